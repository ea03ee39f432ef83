"""The diffusion prior: equal to diffusers'; the cached prefix and padding change nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers import PriorTransformer
from parity import load_from_diffusers, randomize

from unclip.checkpoints.diffusers.names import prior_rules
from unclip.models.layers import TransformerBlock
from unclip.models.unclip.mlp_prior import MLPPrior, MLPPriorConfig
from unclip.models.unclip.prior import DiffusionPrior, KeyValues, PriorConfig
from unclip.types import TextEncoding

CONFIG = PriorConfig(emb_dim=16, text_width=16, context_length=9, width=32, depth=3, heads=4)
LENGTHS = torch.tensor([9, 4, 1])
B, D, L = 3, 16, 9


@pytest.fixture
def prior() -> DiffusionPrior:
    torch.manual_seed(0)
    return randomize(DiffusionPrior(CONFIG)).double()


@pytest.fixture
def text() -> TextEncoding:
    return make_text()


def make_text(dtype: torch.dtype = torch.float64) -> TextEncoding:
    torch.manual_seed(1)
    mask = torch.arange(L) < LENGTHS[:, None]
    return TextEncoding(torch.randn(B, D, dtype=dtype), torch.randn(B, L, 16, dtype=dtype), mask)


def make_noised(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(2)
    return torch.randn(B, D, dtype=dtype), torch.tensor([0, 500, 999])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_equals_diffusers(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    reference = PriorTransformer(
        num_attention_heads=4, attention_head_dim=8, num_layers=3, embedding_dim=D, num_embeddings=L
    )
    reference = randomize(reference).to(dtype)
    prior = DiffusionPrior(PriorConfig(**{**vars(CONFIG), "null_text": "empty_prompt"})).to(dtype)
    load_from_diffusers(prior, reference, prior_rules(CONFIG))
    text, (x_t, t) = make_text(dtype), make_noised(dtype)

    expected = reference(x_t, t, text.emb, text.states, text.mask).predicted_image_embedding
    torch.testing.assert_close(prior(x_t, t, text), expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(
        prior.denormalize(x_t), reference.post_process_latents(x_t), rtol=0, atol=tolerance
    )


def full_sequence(
    prior: DiffusionPrior, x_t: torch.Tensor, t: torch.Tensor, text: TextEncoding
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Compute the prediction and the text's keys without a cache: all L + 4 tokens together."""
    query = prior.query.expand(B, 1, -1)
    tokens = [
        prior.state_proj(text.states),
        prior.emb_proj(text.emb)[:, None],
        prior.time(t)[:, None],
    ]
    x = torch.cat([*tokens, prior.x_proj(x_t)[:, None], query], dim=1) + prior.positions
    causal = torch.ones(L + 4, L + 4, dtype=torch.bool).tril()
    mask = causal & F.pad(text.mask, (0, 4), value=True)[:, None, None]
    keys = []
    for block in prior.blocks:
        q, k, v = block.project(x)
        keys.append(k[:, :, : L + 1])
        x = block(x, q, k, v, mask)
    return prior.head(prior.norm(x[:, -1])), keys


def test_cached_prefix_equals_full_sequence(prior: DiffusionPrior, text: TextEncoding) -> None:
    prefix = prior.condition(text)
    for seed in range(2):  # one prefix for any t and x_t
        torch.manual_seed(seed)
        x_t, t = torch.randn(B, D).double(), torch.randint(0, 1000, (B,))
        expected, keys = full_sequence(prior, x_t, t, text)
        torch.testing.assert_close(prior.denoise(x_t, t, prefix), expected, rtol=0, atol=1e-12)
        for ours, theirs in zip(prefix.k, keys, strict=True):
            seen = prefix.mask[:, None, :, None].expand_as(ours)
            torch.testing.assert_close(ours[seen], theirs[seen], rtol=0, atol=1e-12)


