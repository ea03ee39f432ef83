"""Reading images of every mode and file type; writing PNG, GIF and MP4 with metadata."""

from __future__ import annotations

import io
import os
import shutil
import stat
import struct
import subprocess
import sys
import warnings
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, PngImagePlugin
from scripts import ROOT

from unclip import image_io
from unclip.image_io import (
    cell,
    encode_image,
    image_name,
    lacks_image,
    open_image,
    open_mask,
    read_metadata,
    resize,
    save_animation,
    save_image,
    save_png,
)
from unclip.types import GenerationResult


def saved(image: Image.Image, path, **options) -> str:
    image.save(path, **options)
    return str(path)


def test_every_image_mode_becomes_rgb(tmp_path):
    red = Image.new("RGB", (6, 4), (200, 30, 40))
    kinds = {
        "palette.gif": red.quantize(4),
        "grey.png": red.convert("L"),
        "bits.png": red.convert("1"),
        "clear.png": red.convert("RGBA"),
        "cmyk.jpg": red.convert("CMYK"),
        "cmyk.tif": red.convert("CMYK"),
        "greyalpha.png": red.convert("LA"),
    }
    for name, image in kinds.items():
        opened = open_image(saved(image, tmp_path / name))
        assert (opened.mode, opened.size) == ("RGB", (6, 4)), name
        if "grey" not in name and "bits" not in name:
            assert np.abs(np.subtract(opened.getpixel((2, 2)), (200, 30, 40))).max() <= 4, name


