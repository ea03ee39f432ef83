"""The main colour of an image as a word, and images in other colours."""

# S image side; images are uint8 (S, S, 3) on a white background

from __future__ import annotations

import re
from collections import defaultdict

import numpy as np

CHROMATIC = ("red", "orange", "brown", "yellow", "green", "blue", "purple", "pink")
COLOURS = (*CHROMATIC, "black", "grey", "white")
MAIN_FRACTION = 0.5  # of the foreground pixels that must have the main colour
BACKGROUND = 12  # a background pixel differs from white by at most this in every channel
ROTATIONS = range(10, 360, 10)  # of hue in degrees, that `rotations_by_colour` compares
MEASURED_SIDE = 64  # pixels of larger images that it looks at, in each direction
HUES = (  # upper limits in degrees
    (12, "red"),
    (42, "orange"),
    (70, "yellow"),
    (165, "green"),
    (255, "blue"),
    (295, "purple"),
    (345, "pink"),
    (360, "red"),
)


def hsv(image: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return hue in degrees [0, 360), saturation and value in [0, 1], (S, S) each."""
    rgb = image.astype(np.float32) / 255
    high, low = rgb.max(axis=-1), rgb.min(axis=-1)
    chroma = np.maximum(high - low, 1e-6)
    red, green, blue = np.moveaxis(rgb, -1, 0)
    sector = np.where(
        high == red,
        (green - blue) / chroma % 6,
        np.where(high == green, (blue - red) / chroma + 2, (red - green) / chroma + 4),
    )
    return 60 * sector, (high - low) / np.maximum(high, 1e-6), high


def colour_indices(image: np.ndarray) -> np.ndarray:
    """Return the index in COLOURS of each pixel, (S, S)."""
    hue, saturation, value = hsv(image)
    of_hue = np.array([COLOURS.index(name) for _, name in HUES])
    index = of_hue[np.digitize(hue, [limit for limit, _ in HUES[:-1]])]
    is_red, is_orange = index == COLOURS.index("red"), index == COLOURS.index("orange")
    brown = (is_orange | is_red) & (value < 0.66) & (saturation > 0.15) & (hue < 180)
    index[is_red & (saturation < 0.55) & (value > 0.75)] = COLOURS.index("pink")
    index[brown] = COLOURS.index("brown")
    index[saturation < 0.15] = COLOURS.index("grey")
    index[(saturation < 0.15) & (value > 0.85)] = COLOURS.index("white")
    index[value < 0.25] = COLOURS.index("black")
    return index


def main_colour(image: np.ndarray) -> str | None:
    """Return the colour of at least half of the foreground pixels; None if there is none.

    White is never returned, because it cannot be distinguished from the background.
    """
    foreground = (255 - image).max(axis=-1) > BACKGROUND
    if not foreground.any():
        return None
    counts = np.bincount(colour_indices(image)[foreground], minlength=len(COLOURS))
    best = int(counts.argmax())
    frequent = counts[best] >= MAIN_FRACTION * foreground.sum()
    return COLOURS[best] if frequent and COLOURS[best] != "white" else None


def rotate_hue(image: np.ndarray, degrees: float) -> np.ndarray:
    """Rotate all hues by `degrees`; greys are unchanged."""
    hue, saturation, value = hsv(image)
    sector = ((hue + degrees) % 360 / 60)[..., None]
    chroma, value = (saturation * value)[..., None], value[..., None]
    k = (np.array([5, 3, 1], np.float32) + sector) % 6
    rgb = value - chroma * np.clip(np.minimum(k, 4 - k), 0, 1)
    return (255 * rgb).round().clip(0, 255).astype(np.uint8)


def rotations_by_colour(image: np.ndarray) -> dict[str, int]:
    """Return the rotation of the hues in degrees that makes each colour the image's main one.

    If several rotations do, the middle one is returned, which gives the colour most clearly. The
    image's present main colour and those that no rotation gives are omitted.
    """
    step = max(1, len(image) // MEASURED_SIDE)
    small = image[::step, ::step]
    found = defaultdict(list)
    for degrees in ROTATIONS:
        found[main_colour(rotate_hue(small, degrees))].append(degrees)
    colours = set(CHROMATIC) - {main_colour(small)}
    return {c: fitting[len(fitting) // 2] for c, fitting in found.items() if c in colours}


def recolour_caption(caption: str, noun: str, old: str | None, new: str) -> str:
    """Insert the colour `new`: in place of the word `old`, else before `noun`, else at the end.

    >>> recolour_caption("an apple, noto emoji", "apple", "red", "blue")
    'a blue apple, noto emoji'
    """
    if old and re.search(rf"\b{old}\b", caption):
        return _correct_articles(re.sub(rf"\b{old}\b", new, caption))
    if noun and noun in caption:
        return _correct_articles(caption.replace(noun, f"{new} {noun}", 1))
    return f"{caption}, {new}"


def _correct_articles(caption: str) -> str:
    """Correct the articles before colours: "a orange" -> "an orange"."""
    for word in COLOURS:
        article = "an" if word[0] in "aeiou" else "a"
        caption = re.sub(rf"\b(a|an) {word}\b", f"{article} {word}", caption)
    return caption