def test_padding_has_no_effect(prior: DiffusionPrior, text: TextEncoding) -> None:
    x_t, t = make_noised()
    expected = prior(x_t, t, text)
    states = torch.where(text.mask[..., None], text.states, 1e3 * torch.randn_like(text.states))
    assert torch.equal(prior(x_t, t, TextEncoding(text.emb, states, text.mask)), expected)
    for i, n in enumerate(LENGTHS):  # without the padding
        alone = TextEncoding(
            text.emb[i : i + 1], text.states[i : i + 1, :n], text.mask[i : i + 1, :n]
        )
        torch.testing.assert_close(
            prior(x_t[i : i + 1], t[i : i + 1], alone), expected[i : i + 1], rtol=0, atol=1e-12
        )


def test_caption_without_tokens_gives_finite_output(
    prior: DiffusionPrior, text: TextEncoding
) -> None:
    empty = TextEncoding(text.emb, text.states, torch.zeros_like(text.mask))
    x_t, t = make_noised()
    assert prior(x_t, t, empty).isfinite().all()
    assert prior.bfloat16()(x_t, t, empty).isfinite().all()


def test_null_changes_only_dropped_rows(prior: DiffusionPrior, text: TextEncoding) -> None:
    x_t, t = make_noised()
    drop = torch.tensor([False, True, False])
    before = prior(x_t, t, text, drop)
    with torch.no_grad():
        prior.null_emb += 1
        prior.null_state += 1
    after = prior(x_t, t, text, drop)
    assert torch.equal(after[~drop], before[~drop])
    assert (after[drop] - before[drop]).abs().min() > 1e-6
    torch.testing.assert_close(after[~drop], prior(x_t, t, text)[~drop], rtol=0, atol=1e-12)
    # The null branch still depends on x_t, and the null as a value is the null as a row.
    assert not torch.allclose(prior(x_t + 1, t, text, drop)[drop], after[drop])
    torch.testing.assert_close(
        prior(x_t, t, prior.null_text(B))[drop], after[drop], rtol=0, atol=1e-12
    )


def test_contexts_support_row_operations(prior: DiffusionPrior, text: TextEncoding) -> None:
    x_t, t = make_noised()
    cond, null = prior.condition(text), prior.condition(prior.null_text(1))
    both = KeyValues.cat([cond, null.repeat_interleave(B)])  # of L + 1 and of 2 tokens
    assert isinstance(both, KeyValues) and len(both) == 2 * B
    out = prior.denoise(x_t.repeat(2, 1), t.repeat(2), both)
    torch.testing.assert_close(out[:B], prior.denoise(x_t, t, cond), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        out[B:], prior.denoise(x_t, t, null), rtol=0, atol=1e-12
    )  # one row for all
    torch.testing.assert_close(
        prior.denoise(x_t[1:], t[1:], cond[1:]), out[1:B], rtol=0, atol=1e-12
    )
    assert torch.equal(cond.repeat_interleave(2).k[0], cond.k[0][torch.tensor([0, 0, 1, 1, 2, 2])])


def test_statistics_scale_the_embeddings(prior: DiffusionPrior) -> None:
    emb = torch.randn(100, D).double() * torch.arange(1, D + 1) + 3
    prior.set_stats(emb.mean(0), emb.std(0))
    x_0 = prior.normalize(emb)
    torch.testing.assert_close(x_0.std(0), torch.ones(D).double())
    torch.testing.assert_close(prior.denormalize(x_0), emb)
    with pytest.raises(ValueError, match="mean has 3 numbers and std 16; expected 16"):
        prior.set_stats(torch.zeros(3), torch.ones(D))
    with pytest.raises(ValueError, match="std has 16 dimensions that are not positive"):
        prior.set_stats(torch.zeros(D), torch.zeros(D))
    with pytest.raises(ValueError, match="mean has 16 dimensions that are not finite"):
        prior.set_stats(torch.full((D,), torch.nan), torch.ones(D))
    with pytest.raises(ValueError, match="std has 16 dimensions that are not positive and finite"):
        prior.set_stats(torch.zeros(D), torch.full((D,), torch.nan))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(prior: DiffusionPrior, text: TextEncoding, dtype: torch.dtype) -> None:
    x_t, t = make_noised()
    expected = prior(x_t, t, text)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05 * expected.abs().max().item()
    out = prior.to(dtype)(x_t, t, text)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = prior.float()(x_t, t, text)
    torch.testing.assert_close(
        autocast.double(), expected, rtol=0, atol=0.05 * expected.abs().max().item()
    )


