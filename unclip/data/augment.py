"""Augmentation that changes an image together with its caption.

A red apple whose hue is rotated to purple gets the caption "a purple apple".
"""

# S image side; images are uint8 (S, S, 3) on a white background

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unclip.data.colours import (
    CHROMATIC,
    COLOURS,
    main_colour,
    recolour_caption,
    rotate_hue,
    rotations_by_colour,
)
from unclip.data.compose import is_held_out

MIN_ROTATION = 40  # degrees of hue
HELD_OUT_COLOURS = 13  # of 256 combinations of a colour and an annotation
EXCLUDED_GROUPS = ("flags",)  # their colours have a meaning
Recoloured = tuple[np.ndarray, list[str]]  # image, captions
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
) -> Recoloured | None:
    """Rotate the hues by a random angle and name the new main colour in the captions.

    None if `can_recolour` is False, the new image has no main colour, or the combination of colour
    and annotation is held out for evaluation.
    """
    if not can_recolour(meta):
        return None
    rotated = rotate_hue(image, rng.uniform(MIN_ROTATION, 360 - MIN_ROTATION))
    return _with_captions(rotated, main_colour(rotated), captions, meta)


def recolour_to_all(
    image: np.ndarray, captions: Sequence[str], meta: Mapping[str, Any]
) -> list[Recoloured]:
    """Return the image once in each other main colour, with captions that name it.

    Empty if `can_recolour` is False. Combinations of colour and annotation that are held out for
    evaluation are omitted.
    """
    if not can_recolour(meta):
        return []
    copies = [
        _with_captions(rotate_hue(image, degrees), colour, captions, meta)
        for colour, degrees in rotations_by_colour(image).items()
    ]
    return [copy for copy in copies if copy is not None]


def _with_captions(
    image: np.ndarray, colour: str | None, captions: Sequence[str], meta: Mapping[str, Any]
) -> Recoloured | None:
    """Return an image and captions that name its colour; None unless they may be trained on."""
    noun = meta["annotation"]
    if colour not in CHROMATIC or is_held_out_colour(colour, noun):
        return None
    old = (_colours_in(noun) or [meta["colour"]])[0]
    return image, [recolour_caption(caption, noun, old, colour) for caption in captions]


def _colours_in(text: str) -> list[str]:
    return [word for word in text.split() if word in COLOURS]
