"""Augmentation that changes an image together with its caption.

An apple whose hue is rotated to blue gets the caption "a blue apple".
"""

# S image side; images are uint8 (S, S, 3) on a white background

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unclip.data.colours import CHROMATIC, COLOURS, main_colour, recolour_caption, rotate_hue
from unclip.data.compose import is_held_out

MIN_ROTATION = 40  # degrees of hue
HELD_OUT_COLOURS = 13  # of 256 combinations of a colour and an annotation
EXCLUDED_GROUPS = ("flags",)  # their colours have a meaning
PLAIN_WORDS = re.compile(r"[A-Za-z][A-Za-z '-]*")


def can_recolour(meta: Mapping[str, Any]) -> bool:
    """Return whether an image has one main colour and an annotation that can contain its name.

    meta: metadata of a sample, with the keys that `unclip.data.emoji` writes.
    """
    annotation = meta.get("annotation")
    return (
        meta.get("colour") in CHROMATIC
        and meta.get("group") not in EXCLUDED_GROUPS
        and meta.get("tone") is None
        and isinstance(annotation, str)
        and PLAIN_WORDS.fullmatch(annotation) is not None
        and len(_colours_in(annotation)) <= 1
    )


def is_held_out_colour(colour: str, annotation: str) -> bool:
    """Return whether a combination of colour and annotation is kept for evaluation."""
    return is_held_out(colour, annotation, share=HELD_OUT_COLOURS)


def recolour(
    image: np.ndarray, captions: Sequence[str], meta: Mapping[str, Any], rng: np.random.Generator
) -> tuple[np.ndarray, list[str]] | None:
    """Rotate the hues by a random angle and name the new main colour in the captions.

    None if `can_recolour` is False, the new image has no main colour, or the combination of colour
    and annotation is held out for evaluation.
    """
    if not can_recolour(meta):
        return None
    rotated = rotate_hue(image, rng.uniform(MIN_ROTATION, 360 - MIN_ROTATION))
    colour = main_colour(rotated)
    if colour not in CHROMATIC:
        return None
    if is_held_out_colour(colour, meta["annotation"]):
        return None
    old = (_colours_in(meta["annotation"]) or [meta["colour"]])[0]
    noun = meta["annotation"]
    return rotated, [recolour_caption(caption, noun, old, colour) for caption in captions]


def _colours_in(text: str) -> list[str]:
    return [word for word in text.split() if word in COLOURS]