def test_untrained_prior_predicts_the_mean_and_can_learn() -> None:
    torch.manual_seed(0)
    prior, text, (x_t, t) = (
        DiffusionPrior(CONFIG),
        make_text(torch.float32),
        make_noised(torch.float32),
    )
    assert prior(x_t, t, text).abs().max() == 0
    target, optimizer = torch.randn(B, D), torch.optim.Adam(prior.parameters(), lr=3e-3)
    for _ in range(60):
        loss = F.mse_loss(prior(x_t, t, text, torch.tensor([True, False, False])), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    assert all(p.grad is not None for p in prior.parameters())


def test_invalid_input_raises(prior: DiffusionPrior, text: TextEncoding) -> None:
    with pytest.raises(ValueError, match="width is 30; expected a multiple of heads = 4"):
        PriorConfig(emb_dim=16, text_width=16, context_length=9, width=30, depth=3, heads=4)
    with pytest.raises(ValueError, match="the text has 18 tokens; this prior takes at most 9"):
        prior.condition(TextEncoding(text.emb, text.states.repeat(1, 2, 1), text.mask.repeat(1, 2)))
    karlo = DiffusionPrior(PriorConfig(**{**vars(CONFIG), "null_text": "empty_prompt"}))
    with pytest.raises(ValueError, match="no learned null"):
        karlo.condition(text, torch.tensor([True, False, False]))


def test_karlo_size() -> None:
    config = PriorConfig(768, 768, 77, width=2048, depth=20, heads=32, null_text="empty_prompt")
    with torch.device("meta"):
        prior = DiffusionPrior(config)
    # diffusers counts the statistics among the parameters
    parameters = sum(p.numel() for p in prior.parameters())
    assert parameters + prior.emb_mean.numel() + prior.emb_std.numel() == 1_022_030_080


@pytest.mark.parametrize("kind", [DiffusionPrior, MLPPrior])
def test_gradient_checkpointing_keeps_gradients(kind: type, text: TextEncoding) -> None:
    torch.manual_seed(0)
    options = {**vars(CONFIG), "dropout": 0.1}
    config = PriorConfig(**options)
    if kind is MLPPrior:
        config = MLPPriorConfig(**options, kind="mlp", mlp_width=16, mlp_depth=1)
    prior, (x_t, t) = randomize(kind(config)).double(), make_noised()
    gradients, saved = [], []
    for prior.gradient_checkpointing in (False, True):
        saved.append(0)

        def count(x: torch.Tensor) -> torch.Tensor:
            saved[-1] += x.nbytes
            return x

        torch.manual_seed(3)  # of the dropout
        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            loss = prior(x_t, t, text).square().mean()
        gradients.append(torch.autograd.grad(loss, trained(prior)))
    assert saved[1] < 0.6 * saved[0]
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=0, atol=1e-12)


def trained(prior: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Return the parameters that the output without dropped captions depends on."""
    return [p for name, p in prior.named_parameters() if not name.startswith("null_")]


def test_attention_to_a_shared_prefix_does_not_overflow_in_fp16():
    torch.manual_seed(0)
    block = TransformerBlock(64, 1).eval()
    block.qkv.weight.data[:64] *= 300  # q k^T is about 1e5, but 1e4 divided by sqrt(d)
    x, visible = torch.randn(4, 3, 64), torch.ones(2, 5, dtype=torch.bool)
    k, v = 60 * torch.randn(2, 1, 5, 64), torch.randn(2, 1, 5, 64)
    with torch.no_grad():
        output = block.half().extend(x.half(), k.half(), v.half(), visible)
        expected = block.float().extend(x, k, v, visible)
    torch.testing.assert_close(output.float(), expected, atol=2e-2, rtol=2e-2)