def test_16_bit_images_are_scaled_to_8_bits(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    opened = open_image(saved(Image.fromarray(ramp), tmp_path / "deep.png"))
    assert np.abs(np.asarray(opened, dtype=int)[..., 0].ravel() - np.arange(256)).max() <= 1


def test_integers_of_32_bits_are_taken_as_16_bits_or_refused(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.int32).reshape(16, 16)
    opened = open_image(saved(Image.fromarray(ramp), tmp_path / "wide.tif"))
    assert np.abs(np.asarray(opened, dtype=int)[..., 0].ravel() - np.arange(256)).max() <= 1
    for value, name in ((2**31 - 1, "large.tif"), (-1, "negative.tif")):
        ramp[0, 0] = value
        path = saved(Image.fromarray(ramp), tmp_path / name)
        for read in (open_image, open_mask):
            with pytest.raises(ValueError, match=rf"{name}: .*{value}.*; expected 0 to 65535"):
                read(path)


def test_integers_up_to_255_in_memory_are_8_bits(tmp_path):
    ramp = np.arange(256, dtype=np.int32).reshape(16, 16)
    image = Image.fromarray(ramp)
    assert image.mode == "I" and np.array_equal(np.asarray(open_image(image))[..., 0], ramp)
    assert np.array_equal(np.asarray(open_mask(image)), np.where(ramp > 127, 255, 0))
    dark = saved(Image.fromarray(ramp.astype(np.uint16)), tmp_path / "dark.png")
    image.format = "PNG"  # as Pillow 10.1 opens PNGs of 16 bits
    for source in (dark, image):
        assert np.asarray(open_image(source)).max() == 1


@pytest.mark.filterwarnings("error")
def test_damaged_exif_is_ignored_without_a_warning(tmp_path):
    cut = b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01"  # five tags, of which none is complete
    path = saved(Image.new("RGB", (4, 2), "red"), tmp_path / "cut.jpg", exif=cut)
    assert open_image(path).size == (4, 2)
    with pytest.raises(ValueError, match="no unclip metadata"):
        read_metadata(path)


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (8, 4), "blue")
    image.paste("red", (0, 0, 4, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise
    opened = open_image(saved(image, tmp_path / "turned.png", exif=exif))
    assert opened.size == (4, 8)
    assert opened.getpixel((2, 1)) == (255, 0, 0) and opened.getpixel((2, 6)) == (0, 0, 255)


def test_the_first_frame_of_an_animation_is_opened(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    path = saved(frames[0], tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert open_image(path).getpixel((1, 1)) == (255, 0, 0)


def test_large_images_open_without_a_warning_and_decompression_bombs_are_errors(
    tmp_path, monkeypatch
):
    path = saved(Image.new("1", (400, 400)), tmp_path / "large.png")
    # The image has 1.6 times this limit, like 10,000 x 10,000 pixels and the default limit.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(path).size == (400, 400)
    monkeypatch.setattr("unclip.image_io.reading.MAX_DECODED", 4 * 400 * 400)
    assert open_image(path).size == (400, 400)
    deep = saved(Image.new("I;16", (400, 400)), tmp_path / "deep.png")
    with pytest.raises(
        ValueError, match=r"deep\.png: .* 400 x 400 pixels; .* 80,000 pixels .* I;16"
    ):
        open_image(deep)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    with pytest.raises(ValueError, match=r"large\.png: Image size .* exceeds limit"):
        open_image(path)


@pytest.mark.parametrize("name", ["evil.png", "a.jpg", "a.eps"])
def test_postscript_is_refused_under_any_name(tmp_path, monkeypatch, name):
    """Pillow would start Ghostscript on it."""
    monkeypatch.setattr(subprocess, "Popen", mock.Mock(side_effect=AssertionError))
    path = tmp_path / name
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    for read in (open_image, open_mask, read_metadata, image_io.read_source_type):
        with pytest.raises(
            ValueError, match=rf"{name}: not a readable image; expected .*\(PNG, JPEG"
        ):
            read(path)
    with pytest.raises(ValueError, match="the image: not a readable image"):
        open_image(io.BytesIO(path.read_bytes()))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no pipes in folders")
def test_pipes_and_devices_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", "/dev/zero", tmp_path):
        with pytest.raises(ValueError, match="(a pipe or a device|a folder); expected"):
            open_image(path)


def test_floating_point_pixels_are_an_error(tmp_path):
    path = saved(Image.new("F", (4, 4)), tmp_path / "floats.tif")
    with pytest.raises(ValueError, match=r"floats\.tif: mode is F; expected RGB"):
        open_image(path)


def test_arrays_and_tensors_are_an_error():
    for source in (np.zeros((4, 4, 3), dtype=np.uint8), torch.zeros(3, 4, 4), None):
        for opened in (open_image, open_mask):
            with pytest.raises(ValueError, match=f"{type(source).__name__}; expected a path"):
                opened(source)
    result = GenerationResult([Image.new("RGB", (4, 4))], [0], ["a"])
    with pytest.raises(ValueError, match=r"GenerationResult; .* for a result: result.images"):
        open_image(result)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"from bytes; expected a path.* io.BytesIO\(data\)"):
        open_image(b"abc")  # type: ignore[arg-type]


def test_masks_are_read_from_brightness_or_transparency(tmp_path):
    grey = Image.fromarray(np.array([[0, 127], [128, 255]], dtype=np.uint8))
    assert np.asarray(open_mask(saved(grey, tmp_path / "grey.png"))).tolist() == [
        [0, 0],
        [255, 255],
    ]
    clear = Image.new("RGBA", (2, 1), "white")
    clear.putpixel((1, 0), (0, 0, 0, 0))
    assert np.asarray(open_mask(saved(clear, tmp_path / "clear.png"))).tolist() == [[0, 255]]
    for mode in ("RGBA", "LA"):  # fully opaque: the alpha channel is ignored
        opaque = grey.convert(mode)
        assert np.asarray(open_mask(saved(opaque, tmp_path / f"{mode}.png"))).tolist() == [
            [0, 0],
            [255, 255],
        ]
    with pytest.raises(FileNotFoundError, match="none.png does not exist"):
        open_mask(tmp_path / "none.png")


def test_damaged_files_are_one_line_errors(tmp_path, monkeypatch):
    """Pillow raises almost any exception type."""
    path = saved(Image.new("RGB", (4, 4)), tmp_path / "a.png")
    for error in (
        RuntimeError("frame 0"),
        NotImplementedError("format 0"),
        struct.error("4 bytes"),
        AttributeError(),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(ImageOps, "exif_transpose", mock.Mock(side_effect=error))
            for opened in (open_image, open_mask):
                with pytest.raises(ValueError, match=r"a\.png: not a readable image; expected"):
                    opened(path)


def test_resize_is_antialiased_and_keeps_the_dtype():
    images = (torch.arange(8)[:, None] + torch.arange(8)).remainder(2).expand(2, 3, 8, 8)
    for dtype in (torch.float16, torch.float32, torch.float64):
        small = resize(images.to(dtype), (2, 2), "bilinear")
        assert small.dtype == dtype and small.shape == (2, 3, 2, 2)
        assert (small - 0.5).abs().max() < 0.01


# -- metadata


@pytest.mark.parametrize(
    "text",
    [
        *("5", '"x"', '"pictures"', "null", "[]", "[1]", "{", "[" * 100_000, '{"pictures": [1]}'),
        *(
            '{"pictures": [], "entries": [{"picture": 0}]}',
            '{"pictures": [1], "entries": [{"picture": 0}]}',
        ),
        *(
            '{"options": 5}',
            '{"sources": [4]}',
            '{"sources": ["x"]}',
            '{"sources": 4}',
            '{"options": null}',
        ),
        *(
            '{"dtype": []}',
            '{"image_emb": 5}',
            '{"arguments": []}',
            '[{"seed": 1}, {"sources": [{"picture": 1}]}]',
        ),
    ],
)
def test_foreign_and_damaged_metadata_is_an_error(tmp_path, text):
    info = PngImagePlugin.PngInfo()
    info.add_itxt(image_io.METADATA_KEY, text)
    path = saved(Image.new("RGB", (4, 4)), tmp_path / "a.png", pnginfo=info)
    with pytest.raises(ValueError, match=r"a\.png: damaged metadata"):
        read_metadata(path)


@pytest.fixture(params=["isal", "zlib"])
def compression(request, monkeypatch):
    """The compression of encoded PNGs, with and without the optional package."""
    if request.param == "isal":
        pytest.importorskip("isal")
    else:
        monkeypatch.setitem(sys.modules, "isal", None)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 3), (256, 256)])
def test_an_encoded_png_has_the_same_pixels_and_metadata(size, compression):
    pixels = np.random.default_rng(0).integers(0, 256, (*reversed(size), 3), np.uint8)
    file = io.BytesIO(encode_image(Image.fromarray(pixels), metadata={"prompt": "größer"}))
    with Image.open(file) as opened:
        opened.load()
    assert (opened.format, opened.mode, opened.size) == ("PNG", "RGB", size)
    assert np.array_equal(np.asarray(opened), pixels)
    file.seek(0)
    assert read_metadata(file) == [{"prompt": "größer"}]


@pytest.mark.parametrize("size", [64, 256, 1024])
def test_an_encoded_png_is_about_as_small_as_a_fast_one_of_pillow(size, compression):
    image = Image.open(ROOT / "assets/emoji/samples.png").convert("RGB").crop((0, 0, 256, 256))
    image = image.resize((size, size), Image.Resampling.LANCZOS)
    fast = io.BytesIO()
    image.save(fast, "PNG", compress_level=1)
    assert len(encode_image(image)) < 1.1 * len(fast.getvalue())


def test_an_input_image_is_stored_once_for_all_entries(frames, tmp_path):
    entries = [
        *(
            {"seed": i, "operation": "inpaint", "picture": "P" * 9000, "mask": "M" * 900}
            for i in range(9)
        ),
        *(
            {"sources": [{"picture": "P" * 9000}, {"picture": one}, {"seed": 2}]}
            for one in ("Q" * 9000, None)
        ),
        {"prompt": {"picture": 2.0}},
    ]
    save_png(frames[0], tmp_path / "a.png", entries)
    save_animation(frames, tmp_path / "a.gif", metadata=entries)
    for path in (tmp_path / "a.png", tmp_path / "a.gif"):
        assert read_metadata(path) == entries and path.stat().st_size < 22_000
    assert [lacks_image(entry) for entry in entries] == [*[False] * 10, True, False]


def test_input_images_that_are_too_large_are_left_out_with_a_warning(frames, tmp_path, monkeypatch):
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_MEMORY", 3000)
    monkeypatch.setattr("unclip.image_io.metadata.MAX_METADATA", 2800)
    entries = [
        {"seed": 1, "picture": "P" * 2000},
        {"seed": 2, "sources": [{"picture": "Q" * 2000}]},
    ]
    for metadata in (entries, {"picture": "P" * 3000}):
        with pytest.warns(UserWarning, match="input images are too large for a png") as caught:
            save_png(frames[0], tmp_path / "a.png", metadata)
        assert caught[0].filename == __file__
        assert all(map(lacks_image, read_metadata(tmp_path / "a.png")))
    save_png(frames[0], tmp_path / "a.png", entries[:1] * 9)
    assert read_metadata(tmp_path / "a.png") == entries[:1] * 9


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_what_jpeg_and_webp_have_no_room_for_is_left_out_with_a_warning(suffix, frames, tmp_path):
    path, entry = tmp_path / f"a{suffix}", {"seed": 1, "picture": "P" * 70_000}
    with pytest.warns(UserWarning, match="input images are too large for a .* a .png file has"):
        save_image(frames[0], path, [entry])
    assert read_metadata(path) == [{"seed": 1, "picture": None}]
    with pytest.warns(UserWarning, match="metadata is too large"):
        save_image(frames[0], path, [{"image_emb": "E" * 9000}] * 7)
    with pytest.raises(ValueError, match="no unclip metadata"):
        read_metadata(path)


# -- animations


@pytest.fixture
def frames() -> list[Image.Image]:
    return [Image.new("RGB", (15, 9), (40 * i, 20, 200 - 30 * i)) for i in range(5)]


def test_a_gif_holds_its_frames_and_metadata(frames, tmp_path):
    entries = [{"operation": "interpolate", "prompt": "é" * 300, "frame": i} for i in range(5)]
    save_animation(frames, tmp_path / "new" / "a.gif", fps=5, metadata=entries)
    with Image.open(tmp_path / "new" / "a.gif") as image:
        assert (image.n_frames, image.size, image.info["duration"]) == (5, (15, 9), 200)
        for i, frame in enumerate(frames):
            image.seek(i)
            written = np.asarray(image.convert("RGB"), int)
            assert np.abs(written - np.asarray(frame, int)).max() <= 8
    assert read_metadata(tmp_path / "new" / "a.gif") == entries
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.gif"]


@pytest.mark.parametrize(
    ("fps", "lengths"), [(15, [70, 60, 70, 70, 60]), (24, [40] * 3 + [50, 40]), (100, [10] * 5)]
)
def test_gif_frame_durations_add_up_to_the_frame_rate(frames, tmp_path, fps, lengths):
    """Durations are in hundredths of a second, so that they differ between frames."""
    save_animation(frames, tmp_path / "a.gif", fps)
    with Image.open(tmp_path / "a.gif") as image:
        found = [image.seek(i) or image.info["duration"] for i in range(5)]
    assert found == lengths and abs(sum(found) - 5000 / fps) <= 5


def test_unsupported_animations_are_errors(frames, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"'\.webm'; expected \.gif or \.mp4"):
        save_animation(frames, tmp_path / "a.webm")
    for fps in (0, 0.001, 101, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=rf"fps is {fps:g}; expected 0.1 to 100 for a \.gif"):
            save_animation(frames, tmp_path / "a.gif", fps)
    with pytest.raises(ValueError, match=r"fps is inf; expected 0.1 to 1000 for a \.mp4"):
        save_animation(frames, tmp_path / "a.mp4", float("inf"))
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)  # not installed
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="needs ffmpeg"):
        save_animation(frames, tmp_path / "a.mp4")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a shell script")
