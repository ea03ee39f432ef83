"""Augmentation of images in training, some of it together with the caption.

A red apple whose hue is rotated to purple gets the caption "a purple apple".
"""

# S image side; images are uint8 (S, S, 3) on a white background

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from unclip.config import ProperFraction, config
from unclip.data.colours import (
    CHROMATIC,
    COLOURS,
    main_colour,
    recolour_caption,
    rotate_hue,
    rotations_by_colour,
)
from unclip.data.compose import change_background, compose, is_held_out, name_object, repeat
from unclip.data.order import COMPOSE, RECOLOUR

MIN_ROTATION = 40  # degrees of hue
HELD_OUT_COLOURS = 13  # of 256 combinations of a colour and an annotation
EXCLUDED_GROUPS = ("flags",)  # their colours have a meaning
Recoloured = tuple[np.ndarray, list[str]]  # image, captions
PLAIN_WORDS = re.compile(r"[A-Za-z][A-Za-z '-]*")

# image, captions, key, metadata
Example = tuple[np.ndarray, list[str], str, Mapping[str, Any]]


@config
class Augment:
    """Random shift and scale on white (fractions of the image side), colours and compositions.

    There are no flips: images may contain text.
    """

    shift: ProperFraction = 0.0  # largest shift in x and in y, in whole pixels
    scale: ProperFraction = 0.0  # largest relative change in size
    # probability of another hue, for images with one main colour; captions name the new colour
    recolour: ProperFraction = 0.0
    # probability of a second object of the batch in a relation, or of several copies of an object;
    # captions say so: "an apple above a dog", "three apples"
    compose: ProperFraction = 0.0
    background: ProperFraction = 0.0  # probability of a coloured background


def apply_augment(
    augment: Augment,
    image: np.ndarray,
    caption: str,
    meta: Mapping[str, Any],
    other: Example,
    draw: np.ndarray,
) -> tuple[np.ndarray, str]:
    """Return an image (S, S, 3) and its caption, changed at random; `other` is used to compose.

    draw (at least 4,) in [0, 1) determines the result. Recolouring and composition have generators
    of their own, so that each augmentation draws the same numbers with and without the others.
    """
    seed = draw.view(np.uint64)[:2].tolist()
    if augment != Augment():
        image = shift_and_scale(image, augment, draw[1:4])
    if augment.recolour:
        rng = np.random.default_rng([RECOLOUR, *seed])
        if rng.random() < augment.recolour:
            image, (caption,) = recolour(image, [caption], meta, rng) or (image, (caption,))
    if augment.compose or augment.background:
        rng = np.random.default_rng([COMPOSE, *seed])
        image, caption = recompose(image, caption, meta, other, augment, rng)
    return image, caption


def recompose(
    image: np.ndarray,
    caption: str,
    meta: Mapping[str, Any],
    other: Example,
    augment: Augment,
    rng: np.random.Generator,
) -> tuple[np.ndarray, str]:
    """Compose an image with another example and change its background at `augment`'s rates."""
    if rng.random() < augment.compose:
        names = name_object(caption, meta), name_object(other[1][0], other[3])
        if rng.random() < 0.25:
            composed = repeat(image, names[0], rng)
        else:
            composed = compose((image, other[0]), names, rng)
        image, caption = composed or (image, caption)
    if rng.random() < augment.background:
        image, caption = change_background(image, caption, rng)
    return image, caption


def shift_and_scale(image: np.ndarray, augment: Augment, draws: np.ndarray) -> np.ndarray:
    """Scale about the centre and shift on white: uint8 (S, S, 3) -> (S, S, 3).

    draws (3,) in [0, 1) determine the scale and the shifts in x and y.
    """
    size = len(image)
    scale, x, y = 2 * draws - 1
    side = round(size * (1 + augment.scale * scale))
    corner = [(size - side) // 2 + round(augment.shift * size * offset) for offset in (x, y)]
    scaled = Image.fromarray(image)
    if side != size:
        scaled = scaled.resize((side, side), Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", (size, size), "white")
    canvas.paste(scaled, (corner[0], corner[1]))
    return np.asarray(canvas)


def crop(image: np.ndarray, size: int, draws: np.ndarray) -> np.ndarray:
    """Crop a square: (S, S, 3) -> (size, size, 3), placed by draws (2,) in [0, 1)."""
    top, left = (draws * (len(image) - size + 1)).astype(int)
    return image[top : top + size, left : left + size]


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
