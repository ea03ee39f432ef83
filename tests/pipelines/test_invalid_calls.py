"""Invalid arguments of pipelines are rejected with a clear ValueError."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import TINY_OPTIONS, tiny_decoder, tiny_upsampler
from PIL import Image

from unclip.diffusion.schedules import ScheduleConfig
from unclip.pipelines.provenance import regenerate
from unclip.pipelines.unclip.latent import deterministic
from unclip.pipelines.unclip.pipeline import UnCLIPPipeline
from unclip.types import CodeOptions, StageOptions, UnCLIPOptions, update_options


@pytest.mark.parametrize(
    ("prompt", "changes", "message"),
    [
        ([], {}, "list of prompts is empty"),
        (None, {}, "prompt is of type NoneType; expected a string"),
        (7, {}, "prompt is of type int; expected a string"),
        (b"a cat", {}, "prompt is of type bytes; expected a string"),
        (["a", 7], {}, "prompt 1 is 7, of type int; expected a string"),
        ("caf\udce9", {}, r"prompt 0 is 'caf\\udce9', not valid Unicode; expected UTF-8"),
        (
            "a",
            {"options": replace(TINY_OPTIONS, prior=StageOptions(1, temperature=0.2))},
            "temperature is 0.2; expected 1",
        ),
        ("a", {"num_images": 0}, "num_images is 0; expected a whole number of at least 1"),
        ("a", {"num_images": 1.5}, "num_images is 1.5"),
        ("a", {"batch_size": 0}, "batch_size is 0"),
        ("a", {"seed": -1}, "seed is -1; expected a whole number from 0"),
        ("a", {"seed": "one"}, "seed is 'one'"),
        ("a", {"seed": 2**63 - 1, "num_images": 2}, r"from 0 to 2\*\*63 - 2 for 2 images"),
        ("a", {"seed": np.array(3)}, r"seed is array\(3\); expected a whole number"),
        ("a", {"options": StageOptions(3)}, "options is a StageOptions; expected UnCLIPOptions"),
        (
            "a",
            {"options": replace(TINY_OPTIONS, upsamplers=(StageOptions(1),) * 2)},
            "2 upsamplers, but the model has 1",
        ),
        (
            "a",
            {"options": replace(TINY_OPTIONS, decoder=StageOptions(1, sampler="euler"))},
            "sampler is 'euler'",
        ),
        (
            "a",
            {"options": replace(TINY_OPTIONS, decoder=StageOptions(1001))},
            "only 1000 timesteps",
        ),
    ],
)
def test_invalid_calls_are_rejected(tiny_pipe, prompt, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipe(prompt, progress=False, **changes)


def test_numbers_of_numpy_are_taken_as_python_s(tiny_pipe):
    two = {"num_images": np.int64(2), "batch_size": np.uint8(1), "seed": np.int32(5)}
    result = tiny_pipe("a", **two, progress=False)
    expected = tiny_pipe("a", num_images=2, seed=5, batch_size=1, progress=False)
    assert result.seeds == [5, 6] and result.metadata == expected.metadata
    assert tiny_pipe("a", seed=2**63 - 1, progress=False).seeds == [2**63 - 1]
    image = Image.new("RGB", (16, 16), "red")
    wider = tiny_pipe.outpaint(image, "a", left=np.int64(4), seed=0, progress=False)
    assert wider.images[0].size == (20, 16)
    with pytest.raises(ValueError, match="left is True; expected a whole number"):
        tiny_pipe.outpaint(image, "a", left=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "either an image or image_emb"),
        ({"image": "a.png", "image_emb": torch.ones(1, 16)}, "either an image or image_emb"),
        ({"image": []}, "list of images is empty"),
        ({"image": torch.zeros(1, 4, 8, 8)}, r"image is of shape \(1, 4, 8, 8\); expected"),
        ({"image": torch.zeros(0, 3, 8, 8)}, r"image is of shape \(0, 3, 8, 8\); expected"),
        (
            {"image": torch.zeros(3, 8, 8, dtype=torch.uint8)},
            r"image is of torch.uint8; expected floating-point",
        ),
        (
            {"image": torch.full((3, 8, 8), 255.0)},
            r"image has values from 255 to 255; expected them in \[-1, 1\]",
        ),
        ({"image": [torch.full((3, 8, 8), torch.nan)]}, r"image has values from nan to nan"),
        (
            {"image": np.zeros((8, 8, 3))},
            "ndarray; expected a path or a PIL image",
        ),
        ({"image_emb": torch.ones(16)}, r"image_emb is of shape \(16,\); expected \(N, 16\)"),
        ({"image_emb": np.ones((1, 16))}, r"image_emb is a ndarray; expected a tensor"),
        ({"image": Image.new("RGB", (0, 0))}, "0 x 0 px; expected at least 1 x 1"),
        ({"image": Image.new("La", (8, 8))}, "mode is La; expected RGB"),
        ({"image_emb": torch.ones(2, 8)}, r"image_emb is of shape \(2, 8\); expected \(N, 16\)"),
        (
            {"image_emb": torch.full((1, 16), torch.nan)},
            "image_emb contains infinity or nan",
        ),
        (
            {"image_emb": torch.ones(3, 16), "prompt": ["a", "b"]},
            "2 prompts for 3 images; expected one for each, or one for all",
        ),
        (
            {"image_emb": torch.ones(1, 16), "negative_prompt": ["a", "b"]},
            "2 negative prompts for 1 images",
        ),
        (
            {
                "image_emb": torch.ones(1, 16),
                "negative_prompt": "a",
                "options": replace(
                    TINY_OPTIONS, decoder=replace(TINY_OPTIONS.decoder, guidance=1.0)
                ),
            },
            "guidance is 1 in decoder; set it higher",
        ),
    ],
)
def test_invalid_variations_are_rejected(tiny_pipe, given, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipe.variations(**given, progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embedding": "imge"}, "embedding is 'imge'; expected 'prior', 'text' or 'none'"),
        ({"prior_candidates": 0}, "prior_candidates is 0; expected at least 1"),
    ],
)
def test_options_of_unclip_out_of_range_are_rejected(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY_OPTIONS, **change)


@pytest.mark.parametrize("name", ["eta", "guidance_rescale"])
@pytest.mark.parametrize("value", [-0.1, 1.5])
def test_fractions_out_of_range_are_rejected(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}; expected at least 0 and at most 1"):
        StageOptions(3, **{name: value})


def test_another_number_of_steps_has_evenly_spaced_timesteps():
    chosen = StageOptions(3, timesteps=(900, 500, 10))
    assert chosen.with_steps(3, guidance=2.0).timesteps == (900, 500, 10)
    assert chosen.with_steps(5) == StageOptions(5)
    options = replace(TINY_OPTIONS, decoder=chosen)
    assert deterministic(options, 50).decoder == StageOptions(50)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"decoder": {"eta": 0.5}}, {"decoder": StageOptions(3, timesteps=(9, 5, 1), eta=0.5)}),
        ({"decoder": {"steps": 3}}, {"decoder": StageOptions(3, timesteps=(9, 5, 1))}),
        ({"decoder": {"steps": 4}}, {"decoder": StageOptions(4)}),
        ({"decoder": {"timesteps": [7, 2]}}, {"decoder": StageOptions(2, timesteps=(7, 2))}),
        (
            {"decoder": {"guidance_interval": {"0": 0.25}}},
            {"decoder": StageOptions(3, timesteps=(9, 5, 1), guidance_interval=(0.25, 1))},
        ),
        (
            {"upsamplers": {"*": {"eta": 1.0}, "1": {"steps": 7}}},
            {"upsamplers": (StageOptions(1, eta=1.0), StageOptions(7, eta=1.0))},
        ),
        (
            {"upsamplers": [{}, {"sampler": "unipc"}]},
            {"upsamplers": (StageOptions(1), StageOptions(2, sampler="unipc"))},
        ),
        ({"upsamplers": [{"steps": 5}]}, {"upsamplers": (StageOptions(5),)}),
    ],
)
def test_some_options_are_updated(changes, expected):
    stages = StageOptions(1), StageOptions(2)
    options = UnCLIPOptions(decoder=StageOptions(3, timesteps=(9, 5, 1)), upsamplers=stages)
    assert update_options(options, changes, "here") == replace(options, **expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder": {"steps": 2, "timesteps": [3]}}, "here: decoder: got 1 timesteps"),
        ({"upsamplers": {"5": {"steps": 2}}}, "here: '5' does not exist in a list of 1"),
        ({"upsamplers": {"0": {"sampler": 3}}}, "here: sampler is 3; expected one of ddim, "),
        ({"decoder": {"steps": {"0": 1}}}, "here: decoder.steps is {'0': 1}; expected"),
    ],
)
def test_updates_that_do_not_fit_are_rejected(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        update_options(TINY_OPTIONS, changes, "here")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e39])
def test_infinite_or_huge_options_are_rejected(value):
    for make, name in [
        *(
            (partial(StageOptions, 3), name)
            for name in ("guidance", "eta", "guidance_rescale", "temperature")
        ),
        *((CodeOptions, name) for name in ("guidance", "temperature")),
    ]:
        with pytest.raises(ValueError, match=rf"{name} is {re.escape(str(value))}; expected"):
            make(**{name: value})


def test_stages_check_their_inputs(tiny_pipe):
    text = tiny_pipe.encode_text(["a", "b"])
    with pytest.raises(ValueError, match="2 texts for 3 image embeddings"):
        tiny_pipe.decode(torch.ones(3, 16), text)
    for emb in (torch.ones(16), torch.ones(2, 8)):
        with pytest.raises(
            ValueError,
            match=rf"image_emb is of shape {re.escape(str(tuple(emb.shape)))}; expected \(B, 16",
        ):
            tiny_pipe.decode(emb)
    for candidates in (0, -1):
        with pytest.raises(
            ValueError, match=f"candidates is {candidates}; expected a whole number of at least 1"
        ):
            tiny_pipe.sample_prior(text, candidates=candidates)
    bright = torch.full((1, 3, 16, 16), 255.0)
    for edit in (tiny_pipe.reconstruct, tiny_pipe.image_to_image):
        with pytest.raises(ValueError, match="image has values from 255 to 255"):
            edit(bright)
    with pytest.raises(ValueError, match="cannot open an image from Tensor"):
        tiny_pipe.inpaint(Image.new("RGB", (16, 16)), torch.zeros(16, 16))
    with pytest.raises(ValueError, match=r"expected \(B, 3, 8, 8\)"):
        tiny_pipe.upsample(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="1 generators for 2 samples"):
        tiny_pipe.decode(torch.ones(2, 16), text, generators=[torch.Generator()])


def test_unavailable_devices_are_rejected(tiny_pipe, tiny_folder):
    unavailable = "device cuda:99 is not available; available: .*cpu"
    for device, message in {
        "cuda:99": unavailable,
        "gpu": "unknown device 'gpu'",
    }.items():
        with pytest.raises(ValueError, match=message):
            tiny_pipe.to(device)
    with pytest.raises(ValueError, match=unavailable):
        UnCLIPPipeline.from_pretrained(tiny_folder, device="cuda:99")


def test_networks_that_do_not_fit_together_are_rejected(tiny_pipe):
    clip, prior, decoder = tiny_pipe.clip, tiny_pipe.prior, tiny_pipe.decoder
    with pytest.raises(ValueError, match="decoder has emb_dim 20, but CLIP has 16"):
        UnCLIPPipeline(clip, prior, tiny_decoder(emb_dim=20))
    with pytest.raises(ValueError, match="upsampler_0 takes images of 16 px, but gets 8 px"):
        UnCLIPPipeline(clip, prior, decoder, [tiny_upsampler(low=16)])
    with pytest.raises(ValueError, match="schedules of decodr; the model has prior, decoder"):
        UnCLIPPipeline(clip, prior, decoder, schedules={"decodr": ScheduleConfig()})


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"prompt": "a"}, "no options and no seed"),
        ({"seed": 1, "options": {}}, "neither a prompt nor an image embedding"),
        (
            {"seed": 1, "options": {"decoder": {"steps": "x"}}, "prompt": "a"},
            "options in the metadata: decoder.steps",
        ),
    ],
)
def test_incomplete_metadata_is_rejected(tiny_pipe, metadata, message):
    with pytest.raises(ValueError, match=message):
        regenerate(tiny_pipe, metadata)
