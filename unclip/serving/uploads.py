"""Images that clients upload: recognised by content, checked by header, then decoded."""

from __future__ import annotations

import base64
import binascii
import io

from PIL import Image, ImageOps

from unclip.image_io import identify, open_image, open_mask
from unclip.serving.config import ServerConfig
from unclip.serving.errors import bad_request

FORMATS = ("PNG", "JPEG", "WEBP")
STRICT_BYTES = 4 * 2**20
ALPHA_MODES = ("RGBA", "LA", "L")


def decode_image(data: bytes, param: str, config: ServerConfig) -> Image.Image:
    """Decode an image, in its own mode. APIError unless format, bytes and pixels are allowed."""
    limit = min(STRICT_BYTES, config.max_upload) if config.strict else config.max_upload
    formats = FORMATS[:1] if config.strict else FORMATS
    kinds = "a PNG" if config.strict else "a PNG, JPEG or WebP"
    wrong = f"Uploaded image must be {kinds} and less than {limit / 2**20:g} MB."
    if not data or len(data) > limit:
        raise bad_request(wrong, param)
    try:
        image = identify(io.BytesIO(data), formats)  # reads the header only
    except Exception:  # Pillow raises almost any type for damaged files
        raise bad_request(wrong, param) from None
    _check_size(image, param, config)
    try:
        image.load()
    except MemoryError:
        raise
    except Exception:
        raise bad_request("Uploaded image is damaged and cannot be decoded.", param) from None
    if image.mode in ("F", "LAB"):
        raise bad_request(f"Invalid input image - format {image.mode} is not supported.", param)
    return image


def _check_size(image: Image.Image, param: str, config: ServerConfig) -> None:
    width, height = image.size
    if max(width, height) > config.max_side:
        raise bad_request(
            f"Uploaded image is {width}x{height} pixels; expected at most "
            f"{config.max_side}x{config.max_side}.",
            param,
        )
    if min(width, height) < 1:
        raise bad_request("Uploaded image is empty.", param)
    if config.strict and width != height:
        raise bad_request(f"Uploaded image must be square, got {width}x{height}.", param)


def decode_text(value: str, param: str) -> bytes:
    """Decode a data URL or base64. APIError for other URLs, which are never fetched."""
    if value.startswith("data:"):
        header, separator, value = value.partition(",")
        if not separator or not header.endswith(";base64"):
            raise bad_request(f"'{param}' is a data URL that is not base64.", param)
    elif "://" in value[:32]:
        raise bad_request(
            f"'{param}' is a URL; this server fetches none. Send a file, a data URL or base64.",
            param,
        )
    try:
        return base64.b64decode(value, validate=True)
    except (ValueError, binascii.Error):
        raise bad_request(f"'{param}' is neither a data URL nor base64.", param) from None


def to_rgb(image: Image.Image, param: str) -> Image.Image:
    """Return an image upright, as RGB on white."""
    try:
        return open_image(image)
    except ValueError as error:
        raise bad_request(str(error), param) from None


def edit_mask(
    image: Image.Image, mask: Image.Image | None, strict: bool, required: bool
) -> Image.Image | None:
    """Return the part to paint as 255 in mode L: what is transparent in the mask, or in the image.

    A mask without transparent pixels marks it in white, unless strict. None if there is no mask at
    all, which is an APIError if it is required.
    """
    source, param = (image, "image") if mask is None else (mask, "mask")
    if (clear := _transparent_part(source)) is not None:
        hole = clear
    elif mask is not None and not strict:
        hole = open_mask(upright(mask))
    elif mask is None and not required:
        return None
    else:
        reason = f"format must be in {list(ALPHA_MODES)}, got {source.mode}"
        if source.has_transparency_data:
            reason = "it has no transparent pixels; expected them where it is to be painted"
        raise bad_request(f"Invalid input image - {reason}.", param)
    if hole.size != upright(image).size:
        raise bad_request(
            f"Invalid mask image - it is {hole.width}x{hole.height}, but the image is "
            f"{image.width}x{image.height}; both must have the same size.",
            "mask",
        )
    return hole


def _transparent_part(image: Image.Image) -> Image.Image | None:
    """Return the transparent pixels as 255 in mode L; None if there are none."""
    if not image.has_transparency_data:
        return None
    alpha = upright(image).convert("RGBA").getchannel("A")
    clear = alpha.point([255] * 128 + [0] * 128)
    return clear if clear.getbbox() else None


def upright(image: Image.Image) -> Image.Image:
    """Turn an image as its EXIF orientation says."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF
        raise bad_request("Uploaded image has damaged metadata.", "image") from None
