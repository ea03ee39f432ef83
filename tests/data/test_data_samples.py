import io

import numpy as np
import pytest
from PIL import Image

from unclip.data.samples import decode
from unclip.data.text import caption_list, readable, sample_weight
from unclip.files import shorten
from unclip.image_io import fit


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def test_transparency_becomes_white():
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0, 128))
    decoded = decode(encoded(image))
    assert decoded.mode == "RGB"
    assert [decoded.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (255, 127, 127)]


def test_a_transparent_palette_entry_becomes_white():
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 255, 0, 255, 0])
    image.putpixel((1, 0), 1)
    decoded = decode(encoded(image, transparency=0))
    assert [decoded.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 255, 0)]


def test_16_bit_grayscale_keeps_its_range():
    image = Image.fromarray(np.array([[0, 0x8000, 0xFFFF]], np.uint16))
    assert [pixel[0] for pixel in np.asarray(decode(encoded(image)))[0]] == [0, 128, 255]


def test_cmyk_becomes_rgb():
    decoded = decode(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100))
    assert decoded.mode == "RGB"
    assert np.abs(np.asarray(decoded, int) - [255, 0, 0]).max() < 8


def test_exif_rotation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    assert decode(encoded(Image.new("RGB", (30, 20)), "JPEG", exif=exif)).size == (20, 30)


def test_the_shorter_side_is_resized_and_the_center_cropped():
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (10, 0, 30, 20))
    pixels = np.asarray(fit(image, 10))
    assert pixels.shape == (10, 10, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels[:, 3:7] - np.array([0, 0, 255])).max() < 8
    assert (pixels[:, 0, 0] < pixels[:, 0, 2]).all()


def test_resizing_is_antialiased():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    resized = np.asarray(fit(Image.fromarray(stripes), 8), int)
    assert np.abs(resized - 127).max() < 8


@pytest.mark.parametrize(
    "damage", [lambda png: b"", lambda png: b"hello", lambda png: png[: len(png) // 2]]
)
def test_broken_images_raise_value_error(damage):
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="image"):
        decode(damage(encoded(Image.fromarray(noise))))


def test_formats_that_start_programs_are_rejected():
    with pytest.raises(ValueError, match="not a readable image"):
        decode(encoded(Image.new("RGB", (4, 4)), "EPS"))


def test_captions_and_weights_are_checked():
    assert caption_list(" a fox ") == ["a fox"] and caption_list(["a", " ", "b"]) == ["a", "b"]
    for empty in ("", None, [], [None, ""], " "):
        with pytest.raises(ValueError, match="no caption"):
            caption_list(empty)
    for wrong in (1, [1], ["a", {}], "x\ud83d", ["a", "\udce9"], "a\0"):
        with pytest.raises(ValueError, match="caption"):
            caption_list(wrong)
    assert sample_weight({}) == 1 and sample_weight({"weight": "0.5"}) == 0.5
    for wrong in (-1, "much", float("nan"), None, 1e9, 1e300, 10**400, "9" * 9999, [1]):
        with pytest.raises(ValueError, match="weight"):
            sample_weight({"weight": wrong})


def test_messages_are_short_and_on_one_line():
    assert readable("a\nb\x1b[31m\udce9\u2028é") == r"a\nb\x1b[31m\udce9\u2028é"
    nested = []
    for _ in range(10_000):
        nested = [nested]
    for value in ("x" * 500, "\x1b" * 500, 10**5000, nested):
        assert len(shorten(value)) <= 80 and shorten(value).isprintable()
