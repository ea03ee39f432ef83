"""Duplicates: images of one emoji that look the same in several styles.

A duplicate of a held-out image must not be in the training split under another style.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from PIL import Image

from unclip.image_io import open_image

SIDE = 32  # of the thumbnails that are compared
THRESHOLD = 0.08  # root mean square difference of duplicates, for colours in [-1, 1]


def thumbnail(image: bytes) -> np.ndarray:
    """Convert an encoded image to (SIDE, SIDE, 3) float32 in [-1, 1]."""
    rgb = open_image(io.BytesIO(image))
    small = rgb.resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(small, np.float32) / 127.5 - 1


def find_duplicates(
    hexcodes: Sequence[str],
    ranks: Sequence[int],
    held_out: Sequence[bool],
    thumbnails: Sequence[np.ndarray],
) -> set[int]:
    """Return the indices of the images to leave out; each argument has one entry per image.

    Among images of one emoji that look the same, those with the lowest rank are kept. If any of
    these is held out, only the held-out ones are kept.
    """
    by_code: dict[str, list[int]] = defaultdict(list)
    for index, code in enumerate(hexcodes):
        by_code[code].append(index)
    left_out: set[int] = set()
    for members in by_code.values():
        for group in _groups(members, thumbnails):
            lowest = min(ranks[index] for index in group)
            kept = [index for index in group if ranks[index] == lowest]
            if any(held_out[index] for index in kept):
                kept = [index for index in kept if held_out[index]]
            left_out.update(set(group) - set(kept))
    return left_out


def _groups(members: Sequence[int], thumbnails: Sequence[np.ndarray]) -> list[list[int]]:
    """Group members that look the same; each is compared with the first member of a group."""
    groups: list[list[int]] = []
    for index in members:
        for group in groups:
            if np.sqrt(np.mean((thumbnails[index] - thumbnails[group[0]]) ** 2)) < THRESHOLD:
                group.append(index)
                break
        else:
            groups.append([index])
    return groups