def test_ffmpeg_is_given_the_frames(frames, tmp_path, monkeypatch):
    """A stand-in records its arguments and input, because ffmpeg is not always installed."""
    program = tmp_path / "ffmpeg"
    program.write_text(
        '#!/bin/sh\necho "$@" > "$0.arguments"\nfor last; do :; done\ncat > "$last"\n'
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    save_animation(frames, tmp_path / "a.mp4", fps=12)
    assert (tmp_path / "a.mp4").read_bytes() == b"".join(frame.tobytes() for frame in frames)
    arguments = (tmp_path / "ffmpeg.arguments").read_text()
    assert "-s 15x9 -r 12" in arguments and "-pix_fmt yuv420p" in arguments
    script = 'cat > /dev/null\nfor last; do :; done\necho "$last: no such codec" >&2\nexit 1'
    program.write_text(f"#!/bin/sh\n{script}\n")
    with pytest.raises(OSError) as caught:
        save_animation(frames, tmp_path / "b.mp4")
    expected = f"cannot write {tmp_path / 'b.mp4'}: ffmpeg reports 'the file: no such codec'"
    assert str(caught.value) == expected
    assert not (tmp_path / "b.mp4").exists()


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.gif"])
def test_the_error_of_a_file_that_cannot_be_written_names_it(frames, tmp_path, name):
    (tmp_path / name / "folder").mkdir(parents=True)
    save = save_animation if name == "a.gif" else save_image
    with pytest.raises(OSError) as caught:
        save(frames if name == "a.gif" else frames[0], tmp_path / name)
    assert str(caught.value).startswith(f"cannot write {tmp_path / name}: ")


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")
def test_an_mp4_is_written(frames, tmp_path):
    save_animation(frames, tmp_path / "a.mp4")
    assert (tmp_path / "a.mp4").read_bytes()[4:8] == b"ftyp"


def test_a_cell_has_titles_above_and_a_caption_below():
    image = cell([Image.new("RGB", (8, 8), "red"), None], 20, "a b", ["1", "2"])
    assert image.width == 44 and image.height > 40
    assert (np.asarray(image)[:, 22:] != 255).any()


def test_files_that_are_not_images_are_rejected(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.png does not exist"):
        open_image(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(ValueError, match=r"text\.png: not a readable image"):
        open_image(tmp_path / "text.png")
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"half\.png: .*truncated"):
        open_image(tmp_path / "half.png")
    with pytest.raises(ValueError, match=r"whole\.png .*metadata"):
        read_metadata(tmp_path / "whole.png")


def test_file_names_tell_texts_apart():
    assert image_name("A red apple, noto emoji!", 3) == "a-red-apple-noto-emoji-3"
    long = "a " * 40 + "red apple"
    similar = [
        "C++",
        "C#",
        "c",
        "\N{RED APPLE}",
        "\N{GREEN APPLE}",
        long,
        long.replace("red", "blue"),
    ]
    names = [image_name(text, 0) for text in similar]
    assert len(set(names)) == len(similar) and names[2] == "c-0"
    assert all(name.replace("-", "").isalnum() for name in names)


def test_every_image_of_a_result_gets_a_file_of_its_own(tmp_path):
    colours = ["red", "green", "blue"]
    images = [Image.new("RGB", (4, 4), colour) for colour in colours]
    for seeds in ([1, 1, 1], [1, 1, 2]):
        files = GenerationResult(images, seeds, ["a", "a", "a 1"]).save(tmp_path / "out")
        written = [np.asarray(open_image(file)) for file in files]
        assert all(map(np.array_equal, written, map(np.asarray, images)))
