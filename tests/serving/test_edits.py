"""Edits: masks, strength and painting."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace

import numpy as np
import pytest
from api_helpers import EDITS, VARIATIONS, edit, encode, error_of, generate, images_of
from PIL import Image
from serving_helpers import CONFIG, client, load, opened, pixels, png

from unclip.config import to_dict
from unclip.diffusion.repaint import PaintOptions
from unclip.image_io import read_metadata


@pytest.mark.parametrize("size", [16, 24, 40])
def test_kept_pixels_equal_the_upload(client, size):
    image = png(size)
    results = images_of(edit(client, image, png(size, "RGBA"), n="2"))
    assert len(results) == 2
    for data in results:
        assert opened(data).size == (size, size)
        assert (pixels(data)[size // 2 :] == pixels(image)[size // 2 :]).all()
        assert (pixels(data)[: size // 2] != pixels(image)[: size // 2]).any()


def test_the_images_own_alpha_is_the_mask(client):
    image = png(16, "RGBA")
    (data,) = images_of(edit(client, image))
    (masked,) = images_of(edit(client, png(16), image))
    assert (pixels(data)[8:] == pixels(image)[8:]).all()
    assert (pixels(masked)[8:] == pixels(image)[8:]).all()


def test_a_mask_of_16_bits_is_split_at_mid_grey(client):
    pixels_16 = np.full((16, 16), 600, np.uint16)  # nearly black
    pixels_16[:8] = 2**15 + 600
    file = io.BytesIO()
    Image.fromarray(pixels_16).save(file, "PNG")
    (data,) = images_of(edit(client, png(16), file.getvalue()))
    assert (pixels(data)[8:] == pixels(png(16))[8:]).all()
    assert (pixels(data)[:8] != pixels(png(16))[:8]).any()


@pytest.mark.parametrize("size", [16, 40])
def test_a_dalle_inpaints(client, tiny_dalle, size):
    image, mask = png(size), png(size, "RGBA", seed=1)
    data = images_of(edit(client, image, mask, model="tiny-dalle", n="2", strength="1"))
    hole = Image.new("L", (size, size))
    hole.paste(255, (0, 0, size, size // 2))
    call = {"num_images": 2, "seed": 3, "progress": False}
    expected = tiny_dalle.inpaint(opened(image), hole, "a red apple", **call)
    for one, same_seed in zip(data, expected.images, strict=True):
        assert (pixels(one) == np.asarray(same_seed)).all()
        assert (pixels(one)[size // 2 :] == pixels(image)[size // 2 :]).all()


def test_json_edits_take_data_urls(client):
    encoded = base64.b64encode(png(16, "RGBA")).decode()
    body = {"prompt": "a red apple", "response_format": "b64_json", "seed": 3}
    expected = images_of(edit(client))
    for image in (
        {"image": f"data:image/png;base64,{encoded}"},
        {"image": encoded},
        {"images": [{"image_url": f"data:image/png;base64,{encoded}"}]},
    ):
        assert images_of(client.post(EDITS, json={**body, **image})) == expected


def test_strength_without_a_mask_changes_the_whole_image(client, tiny_pipe):
    (data,) = images_of(edit(client, png(16), strength="0.5"))
    image = opened(png(16))
    call = dict(strength=0.5, seed=3, progress=False)
    (expected,) = tiny_pipe.image_to_image(image, "a red apple", **call).images
    assert (pixels(data) == np.asarray(expected)).all()


def test_an_opaque_alpha_channel_is_no_mask(client):
    white = Image.new("L", (16, 16))
    white.paste(255, (0, 0, 8, 16))
    (data,) = images_of(edit(client, png(16), encode(white.convert("RGBA"))))
    assert [data] == images_of(edit(client, png(16), encode(white)))
    assert (pixels(data)[:, :8] != pixels(png(16))[:, :8]).any()
    opaque = encode(opened(png(16)).convert("RGBA"))
    (data,) = images_of(edit(client, opaque, strength="0.5"))
    (expected,) = images_of(edit(client, png(16), strength="0.5"))
    assert (pixels(data) == pixels(expected)).all()
    assert "no transparent pixels" in error_of(edit(client, opaque), 400, "image")


@pytest.mark.parametrize(
    ("image", "mask", "param", "message"),
    [
        (png(16), None, "image", "got RGB"),
        (png(16), png(24, "RGBA"), "mask", "same size"),
        (b"GIF89a", None, "image", "PNG"),
        (b"", None, "image", "PNG"),
        (png(16)[:60], png(16, "RGBA"), "image", "damaged"),
        (png(16), b"nonsense", "mask", "PNG"),
    ],
)
def test_invalid_images(client, image, mask, param, message):
    assert message in error_of(edit(client, image, mask), 400, param)


def test_missing_image_and_prompt(client):
    error_of(client.post(EDITS, data={"prompt": "a"}, files={"x": b"y"}), 400, "image")
    error_of(client.post(EDITS, files={"image": png(mode="RGBA")}), 400, "prompt")
    error_of(client.post(VARIATIONS, json={}), 400, "image")


def test_uploads_are_not_written_into_results(client, tmp_path):
    (data,) = images_of(edit(client))
    (tmp_path / "image.png").write_bytes(data)
    (entry,) = read_metadata(tmp_path / "image.png")
    assert entry["operation"] == "inpaint"
    assert entry["picture"] is None and entry["mask"] is None
    assert CONFIG.metadata


def test_painting_options_are_among_those_of_an_edit(client, tiny_pipe):
    image, mask = png(16), png(16, "RGBA")
    options = json.dumps({"painting": {"resamples": 2, "strength": 0.5}, "decoder": {"steps": 2}})
    (data,) = images_of(edit(client, image, mask, options=options, strength="0.8"))
    hole = Image.new("L", (16, 16))
    hole.paste(255, (0, 0, 16, 8))
    usual, painting = tiny_pipe.options, PaintOptions(resamples=2, strength=0.8)
    call = {"options": replace(usual, decoder=usual.decoder.with_steps(2)), "painting": painting}
    expected = tiny_pipe.inpaint(opened(image), hole, "a red apple", **call, seed=3, progress=False)
    assert (pixels(data) == np.asarray(expected.images[0])).all()
    listed = client.get("/v1/models/tiny").json()["options"]["painting"]
    assert listed == to_dict(PaintOptions(trained=False))
    generate(client, model="tiny-dalle")  # loads it
    assert "painting" not in client.get("/v1/models/tiny-dalle").json()["options"]
    for painting, part, fact in (
        ({"resample": 2}, mask, "resamples"),
        ({"resamples": 65}, mask, "resamples is 65"),
        ({"resamples": 10**400}, mask, "expected at most 64"),
        (3, mask, "painting"),
        ({"resamples": 2}, None, "needs a mask"),
    ):
        fields = {"options": json.dumps({"painting": painting}), "strength": "0.5"}
        assert fact in error_of(edit(client, image, part, **fields), 400, "options")
