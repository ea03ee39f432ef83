"""Inpainting, outpainting and image-to-image."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conftest import box_mask
from diffusers import EulerDiscreteScheduler
from PIL import Image

from unclip.diffusion.repaint import PaintOptions
from unclip.diffusion.schedulers import scheduler_betas
from unclip.image_io import read_metadata, save_png
from unclip.pipelines.canvas import to_model, windows_over
from unclip.pipelines.provenance import encode_image, regenerate

PAINTING = PaintOptions(resamples=2, jump=2)
QUICK = {"progress": False, "batch_size": 2}


def difference(a: Image.Image, b: Image.Image, where: np.ndarray | None = None) -> int:
    pixels = np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int))
    return int((pixels if where is None else pixels[where]).max())


def photo(width: int, height: int) -> Image.Image:
    return Image.linear_gradient("L").resize((width, height)).convert("RGB")


@pytest.fixture(scope="module")
def pipe(invertible_pipe):
    return invertible_pipe


@pytest.mark.parametrize("size", [(16, 16), (20, 31), (9, 12), (64, 50)])
def test_unmasked_pixels_are_unchanged(pipe, size):
    image, marked = photo(*size), box_mask(*size, (2, 3, 7, 8))
    result = pipe.inpaint(
        image, marked, "a red apple", painting=PAINTING, num_images=3, seed=1, **QUICK
    )
    assert [one.size for one in result.images] == [size] * 3 and result.seeds == [1, 2, 3]
    kept = np.asarray(marked) == 0
    assert all(difference(one, image, kept) == 0 for one in result.images)
    assert len({one.tobytes() for one in result.images}) == 3


def test_images_do_not_depend_on_the_batch(pipe):
    image, marked = photo(16, 16), box_mask(16, 16, (2, 3, 12, 12))
    together = pipe.inpaint(
        image, marked, "a red apple", painting=PAINTING, num_images=3, seed=1, **QUICK
    )
    alone = pipe.inpaint(image, marked, "a red apple", painting=PAINTING, seed=3, **QUICK)
    assert difference(alone.images[0], together.images[2]) <= 1


def test_the_prompt_is_used_and_optional(pipe):
    image, marked = photo(16, 16), box_mask(16, 16, (2, 3, 12, 12))
    generated = {"painting": PAINTING, "seed": 1, **QUICK}
    apple, fish, none = (
        pipe.inpaint(image, marked, said, **generated)
        for said in ("a red apple", "a blue fish", None)
    )
    assert difference(apple.images[0], fish.images[0]) > 0
    assert none.prompts == [None] and none.image_emb.allclose(pipe.encode_image(image))


EDITS = {
    "inpaint": lambda pipe, **more: pipe.inpaint(
        photo(16, 16), box_mask(16, 16, (2, 3, 12, 12)), painting=PAINTING, **more
    ),
    "outpaint": lambda pipe, **more: pipe.outpaint(
        photo(16, 16), right=4, painting=PAINTING, **more
    ),
    "image_to_image": lambda pipe, **more: pipe.image_to_image(photo(16, 16), **more),
}


@pytest.mark.parametrize("prompt", ["a red apple", None])
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_a_negative_prompt_replaces_the_null_of_guidance(pipe, edit, prompt):
    call = {"prompt": prompt, "seed": 1, **QUICK}
    plain, avoided = edit(pipe, **call), edit(pipe, negative_prompt="a blue fish", **call)
    assert difference(plain.images[0], avoided.images[0]) > 0
    # The prior, which makes embeddings of prompts, is guided too.
    assert (plain.image_emb != avoided.image_emb).any() == (prompt is not None)
    again = regenerate(pipe, avoided.metadata[0], progress=False)
    assert difference(again.images[0], avoided.images[0]) <= 2
    assert "negative_prompt" not in plain.metadata[0]["arguments"]


def test_a_negative_prompt_needs_guidance(pipe):
    unguided = replace(pipe.options, decoder=replace(pipe.options.decoder, guidance=1.0))
    call = {"negative_prompt": "a blue fish", "options": unguided, **QUICK}
    with pytest.raises(ValueError, match="guidance is 1 in decoder; set it higher"):
        pipe.image_to_image(photo(16, 16), **call)
    pipe.image_to_image(photo(16, 16), "a red apple", **call)  # guidance of the prior
    with pytest.raises(ValueError, match="2 negative prompts for 1 images"):
        pipe.image_to_image(photo(16, 16), negative_prompt=["a", "b"])


def test_low_strength_keeps_the_old_content(pipe):
    image, marked = photo(16, 16), box_mask(16, 16, (2, 3, 12, 12))

    def changed(strength: float) -> float:
        painting = PaintOptions(resamples=1, strength=strength)
        options = replace(
            pipe.options, decoder=replace(pipe.options.decoder, steps=20), upsamplers=()
        )
        generated = pipe.inpaint(
            image, marked, "a red apple", painting=painting, options=options, seed=1, **QUICK
        )
        return float(np.abs(np.subtract(generated.images[0], image, dtype=int)).mean())

    assert changed(0.1) < changed(0.5) < changed(1.0)


def test_a_mask_of_another_size_is_rejected(pipe):
    with pytest.raises(ValueError, match="mask is 8 x 9 px, but the image is 16 x 16"):
        pipe.inpaint(photo(16, 16), box_mask(8, 9, (0, 0, 2, 2)), "a")


def test_empty_and_full_masks_warn(pipe):
    image = photo(16, 16)
    with pytest.warns(UserWarning, match="nothing is marked"):
        result = pipe.inpaint(image, Image.new("L", (16, 16)), "a", num_images=2, **QUICK)
    assert [difference(one, image) for one in result.images] == [0, 0]
    with pytest.warns(UserWarning, match="everything is marked"):
        result = pipe.inpaint(image, Image.new("L", (16, 16), 255), "a", painting=PAINTING, **QUICK)
    assert difference(result.images[0], image) > 0


def test_transparent_parts_of_a_mask_are_painted(pipe):
    image = photo(16, 16)
    clear = image.convert("RGBA")
    clear.putalpha(box_mask(16, 16, (0, 0, 16, 8)))  # opaque above
    result = pipe.inpaint(image, clear, "a", painting=PAINTING, seed=0, **QUICK)
    kept = np.zeros((16, 16), dtype=bool)
    kept[:8] = True
    assert (
        difference(result.images[0], image, kept) == 0
        and difference(result.images[0], image, ~kept) > 0
    )


@pytest.mark.parametrize(
    "borders",
    [{"right": 30}, {"left": 3, "top": 40}, {"left": 9, "top": 9, "right": 9, "bottom": 9}],
)
def test_outpainting_extends_each_side(pipe, borders):
    image = photo(16, 20)
    result = pipe.outpaint(
        image, "a red apple", **borders, painting=PAINTING, seed=1, num_images=2, **QUICK
    )
    left, top = borders.get("left", 0), borders.get("top", 0)
    width, height = 16 + left + borders.get("right", 0), 20 + top + borders.get("bottom", 0)
    for one in result.images:
        assert one.size == (width, height)
        assert difference(one.crop((left, top, left + 16, top + 20)), image) == 0
        outside = np.ones((height, width), dtype=bool)
        outside[top : top + 20, left : left + 16] = False
        assert np.asarray(one)[outside].any(axis=1).mean() > 0.9  # painted, not black


@pytest.mark.parametrize(
    ("borders", "message"),
    [
        ({}, "are all 0"),
        ({"left": -1}, "left is -1"),
        ({"top": 1.5}, "top is 1.5"),
        ({"right": 5000}, "expected at most 64"),
        ({"left": 10**10}, "expected at most 64"),
        ({"bottom": 10**19}, "expected at most 64"),
    ],
)
def test_invalid_borders_are_rejected(pipe, borders, message):
    with pytest.raises(ValueError, match=message):
        pipe.outpaint(photo(16, 16), "a", **borders)


def test_image_to_image_changes_more_with_strength(pipe):
    image = photo(16, 16)
    options = replace(pipe.options, decoder=replace(pipe.options.decoder, steps=20))

    def changed(strength: float) -> float:
        generated = pipe.image_to_image(
            image, "a red apple", strength=strength, options=options, seed=1, **QUICK
        )
        return float(np.abs(np.subtract(generated.images[0], image, dtype=int)).mean())

    assert changed(0.1) < changed(0.4) < changed(1.0)
    assert pipe.image_to_image(photo(40, 30), "a", seed=0, **QUICK).images[0].size == (40, 30)
    assert pipe.image_to_image(photo(1, 1), "a", seed=0, **QUICK).images[0].size == (1, 1)
    for strength in (0.0, 1.1):
        with pytest.raises(ValueError, match="strength is"):
            pipe.image_to_image(image, "a", strength=strength)


@pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # diffusers, numpy 2
def test_painting_works_with_diffusers_schedulers(pipe):
    scheduler = EulerDiscreteScheduler(
        trained_betas=scheduler_betas(pipe.schedules["decoder"]), use_karras_sigmas=True
    )
    options = replace(pipe.options, decoder=replace(pipe.options.decoder, sampler=scheduler))
    image, marked = photo(16, 16), box_mask(16, 16, (2, 3, 12, 12))
    pipe.inpaint(image, marked, "a", painting=PAINTING, options=options, **QUICK)
    pipe.image_to_image(image, "a", options=options, **QUICK)


def test_every_step_is_reported(pipe):
    steps = []
    marked = box_mask(16, 16, (2, 3, 12, 12))
    pipe.inpaint(photo(16, 16), marked, "a", painting=PAINTING, on_step=steps.append, **QUICK)
    once = [("prior", i, 3) for i in (1, 2, 3)] + [("decoder", i, 8) for i in range(1, 9)]
    once += [("upsampler_0", i, 3) for i in (1, 2, 3)]
    assert [(p.stage, p.step, p.num_steps) for p in steps] == once


def test_metadata_regenerates_edited_images(pipe, tmp_path):
    image, generated = photo(20, 16), {"num_images": 2, "seed": 4, **QUICK}
    results = [
        pipe.inpaint(
            image, box_mask(20, 16, (2, 3, 9, 9)), "a red apple", painting=PAINTING, **generated
        ),
        pipe.outpaint(image, right=9, painting=PAINTING, **generated),
        pipe.image_to_image(image, "a blue fish", strength=0.5, **generated),
    ]
    for result in results:
        save_png(result.images[1], tmp_path / "a.png", result.metadata[1])
        (metadata,) = read_metadata(tmp_path / "a.png")
        assert (
            difference(regenerate(pipe, metadata, progress=False).images[0], result.images[1]) <= 2
        )
    with pytest.raises(ValueError, match="source image is not stored"):
        regenerate(pipe, {**results[2].metadata[0], "picture": None}, progress=False)


def test_images_too_large_for_metadata_are_omitted(monkeypatch):
    from unclip.pipelines import provenance as recipes

    monkeypatch.setattr(recipes, "MAX_TEXT", 100)
    assert encode_image(Image.effect_noise((64, 64), 50)) is None


def test_unsupported_options_are_rejected(pipe):
    options = replace(pipe.options, decoder=replace(pipe.options.decoder, cache_interval=2))
    with pytest.raises(ValueError, match="cache_interval is above 1"):
        pipe.image_to_image(photo(16, 16), "a", options=options)
    with pytest.raises(ValueError, match="got 2 images"):
        pipe.outpaint([photo(16, 16)] * 2, "a", left=4)
    with pytest.raises(ValueError, match="1 masks for 2 images"):
        pipe.inpaint([photo(16, 16)] * 2, box_mask(16, 16, (0, 0, 4, 4)), "a")
    with pytest.raises(ValueError, match="2 prompts for 1 images"):
        pipe.image_to_image(photo(16, 16), ["a", "b"])
    options = replace(pipe.options, embedding="none")
    with pytest.raises(ValueError, match="embedding is 'none'; painting, .* need 'prior'"):
        pipe.inpaint(photo(16, 16), box_mask(16, 16, (0, 0, 4, 4)), "a fish", options=options)


@pytest.mark.parametrize("prompts", [None, ["a", "b", "c"]])
def test_several_images_are_edited_as_each_alone(pipe, prompts):
    sizes = ((16, 16), (40, 24), (32, 32))  # the second one needs two windows
    images = [photo(*size) for size in sizes]
    masks = [
        box_mask(16, 16, (0, 0, 4, 9)),
        box_mask(40, 24, (2, 3, 38, 20)),
        Image.new("L", (32, 32)),
    ]
    with pytest.warns(UserWarning, match="nothing is marked"):
        result = pipe.inpaint(images, masks, prompts, num_images=2, seed=5, **QUICK)
        for k, image in enumerate(images):
            prompt = prompts[k] if isinstance(prompts, list) else prompts
            alone = pipe.inpaint(image, masks[k], prompt, num_images=2, seed=5 + 2 * k, **QUICK)
            assert alone.seeds == result.seeds[2 * k : 2 * k + 2]
            assert alone.metadata == result.metadata[2 * k : 2 * k + 2]
            for ours, theirs in zip(result.images[2 * k :], alone.images, strict=False):
                difference = np.abs(np.asarray(ours).astype(int) - np.asarray(theirs))
                assert difference.max() <= 2
                assert (np.asarray(ours) == np.asarray(image))[np.asarray(masks[k]) == 0].all()


# -- windows


def covered(hole: np.ndarray, side: int) -> np.ndarray:
    seen = np.zeros_like(hole)
    for left, top in windows_over(hole, side):
        assert 0 <= left <= hole.shape[1] - side and 0 <= top <= hole.shape[0] - side
        seen[top : top + side, left : left + side] = True
    return seen


def test_a_small_hole_is_centred_in_one_window():
    hole = np.zeros((100, 40), dtype=bool)
    hole[60:70, 5:15] = True
    assert list(windows_over(hole, 40)) == [(0, 45)]
    assert list(windows_over(np.zeros((40, 40), dtype=bool), 40)) == []


@pytest.mark.parametrize("shape", [(16, 16), (16, 90), (70, 40), (33, 47)])
def test_windows_cover_the_hole(shape):
    everything = np.ones(shape, dtype=bool)
    assert covered(everything, 16).all()
    beyond = everything.copy()
    beyond[:16, :16] = False
    assert (covered(beyond, 16) | ~beyond).all()


def test_the_first_window_contains_known_pixels():
    hole = np.ones((16, 80), dtype=bool)
    hole[:, :16] = False
    windows = list(windows_over(hole, 16))
    assert windows == [(left, 0) for left in range(8, 65, 8)]


def test_too_many_windows_are_rejected():
    hole = np.zeros((16, 3200), dtype=bool)
    hole[8, : 64 * 16] = True
    assert len(list(windows_over(hole, 16))) <= 64
    hole[8] = True  # small area, but long
    with pytest.raises(ValueError, match="expected at most 64"):
        list(windows_over(hole, 16))


def test_the_content_of_the_hole_is_not_used():
    for side, size in ((16, 16), (64, 16), (8, 16)):
        pixels = np.full((1, side, side, 3), 255, dtype=np.uint8)
        hole = np.zeros((side, side), dtype=bool)
        hole[side // 4 : side // 2, side // 4 : side // 2] = True
        pixels[:, hole] = 0
        known, marked = to_model(pixels, hole, size, keep=False)
        assert known.shape == (1, 3, size, size) and marked.shape == (1, 1, size, size)
        assert known.min() > 0.99 and marked.float().mean() == pytest.approx(1 / 16)
        assert to_model(pixels, hole, size, keep=True)[0].min() < -0.9


def test_a_large_image_is_edited_at_full_size(pipe):
    """The model paints small windows; known pixels keep their full resolution."""
    image, marked = photo(3000, 2000), box_mask(3000, 2000, (100, 100, 300, 300))
    with pytest.warns(UserWarning, match="3000 x 2000 px is too large for metadata") as warned:
        result = pipe.inpaint(image, marked, "a", painting=PaintOptions(1), seed=0, **QUICK)
    assert [one.filename for one in warned] == [__file__]
    assert difference(result.images[0], image, np.asarray(marked) == 0) == 0
