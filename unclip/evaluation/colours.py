"""Combinations of a colour and a concept that no training image has, such as "a blue apple".

`data.augment.recolour` and embedding jobs with --recolour never make these combinations.
"""

# N pairs, C combinations, S image size

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from unclip.data.augment import is_held_out_colour
from unclip.data.colours import (
    CHROMATIC,
    main_colour,
    recolour_caption,
    rotate_hue,
    rotations_by_colour,
)
from unclip.evaluation.judge import Judge
from unclip.evaluation.pairs import Pair, Pairs
from unclip.image_io import to_pil, to_tensor


@dataclass(frozen=True)
class Combination:
    """A pair's concept in another colour, which its image has after a rotation of the hues."""

    row: int
    pair: Pair
    colour: str
    degrees: float


def combinations(pairs: Pairs) -> list[Combination]:
    """Return each pair's concept in the held-out colours that a rotation of its hues gives."""
    found = []
    for row, pair in enumerate(pairs.entries):
        colours = [c for c in CHROMATIC if is_held_out_colour(c, pair.concept)]
        if pair.colour is None or not colours:
            continue
        rotations = rotations_by_colour(to_array(pairs.images[row]))
        for colour in colours:
            if colour in rotations and colour != pair.colour:
                caption = recolour_caption(pair.caption, pair.concept, pair.colour, colour)
                wanted = replace(pair, caption=caption)
                found.append(Combination(row, wanted, colour, rotations[colour]))
    return found


def true_images(pairs: Pairs, wanted: Sequence[Combination]) -> Tensor:
    """Return the pairs' images in the colours of the combinations, (C, 3, S, S) in [-1, 1]."""
    return to_tensor([rotate_hue(to_array(pairs.images[c.row]), c.degrees) for c in wanted])


def judge_colours(images: Tensor, wanted: Sequence[Combination], judge: Judge) -> dict[str, Tensor]:
    """Return whether images (C, 3, S, S) in [-1, 1] have the colour and the concept, (C,) bool.

    The judge was trained on concepts in their own colours, so it gets the images with the hues
    rotated back.
    """
    arrays = [np.asarray(image) for image in to_pil(images)]
    colour = [main_colour(image) == c.colour for image, c in zip(arrays, wanted, strict=True)]
    back = [rotate_hue(image, -c.degrees) for image, c in zip(arrays, wanted, strict=True)]
    concept = judge.judge(to_tensor(back), [c.pair for c in wanted]).concept
    of_colour = torch.tensor(colour)
    return {"colour": of_colour, "concept": concept, "both": of_colour & concept}


def to_array(image: Tensor) -> np.ndarray:
    """(3, S, S) uint8 -> (S, S, 3)."""
    return image.permute(1, 2, 0).numpy()
