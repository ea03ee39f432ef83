"""The metadata from which unclip generates an image again, in PNG, JPEG, WebP and GIF files."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from unclip.files import parse_json
from unclip.image_io.reading import pillow_warnings_ignored, read

METADATA_KEY = "unclip"  # of the PNG's iTXt chunk
XMP_KEY = "XML:com.adobe.xmp"
EXIF_IFD, USER_COMMENT, ASCII_COMMENT = 0x8769, 0x9286, b"ASCII\0\0\0"
MAX_EXIF = 60_000  # bytes; a JPEG segment holds 65,533
MAX_METADATA = 60_000_000  # characters; Pillow refuses PNG files with more than 64 MB of text
_TEXTS = ("picture", "mask", "image_emb", "model", "prior_model", "dtype", "quantized")
FIELD_TYPES = {  # of an entry of the metadata and of the sources in it
    **dict.fromkeys(("options", "arguments", "inversion"), dict),
    **dict.fromkeys(_TEXTS, (str, type(None))),
    **dict.fromkeys(("sources", "lora"), list),
}


def read_source_type(path: str | Path) -> str | None:
    """Read the IPTC DigitalSourceType in the XMP of an image, such as "trainedAlgorithmicMedia"."""
    image = read(path)
    xmp = image.info.get("xmp") or image.info.get(XMP_KEY) or b""
    text = xmp.decode("utf-8", "replace") if isinstance(xmp, bytes) else str(xmp)
    found = re.search(r"digitalsourcetype/(\w+)", text)
    return found and found[1]


def read_metadata(path: str | Path) -> list[dict[str, Any]]:
    """Read the metadata of an image that unclip wrote: one entry for each image in the file.

    Raises ValueError if the file is not an image, has no such metadata, or has damaged metadata.
    """
    image = read(path)
    text = image.info.get(METADATA_KEY) if image.format == "PNG" else None
    if image.format == "GIF":
        comment = image.info.get("comment", b"")
        text = comment if comment.startswith((b"[", b'{"pictures":')) else None
    elif image.format in ("JPEG", "WEBP"):
        comment = _user_comment(image)
        text = comment.removeprefix(ASCII_COMMENT) if comment.startswith(ASCII_COMMENT) else None
    if text is None:
        raise ValueError(f"{path} has no unclip metadata; expected an image that unclip wrote")
    try:
        data = parse_json(text)
        if "pictures" in data:
            pictures = data["pictures"]
            data = _with_images(data["entries"], lambda i: None if i is None else pictures[i])
        entries = data if isinstance(data, list) else [data]
        if entries and all(_is_valid(source) for entry in entries for source in _sources(entry)):
            return entries
    except (ValueError, TypeError, LookupError, AttributeError):
        pass
    raise ValueError(f"{path}: damaged metadata; expected an image that unclip wrote")


def _user_comment(image: Image.Image) -> bytes:
    try:
        with pillow_warnings_ignored():
            comment = image.getexif().get_ifd(EXIF_IFD).get(USER_COMMENT, b"")
    except Exception:  # Pillow raises almost any type for damaged EXIF
        return b""
    return comment if isinstance(comment, bytes) else b""


def _is_valid(source: dict[str, Any]) -> bool:
    """Return whether a metadata entry, or a source in one, has fields of the expected types."""
    if not isinstance(source, dict):
        return False
    return all(isinstance(source[n], FIELD_TYPES[n]) for n in FIELD_TYPES.keys() & source.keys())


def lacks_image(entry: dict[str, Any]) -> bool:
    """Return whether an input image is not stored in this metadata entry for lack of room."""
    return any(None in (part.get("picture", ""), part.get("mask", "")) for part in _sources(entry))


def dump_metadata(metadata: Any, kind: str) -> str | None:
    """Serialise metadata for a kind of file; several entries store each image once.

    Images are left out if the text would be too large for the file, and all if it still is, with a
    warning.
    """
    if metadata is None:
        return None
    data, entries = metadata, metadata if isinstance(metadata, list) else [metadata]
    if isinstance(metadata, list):
        index: dict[str, int] = {}
        numbered = _with_images(
            entries, lambda image: None if image is None else index.setdefault(image, len(index))
        )
        data = {"pictures": list(index), "entries": numbered} if index else numbered
    most = MAX_EXIF if kind in ("jpeg", "webp") else MAX_METADATA
    dump = json.JSONEncoder(ensure_ascii=kind != "png").encode
    if len(text := dump(data)) <= most:
        return text
    text = dump(_with_images(entries, lambda _: None))
    what = "input images are" if len(text) <= most else "metadata is"
    advice = "; a .png file has more room" if most == MAX_EXIF else ""
    warnings.warn(
        f"the {what} too large for a {kind} file, which cannot be generated again{advice}",
        stacklevel=3,
    )
    return text if len(text) <= most else None


def _sources(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the parts of an entry that may hold images."""
    return [entry, *entry.get("sources", [])]


def _with_images(
    entries: Sequence[dict[str, Any]], change: Callable[[Any], Any]
) -> list[dict[str, Any]]:
    """Return copies of the entries with `change` applied to their images and masks."""

    def changed(source: dict[str, Any]) -> dict[str, Any]:
        images = {name: change(source[name]) for name in ("picture", "mask") if name in source}
        inner = {"sources": list(map(changed, source["sources"]))} if "sources" in source else {}
        return {**source, **images, **inner}

    return list(map(changed, entries))
