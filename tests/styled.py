"""Captioned images in two styles, some held out: a small version of the emoji data."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image, ImageDraw

from unclip.data.shards import ShardWriter

CONCEPTS = ("apple", "fish", "disc", "sun", "moon", "leaf")
STYLES = ("dark", "pale")
HELD_OUT = {("apple", "dark"), ("fish", "pale"), ("sun", "dark"), ("moon", "pale")}


def png(concept: str, style: str) -> bytes:
    """Draw a square: its position depends on the concept, its brightness on the style."""
    image = Image.new("RGB", (32, 32), "white")
    i = CONCEPTS.index(concept)
    color = (20, 40 * i, 20) if style == "dark" else (200, 40 * i, 250)
    ImageDraw.Draw(image).rectangle((4 * i, 4, 4 * i + 10, 26), fill=color)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def write_pairs(folder: Path) -> Path:
    """Write tar shards in the layout of the emoji data and return the folder."""
    with ShardWriter(folder, "train", 4) as train, ShardWriter(folder, "heldout") as held_out:
        for i, concept in enumerate(CONCEPTS):
            for style in STYLES:
                meta = {"annotation": concept, "style": style, "group": f"group {i // 2}"}
                meta |= {
                    "captions": [f"{concept}, {style} emoji", concept],
                    "tone": [3] if concept == "moon" else None,
                }
                writer = held_out if (concept, style) in HELD_OUT else train
                writer.write(f"{style}-{concept}", {"png": png(concept, style), "json": meta})
    return folder
