"""Opening of image files, which may be damaged or hostile."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError, features

from unclip.files import open_regular, printable

ImageSource = str | os.PathLike[str] | BinaryIO | Image.Image

# Formats that Pillow decodes by itself.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
if "avif" in features.modules and features.check_module("avif"):
    FORMATS = (*FORMATS, "AVIF")
MAX_DECODED = 2**29  # bytes of an image in memory: 134 million pixels of 8 bits per channel


def open_image(source: ImageSource) -> Image.Image:
    """Open an image as upright 8-bit RGB, composited on white; the first frame of an animation.

    Grey of 16 bits is scaled to 8 bits. A PIL image of mode I, as Image.fromarray makes of an int32
    array, has 8 bits if no value is above 255, else 16.

    Raises FileNotFoundError, or ValueError if the file is not an image of one of `FORMATS`, is
    damaged, or takes more than `MAX_DECODED` bytes in memory.
    """
    image = _open(source)
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def open_mask(source: ImageSource) -> Image.Image:
    """Open an inpainting mask in mode L: 255 where the image is painted, 0 where it is kept.

    The painted area is the transparent part of the file; without one, its pixels above mid-grey.
    """
    image = _open(source)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        clear = image.getchannel("A").point([255] * 128 + [0] * 128)
        if clear.getbbox():
            return clear
    return image.convert("L").point([0] * 128 + [255] * 128)


@contextlib.contextmanager
def pillow_warnings_ignored() -> Iterator[None]:
    """Ignore what Pillow warns of: images that `MAX_DECODED` allows, damaged EXIF."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def identify(file: BinaryIO, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Open an encoded image; its pixels are decoded on `load()`, while `file` must stay open.

    All images are opened here, because Pillow recognises formats by content, and starts other
    programs for some (EPS). Raises ValueError if the image is too large, else the errors of Pillow.
    """
    with pillow_warnings_ignored():
        image = Image.open(file, formats=formats)  # noqa: TID251
    width, height = image.size
    pixel = 8 if image.mode.startswith("I") else 4  # bytes; 16 bits are converted in 32
    if width * height * pixel > MAX_DECODED:
        expected = f"expected at most {MAX_DECODED // pixel:,} pixels in mode {image.mode}"
        raise ValueError(f"the image has {width} x {height} pixels; {expected}")
    return image


def read(source: ImageSource) -> Image.Image:
    """Decode a file with all its metadata; errors name it."""
    if isinstance(source, Image.Image):
        return source
    if not isinstance(source, (str, os.PathLike, io.IOBase)):
        advice = "for an array: Image.fromarray; for a result: result.images"
        expected = f"expected a path or a PIL image ({advice})"
        if isinstance(source, (bytes, bytearray)):
            expected = "expected a path, a PIL image or io.BytesIO(data)"
        raise ValueError(f"cannot open an image from {type(source).__name__}; {expected}")
    name = "the image" if isinstance(source, io.IOBase) else printable(source)
    try:
        if isinstance(source, io.IOBase):
            image = identify(source)  # type: ignore[arg-type]
            image.load()
            return image
        with open_regular(source) as file:
            image = identify(file)
            image.load()  # text may follow the pixels
            return image
    except FileNotFoundError:
        raise FileNotFoundError(f"image file {name} does not exist") from None
    except Exception as error:  # Pillow raises almost any type for damaged files
        raise _unreadable(name, error) from None


def _unreadable(name: str, error: Exception) -> ValueError:
    known = isinstance(error, (OSError, SyntaxError, ValueError, Image.DecompressionBombError))
    unidentified = isinstance(error, UnidentifiedImageError)
    reason = printable(error) if known and not unidentified else "not a readable image"
    if reason.startswith(f"{name} is "):  # of `open_regular`, with what is expected
        return ValueError(reason)
    return ValueError(f"{name}: {reason}; expected an image ({', '.join(FORMATS)})")


def _open(source: ImageSource) -> Image.Image:
    """Open an image upright, with 8 bits per channel."""
    image = read(source)
    name = "the image" if isinstance(source, (Image.Image, io.IOBase)) else printable(source)
    is_ours = not isinstance(source, Image.Image)
    is_png = image.format == "PNG"  # the format is not copied below
    try:
        with pillow_warnings_ignored():
            image = ImageOps.exif_transpose(image, in_place=is_ours) or image
    except Exception as error:
        raise _unreadable(name, error) from None
    if image.mode in ("F", "LAB", "La"):
        raise ValueError(f"{name}: mode is {image.mode}; expected RGB, grey, CMYK or a palette")
    if 0 in image.size:
        raise ValueError(f"{name}: {image.width} x {image.height} px; expected at least 1 x 1")
    if not image.mode.startswith("I"):
        return image
    # Pillow would clip 16 bits at 255.
    may_be_8_bits = image.mode == "I" and not is_png  # Pillow 10.1 opens PNGs of 16 bits in mode I
    image = image.convert("I")
    low, high = np.asarray(image).min(), np.asarray(image).max()
    if low < 0 or high >= 2**16:
        raise ValueError(f"{name}: values are {low} to {high}; expected 0 to 65535 (16 bits)")
    if may_be_8_bits and high < 2**8:
        return image.convert("L")
    return image.point([round(value / 257) for value in range(2**16)], "L")
