"""A folder like LAION's with DALLE2-pytorch's prior, decoder and upsampler as a whole model."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import scrambled
from laion import MASK, RECORDED, D, T, decoder_section, prior_section, state_of, write, write_clip
from recorded import numbers

import unclip
from unclip.checkpoints.dalle2_pytorch import load as dalle2_pytorch
from unclip.checkpoints.dalle2_pytorch.files import read_file
from unclip.checkpoints.dalle2_pytorch.names import prior_rules
from unclip.checkpoints.formats import LoadedPrior
from unclip.checkpoints.renaming import export_state
from unclip.diffusion.schedules import ScheduleConfig
from unclip.models.published.relative_prior import RelativePrior, RelativePriorConfig
from unclip.pipelines.unclip.stages import EncodedPrompts
from unclip.types import StageOptions, TextEncoding, UnCLIPOptions


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, clip_folder: Path) -> Path:
    """A folder like LAION's: prior, decoder, and an upsampler in the decoder's file."""
    folder = tmp_path_factory.mktemp("models") / "laion"
    torch.manual_seed(0)
    config = RelativePriorConfig(D, 40, depth=2, heads=2, head_dim=8, num_timesteps=100)
    state = scrambled(RelativePrior(config)).state_dict()
    state = export_state(state, prior_rules(config, {"net.null_text_encodings"}))
    del state["emb_norm"]
    net = {
        "dim": D,
        "depth": 2,
        "heads": 2,
        "dim_head": 8,
        "num_timesteps": 100,
        "max_text_len": 40,
    }
    write(folder / "prior/latest.pth", state, "1.15.6", prior=prior_section(net))
    decoder, upsampler = RECORDED["decoders"]["1.0.2"], RECORDED["upsamplers"]["1.0.2"]
    section = decoder_section(decoder["unet"], upsampler["unet"], learned_variance=[True])
    write(
        folder / "decoder/latest.pth",
        {**state_of(decoder), **state_of(upsampler)},
        "1.0.2",
        decoder=section,
    )
    (folder / "clip").symlink_to(clip_folder)
    return folder


QUICK = UnCLIPOptions(
    prior=StageOptions(3, guidance=2.0, eta=1.0),
    decoder=StageOptions(3, guidance=1.7),
    upsamplers=(StageOptions(2),),
)


def pixels(result: unclip.GenerationResult) -> list[bytes]:
    return [image.tobytes() for image in result.images]


def test_a_copy_in_our_format_gives_the_same_images(model, tmp_path):
    pipe = unclip.load(model)
    assert pipe.name == "laion" and pipe.options.prior == StageOptions(64, eta=1.0)
    result = pipe(["a red apple", "a blue fish"], seed=3, options=QUICK, progress=False)
    assert result.images[0].size == (16, 16)
    assert torch.allclose(result.image_emb.norm(dim=-1), torch.ones(2), atol=1e-5)  # as in training
    assert pixels(result)[0] != pixels(result)[1]
    assert pixels(pipe("a blue fish", seed=4, options=QUICK, progress=False)) == pixels(result)[1:]

    pipe.save_pretrained(tmp_path / "copy")
    copied = unclip.load(tmp_path / "copy")
    assert pixels(
        copied(["a red apple", "a blue fish"], seed=3, options=QUICK, progress=False)
    ) == pixels(result)
    assert copied.schedules["upsampler_0"].config == ScheduleConfig("linear", 100)


def test_ancestral_sampling_guides_the_learned_variance(model):
    """DALLE2-pytorch guides it; Karlo and GLIDE use the conditional variance."""
    pipe = unclip.load(model)
    options = StageOptions(3, guidance=3.0, sampler="ancestral")
    bound = pipe.decoder_stage.bind(numbers("emb", (1, D)), EncodedPrompts(), options)
    x_t = numbers("x", (1, 3, 16, 16))
    cond, null = bound.denoise_both(torch.cat([x_t, x_t]), 50.0).chunk(2)
    _, variance = bound.estimate(x_t, 50.0)
    assert torch.allclose(variance, (null + 3 * (cond - null))[:, 3:], atol=1e-5)
    assert not torch.allclose(variance, cond[:, 3:], atol=1e-3)


def test_variations_depend_on_the_direction_of_the_embedding(model):
    pipe = unclip.load(model)
    emb = torch.randn(2, D)
    images = [
        pixels(pipe.variations(image_emb=x, seed=1, options=QUICK, progress=False))
        for x in (emb, emb * 5, -emb)
    ]
    assert images[0] == images[1] != images[2]


def test_the_prior_works_in_another_model(model, tiny_pipe):
    pipe, prior = unclip.load(model), unclip.load_prior(model)
    pipe.prior = prior
    first = pipe("a red apple", seed=3, options=QUICK, progress=False)
    assert pixels(first) == pixels(
        unclip.load(model)("a red apple", seed=3, options=QUICK, progress=False)
    )
    with pytest.raises(ValueError, match="prior has text_width 16, but CLIP has 24"):
        copy.deepcopy(tiny_pipe).prior = prior


def test_half_precision_output_is_close(model):
    prior, half = (unclip.load_prior(model, one).network for one in (None, torch.bfloat16))
    assert {p.dtype for p in half.parameters()} == {
        torch.bfloat16
    } and half.emb_norm.dtype == torch.float32
    text = TextEncoding(numbers("emb", (2, D)), numbers("states", (2, 6, D)), MASK)
    x_t = numbers("x", (2, D))
    with torch.no_grad():
        torch.testing.assert_close(
            half(x_t, T, text).float(), prior(x_t, T, text), atol=0.1, rtol=0.1
        )


def test_a_folder_without_an_upsampler_is_an_error(tmp_path, clip_folder):
    record = RECORDED["decoders"]["1.0.2"]
    for place in ("decoder", "upsampler"):
        section = decoder_section(record["unet"])
        write(tmp_path / place / "latest.pth", state_of(record), "1.0.2", decoder=section)
    with pytest.raises(ValueError, match="latest.pth has no upsampler"):
        dalle2_pytorch.load_bundle(tmp_path)
    with pytest.raises(ValueError, match="is not a prior of DALLE2-pytorch: it has no net"):
        read_file(tmp_path / "decoder/latest.pth", "prior")


def test_a_prior_without_null_text_cannot_be_guided(model):
    pipe = unclip.load(model)
    prior = RelativePrior(replace(pipe.prior.config, text_null=None))
    pipe.prior = LoadedPrior(prior, pipe.schedules["prior"].config)
    options = replace(QUICK, prior=replace(QUICK.prior, guidance=1.0))
    assert len(pipe("a red apple", options=options, progress=False)) == 1
    with pytest.raises(ValueError, match="trained without dropped texts"):
        pipe("a red apple", options=QUICK, progress=False)
