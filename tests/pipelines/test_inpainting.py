"""The inpainting decoder: random holes, fine-tuning from a plain decoder, and inpainting."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import CONTEXT, EMB_DIM, TEXT_WIDTH, scrambled, tiny_clip, tiny_decoder, tiny_unet
from PIL import Image

import unclip
from unclip.checkpoints.store import load_component, save_component
from unclip.diffusion.losses import LossConfig
from unclip.diffusion.repaint import PaintOptions
from unclip.diffusion.schedules import Schedule, ScheduleConfig
from unclip.image_io import read_metadata, save_png
from unclip.models.unclip.decoder import Decoder, DecoderContext, LayoutConfig, masked_image
from unclip.pipelines.provenance import regenerate
from unclip.pipelines.unclip.pipeline import UnCLIPPipeline
from unclip.training.initialization import warm_start
from unclip.training.inpainting import HOLES, HoleConfig, copy_paste, foreground_alpha, random_holes
from unclip.training.losses import ConditionDropout, DecoderLoss, mix_embeddings
from unclip.types import TextEncoding

QUICK = {"progress": False, "batch_size": 2}


def inpainting(**changes: object) -> Decoder:
    unet = tiny_unet(7, 3, context_dim=24)
    return tiny_decoder(
        **{"unet": unet, "learned_variance": False, "prediction": "v", "inpaints": True, **changes}
    )


def text(rows: int) -> TextEncoding:
    mask = torch.ones(rows, CONTEXT, dtype=torch.bool)
    return TextEncoding(torch.randn(rows, EMB_DIM), torch.randn(rows, CONTEXT, TEXT_WIDTH), mask)


# -- holes


@pytest.mark.parametrize("kind", HOLES)
def test_holes_of_each_kind_are_not_empty(kind):
    torch.manual_seed(0)
    holes = random_holes(40, 32, HoleConfig(**{name: float(name == kind) for name in HOLES}))
    assert holes.shape == (40, 1, 32, 32) and holes.dtype == torch.bool
    share = holes.float().mean(dim=(1, 2, 3))
    assert share.min() > 0 and (share.max() < 1 or kind == "all")
    assert len({hole.numpy().tobytes() for hole in holes}) > 30 or kind == "all"


def test_hole_kinds_follow_their_weights():
    torch.manual_seed(0)
    everything = random_holes(400, 8, HoleConfig(box=3, stroke=0, half=0, border=0, all=1)).all(
        dim=(1, 2, 3)
    )
    assert everything.float().mean() == pytest.approx(0.25, abs=0.06)
    with pytest.raises(ValueError, match="box is -1"):
        HoleConfig(box=-1)
    with pytest.raises(ValueError, match="all weights are 0"):
        HoleConfig(0, 0, 0, 0, 0)


def disc(rows: int, side: int = 32) -> torch.Tensor:
    """Red discs with a blue middle on white: (B, 3, s, s)."""
    middle = (torch.arange(side) + 0.5 - side / 2).square()
    far = (middle + middle[:, None]).sqrt()[None, None] / side
    red, blue = (torch.tensor(colour).view(1, 3, 1, 1) for colour in ([1.0, -1, -1], [-1.0, -1, 1]))
    return torch.where(far < 0.15, blue, torch.where(far < 0.4, red, 1.0)).expand(rows, -1, -1, -1)


def test_foregrounds_are_cut_out_of_plain_backgrounds_only():
    opaque = foreground_alpha(disc(1))[0, 0]
    assert (
        opaque[16, 16] == 1
        and opaque[16, 8] == 1
        and not opaque[:2].any()
        and not opaque[:, :2].any()
    )
    holed = torch.where(disc(1)[:, 2:] > disc(1)[:, :1], 1.0, disc(1))
    assert foreground_alpha(holed)[0, 0, 16, 16] == 1, "white inside a thing is not its ground"
    assert torch.equal(foreground_alpha(-disc(1)), foreground_alpha(disc(1))), (
        "the ground may have any colour"
    )
    noise = torch.rand(2, 3, 16, 16) * 2 - 1
    assert foreground_alpha(noise).mean() > 0.8


def test_pasted_foregrounds_lie_within_their_holes():
    torch.manual_seed(0)
    ground = torch.full((20, 3, 32, 32), 0.5) * torch.tensor([1.0, 1, -1]).view(1, 3, 1, 1)
    photos, holes = copy_paste(ground, disc(20))
    assert holes.shape == (20, 1, 32, 32) and holes.dtype == torch.bool
    changed = (photos - ground).abs().amax(dim=1, keepdim=True) > 1e-6
    assert not (changed & ~holes).any()
    share = (changed & holes).flatten(1).sum(dim=1) / holes.flatten(1).sum(dim=1)
    assert share.min() > 0.05 and share.max() < 0.8
    assert photos.abs().max() <= 1 + 1e-6 and not (photos > 0.9).all(dim=1).any(), (
        "no white of the thing's ground"
    )
    assert (photos[:, 2].flatten(1).amax(dim=1) > 0.3).all(), "its blue middle is there"
    assert torch.equal(
        ground, torch.full((20, 3, 32, 32), 0.5) * torch.tensor([1.0, 1, -1]).view(1, 3, 1, 1)
    )
    assert copy_paste(ground[:0], disc(0))[1].shape == (0, 1, 32, 32)


# -- the network


def test_masked_images_contain_the_known_pixels_only():
    photo, hole = torch.rand(2, 3, 4, 4) - 2, torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    hole[..., :2] = True
    known = masked_image(photo, hole)
    assert known.shape == (2, 4, 4, 4) and not known[..., :2].any()
    assert torch.equal(known[:, :3, :, 2:], photo[..., 2:]) and (known[:, 3, :, 2:] == 1).all()


@pytest.mark.parametrize("patch", [1, 2])
def test_fine_tuning_starts_from_the_plain_decoder(tmp_path, patch):
    torch.manual_seed(0)
    unet = replace(tiny_unet(3, 3, context_dim=24), patch=patch)
    plain = scrambled(tiny_decoder(unet=unet, learned_variance=False, prediction="v"))
    save_component(plain, tmp_path / "plain")
    decoder = inpainting(unet=replace(unet, in_channels=7))
    warm_start(decoder, tmp_path / "plain")
    x_t, t, emb, said = (
        torch.randn(2, 3, 8, 8),
        torch.tensor([3, 900]),
        torch.randn(2, EMB_DIM),
        text(2),
    )
    known = masked_image(torch.rand(2, 3, 8, 8), torch.rand(2, 1, 8, 8) < 0.5)
    torch.testing.assert_close(decoder(x_t, t, emb, said, known=known), plain(x_t, t, emb, said))

    decoder(x_t, t, emb, said, known=known).square().mean().backward()
    grad = decoder.unet.stem.weight.grad[:, 3 * patch**2 :]
    assert (
        decoder.extra_channel_weights()["known"].shape[1] == 4 * patch**2
        and grad.flatten(2).abs().amax(dim=(0, 2)).min() > 0
    )

    scrambled(decoder)
    torch.nn.init.normal_(decoder.extra_channel_weights()["known"].data, std=0.1)
    assert not torch.equal(decoder(x_t, t, emb, said, known=known), decoder(x_t, t, emb, said))
    save_component(decoder, tmp_path / "tuned")
    again = inpainting(unet=replace(unet, in_channels=7))
    warm_start(again, tmp_path / "tuned")  # resuming training
    torch.testing.assert_close(again.state_dict(), decoder.state_dict())
    assert load_component(tmp_path / "tuned").config.inpaints


def test_contexts_keep_the_known_pixels():
    decoder, emb = inpainting(), torch.randn(3, EMB_DIM)
    known = torch.rand(3, 4, 8, 8)
    context = decoder.condition(emb, text(3), known=known)
    assert torch.equal(context[1:].extra_channels, known[1:])
    assert torch.equal(
        context.repeat_interleave(2).extra_channels, known.repeat_interleave(2, dim=0)
    )
    assert torch.equal(
        DecoderContext.cat([context, context[:1]]).extra_channels, known[[0, 1, 2, 0]]
    )
    assert not decoder.condition(emb, text(3)).extra_channels.any()


def test_decoders_that_cannot_inpaint_are_rejected(invertible_pipe, tmp_path):
    pipe = invertible_pipe
    with pytest.raises(ValueError, match="expected 7 in"):
        inpainting(unet=tiny_unet(3, 3, context_dim=24))
    with pytest.raises(ValueError, match="not trained to inpaint"):
        tiny_decoder().condition(torch.randn(1, EMB_DIM), text(1), known=torch.rand(1, 4, 8, 8))
    for wrong in (pipe.decoder, inpainting(image_size=16)):
        with pytest.raises(ValueError, match="expected a decoder of 8 px"):
            UnCLIPPipeline(pipe.clip, pipe.prior, pipe.decoder, inpainter=wrong)
    save_component(tiny_decoder(image_size=16, emb_dim=8), tmp_path)
    with pytest.raises(ValueError, match="does not fit"):
        warm_start(inpainting(), tmp_path)


def test_training_learns_to_copy_known_pixels():
    """Also from pure noise, where an unconditioned decoder can only guess."""
    torch.manual_seed(0)
    clip, decoder, schedule = (
        tiny_clip().requires_grad_(False),
        inpainting(prediction="x0"),
        Schedule(ScheduleConfig()),
    )
    holes = HoleConfig(box=0, stroke=0, half=1, border=0, all=0)
    loss = DecoderLoss(decoder, clip, schedule, ConditionDropout(0.5, 0.1), LossConfig(), holes)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=6e-3)

    def plain(count: int) -> torch.Tensor:
        return (torch.rand(count, 3, 1, 1) * 2 - 1).expand(-1, -1, 8, 8).contiguous()

    for _ in range(150):
        optimizer.zero_grad()
        loss(decoder, {"image": plain(16), "caption": ["a"] * 16})["loss"].backward()
        optimizer.step()
    photos, noise = plain(64), torch.randn(64, 3, 8, 8)
    hole = torch.zeros(64, 1, 8, 8, dtype=torch.bool)
    hole[..., 4:] = True
    conditions = clip.encode_image(torch.zeros_like(photos)).float(), clip.encode_text(["a"] * 64)

    def miss(known: torch.Tensor | None) -> float:
        generated = decoder(noise, torch.full((64,), 999), *conditions, known=known)
        return (generated - photos).abs()[hole.expand_as(photos)].mean().item()

    with torch.no_grad():
        assert miss(masked_image(photos, hole)) < 0.7 * miss(None)


def test_embeddings_are_mixed_with_those_of_other_images():
    torch.manual_seed(0)
    emb, rows = torch.eye(EMB_DIM).repeat(100, 1), torch.arange(100 * EMB_DIM) % 2 == 0
    turned = mix_embeddings(emb, rows, most=0.5)
    torch.testing.assert_close(turned[~rows], emb[~rows])
    cosine = (turned * emb).sum(dim=1)[rows]
    assert (
        cosine.min() > 0.5**0.5 - 1e-6 and cosine.min() < 0.72 and cosine.max() > 0.99
    )  # angles up to an eighth of a circle
    torch.testing.assert_close(turned.square() @ torch.ones(EMB_DIM), torch.ones(len(emb)))
    other = (turned * emb.roll(-1, dims=0)).sum(dim=1)[rows]
    torch.testing.assert_close(cosine**2 + other**2, torch.ones(int(rows.sum())))


def test_only_images_with_known_pixels_have_mixed_embeddings(monkeypatch):
    seen = {}
    decoder, clip = inpainting(), tiny_clip().requires_grad_(False)
    real = decoder.condition
    monkeypatch.setattr(
        decoder,
        "condition",
        lambda *given: seen.update(emb=given[0], known=given[4]) or real(*given),
    )
    holes = HoleConfig(box=1, stroke=0, half=0, border=0, all=1)
    loss = DecoderLoss(
        decoder,
        clip,
        Schedule(ScheduleConfig()),
        ConditionDropout(),
        LossConfig(),
        holes,
        emb_mix=0.5,
    )
    emb = torch.randn(64, EMB_DIM)
    loss(decoder, {"image": torch.zeros(64, 3, 8, 8), "image_emb": emb, "caption": ["a"] * 64})
    known = seen["known"][:, 3].flatten(1).any(dim=1)
    assert 10 < known.sum() < 54
    torch.testing.assert_close(seen["emb"][~known], emb[~known])
    assert not torch.isclose(seen["emb"][known], emb[known]).all(dim=1).any()


def test_pasted_foregrounds_are_in_the_target(monkeypatch):
    torch.manual_seed(0)
    seen = {}
    decoder, clip = inpainting(), tiny_clip().requires_grad_(False)
    real = decoder.forward
    monkeypatch.setattr(decoder, "forward", lambda *given: seen.update(given=given) or real(*given))
    schedule, holes = (
        Schedule(ScheduleConfig()),
        HoleConfig(box=1, stroke=0, half=0, border=0, all=1),
    )
    loss = DecoderLoss(
        decoder, clip, schedule, ConditionDropout(0, 0), LossConfig(), holes, copy_paste=0.5
    )
    emb, captions = (
        torch.randn(64, EMB_DIM),
        [f"{chr(97 + i % 26)} {chr(97 + i // 26)}" for i in range(64)],
    )
    batch = {"image": disc(64, 8).contiguous(), "image_emb": emb, "caption": captions}
    loss(decoder, batch)
    _, _, image_emb, text, _, _, known, _ = seen["given"]
    nexts, own = ((image_emb == other).all(dim=1) for other in (emb.roll(-1, dims=0), emb))
    partly = known[:, 3].flatten(1).any(dim=1)
    assert (nexts ^ own).all() and not (nexts & ~partly).any()
    assert nexts.float().mean() == pytest.approx(0.25, abs=0.12)
    said = clip.encode_text(captions)
    torch.testing.assert_close(
        text.emb, torch.where(nexts[:, None], said.emb.roll(-1, dims=0), said.emb)
    )
    assert torch.equal(batch["image"], disc(64, 8)), "the batch is as it was"


def test_training_guides_embeddings_towards_known_pixels(monkeypatch):
    torch.manual_seed(0)
    unet, layout = (
        replace(tiny_unet(10, 3, context_dim=24), patch=2),
        LayoutConfig(EMB_DIM, size=4, width=16),
    )
    decoder, clip, seen = (
        scrambled(inpainting(unet=unet, layout=layout)),
        tiny_clip().requires_grad_(False),
        {},
    )
    real = decoder.forward
    monkeypatch.setattr(decoder, "forward", lambda *given: seen.update(given=given) or real(*given))
    schedule, holes = (
        Schedule(ScheduleConfig()),
        HoleConfig(box=1, stroke=0, half=0, border=0, all=1),
    )
    loss = DecoderLoss(
        decoder, clip, schedule, ConditionDropout(0, 0), LossConfig(), holes, agreement=50.0
    )
    emb = torch.randn(32, EMB_DIM)
    loss(decoder, {"image": disc(32, 8).contiguous(), "image_emb": emb, "caption": ["a"] * 32})[
        "loss"
    ].backward()
    _, _, image_emb, _, _, _, known, _ = seen["given"]
    partly = known[:, 3].flatten(1).any(dim=1)
    assert (
        torch.equal(image_emb[~partly], emb[~partly])
        and image_emb[partly].ne(emb[partly]).any(dim=1).all()
    )
    truth, share = torch.nn.functional.adaptive_avg_pool2d(known, 4).split([3, 1], dim=1)
    misses = [
        ((decoder.layout(e) * share - truth).square().mean(dim=(1, 2, 3)))[partly]
        for e in (image_emb, emb)
    ]
    assert (misses[0] < misses[1]).float().mean() > 0.9


# -- painting


@pytest.fixture(scope="module")
def pipe(invertible_pipe) -> UnCLIPPipeline:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        inpainter = scrambled(inpainting(), std=0.02)
        torch.nn.init.normal_(inpainter.extra_channel_weights()["known"].data, std=0.2)
    own = invertible_pipe
    schedules = {"decoder": ScheduleConfig(shift=2.0), "inpainter": ScheduleConfig(shift=3.0)}
    parts = own.clip, own.prior, own.decoder, own.upsamplers, own.options
    return UnCLIPPipeline(
        *parts, inpainter=inpainter, schedules=schedules, name="still", licence="MIT"
    )


def scene() -> tuple[Image.Image, Image.Image]:
    image, mask = (
        Image.linear_gradient("L").resize((20, 16)).convert("RGB"),
        Image.new("L", (20, 16)),
    )
    mask.paste(255, (3, 3, 12, 11))
    return image, mask


def test_the_inpainter_is_used_by_default(pipe):
    image, mask = scene()
    steps = []
    result = pipe.inpaint(
        image, mask, "a red apple", seed=1, num_images=2, on_step=steps.append, **QUICK
    )
    kept = np.asarray(mask) == 0
    for one in result.images:
        assert (
            np.asarray(one)[kept] == np.asarray(image)[kept]
        ).all() and one.tobytes() != image.tobytes()
    assert [(p.stage, p.step, p.num_steps) for p in steps if p.stage != "prior"] == [
        *(("inpainter", i, 16) for i in range(1, 17)),
        *(("upsampler_0", i, 3) for i in (1, 2, 3)),
    ]
    assert {entry["arguments"]["painting"]["trained"] for entry in result.metadata} == {True}
    plain = pipe.inpaint(
        image, mask, "a red apple", seed=1, painting=PaintOptions(trained=False), **QUICK
    )
    assert plain.images[0].tobytes() != result.images[0].tobytes()
    assert pipe.outpaint(image, right=8, seed=1, **QUICK).metadata[0]["arguments"]["painting"][
        "trained"
    ]
    assert (
        pipe.image_to_image(image, seed=1, **QUICK).images[0].size == image.size
    )  # the plain decoder is used


def test_a_decoder_may_be_its_own_inpainter(pipe, tmp_path):
    schedules = {"decoder": ScheduleConfig(shift=3.0)}
    alone = UnCLIPPipeline(
        pipe.clip, pipe.prior, pipe.inpainter, pipe.upsamplers, pipe.options, schedules=schedules
    )
    assert alone.inpainter is alone.decoder and "inpainter" not in alone.networks()
    image, mask = scene()
    steps: list[str] = []
    generated = {"prompt": "a red apple", "seed": 1, **QUICK}
    result = alone.inpaint(image, mask, on_step=lambda p: steps.append(p.stage), **generated)
    assert "decoder" in steps and result.metadata[0]["arguments"]["painting"]["trained"]
    assert result.images[0].tobytes() == pipe.inpaint(image, mask, **generated).images[0].tobytes()
    alone.save_pretrained(tmp_path / "model")
    assert UnCLIPPipeline.from_pretrained(tmp_path / "model").inpainter is not None


def test_inpainting_depends_on_known_pixels_only(pipe):
    image, mask = scene()
    other, painted_over = image.copy(), image.copy()
    other.paste((200, 20, 20), (0, 0, 20, 3))
    painted_over.paste((200, 20, 20), (4, 4, 10, 10))
    emb_free = {"prompt": "a red apple", "seed": 1, **QUICK}
    first, second, third = (
        np.asarray(pipe.inpaint(one, mask, **emb_free).images[0])
        for one in (image, other, painted_over)
    )
    hole = np.asarray(mask) > 0
    assert (first[hole] != second[hole]).any() and (first[hole] == third[hole]).all()


def test_the_negative_context_has_the_known_pixels(pipe):
    """As the null context, so that guidance does not move away from what is known."""
    (image, mask), seen = scene(), []
    condition = type(pipe.inpainter).condition

    def recorded(self, *given, **more):
        seen.append(more.get("known"))
        return condition(self, *given, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "condition", recorded)
        pipe.inpaint(image, mask, "a red apple", negative_prompt="a blue fish", seed=1, **QUICK)
    assert len(seen) == 2 and torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("prepared", ["as it is", "int8", "packed", "offloaded"])
def test_embeddings_are_guided_if_the_decoder_has_a_layout(pipe, prepared):
    torch.manual_seed(0)
    unet, layout = (
        replace(pipe.inpainter.config.unet, in_channels=10),
        LayoutConfig(EMB_DIM, size=4, width=96),
    )
    decoder = scrambled(Decoder(replace(pipe.inpainter.config, unet=unet, layout=layout)), std=0.1)
    clip, prior, upsamplers = (
        copy.deepcopy(part) for part in (pipe.clip, pipe.prior, pipe.upsamplers)
    )
    own = UnCLIPPipeline(clip, prior, decoder, upsamplers, pipe.options)
    if prepared == "int8":
        own.quantize()
    elif prepared == "packed":
        unclip.compile(own.to(dtype=torch.bfloat16))
    elif prepared == "offloaded":
        own.offload("cpu")
    (image, mask), asked = scene(), {"prompt": "a red apple", "seed": 1, **QUICK}
    guided, plain = (
        own.inpaint(image, mask, painting=PaintOptions(agreement=w), **asked) for w in (10.0, 0.0)
    )
    assert torch.equal(guided.image_emb, plain.image_emb), "the result keeps the original embedding"
    assert guided.images[0].tobytes() != plain.images[0].tobytes()
    assert guided.metadata[0]["arguments"]["painting"]["agreement"] == 10.0


def test_an_inpainter_is_saved_and_recorded_in_metadata(pipe, invertible_pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    assert "inpainter" in json.loads((tmp_path / "model/model.json").read_text())["components"]
    again = UnCLIPPipeline.from_pretrained(tmp_path / "model")
    assert again.schedules["inpainter"].config.shift == 3.0
    image, mask = scene()
    result = pipe.inpaint(image, mask, "a red apple", seed=2, **QUICK)
    save_png(result.images[0], tmp_path / "a.png", result.metadata[0])
    (metadata,) = read_metadata(tmp_path / "a.png")
    assert (
        regenerate(again, metadata, progress=False).images[0].tobytes()
        == result.images[0].tobytes()
    )
    with pytest.raises(ValueError, match="has no inpainter"):
        regenerate(invertible_pipe, metadata, progress=False)
