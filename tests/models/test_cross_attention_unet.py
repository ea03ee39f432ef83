"""U-Net with cross-attention, compared with formulas. See also test_dalle2_pytorch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from unclip.models.published.cross_attention_decoder import (
    CrossAttentionDecoder,
    CrossAttentionDecoderConfig,
    CrossAttentionUpsampler,
    CrossAttentionUpsamplerConfig,
    TokenContext,
)
from unclip.models.published.cross_attention_unet import (
    CrossAttentionUNet,
    CrossAttentionUNetConfig,
    CrossLevel,
    LinearAttention,
    PixelAttention,
    TokenAttention,
)
from unclip.types import TextEncoding

LEVELS = (CrossLevel(8, blocks=1, attention="linear"), CrossLevel(16, blocks=2, attention="full"))
CONFIG = CrossAttentionUNetConfig(3, 6, 8, LEVELS, token_dim=12, heads=3, head_dim=5)
DECODER = CrossAttentionDecoderConfig(
    CONFIG, 8, emb_dim=10, text_width=14, text_slots=9, learned_variance=True
)
UPSAMPLING = replace(CONFIG, in_channels=6, out_channels=3, head_sees=3)
VARIANTS = [
    CONFIG,
    replace(
        CONFIG, shrink_first=True, down="conv", up="transposed", unit_values=False, peak_norms=True
    ),
    replace(
        CONFIG,
        up="nearest",
        pixel_similarity="cosine",
        token_similarity="cosine",
        stem=(7,),
        skip_scale=0.7,
    ),
]


def init(module: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        parameter.data.normal_(0.5 if parameter.ndim == 1 else 0, 0.3)
    return module.eval().requires_grad_(False)


def make_inputs(
    batch: int = 2, length: int = 5
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, TextEncoding]:
    torch.manual_seed(1)
    mask = torch.arange(length) < torch.tensor([3, length])[:batch, None]
    text = TextEncoding(torch.randn(batch, 10), torch.randn(batch, length, 14), mask)
    return (
        torch.randn(batch, 3, 8, 8),
        torch.tensor([3, 700])[:batch],
        torch.randn(batch, 10) * 4,
        text,
    )


def norm(x: torch.Tensor, weight: torch.Tensor, peak: bool = False) -> torch.Tensor:
    x = x / x.max() if peak else x
    return (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt() * weight


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("peak", [False, True])
def test_attention_matches_reference_formula(cosine, peak):
    similarity = "cosine" if cosine else "dot"
    config = replace(
        CONFIG,
        pixel_similarity=similarity,
        token_similarity=similarity,
        pixel_scale=0.2,
        peak_norms=peak,
    )
    x, tokens = torch.randn(1, 6, 8), torch.randn(1, 4, 12)
    pixel_attention, token_attention = (
        init(PixelAttention(8, config)),
        init(TokenAttention(8, config)),
    )

    def attend_pixel(module, pixel, keys, values, heads, scale):
        q = module.q(norm(pixel, module.norm1.weight, peak)).view(heads, -1)
        outputs = []
        for h in range(heads):
            pairs = zip(module.null_kv, (keys[h % len(keys)], values[h % len(values)]), strict=True)
            k, v = (torch.cat([null[None], y]) for null, y in pairs)
            scores = F.cosine_similarity(q[h][None], k, dim=-1) * 16 if cosine else k @ q[h] * scale
            outputs.append(scores.softmax(dim=0) @ v)
        return pixel + norm(module.out(torch.cat(outputs)), module.norm2.weight, peak)

    normed = torch.stack([norm(pixel, pixel_attention.norm1.weight, peak) for pixel in x[0]])
    kv = pixel_attention.kv(normed).chunk(2, dim=-1)
    rows = [
        attend_pixel(pixel_attention, pixel, kv[0][None], kv[1][None], 3, 0.2) for pixel in x[0]
    ]
    torch.testing.assert_close(pixel_attention(x)[0], torch.stack(rows), atol=1e-5, rtol=1e-5)

    k, v = token_attention.kv(tokens)[0].view(4, 2, 8, 64).permute(1, 2, 0, 3)
    rows = [attend_pixel(token_attention, pixel, k, v, 8, 64**-0.5) for pixel in x[0]]
    torch.testing.assert_close(
        token_attention(x, tokens)[0], torch.stack(rows), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("unit_values", [True, False])
def test_linear_attention_matches_reference_formula(unit_values):
    module, x = (
        init(LinearAttention(8, replace(CONFIG, unit_values=unit_values))),
        torch.randn(1, 6, 8),
    )
    normed = torch.stack([norm(pixel, module.norm1.weight) for pixel in x[0]])
    q, k, v = module.qkv(normed).view(6, 3, 3, 5).permute(1, 2, 0, 3)  # heads, pixels, 5
    v = v / v.norm(dim=-1, keepdim=True) / 6 if unit_values else v
    weights = torch.einsum("hsd,htd->hst", q.softmax(dim=-1) * 5**-0.5, k.softmax(dim=1))
    h = F.gelu((weights @ v).transpose(0, 1).flatten(1))
    expected = [
        pixel + norm(module.out(row), module.norm2.weight)
        for pixel, row in zip(x[0], h, strict=True)
    ]
    torch.testing.assert_close(module(x)[0], torch.stack(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", VARIANTS)
def test_all_parameters_have_gradients(config):
    decoder = init(CrossAttentionDecoder(replace(DECODER, unet=config))).requires_grad_(True)
    x_t, t, emb, text = make_inputs()
    drop = torch.tensor([True, False])
    out = decoder(x_t, t, emb, text, drop_image=drop, drop_text=~drop)
    assert out.shape == (2, 6, 8, 8)
    (out * torch.randn_like(out)).sum().backward()
    assert [
        name for name, p in decoder.named_parameters() if p.grad is None or not p.grad.any()
    ] == []


def test_decoder_conditioning():
    decoder = init(CrossAttentionDecoder(DECODER))
    x_t, t, emb, text = make_inputs()
    plain, drop = decoder(x_t, t, emb, text), torch.ones(2, dtype=torch.bool)
    torch.testing.assert_close(decoder(x_t, t, emb * 7, text), plain)  # embeddings are normalised
    repadded = TextEncoding(
        text.emb, torch.where(text.mask[..., None], text.states, 9.0), text.mask
    )
    torch.testing.assert_close(decoder(x_t, t, emb, repadded), plain)  # padding has no effect
    unconditional = decoder(x_t, t, emb, text, drop, drop)
    other = decoder(
        x_t,
        t,
        emb.flip(0) * 2,
        TextEncoding(text.emb, text.states + 1, text.mask),
        drop,
        drop,
    )
    torch.testing.assert_close(unconditional, other)
    assert (unconditional - plain).abs().max() > 0.01
    with pytest.raises(ValueError, match="the text has 10 tokens; this decoder takes at most 9"):
        decoder.condition(
            emb, TextEncoding(text.emb, torch.randn(2, 10, 14), torch.ones(2, 10, dtype=torch.bool))
        )


def test_contexts_support_row_operations():
    decoder = init(CrossAttentionDecoder(DECODER))
    x_t, t, emb, text = make_inputs()
    both = decoder.condition(emb, text)
    single = [decoder.condition(emb[[i]], text[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(
        decoder.denoise(x_t, t, TokenContext.cat(single)), decoder.denoise(x_t, t, both)
    )
    assert len(both) == 2 and len(both[:1]) == 1 and len(both.repeat_interleave(3)) == 6
    repeated = decoder.denoise(
        x_t.repeat_interleave(3, 0), t.repeat_interleave(3), both.repeat_interleave(3)
    )
    torch.testing.assert_close(repeated[::3], decoder.denoise(x_t, t, both))


def test_decoder_without_text():
    decoder = init(CrossAttentionDecoder(replace(DECODER, text_width=None)))
    x_t, t, emb, text = make_inputs()
    blank = TextEncoding(text.emb * 0, text.states * 0, text.mask)
    assert torch.equal(decoder(x_t, t, emb, text), decoder(x_t, t, emb, blank))
    context = decoder.condition(emb, text)
    assert context.text_tokens is None and TokenContext.cat([context, context]).text_tokens is None


def test_upsampler_enlarges_by_nearest_neighbour():
    upsampler = init(
        CrossAttentionUpsampler(CrossAttentionUpsamplerConfig(UPSAMPLING, low_size=4, high_size=8))
    )
    x_t, t, *_ = make_inputs()
    low = torch.randn(2, 3, 4, 4)
    large = upsampler.condition(low)
    assert torch.equal(large[:, :, ::2, ::2], low) and torch.equal(large[:, :, 1::2, 1::2], low)
    assert torch.equal(upsampler.denoise(x_t, t, low), upsampler.denoise(x_t, t, large))
    assert upsampler.denoise(x_t, t, low).shape == (2, 3, 8, 8)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: replace(CONFIG, levels=()), r"levels is \(\)"),
        (lambda: replace(CONFIG, stem=(3, 4)), r"stem is \(3, 4\); expected odd kernel sizes"),
        (lambda: CrossLevel(12), "channels is 12; expected a multiple of groups = 8"),
        (lambda: replace(DECODER, image_size=9), "image_size is 9; expected a multiple of .* 2"),
        (lambda: replace(DECODER, learned_variance=False), "unet has 3 channels in and 6 out"),
        (
            lambda: CrossAttentionUpsamplerConfig(UPSAMPLING, 3, 8),
            "high_size is 8; expected a multiple of low_size = 3",
        ),
        (
            lambda: CrossAttentionUNet(CONFIG)(torch.zeros(1, 3, 7, 8), torch.zeros(1)),
            "the image is 7 x 8",
        ),
    ],
)
def test_invalid_input_raises(make, message):
    with pytest.raises(ValueError, match=message):
        make()
