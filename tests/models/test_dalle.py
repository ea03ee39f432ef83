"""DALL-E's transformer: causality, caching and the null text."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from unclip.checkpoints.store import load_component, save_component
from unclip.models.dalle.attention import stream_mask
from unclip.models.dalle.layers import LayerSpec
from unclip.models.dalle.transformer import DALLE, DALLEConfig, DALLEPrefix

B, L, V, K, GRID = 3, 5, 20, 11, (4, 5)
N = GRID[0] * GRID[1]
CONFIG = DALLEConfig(V, L, K, GRID, width=24, depth=5, heads=2, head_dim=8, kernel=3)
KINDS = ("full", "row", "column", "conv", "own_row", "corner")
DALLE_PYTORCH_LAYER = LayerSpec(mlp="geglu", qkv_bias=False, gain=0.5, sandwich=True, shift=True)
VARIANTS = {
    "layer": {"layer": DALLE_PYTORCH_LAYER},
    "rotary": {"positions": "rotary", "head_dim": 13},  # heads narrower than the width
    "reversible": {"reversible": True},
    "all": {"layer": DALLE_PYTORCH_LAYER, "positions": "rotary", "reversible": True},
}


def make(config: DALLEConfig = CONFIG) -> DALLE:
    """Random weights, large enough for every input to affect the output."""
    torch.manual_seed(0)
    dalle = DALLE(config).eval()
    for p in dalle.parameters():
        nn.init.normal_(p, std=0.3 if p.ndim > 1 else 0.5)
    return dalle


def uniform_config(kind: str, **changes: object) -> DALLEConfig:
    return replace(CONFIG, attention=(kind,), last_attention=None, **changes)


@pytest.fixture
def stream() -> tuple[torch.Tensor, torch.Tensor]:
    """Text tokens and codes."""
    torch.manual_seed(1)
    return torch.randint(0, V + L, (B, L)), torch.randint(0, K, (B, N))


def test_attention_patterns_of_the_paper():
    kinds = [pattern.kind for pattern in replace(CONFIG, depth=10).patterns]
    assert kinds == ["row", "column", "row", "row", "row", "column", "row", "row", "row", "conv"]


def reference_logits(dalle: DALLE, tokens: list[int], codes: list[int]) -> torch.Tensor:
    """Logits of each code, (N, K), computed position by position and head by head (B.1)."""
    state, (_, w), T = dalle.state_dict(), GRID, L + 1
    stream = [state["start"], *state["text_emb.weight"][tokens]]
    stream = [x + state["text_positions.weight"][p] for p, x in enumerate(stream)]
    for n, code in enumerate(codes[:-1]):
        position = state["rows.weight"][n // w] + state["columns.weight"][n % w]
        stream.append(state["code_emb.weight"][code] + position)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return state[f"{name}.weight"] @ x + state[f"{name}.bias"]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        z = (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()
        return z * state[f"{name}.weight"] + state[f"{name}.bias"]

    def visible(kind: str, q: int) -> list[int]:
        if q < T:
            return list(range(q + 1))
        n = q - T
        offsets = {
            "row": range(w + 1),
            "column": range(0, n + 1, w),
            # kernel size 3
            "conv": sorted({r * w + c for r in range(2) for c in (-1, 0, 1)} - {-1}),
        }
        return [*range(T), *(T + n - offset for offset in offsets[kind] if offset <= n)]

    for i, kind in enumerate(["row", "column", "row", "row", "conv"]):
        qkv = [
            linear(norm(x, f"layers.{i}.norm1"), f"layers.{i}.qkv").view(3, 2, 8) for x in stream
        ]
        for p in range(len(stream)):
            heads = []
            for head in range(2):
                keys, values = (
                    torch.stack([qkv[k][part, head] for k in visible(kind, p)]) for part in (1, 2)
                )
                heads.append((keys @ qkv[p][0, head] / 8**0.5).softmax(0) @ values)
            stream[p] = stream[p] + linear(torch.cat(heads), f"layers.{i}.out")
        for p, x in enumerate(stream):
            stream[p] = x + linear(
                F.gelu(linear(norm(x, f"layers.{i}.norm2"), f"layers.{i}.fc1")), f"layers.{i}.fc2"
            )
    return torch.stack([linear(norm(x, "norm"), "code_head") for x in stream[L:]])


def test_matches_reference_implementation(stream):
    dalle, (tokens, codes) = make().double(), stream
    with torch.no_grad():
        expected = reference_logits(dalle, tokens[0].tolist(), codes[0].tolist())
        torch.testing.assert_close(
            dalle(tokens[:1], codes[:1]).codes[0], expected, rtol=0, atol=1e-12
        )


@pytest.mark.parametrize("kind", KINDS)
def test_attention_is_causal(kind):
    """The gradient footprint of one layer is its mask; that of several is causal."""
    inputs: list[torch.Tensor] = []

    def keep(_: nn.Module, args: tuple) -> tuple:
        inputs[:] = [args[0].detach().requires_grad_()]
        return (*inputs, *args[1:])

    for depth in (1, 3):
        dalle = make(uniform_config(kind, depth=depth)).double()
        dalle.layers[0].register_forward_pre_hook(keep)
        logits = dalle(torch.randint(0, V, (1, L)), torch.randint(0, K, (1, N)))
        outputs = [*logits.text[0], *logits.codes[0]]
        for position, output in enumerate(outputs):
            (grad,) = torch.autograd.grad(output.square().sum(), inputs[0], retain_graph=True)
            footprint = grad[0].abs().sum(-1) > 0  # L + N
            assert not footprint[position + 1 :].any()
            if depth == 1:
                assert torch.equal(
                    footprint, stream_mask(dalle.patterns[0], L + 1)[position, : L + N]
                )


@pytest.mark.parametrize("kind", [*KINDS, "paper"])
@pytest.mark.parametrize("given", [0, 1, 8, N - 1])
@pytest.mark.parametrize("static_shapes", [False, True])
def test_cached_logits_equal_uncached(kind, given, static_shapes, stream):
    dalle, (tokens, codes) = make(CONFIG if kind == "paper" else uniform_config(kind)), stream
    with torch.no_grad():
        expected = dalle(tokens, codes).codes
        prefix = dalle.condition(tokens)
        cache, logits = dalle.start_cache(prefix), prefix.logits
        torch.testing.assert_close(logits, expected[:, 0], rtol=0, atol=1e-5)
        if given:
            logits = dalle.extend(codes[:, :given], cache)
            torch.testing.assert_close(logits, expected[:, given], rtol=0, atol=1e-5)
        for n in range(given, N - 1):
            logits = dalle.step(codes[:, n], torch.tensor(n) if static_shapes else n, cache)
            torch.testing.assert_close(logits, expected[:, n + 1], rtol=0, atol=1e-5)


def test_prefix_is_shared_by_images_and_guidance_branches(stream):
    dalle, (tokens, codes) = make(), stream
    null = dalle.null_tokens(1)
    with torch.no_grad():
        rows = DALLEPrefix.cat(
            [
                dalle.condition(tokens).repeat_interleave(2),
                dalle.condition(null).repeat_interleave(2 * B),
            ]
        )
        images = codes.repeat_interleave(2, dim=0).repeat(2, 1)
        expected = dalle(
            torch.cat([tokens.repeat_interleave(2, dim=0), null.expand(2 * B, -1)]), images
        ).codes
        cache = dalle.start_cache(rows)
        for n in range(N - 1):
            logits = dalle.step(images[:, n], n, cache)
            torch.testing.assert_close(logits, expected[:, n + 1], rtol=0, atol=1e-5)
    assert len(rows[:4]) == 4
    assert torch.equal(rows[torch.tensor([0, 2])].logits, rows.logits[[0, 2]])


def test_padding_tokens_depend_on_position(stream):
    dalle = make()
    ids, mask = (
        torch.tensor([[3, 4, 0, 0, 0], [5, 0, 7, 8, 9]]),
        torch.tensor([[1, 1, 0, 0, 0], [1] * 5]).bool(),
    )
    assert dalle.tokens(ids, mask).tolist() == [[3, 4, V + 2, V + 3, V + 4], [5, 0, 7, 8, 9]]
    dropped = dalle.tokens(ids, mask, torch.tensor([False, True]))
    assert torch.equal(dropped[1:], dalle.null_tokens(1))
    assert torch.equal(dropped[:1], dalle.tokens(ids, mask)[:1])
    assert torch.equal(dalle.tokens(ids, torch.zeros_like(mask)), dalle.null_tokens(2))


def test_padding_embeddings_affect_only_the_null_text(stream):
    dalle, (_, codes) = make(), stream
    tokens = torch.randint(0, V, (B, L))
    tokens[1] = dalle.null_tokens(1)
    before = dalle(tokens, codes)
    with torch.no_grad():
        dalle.text_emb.weight[V:] *= -1
    after = dalle(tokens, codes)
    rows = torch.tensor([0, 2])
    assert torch.equal(after.codes[rows], before.codes[rows])
    assert torch.equal(after.text[rows], before.text[rows])
    assert (after.codes[1] - before.codes[1]).abs().amax(-1).min() > 1e-4


def test_heads_equal_one_masked_softmax(stream):
    """Logits over text and codes, with the other kind masked, give the same likelihoods."""
    dalle, (tokens, codes) = make().double(), stream
    logits = dalle(tokens, codes)
    joint = torch.full((B, L + N, V + L + K), -torch.inf).double()
    joint[:, :L, : V + L], joint[:, L:, V + L :] = logits
    p = joint.log_softmax(-1).gather(-1, torch.cat([tokens, codes + V + L], dim=1)[..., None])[
        ..., 0
    ]
    text, image = dalle.log_likelihood(tokens, codes.view(B, *GRID))
    torch.testing.assert_close(text, p[:, :L].float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(image, p[:, L:].float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("given", [0, 3, 12])
def test_cached_logits_of_variants_equal_uncached(variant, given, stream):
    dalle, (tokens, codes) = make(replace(CONFIG, **VARIANTS[variant])), stream
    with torch.no_grad():
        expected = dalle(tokens, codes).codes
        prefix = dalle.condition(tokens)
        cache, logits = dalle.start_cache(prefix), [prefix.logits]
        if given:
            logits = [dalle.extend(codes[:, :given], cache)]
        logits += [dalle.step(codes[:, n], n, cache) for n in range(given, N - 1)]
    torch.testing.assert_close(torch.stack(logits, dim=1), expected[:, given:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_are_causal(variant, stream):
    dalle, (tokens, codes) = make(replace(CONFIG, **VARIANTS[variant])), stream
    before, changed = dalle(tokens, codes), codes.clone()
    changed[:, 11] = (changed[:, 11] + 1) % K
    after = dalle(tokens, changed)
    assert torch.equal(after.text, before.text)
    assert torch.equal(after.codes[:, :12], before.codes[:, :12])
    assert (after.codes[:, 12] != before.codes[:, 12]).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_logits_in_other_dtypes(dtype, stream):
    dalle, (tokens, codes) = make(), stream
    with torch.no_grad():
        expected = dalle(tokens, codes).codes
        dalle.to(dtype)
        uncached = dalle(tokens, codes).codes
        cache = dalle.start_cache(dalle.condition(tokens))
        steps = [dalle.step(codes[:, n], n, cache) for n in range(N - 1)]
    assert uncached.dtype == steps[0].dtype == cache.layers[0].window.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float64 else 0.1 * expected.abs().max().item()
    torch.testing.assert_close(uncached.float(), expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(
        torch.stack(steps, dim=1).float(), expected[:, 1:], rtol=0, atol=tolerance
    )


@pytest.mark.parametrize("reversible", [False, True])
def test_gradient_checkpointing_saves_memory_and_keeps_gradients(stream, reversible):
    tokens, codes = stream

    def step(checkpointing: bool) -> tuple[int, list[torch.Tensor]]:
        """Return the bytes that are kept for the backward pass, and the gradients."""
        dalle, kept = make(replace(CONFIG, reversible=reversible)).train(), []
        dalle.gradient_checkpointing = checkpointing
        keep = torch.autograd.graph.saved_tensors_hooks
        with keep(lambda x: kept.append(x.nbytes) or x, lambda x: x):
            logits = dalle(tokens, codes)
        F.cross_entropy(logits.codes.flatten(0, 1), codes.flatten()).backward()
        return sum(kept), [p.grad for p in dalle.parameters() if p.grad is not None]

    (whole, gradients), (less, checkpointed) = step(False), step(True)
    assert less < 0.5 * whole
    for plain, recomputed in zip(gradients, checkpointed, strict=True):
        torch.testing.assert_close(recomputed, plain)


def test_training_from_near_uniform_predictions(stream):
    torch.manual_seed(0)
    dalle, (tokens, codes) = DALLE(CONFIG), stream
    text, image = dalle.log_likelihood(tokens, codes)
    assert (image + torch.tensor(K).log()).abs().max() < 1
    assert (text + torch.tensor(V + L).log()).abs().max() < 1
    optimizer = torch.optim.Adam(dalle.parameters(), lr=1e-2)
    for _ in range(60):
        loss = -sum(terms.mean() for terms in dalle.log_likelihood(tokens, codes))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5 and all(p.grad is not None for p in dalle.parameters())


def test_save_and_load(tmp_path, stream):
    dalle, (tokens, codes) = make(replace(CONFIG, **VARIANTS["all"])), stream
    save_component(dalle, tmp_path)
    again = load_component(tmp_path)
    assert again.config == dalle.config
    assert torch.equal(again(tokens, codes).codes, dalle(tokens, codes).codes)


def test_invalid_input_raises():
    with pytest.raises(ValueError, match="kernel is 4; expected an odd number"):
        replace(CONFIG, kernel=4)
    with pytest.raises(ValueError, match="width is 22; expected a multiple of shifted_parts = 4"):
        replace(CONFIG, width=22, layer=LayerSpec(shift=True))
    with pytest.raises(ValueError, match=r"attention is \(\); expected a length of at least 1"):
        replace(CONFIG, attention=())
    with pytest.raises(ValueError, match="depth is 0; expected at least 1"):
        replace(CONFIG, depth=0)
    with pytest.raises(
        ValueError,
        match="the codec has 11 codes on a grid of 8 x 8; the transformer expects 11 on 4 x 5",
    ):
        CONFIG.check_codec(11, (8, 8))
    CONFIG.check_codec(11, (4, 5))
    dalle = make()
    with pytest.raises(
        ValueError, match=r"text ids are of shape \(1, 7\); this transformer expects \(B, 5\)"
    ):
        dalle.tokens(torch.zeros(1, 7).long(), torch.ones(1, 7).bool())
    with pytest.raises(ValueError, match="text ids are 0 to 20; this transformer expects 0 to 19"):
        dalle.tokens(torch.tensor([[0, 1, 2, 3, 20]]), torch.ones(1, 5).bool())
    with pytest.raises(ValueError, match="an image has 12 codes; this transformer expects 20"):
        dalle(dalle.null_tokens(1), torch.zeros(1, 12).long())
