"""Pictures in and out of files: opened strictly, written with what it takes to draw them again."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

METADATA_KEY = "unclip"  # of the PNG's iTXt chunk


def open_picture(source: str | Path | Image.Image) -> Image.Image:
    """A picture as upright RGB, transparent parts on white; ValueError if the file is no picture or is truncated."""
    try:
        image = source if isinstance(source, Image.Image) else Image.open(source)
        image = ImageOps.exif_transpose(image)
        if not image.has_transparency_data:
            return image.convert("RGB")
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"no picture at {source}") from None
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "not a picture that can be read" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"{source}: {reason}; expected a PNG, JPEG, WebP or the like") from None


def save_png(image: Image.Image, path: str | Path, metadata: Any = None) -> None:
    """Writes a PNG whole or not at all; `metadata` (JSON types) goes into a text chunk. Parent folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    info = PngImagePlugin.PngInfo()
    if metadata is not None:
        info.add_itxt(METADATA_KEY, json.dumps(metadata, ensure_ascii=False))
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        image.save(part, format="PNG", pnginfo=info)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read_metadata(path: str | Path) -> list[dict[str, Any]]:
    """What `save_png` put into a PNG, one entry for each picture in it (a grid holds several).

    ValueError if the file is no picture, or one that was not drawn here.
    """
    open_picture(path)
    with Image.open(path) as image:
        image.load()  # text chunks may follow the pixels
        text = getattr(image, "text", {}).get(METADATA_KEY)
    if text is None:
        raise ValueError(f"{path} holds no metadata of unclip; it was drawn elsewhere, or its metadata was stripped")
    metadata = json.loads(text)
    return metadata if isinstance(metadata, list) else [metadata]


def grid(images: Sequence[Image.Image], columns: int, gap: int = 4) -> Image.Image:
    """Pictures of one size in rows of `columns`, on white with `gap` pixels between."""
    if not images:
        raise ValueError("a grid needs at least one picture")
    width, height = images[0].size
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * (width + gap), i // columns * (height + gap)))
    return sheet
