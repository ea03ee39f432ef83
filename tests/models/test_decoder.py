"""The decoder: equal to diffusers' in Karlo's configuration; nulls and padding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from parity import load_from_diffusers, randomize

from unclip.checkpoints.diffusers.names import text_proj_rules, unet_rules
from unclip.models.unclip.decoder import (
    ClipStates,
    Decoder,
    DecoderConfig,
    DecoderContext,
    TextTransformer,
)
from unclip.models.unet import LevelSpec, UNetConfig
from unclip.types import TextEncoding

B, L, D, W, SIZE = 3, 6, 16, 24, 8
LENGTHS = torch.tensor([6, 3, 1])
UNET = UNetConfig(
    3, 3, (LevelSpec(16, 1), LevelSpec(32, 1, attention=True)), head_dim=8, groups=8, context_dim=20
)
CONFIG = DecoderConfig(UNET, SIZE, emb_dim=D, text_width=W)
OWN_TEXT = TextTransformer(vocab_size=50, context_length=L, width=12, depth=2, heads=3)
TEXTS = pytest.mark.parametrize("text_kind", [ClipStates(), OWN_TEXT], ids=lambda kind: kind.kind)


def make(text_kind: ClipStates | TextTransformer) -> Decoder:
    torch.manual_seed(0)
    return randomize(Decoder(replace(CONFIG, text=text_kind))).double()


def make_text(width: int = W, dtype: torch.dtype = torch.float64) -> TextEncoding:
    torch.manual_seed(1)
    mask = torch.arange(L) < LENGTHS[:, None]
    ids = torch.randint(50, (B, L))
    return TextEncoding(
        torch.randn(B, D, dtype=dtype), torch.randn(B, L, width, dtype=dtype), mask, ids
    )


def make_rest(
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(2)
    x_t, image_emb = torch.randn(B, 3, SIZE, SIZE, dtype=dtype), torch.randn(B, D, dtype=dtype)
    return x_t, torch.tensor([0, 500, 999]), image_emb


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_equals_diffusers(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    attended = ("SimpleCrossAttnDownBlock2D",) * 2
    reference = UNet2DConditionModel(
        sample_size=SIZE,
        in_channels=3,
        out_channels=6,
        layers_per_block=3,
        block_out_channels=(32, 64, 64),
        down_block_types=("ResnetDownsampleBlock2D", *attended),
        up_block_types=("SimpleCrossAttnUpBlock2D",) * 2 + ("ResnetUpsampleBlock2D",),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        cross_attention_dim=20,
        class_embed_type="identity",
        attention_head_dim=16,
        resnet_time_scale_shift="scale_shift",
    )
    text_proj = UnCLIPTextProjModel(
        clip_embeddings_dim=D, time_embed_dim=128, cross_attention_dim=20
    )
    reference, text_proj = randomize(reference, 0.03).to(dtype), randomize(text_proj).to(dtype)

    levels = (LevelSpec(32, 3), LevelSpec(64, 3, attention=True), LevelSpec(64, 3, attention=True))
    unet = UNetConfig(3, 6, levels, head_dim=16, context_dim=20)
    decoder = Decoder(
        DecoderConfig(unet, SIZE, D, D, null_text="empty_prompt", learned_variance=True)
    ).to(dtype)
    load_from_diffusers(decoder.unet, reference, unet_rules(unet))
    load_from_diffusers(decoder, text_proj, text_proj_rules(), except_for="unet")

    text, (x_t, t, image_emb) = make_text(D, dtype), make_rest(dtype)
    drop_image = torch.tensor([True] * B + [False] * B)  # diffusers' order: [null; cond]
    ours = decoder(
        x_t.repeat(2, 1, 1, 1),
        t.repeat(2),
        image_emb.repeat(2, 1),
        text[torch.arange(B).repeat(2)],
        drop_image,
    )
    states, time_shift = text_proj(
        image_embeddings=image_emb,
        prompt_embeds=text.emb.repeat(2, 1),
        text_encoder_hidden_states=text.states.repeat(2, 1, 1),
        do_classifier_free_guidance=True,
    )
    mask = torch.nn.functional.pad(text.mask, (4, 0), value=True).repeat(2, 1)
    theirs = reference(
        x_t.repeat(2, 1, 1, 1), t.repeat(2), states, time_shift, attention_mask=mask
    ).sample
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


@TEXTS
def test_nulls_change_only_dropped_rows(text_kind: ClipStates | TextTransformer) -> None:
    decoder, text, (x_t, t, image_emb) = make(text_kind), make_text(), make_rest()
    drop_image, drop_text = torch.tensor([True, False, False]), torch.tensor([True, True, False])
    before = decoder(x_t, t, image_emb, text, drop_image, drop_text)
    torch.testing.assert_close(before[2], decoder(x_t, t, image_emb, text)[2], rtol=0, atol=1e-12)

    with torch.no_grad():
        decoder.text.null_text_state += torch.randn(len(decoder.text.null_text_state))
    after = decoder(x_t, t, image_emb, text, drop_image, drop_text)
    assert torch.equal(after[2], before[2])
    assert not torch.isclose(after[:2], before[:2]).all(dim=(1, 2, 3)).any()

    with torch.no_grad():
        decoder.null_image += 1
    again = decoder(x_t, t, image_emb, text, drop_image, drop_text)
    assert torch.equal(again[1:], after[1:])
    assert not torch.allclose(again[0], after[0])


@TEXTS
def test_dropped_caption_has_no_effect(text_kind: ClipStates | TextTransformer) -> None:
    decoder, text, (x_t, t, image_emb) = make(text_kind), make_text(), make_rest()
    everything = torch.ones(B, dtype=torch.bool)
    other = text[torch.tensor([2, 0, 1])]
    null = decoder(x_t, t, image_emb, text, everything, everything)
    assert torch.equal(decoder(x_t, t, image_emb + 1, other, everything, everything), null)


@TEXTS
def test_padding_has_no_effect(text_kind: ClipStates | TextTransformer) -> None:
    decoder, text, (x_t, t, image_emb) = make(text_kind), make_text(), make_rest()
    expected = decoder(x_t, t, image_emb, text)
    states = torch.where(text.mask[..., None], text.states, 1e3)
    ids = torch.where(text.mask, text.ids, (text.ids + 1) % 50)
    torch.testing.assert_close(
        decoder(x_t, t, image_emb, TextEncoding(text.emb, states, text.mask, ids)),
        expected,
        rtol=0,
        atol=1e-12,
    )
    for i, n in enumerate(LENGTHS):  # without the padding
        row = text[i : i + 1]
        alone = TextEncoding(row.emb, row.states[:, :n], row.mask[:, :n], row.ids[:, :n])
        out = decoder(x_t[i : i + 1], t[i : i + 1], image_emb[i : i + 1], alone)
        torch.testing.assert_close(out, expected[i : i + 1], rtol=0, atol=1e-12)


def test_caption_changes_time_embedding_and_attention() -> None:
    text, (_, _, image_emb) = make_text(), make_rest()
    decoder = make(ClipStates())
    before = decoder.condition(image_emb, text)
    after = decoder.condition(image_emb, TextEncoding(text.emb + 1, text.states, text.mask))
    assert not torch.allclose(after.time_shift, before.time_shift)
    assert torch.equal(after.kv.k[0], before.kv.k[0])
    decoder = Decoder(replace(CONFIG, text_emb_in_time=False)).double()
    assert "text.null_text_emb" not in decoder.state_dict()
    assert torch.equal(
        decoder.condition(image_emb, text).time_shift,
        decoder.condition(image_emb, TextEncoding(text.emb + 1, text.states, text.mask)).time_shift,
    )


def test_contexts_support_row_operations() -> None:
    decoder, text, (x_t, t, image_emb) = make(ClipStates()), make_text(), make_rest()
    cond = decoder.condition(image_emb, text)
    short = TextEncoding(text.emb, text.states[:, :2], text.mask[:, :2])
    null = decoder.condition(
        image_emb, short, torch.ones(B, dtype=torch.bool), torch.ones(B, dtype=torch.bool)
    )
    both = DecoderContext.cat([cond, null])
    assert len(both) == 2 * B
    out = decoder.denoise(x_t.repeat(2, 1, 1, 1), t.repeat(2), both)
    torch.testing.assert_close(out[:B], decoder.denoise(x_t, t, cond), rtol=0, atol=1e-12)
    torch.testing.assert_close(out[B:], decoder.denoise(x_t, t, null), rtol=0, atol=1e-12)
    twice = decoder.denoise(
        x_t.repeat_interleave(2, 0), t.repeat_interleave(2), cond.repeat_interleave(2)
    )
    torch.testing.assert_close(twice[::2], out[:B], rtol=0, atol=1e-12)
    torch.testing.assert_close(
        decoder.denoise(x_t[1:], t[1:], cond[1:]), out[1:B], rtol=0, atol=1e-12
    )


@TEXTS
def test_all_parameters_have_gradients(text_kind: ClipStates | TextTransformer) -> None:
    decoder, text, (x_t, t, image_emb) = make(text_kind), make_text(), make_rest()
    drop = torch.tensor([True, False, False])
    decoder(x_t, t, image_emb, text, drop, drop).square().mean().backward()
    assert [
        name for name, p in decoder.named_parameters() if p.grad is None or not p.grad.any()
    ] == []


@TEXTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(text_kind: ClipStates | TextTransformer, dtype: torch.dtype) -> None:
    decoder, text, (x_t, t, image_emb) = make(text_kind), make_text(), make_rest()
    drop = torch.tensor([True, False, False])
    expected = decoder(x_t, t, image_emb, text, drop, ~drop)
    decoder = decoder.to(dtype)
    out = decoder(x_t, t, image_emb, text, drop, ~drop)
    assert out.dtype == dtype
    assert (out - expected).norm() / expected.norm() < (1e-5 if dtype == torch.float32 else 0.05)
    with torch.autocast("cpu", torch.bfloat16):
        out = decoder.float()(x_t, t, image_emb, text, drop, ~drop)
    assert (out - expected).norm() / expected.norm() < 0.05


def test_invalid_input_raises() -> None:
    text, (_, _, image_emb) = make_text(), make_rest()
    karlo = Decoder(replace(CONFIG, null_text="empty_prompt"))
    with pytest.raises(ValueError, match="drop_text was given"):
        karlo.condition(image_emb, text, drop_text=torch.ones(B, dtype=torch.bool))
    decoder = make(OWN_TEXT)
    with pytest.raises(ValueError, match="has no token ids"):
        decoder.condition(image_emb, replace(text, ids=None))
    with pytest.raises(ValueError, match="the text has 12 tokens; this decoder takes at most 6"):
        decoder.condition(
            image_emb, replace(text, ids=text.ids.repeat(1, 2), mask=text.mask.repeat(1, 2))
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learned_variance": True}, "unet has 3 channels in and 3 out; .* and 6 out"),
        ({"unet": replace(UNET, context_dim=None)}, "unet.context_dim is not set"),
        ({"image_size": 15}, "image_size is 15; expected a multiple of .* 2"),
        ({"context_tokens": 0}, "context_tokens is 0; expected at least 1"),
        ({"emb_dim": 0}, "emb_dim is 0; expected at least 1"),
    ],
)
def test_invalid_configs_raise(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)
    with pytest.raises(ValueError, match="width is 10; expected a multiple of heads = 3"):
        replace(OWN_TEXT, width=10)


def test_karlo_size() -> None:
    levels = (LevelSpec(320, 3), *(LevelSpec(c, 3, attention=True) for c in (640, 960, 1280)))
    config = DecoderConfig(
        UNetConfig(3, 6, levels, context_dim=1536),
        image_size=64,
        emb_dim=768,
        text_width=768,
        null_text="empty_prompt",
        learned_variance=True,
    )
    with torch.device("meta"):
        decoder = Decoder(config)
    unet = sum(p.numel() for p in decoder.unet.parameters())
    assert unet == 885_439_686
    assert sum(p.numel() for p in decoder.parameters()) - unet == 7_878_400
    assert len(list(decoder.unet.attentions())) == 22
