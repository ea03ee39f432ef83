"""The layout that a decoder gets from its image embedding, learned by regression."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import CONTEXT, EMB_DIM, TEXT_WIDTH, scrambled, tiny_clip, tiny_decoder, tiny_unet

from unclip.checkpoints.store import load_component, save_component
from unclip.diffusion.losses import LossConfig
from unclip.diffusion.schedules import Schedule, ScheduleConfig
from unclip.models.unclip.decoder import Decoder, Layout, LayoutConfig, masked_image
from unclip.pipelines.unclip.pipeline import UnCLIPPipeline
from unclip.training.initialization import warm_start
from unclip.training.losses import ConditionDropout, DecoderLoss, LayoutLoss, add_noise
from unclip.types import TextEncoding

SHAPE = LayoutConfig(emb_dim=EMB_DIM, size=4, width=16, depth=2)
CHANNELS = {"layout": 3, "known": 4}


def make_decoder(*names: str) -> Decoder:
    """A decoder whose inputs are x_t and, as requested, a layout and known pixels."""
    unet = replace(tiny_unet(3 + sum(CHANNELS[name] for name in names), 3, context_dim=24), patch=2)
    options = {"layout": SHAPE if "layout" in names else None, "inpaints": "known" in names}
    return tiny_decoder(unet=unet, learned_variance=False, prediction="v", **options)


def inputs(rows: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, TextEncoding]:
    """x_t, t, image embeddings, captions."""
    mask = torch.ones(rows, CONTEXT, dtype=torch.bool)
    text = TextEncoding(torch.randn(rows, EMB_DIM), torch.randn(rows, CONTEXT, TEXT_WIDTH), mask)
    return (
        torch.randn(rows, 3, 8, 8),
        torch.randint(1000, (rows,)),
        torch.randn(rows, EMB_DIM),
        text,
    )


# -- the network


def test_layout_has_its_depth_and_normalises_embeddings():
    layout = Layout(SHAPE)
    assert [m.out_features for m in layout.mlp if isinstance(m, torch.nn.Linear)] == [16, 16, 48]
    emb, mean, std = torch.randn(5, EMB_DIM), torch.randn(EMB_DIM), torch.rand(EMB_DIM) + 0.5
    before = layout(emb)
    assert before.shape == (5, 3, 4, 4)
    layout.set_stats(mean, std)
    torch.testing.assert_close(layout(emb * std + mean), layout.mlp(emb).view(5, 3, 4, 4))
    with pytest.raises(ValueError, match="depth is 0; expected at least 1"):
        LayoutConfig(emb_dim=EMB_DIM, depth=0)


def test_guided_embeddings_match_known_pixels_by_weight():
    torch.manual_seed(0)
    layout, std = scrambled(Layout(SHAPE)), torch.linspace(0.5, 2, EMB_DIM)
    layout.set_stats(torch.zeros(EMB_DIM), std)
    emb, true = (std * torch.randn(3, EMB_DIM) for _ in range(2))
    image, hole = (
        layout(true).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3),
        torch.zeros(3, 1, 8, 8) > 0,
    )
    hole[..., 4:] = True
    hole[2] = True  # nothing is known
    known = masked_image(image, hole)

    def misses(found: torch.Tensor) -> torch.Tensor:
        return (layout(found) - layout(true))[..., :2].square().mean(dim=(1, 2, 3))

    slightly, fully = (
        layout.guide_embedding(emb, known, weight, steps=200) for weight in (1.0, 1000.0)
    )
    assert torch.equal(layout.guide_embedding(emb, known, 0.0), emb) and torch.equal(
        fully[2], emb[2]
    )
    assert (misses(fully)[:2] < 0.2 * misses(emb)[:2]).all() and (
        misses(slightly)[:2] < misses(emb)[:2]
    ).all()
    ways = [((found - emb) / std).square().mean(dim=1)[:2] for found in (slightly, fully)]
    assert (0 < ways[0]).all() and (ways[0] < ways[1]).all()
    weights = torch.tensor([1.0, 1000.0, 0.0])  # rows are independent
    each = layout.guide_embedding(emb, known, weights, steps=200)
    torch.testing.assert_close(each, torch.stack([slightly[0], fully[1], emb[2]]))
    with torch.inference_mode():  # its inputs may be inference tensors
        inside = scrambled(Layout(SHAPE)).bfloat16()
        bent = inside.guide_embedding(emb.bfloat16() + 0, known + 0, 10.0)
    assert bent.dtype == torch.bfloat16 and bent[:2].ne(emb[:2].bfloat16()).any()
    with torch.autocast("cpu", torch.bfloat16):  # as in training
        assert torch.equal(layout.guide_embedding(emb, known, 1.0, steps=200), slightly)
    assert all(p.grad is None for p in layout.parameters())


def test_layout_learns_positions_from_embeddings():
    """Images that are bright on one side; their embedding encodes the side."""
    torch.manual_seed(0)
    layout, clip = Layout(SHAPE), tiny_clip().requires_grad_(False)
    sides = torch.tensor([-1.0, 1.0]).repeat(16)  # B
    ramp = torch.linspace(-1, 1, 8).expand(3, 8, 8)
    batch = {
        "image": sides[:, None, None, None] * ramp,
        "image_emb": sides[:, None] * torch.ones(EMB_DIM),
    }
    loss, optimizer = (
        LayoutLoss(layout, clip, emb_noise=0.5),
        torch.optim.AdamW(layout.parameters(), lr=1e-2),
    )
    for _ in range(100):
        optimizer.zero_grad()
        loss(layout, batch)["loss"].backward()
        optimizer.step()
    with torch.no_grad():
        truth = torch.nn.functional.avg_pool2d(batch["image"], 2)
        assert (layout(batch["image_emb"]) - truth).square().mean() < 0.05 * truth.square().mean()


def test_embedding_noise_is_in_standard_deviations():
    torch.manual_seed(0)
    std = torch.linspace(0.1, 2, EMB_DIM)
    noise = add_noise(torch.ones(20_000, EMB_DIM), std, most=0.6) - 1
    # a share uniform in [0, 0.6] has a mean square of 0.12
    torch.testing.assert_close(noise.std(0), 0.12**0.5 * std, rtol=0.05, atol=0)
    assert (noise / std).std(1).quantile(0.02) < 0.1  # some rows have almost no noise
    assert torch.equal(add_noise(std[None], std, 0.0), std[None])


def test_dropped_embedding_gives_an_empty_layout():
    decoder, (x_t, t, emb, text) = make_decoder("layout"), inputs()
    dropped = torch.tensor([True, False])
    names = decoder.condition(emb, text, drop_image=dropped).extra_channels
    assert names.shape == (2, 3, 8, 8) and not names[0].any() and names[1].any()
    assert torch.equal(names[1:], decoder.condition(emb, text).extra_channels[1:])
    scrambled(decoder)
    torch.nn.init.normal_(decoder.extra_channel_weights()["layout"].data)
    everything = torch.ones(2, dtype=torch.bool)
    outputs = [decoder(x_t, t, one, text, drop_image=everything) for one in (emb, emb.flip(0))]
    torch.testing.assert_close(*outputs)


def test_layout_changes_the_image_and_is_saved_with_the_decoder(tmp_path):
    decoder, (x_t, t, emb, text) = scrambled(make_decoder("layout", "known")), inputs()
    torch.nn.init.normal_(decoder.extra_channel_weights()["layout"].data)
    before = decoder(x_t, t, emb, text)
    save_component(decoder, tmp_path)
    torch.testing.assert_close(load_component(tmp_path)(x_t, t, emb, text), before)
    torch.nn.init.normal_(decoder.layout.mlp[-1].bias)
    assert not torch.equal(decoder(x_t, t, emb, text), before)
    assert load_component(tmp_path, torch.bfloat16).layout.emb_std.dtype == torch.float32


def test_wrong_shapes_raise():
    unet = tiny_unet(3, 3, context_dim=24)
    with pytest.raises(ValueError, match=r"expected 6 in \(x_t 3, layout 3, known 0\) and 3 out"):
        tiny_decoder(unet=unet, learned_variance=False, layout=SHAPE)
    with pytest.raises(ValueError, match=f"layout.emb_dim is 5; expected emb_dim = {EMB_DIM}"):
        layout = replace(SHAPE, emb_dim=5)
        tiny_decoder(unet=replace(unet, in_channels=6), learned_variance=False, layout=layout)


# -- training


@pytest.mark.parametrize("before", [(), ("layout",), ("known",), ("layout", "known")])
@pytest.mark.parametrize("after", [("layout",), ("known",), ("layout", "known")])
def test_training_continues_from_a_decoder_with_fewer_inputs(before, after, tmp_path):
    torch.manual_seed(0)
    old, new = scrambled(make_decoder(*before)), make_decoder(*after)
    for weight in old.extra_channel_weights().values():
        torch.nn.init.normal_(weight.data)
    save_component(old, tmp_path)
    if not set(before) <= set(after):
        with pytest.raises(ValueError, match="does not fit"):
            warm_start(new, tmp_path)
        return
    if "layout" in after and "layout" not in before:
        with pytest.raises(ValueError, match="missing: layout.emb_mean"):
            warm_start(new, tmp_path)
        own_layout = new.layout.mlp[0].weight.clone()
        warm_start(new, tmp_path, keep_layout=True)
        assert torch.equal(new.layout.mlp[0].weight, own_layout)
    else:
        warm_start(new, tmp_path)
    x_t, t, emb, text = inputs()
    known = masked_image(torch.rand(2, 3, 8, 8), torch.rand(2, 1, 8, 8) < 0.5)
    as_before, as_after = (
        {"known": known} if "known" in names else {} for names in (before, after)
    )
    torch.testing.assert_close(
        new(x_t, t, emb, text, **as_after), old(x_t, t, emb, text, **as_before)
    )
    new(x_t, t, emb, text, **as_after).square().mean().backward()
    grad = new.unet.stem.weight.grad.flatten(2).abs().amax(dim=(0, 2))
    assert grad.min() > 0  # all extra channels are used


def test_decoder_trains_on_noised_embeddings_with_a_frozen_layout(monkeypatch):
    torch.manual_seed(0)
    clip, decoder = tiny_clip().requires_grad_(False), make_decoder("layout")
    decoder.layout.requires_grad_(False)
    seen = []
    monkeypatch.setattr(
        decoder.layout,
        "forward",
        lambda emb: (seen.append(emb), Layout.forward(decoder.layout, emb))[1],
    )
    batch = {"image": torch.rand(4, 3, 8, 8), "caption": ["a"] * 4}
    for emb_noise in (0.0, 0.8):
        loss = DecoderLoss(
            decoder,
            clip,
            Schedule(ScheduleConfig()),
            ConditionDropout(0.5, 0.0),
            LossConfig(),
            None,
            emb_noise,
        )
        loss(decoder, batch)["loss"].backward()
    exact = clip.encode_image(batch["image"]).float()
    torch.testing.assert_close(seen[0], exact)
    assert not torch.allclose(seen[1], exact)
    assert decoder.unet.stem.weight.grad is not None and decoder.layout.mlp[0].weight.grad is None


# -- in a pipeline


def test_pipeline_generates_with_a_layout(invertible_pipe, tmp_path):
    own = invertible_pipe
    torch.manual_seed(0)
    decoder = scrambled(make_decoder("layout"), std=0.02)
    torch.nn.init.normal_(decoder.extra_channel_weights()["layout"].data)
    pipe = UnCLIPPipeline(
        own.clip, own.prior, decoder, own.upsamplers, own.options, name="names", licence="MIT"
    )
    result = pipe(["a red apple", "a blue fish"], num_images=2, seed=0, progress=False)
    alone = pipe("a blue fish", seed=3, progress=False)
    assert result.images[3].tobytes() == alone.images[0].tobytes() != result.images[2].tobytes()
    pipe.save_pretrained(tmp_path / "model")
    again = UnCLIPPipeline.from_pretrained(tmp_path / "model")
    assert (
        again("a blue fish", seed=3, progress=False).images[0].tobytes()
        == alone.images[0].tobytes()
    )
    coarse = again.quantize("int8")("a blue fish", seed=3, progress=False).images[0]
    assert 0 < np.abs(np.subtract(coarse, alone.images[0], dtype=float)).mean() < 20
