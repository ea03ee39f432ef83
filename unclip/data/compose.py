"""Augmentation by composition: two images in a relation, several copies, another background.

An apple and a dog become "an apple to the left of a dog", an apple "three apples", or "an apple on
a blue background". Images have their object on white. Any dataset can be used; a caption, or the
`annotation` in the metadata of a sample, says what the object is.

Some combinations never occur in training (`is_held_out`), so that an evaluation can ask for them.
"""

# S image side; images are uint8 (S, S, 3) on a white background

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from unclip.data.colours import BACKGROUND
from unclip.data.everyday import with_article

Box = tuple[float, float, float, float]  # left, top, width, height, as fractions of the side

HELD_OUT = 26  # of 256: combinations that do not occur in training
BACKGROUNDS = {
    "red": (221, 68, 68),
    "orange": (240, 150, 60),
    "yellow": (250, 220, 90),
    "green": (110, 190, 110),
    "blue": (90, 150, 230),
    "purple": (150, 100, 200),
    "pink": (245, 160, 195),
    "brown": (150, 105, 75),
    "grey": (160, 160, 165),
    "black": (25, 25, 30),
}
LEFT, RIGHT = (0.02, 0.2, 0.47, 0.6), (0.51, 0.2, 0.47, 0.6)
TOP, BOTTOM = (0.2, 0.02, 0.6, 0.47), (0.2, 0.51, 0.6, 0.47)
RELATIONS: dict[str, tuple[Box, Box]] = {  # places of the first and of the second object
    "next to": (LEFT, RIGHT),
    "to the left of": (LEFT, RIGHT),
    "to the right of": (RIGHT, LEFT),
    "above": (TOP, BOTTOM),
    "below": (BOTTOM, TOP),
    "on top of": ((0.25, 0.08, 0.5, 0.42), (0.15, 0.5, 0.7, 0.48)),  # they touch
    "inside": ((0.3, 0.3, 0.4, 0.4), (0.02, 0.02, 0.96, 0.96)),
}
COUNTS: dict[str, list[Box]] = {
    "two": [LEFT, RIGHT],
    "three": [(0.27, 0.03, 0.46, 0.46), (0.03, 0.51, 0.46, 0.46), (0.51, 0.51, 0.46, 0.46)],
    "four": [(x, y, 0.46, 0.46) for y in (0.03, 0.51) for x in (0.03, 0.51)],
    "five": [
        *((x, y, 0.38, 0.38) for y in (0.02, 0.6) for x in (0.02, 0.6)),
        (0.34, 0.34, 0.32, 0.32),
    ],
}


def is_held_out(*words: str, share: int = HELD_OUT) -> bool:
    """Return True for `share` / 256 of all combinations of words, always the same ones."""
    return hashlib.sha256("/".join(words).encode()).digest()[0] < share


def name_object(caption: str, meta: Mapping[str, Any]) -> str:
    """Return what an image shows, as a phrase: the annotation with an article, or the caption."""
    annotation = meta.get("annotation")
    return with_article(annotation) if isinstance(annotation, str) else caption


def compose(
    images: tuple[np.ndarray, np.ndarray], names: tuple[str, str], rng: np.random.Generator
) -> tuple[np.ndarray, str] | None:
    """Put two objects into one image in a random relation; None if the combination is held out."""
    relation = str(rng.choice(list(RELATIONS)))
    if is_held_out(relation, *names):
        return None
    boxes = RELATIONS[relation]
    if relation == "next to" and rng.random() < 0.5:
        boxes = boxes[::-1]
    canvas = Image.new("RGB", images[0].shape[:2], "white")
    for image, box in zip(images[::-1], boxes[::-1], strict=True):  # the first is in front
        _place(canvas, image, box)
    return np.asarray(canvas), f"{names[0]} {relation} {names[1]}"


def repeat(image: np.ndarray, name: str, rng: np.random.Generator) -> tuple[np.ndarray, str] | None:
    """Show an object two to five times; None if the combination is held out."""
    count = str(rng.choice(list(COUNTS)))
    if is_held_out(count, name):
        return None
    canvas = Image.new("RGB", image.shape[:2], "white")
    for box in COUNTS[count]:
        _place(canvas, image, box)
    return np.asarray(canvas), f"{count} {plural(name)}"


def change_background(
    image: np.ndarray, caption: str, rng: np.random.Generator
) -> tuple[np.ndarray, str]:
    """Replace the white around the object by a colour, which half of the captions name."""
    colour = str(rng.choice(list(BACKGROUNDS)))
    named = bool(rng.random() < 0.5)
    if named and is_held_out(colour, "background", caption):
        return image, caption
    outside = ~foreground(image)
    edge = grow_mask(outside)[..., None]  # pixels of the object's edge contain some white
    tinted = (image.astype(np.float32) * np.array(BACKGROUNDS[colour]) / 255).round()
    changed = np.where(edge, tinted, image).astype(np.uint8)
    changed[outside] = BACKGROUNDS[colour]
    return changed, f"{caption} on {with_article(colour)} background" if named else caption


def foreground(image: np.ndarray) -> np.ndarray:
    """Return the pixels of the object, (S, S) bool: all but the white that touches the border."""
    white = (255 - image).max(axis=-1) <= BACKGROUND
    border = np.ones_like(white)
    border[1:-1, 1:-1] = False
    outside, reached = white & border, -1
    while (count := int(outside.sum())) > reached:  # flood fill
        outside, reached = grow_mask(outside) & white, count
    return ~outside


def plural(name: str) -> str:
    """Return the plural of a phrase without its article.

    >>> plural("a red apple")
    'red apples'
    """
    noun = name.removeprefix("an ").removeprefix("a ")
    if noun.endswith(("s", "x", "z", "ch", "sh")):
        return noun if noun.endswith("s") and not noun.endswith("ss") else f"{noun}es"
    if noun.endswith("y") and noun[-2:-1] not in tuple("aeiou"):
        return f"{noun[:-1]}ies"
    return f"{noun}s"


def grow_mask(mask: np.ndarray) -> np.ndarray:
    """Add the four neighbours of each pixel."""
    grown = mask.copy()
    grown[1:] |= mask[:-1]
    grown[:-1] |= mask[1:]
    grown[:, 1:] |= mask[:, :-1]
    grown[:, :-1] |= mask[:, 1:]
    return grown


def _place(canvas: Image.Image, image: np.ndarray, box: Box) -> None:
    """Paste an object into a box of the canvas, without the white around it."""
    mask = foreground(image)
    if not mask.any():
        return
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    area = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    left, top, width, height = (round(canvas.width * value) for value in box)
    scale = min(width / (columns[-1] + 1 - columns[0]), height / (rows[-1] + 1 - rows[0]))
    size = (
        max(1, round(scale * (columns[-1] + 1 - columns[0]))),
        max(1, round(scale * (rows[-1] + 1 - rows[0]))),
    )
    small = Image.fromarray(image[area]).resize(size, Image.Resampling.LANCZOS)
    opaque = Image.fromarray(mask[area]).convert("L").resize(size, Image.Resampling.BOX)
    corner = left + (width - size[0]) // 2, top + height - size[1]  # objects stand on a line
    canvas.paste(small, corner, opaque)
