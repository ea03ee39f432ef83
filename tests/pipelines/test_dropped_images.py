"""Images that `on_step` drops from a batch: others keep their pixels, networks compute less."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from unclip.models.dalle.sampling import sample_codes
from unclip.models.published.bart_dalle import BartDALLE, BartDALLEConfig
from unclip.types import CodeOptions, StageOptions

PROMPTS = ["a red apple", "a blue fish", "a cat"]
OPTIONS = {
    "own": {},
    "dpm++": {"decoder": StageOptions(steps=4, guidance=3.0, sampler="dpm++")},
    "cached": {
        "decoder": StageOptions(steps=5, guidance=3.0, sampler="ancestral", cache_interval=2)
    },
    "candidates": {"prior": StageOptions(steps=3, guidance=2.0), "prior_candidates": 3},
}


class Dropper:
    """Drops an image at one step of a stage."""

    def __init__(self, image, stage, step):
        self.image, self.at = image, (stage, step)

    def __call__(self, progress):
        if (progress.stage, progress.step) == self.at:
            progress.dropped.add(self.image)


def assert_kept_equal(result, expected, dropped):
    for k, (ours, theirs) in enumerate(zip(result.images, expected.images, strict=True)):
        if k not in dropped:
            assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs)).max() <= 2, k


def rows_seen(network, call):
    """Return the result of a call, and how many rows each pass of a network had."""
    rows = []
    hook = network.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    try:
        return call(), rows
    finally:
        hook.remove()


@pytest.mark.parametrize(
    "options, stage",
    [
        *(("own", stage) for stage in ("prior", "decoder", "upsampler_0")),
        ("dpm++", "decoder"), ("cached", "decoder"), ("candidates", "prior"),
    ],
)  # fmt: skip
def test_other_images_keep_their_pixels(tiny_pipe, options, stage):
    arguments = {
        "options": replace(tiny_pipe.options, **OPTIONS[options]),
        "num_images": 2, "seed": 3, "progress": False,
    }  # fmt: skip
    expected = tiny_pipe(PROMPTS, **arguments)
    dropped = {2, 3}  # both of the second prompt

    def drop(progress):
        if (progress.stage, progress.step) == (stage, 1):
            progress.dropped.update(dropped)

    result = tiny_pipe(PROMPTS, on_step=drop, **arguments)
    assert_kept_equal(result, expected, dropped)


@pytest.mark.parametrize("stage", ["prior", "decoder", "upsampler_0"])
def test_all_images_may_be_dropped(tiny_pipe, stage):
    def drop(progress):
        if (progress.stage, progress.step) == (stage, 1):
            progress.dropped.update(range(len(PROMPTS)))

    assert len(tiny_pipe(PROMPTS, seed=3, on_step=drop, progress=False)) == len(PROMPTS)


def test_no_codes_are_sampled_if_all_images_are_dropped(tiny_dalle):
    steps = []

    def drop(progress):
        steps.append(progress.step)
        progress.dropped.update({0, 1} if progress.step == 5 else ())

    result = tiny_dalle(PROMPTS[:2], seed=3, on_step=drop, progress=False)
    assert steps == [1, 2, 3, 4, 5] and (result.codes.flatten(1)[:, 5:] == 0).all()


def test_networks_do_not_compute_dropped_images(tiny_pipe):
    steps = tiny_pipe.options.decoder.steps
    drop = Dropper(1, "decoder", 1)

    def call():
        return tiny_pipe(PROMPTS, seed=3, on_step=drop, progress=False)

    (_, rows), (_, later) = (
        rows_seen(network.unet, call) for network in (tiny_pipe.decoder, tiny_pipe.upsamplers[0])
    )
    assert rows == [6] + [4] * (steps - 1)  # with guidance, twice the images
    assert set(later) == {2}


IMAGES = [Image.new("RGB", (size, size), colour) for size, colour in ((16, "red"), (40, "blue"))]
MASKS = [Image.new("L", image.size) for image in IMAGES]
MASKS[0].paste(255, (0, 0, 8, 16))
MASKS[1].paste(255, (10, 10, 20, 20))
CALLS = {
    "mixtures": lambda pipe, **more: pipe(
        [{"a cat": 1, text: 2} for text in PROMPTS], negative_prompt="a dog", **more
    ),
    "variations": lambda pipe, **more: pipe.variations([*IMAGES, IMAGES[0]], **more),
    "inpaint": lambda pipe, **more: pipe.inpaint(IMAGES[0], MASKS[0], "a", num_images=3, **more),
    "several": lambda pipe, **more: pipe.inpaint(
        [*IMAGES, IMAGES[0]], [*MASKS, MASKS[0]], PROMPTS, **more
    ),
    "image to image": lambda pipe, **more: pipe.image_to_image(IMAGES[0], num_images=3, **more),
}


@pytest.mark.parametrize("name", CALLS)
def test_all_calls_can_drop_images(tiny_pipe, name):
    arguments = {"seed": 3, "progress": False}
    expected = CALLS[name](tiny_pipe, **arguments)
    result, rows = rows_seen(
        tiny_pipe.decoder.unet,
        lambda: CALLS[name](tiny_pipe, on_step=Dropper(1, "decoder", 1), **arguments),
    )
    assert_kept_equal(result, expected, {1})
    assert rows[-1] * 3 == rows[0] * 2


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_codes_of_other_images_stay(tiny_dalle, guidance):
    arguments = {"seed": 3, "options": CodeOptions(guidance=guidance), "progress": False}
    expected = tiny_dalle(PROMPTS, **arguments)
    result = tiny_dalle(PROMPTS, on_step=Dropper(1, "dalle", 5), **arguments)
    kept = torch.tensor([0, 2])
    assert torch.equal(result.codes[kept], expected.codes[kept])
    assert (result.codes[1].flatten()[5:] == 0).all() and (expected.codes[1].flatten() > 0).any()
    assert_kept_equal(result, expected, {1})


@pytest.mark.parametrize("dropped", [{0, 1}, {1}, {0, 3}, {0, 1, 2, 5}])
def test_codes_of_a_shared_text(dropped):
    config = BartDALLEConfig(60, 8, 24, (4, 4), 32, 1, 2, heads=2, mlp_width=40)
    torch.manual_seed(0)
    dalle = BartDALLE(config)
    for p in dalle.parameters():
        nn.init.normal_(p, std=0.3)
    prefix = dalle.condition(dalle.tokens(*text_of(config))).repeat_interleave(2)

    def codes(on_code=None):
        generators = [torch.Generator().manual_seed(k) for k in range(6)]
        options = CodeOptions(guidance=2.0)
        return sample_codes(dalle.eval(), prefix, generators, options, on_code=on_code)

    kept = [k for k in range(6) if k not in dropped]
    result = codes(lambda n, _: kept if n >= 3 else None)
    assert torch.equal(result[kept], codes()[kept])


def text_of(config):
    ids = torch.randint(3, 50, (3, config.context_length), generator=torch.Generator())
    return ids, torch.ones_like(ids, dtype=torch.bool)
