"""The prior with relative positions, compared with a plain implementation."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from unclip.models.published.relative_prior import (
    RelativePrior,
    RelativePriorConfig,
    bucket,
    rotate,
    sinusoids,
)
from unclip.types import TextEncoding

CONFIG = RelativePriorConfig(
    width=24, context_length=30, depth=3, heads=2, head_dim=10, mlp_norm=True
)
VARIANTS = [
    CONFIG,
    replace(CONFIG, num_timesteps=100, similarity="dot", text_null=None, rotary=False, head=False),
    replace(
        CONFIG,
        padding="masked",
        text_null="masked",
        similarity="dot",
        peak_norms="all",
        norm_in=True,
    ),
    replace(CONFIG, norm_out=False, mlp_norm=False, peak_norms="none"),
]


def made(config: RelativePriorConfig) -> RelativePrior:
    torch.manual_seed(0)
    prior = RelativePrior(config).eval().requires_grad_(False)
    for name, parameter in prior.named_parameters():
        if "norm" in name:
            parameter.normal_(1, 0.3)
    for block in prior.blocks:
        block.q.weight *= 3
    return prior


def given(batch: int = 3, length: int = 9) -> tuple[torch.Tensor, torch.Tensor, TextEncoding]:
    torch.manual_seed(1)
    mask = torch.arange(length) < torch.tensor([3, length, 5])[:batch, None]
    text = TextEncoding(torch.randn(batch, 24) * 7, torch.randn(batch, length, 24), mask)
    return torch.randn(batch, 24), torch.tensor([0, 37, 99])[:batch], text


def at_length(prior: RelativePrior, x_t: torch.Tensor, t: int, text: TextEncoding) -> torch.Tensor:
    """Compute the prediction of one row, all tokens at once, query by query."""
    config, N = prior.config, prior.config.context_length
    words = [
        text.states[0, i] if i < text.mask.shape[1] and text.mask[0, i] else None for i in range(N)
    ]
    learned = config.padding == "learned"
    states = [
        prior.no_token[i] if word is None and learned else word for i, word in enumerate(words)
    ]
    null = prior.null_emb if config.text_null == "learned" else None
    emb = F.normalize(text.emb[0], dim=0) if text.mask.any() else null
    tokens = [*states, emb, prior.time(torch.tensor([t]))[0], x_t[0], prior.query]
    seen = [i for i, token in enumerate(tokens) if token is not None]
    x = prior.norm_in(torch.stack([tokens[i] for i in seen]))
    table = prior.bias.weight  # buckets, heads
    for block in prior.blocks:
        h = block.norm1(x)
        q = block.q(h).view(len(seen), config.heads, -1)
        k, v = block.kv(h).chunk(2, dim=-1)
        if config.rotary:
            q, k = turned(q, seen), turned(k[:, None], seen)[:, 0]
        k, v = torch.cat([block.null_kv[:1], k]), torch.cat([block.null_kv[1:], v])
        scale = config.head_dim**-0.5
        if config.similarity == "cosine":
            q, k, scale = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True), 16
        rows = []
        for row, i in enumerate(seen):
            keys = [
                0,
                *(1 + j for j in seen[: row + 1]),
            ]  # the null counts as the key before the first
            biases = torch.stack([table[t5_bucket(i - key)] for key in keys], dim=1)  # heads, keys
            scores = scale * q[row] @ k[: row + 2].T + biases
            rows.append((scores.softmax(dim=-1) @ v[: row + 2]).flatten())
        x = x + block.norm2(block.out(torch.stack(rows)))
        h, gate = block.fc1(block.norm3(x)).chunk(2, dim=-1)
        x = x + block.fc2(block.norm4(h * gate * gate.sigmoid()))
    return prior.head(prior.norm(x[-1:]))


def t5_bucket(distance: int) -> int:
    if distance < 16:
        return max(distance, 0)
    return min(31, 16 + int(math.log(distance / 16) / math.log(128 / 16) * 16))


def turned(x: torch.Tensor, positions: list[int]) -> torch.Tensor:
    """Rotate (n, heads, d) as complex numbers, by exp(i position / 10000^(2i / d))."""
    d = x.shape[-1]
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    angles = torch.tensor(positions)[:, None, None] * 10_000 ** (-torch.arange(0, d, 2) / d)
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


@pytest.mark.parametrize("config", VARIANTS)
def test_prefix_and_steps_equal_the_full_sequence(config):
    prior, (x_t, t, text) = made(config), given()
    together = prior(x_t, t, text)
    alone = torch.cat([at_length(prior, x_t[[i]], int(t[i]), text[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", [VARIANTS[0], VARIANTS[2]])
def test_null_is_a_text_without_tokens(config):
    prior, (x_t, t, text) = made(config), given()
    null = prior.denoise(x_t, t, prior.condition(prior.null_text(1)))
    dropped = prior(x_t, t, text, drop=torch.ones(3, dtype=torch.bool))
    torch.testing.assert_close(null, dropped)
    torch.testing.assert_close(
        null[:1], at_length(prior, x_t[:1], int(t[0]), prior.null_text(1)), atol=1e-5, rtol=1e-5
    )
    assert (null - prior(x_t, t, text)).abs().max() > 0.01  # the text has an effect
    elsewhere = prior.denoise(x_t.flip(0) * 20, t, prior.condition(prior.null_text(1)))
    assert (elsewhere - null).abs().max() > 0.01  # so does x_t: only the text is dropped


def test_prior_without_null_cannot_be_guided():
    prior, (_, _, text) = made(VARIANTS[1]), given()
    for ask in (
        lambda: prior.null_text(1),
        lambda: prior.condition(text, torch.ones(3, dtype=torch.bool)),
    ):
        with pytest.raises(ValueError, match="set guidance to 1"):
            ask()


def test_length_of_embeddings_has_no_effect():
    prior, (x_t, t, text) = made(CONFIG), given()
    longer = TextEncoding(text.emb * 3, text.states, text.mask)
    torch.testing.assert_close(prior(x_t, t, longer), prior(x_t, t, text))
    emb = torch.randn(3, 24) * 9
    assert torch.allclose(prior.normalize(emb).norm(dim=-1), torch.tensor(24.0).sqrt())
    torch.testing.assert_close(prior.denormalize(prior.normalize(emb)), F.normalize(emb, dim=-1))
    prior.emb_norm.fill_(9.5)
    assert torch.allclose(prior.denormalize(torch.randn(4, 24)).norm(dim=-1), torch.tensor(9.5))


def test_context_is_shared_by_images_of_a_text():
    prior, (x_t, t, text) = made(CONFIG), given(2)
    x_t, t = torch.randn(6, 24), torch.full((6,), 7)
    each = prior.denoise(x_t, t, prior.condition(text.repeat_interleave(3)))
    torch.testing.assert_close(prior.denoise(x_t, t, prior.condition(text)), each)


def test_trimming_padding_has_no_effect():
    prior, (x_t, t, text) = made(VARIANTS[2]), given()
    longer = TextEncoding(
        text.emb, F.pad(text.states, (0, 0, 0, 12), value=5.0), F.pad(text.mask, (0, 12))
    )
    torch.testing.assert_close(prior(x_t, t, longer), prior(x_t, t, text))
    longest = TextEncoding(text.emb, F.pad(text.states, (0, 0, 0, 30)), F.pad(text.mask, (0, 30)))
    torch.testing.assert_close(prior(x_t, t, longest), prior(x_t, t, text))
    with pytest.raises(ValueError, match="the text has 31 tokens; this prior takes at most 30"):
        prior.condition(
            TextEncoding(text.emb, torch.randn(3, 31, 24), torch.ones(3, 31, dtype=torch.bool))
        )


def test_buckets_and_rotation():
    distances = torch.arange(-5, 300)
    assert bucket(distances).tolist() == [t5_bucket(int(d)) for d in distances]
    x = torch.randn(4, 2, 40)
    expected = torch.cat([turned(x[..., :32], [3, 0, 7, 99]), x[..., 32:]], dim=-1)
    torch.testing.assert_close(
        rotate(x.transpose(0, 1), torch.tensor([3, 0, 7, 99])).transpose(0, 1), expected
    )


def test_sinusoids_end_at_a_ten_thousandth():
    row = sinusoids(torch.tensor([5.0]), 6)[0]
    angles = torch.tensor([5.0, 0.05, 0.0005])
    torch.testing.assert_close(row, torch.cat([angles.sin(), angles.cos()]))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"depth": 0}, "depth is 0; expected at least 1"),
        ({"width": 3}, "width is 3; time sinusoids need an even number"),
        ({"padding": "masked"}, 'text_null is "learned", which needs padding'),
    ],
)
def test_configuration_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)
