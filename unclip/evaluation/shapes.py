"""An exact scorer of images of shapes: which shapes are there, and does the caption hold?

It finds connected objects on white and compares their silhouettes to those of the shapes. Words for
size and "hollow" are not checked. On images drawn by unclip.data.shapes at 64 px, it is wrong for
fewer than 1 in 200; at 32 px, for 1 in 40, and for 1 in 16 of those with several equal shapes.
"""

# S image side

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from unclip.data.compose import foreground, grow_mask
from unclip.data.shapes import COLOURS, RELATIONS, SHAPES, Scene, Shape, draw

MATCHED_SIDE = 48  # side of silhouettes in comparisons
OFFSETS = [(x, y) for x in (0, 0.25, 0.5, 0.75) for y in (0, 0.25, 0.5, 0.75)]  # in pixels
MIN_AREA = 0.004  # of the image: smaller objects are specks
MIN_PIXELS = 16
BACKGROUND = 60  # an object's pixels differ from white by more than this in some channel


@dataclass(frozen=True)
class Found:
    """An object of an image."""

    shape: str
    colour: str
    x: float  # of the centre of the bounding box, as a fraction of the side
    y: float


def find_shapes(image: np.ndarray) -> list[Found]:
    """Return the objects of an image, uint8 (S, S, 3)."""
    solid = (255 - image).max(axis=-1) > BACKGROUND
    found, side = [], len(image)
    for mask in _components(solid):
        if mask.sum() < max(MIN_PIXELS, MIN_AREA * side**2):
            continue
        rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
        silhouette = _cropped(_filled(mask))
        inner = mask & ~_edge(mask)
        pixels = image[inner if inner.any() else mask]
        centre = (columns[0] + columns[-1] + 1) / 2, (rows[0] + rows[-1] + 1) / 2
        found.append(
            Found(
                shape=_match(silhouette),
                colour=_nearest_colour(np.median(pixels, axis=0)),
                x=centre[0] / side,
                y=centre[1] / side,
            )
        )
    return found


def is_correct(image: np.ndarray, scene: Scene) -> bool:
    """Return whether an image, uint8 (S, S, 3), shows what the scene's caption says."""
    found = find_shapes(image)
    if len(found) != len(scene.shapes):
        return False
    if scene.relation is not None:
        ordered = [[f for f in found if f.shape == s.shape] for s in scene.shapes]
        if any(len(match) != 1 for match in ordered):
            return False
        (first,), (second,) = ordered
        step = np.array([second.x - first.x, second.y - first.y])
        direction = np.array(RELATIONS[scene.relation])
        return bool(step @ direction > abs(step @ direction[::-1]))

    def looks(items: list[Found] | tuple[Shape, ...]) -> list[tuple[str, ...]]:
        return sorted((i.shape, i.colour) if scene.colours_matter else (i.shape,) for i in items)

    return looks(found) == looks(scene.shapes)


def _components(mask: np.ndarray) -> list[np.ndarray]:
    """Return the 4-connected parts of a mask, (S, S) bool each."""
    remaining, parts = mask.copy(), []
    while remaining.any():
        part = np.zeros_like(mask)
        part[tuple(np.argwhere(remaining)[0])] = True
        reached = 0
        while (count := int(part.sum())) > reached:
            part, reached = grow_mask(part) & remaining, count
        parts.append(part)
        remaining &= ~part
    return parts


def _edge(mask: np.ndarray) -> np.ndarray:
    return grow_mask(~mask) & mask


def _filled(mask: np.ndarray) -> np.ndarray:
    """Fill the holes of a mask."""
    white = np.where(mask[..., None], 0, 255).astype(np.uint8).repeat(3, axis=2)
    return foreground(np.pad(white, ((1, 1), (1, 1), (0, 0)), constant_values=255))[1:-1, 1:-1]


def _cropped(mask: np.ndarray) -> np.ndarray:
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    return mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _normalised(silhouette: np.ndarray) -> np.ndarray:
    """Scale the longer side to MATCHED_SIDE and centre: float32 (MATCHED_SIDE, MATCHED_SIDE)."""
    height, width = silhouette.shape
    scale = MATCHED_SIDE / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = Image.fromarray(silhouette).convert("L").resize(size, Image.Resampling.BILINEAR)
    canvas = Image.new("L", (MATCHED_SIDE, MATCHED_SIDE))
    canvas.paste(small, ((MATCHED_SIDE - size[0]) // 2, (MATCHED_SIDE - size[1]) // 2))
    return np.asarray(canvas, np.float32) / 255


@cache
def _templates(side: int) -> np.ndarray:
    """Return the normalised silhouettes of all shapes, drawn at about `side` pixels."""
    canvas = 2 * side
    silhouettes = []
    for shape in SHAPES:
        for x, y in OFFSETS:
            place = 0.5 + x / canvas, 0.5 + y / canvas
            image = draw([Shape(shape, "black", side / canvas, *place)], canvas)
            mask = (255 - image).max(axis=-1) > BACKGROUND
            silhouettes.append(_normalised(_cropped(mask)))
    return np.stack(silhouettes)


def _match(silhouette: np.ndarray) -> str:
    own = _normalised(silhouette)
    templates = _templates(max(silhouette.shape))
    overlap = np.minimum(own, templates).sum(axis=(1, 2))
    union = np.maximum(own, templates).sum(axis=(1, 2))
    return SHAPES[int((overlap / union).argmax()) // len(OFFSETS)]


def _nearest_colour(colour: np.ndarray) -> str:
    palette = np.array(list(COLOURS.values()), np.float64)
    return list(COLOURS)[int(np.square(palette - colour).sum(axis=1).argmin())]
