"""Random holes for training a decoder to inpaint (GLIDE 2.4)."""

# B batch, s image side, P line segments

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.config import NonNegative, config
from unclip.image_io import resize

BACKGROUND_TOLERANCE = 0.1  # largest difference from the background color, of a range of 2


@config
class HoleConfig:
    """Relative frequencies of the kinds of holes."""

    box: NonNegative = 3.0  # one to three rectangles
    stroke: NonNegative = 2.0  # of a thick brush
    half: NonNegative = 1.0  # one side of a line at any angle
    border: NonNegative = 1.0  # everything outside a rectangle, as in outpainting
    all: NonNegative = 1.0  # the whole image: the decoder then also generates whole images

    def __post_init__(self) -> None:
        if sum(vars(self).values()) <= 0:
            raise ValueError("all weights are 0; expected one above 0")


DEFAULT_HOLES = HoleConfig()


def random_holes(count: int, side: int, holes: HoleConfig = DEFAULT_HOLES) -> Tensor:
    """Sample masks (count, 1, side, side), True in the hole, from torch's global generator."""
    names, weights = zip(*vars(holes).items(), strict=True)
    kinds = torch.multinomial(
        torch.tensor(weights, dtype=torch.float), count, replacement=True
    ).tolist()
    return torch.stack([HOLES[names[kind]](side) for kind in kinds])[:, None]


def copy_paste(images: Tensor, objects: Tensor) -> tuple[Tensor, Tensor]:
    """Paste an object, scaled down, into each image (Copy-Paste, 2012.07177).

    The hole is a rectangle around the object. An inpainting decoder trained with it learns to place
    the prompt's object on the background around the hole.

    images, objects: (B, 3, s, s) in [-1, 1]; objects are on plain backgrounds, which are removed.
    Returns the images and the holes (B, 1, s, s) bool.
    """
    side, alpha = images.shape[-1], foreground_alpha(objects)
    images, holes = images.clone(), torch.zeros_like(alpha, dtype=torch.bool)
    for image, hole, obj, shape in zip(images, holes, objects, alpha, strict=True):
        top, left, bottom, right = _rectangle(side, 0.3, 0.9)
        hole[:, top:bottom, left:right] = True
        size = max(1, round(min(bottom - top, right - left) * _uniform(0.6, 1)))
        y, x = (int(torch.randint(a, b - size + 1, ())) for a, b in ((top, bottom), (left, right)))
        small, opaque = (resize(x[None], (size, size), "bilinear")[0] for x in (obj * shape, shape))
        image[:, y : y + size, x : x + size].mul_(1 - opaque).add_(small)
    return images, holes


def foreground_alpha(images: Tensor) -> Tensor:
    """Estimate the opacity (B, 1, s, s) in [0, 1] of objects (B, 3, s, s) on plain backgrounds.

    The background is connected to a corner through pixels of about the corners' color.
    """
    corners = slice(None, None, images.shape[-1] - 1)  # first and last index
    color = images[..., corners, corners].flatten(2).median(dim=2).values  # (B, 3)
    distance = (images - color[:, :, None, None]).abs().amax(dim=1, keepdim=True)
    similar = distance < BACKGROUND_TOLERANCE  # (B, 1, s, s)
    background, reached = torch.zeros_like(similar), 0
    background[..., corners, corners] = similar[..., corners, corners]
    while (count := int(background.sum())) > reached:  # flood fill
        grown = F.max_pool2d(background.float(), 3, stride=1, padding=1) > 0
        background, reached = grown & similar, count
    inside = F.avg_pool2d((~background).float(), 3, stride=1, padding=1, count_include_pad=False)
    # pixels on the edge contain some background and are partly transparent
    return torch.where(background, 0.0, 2 * inside - 1).clamp(0, 1)


def _box(side: int) -> Tensor:
    hole = torch.zeros(side, side, dtype=torch.bool)
    for _ in range(int(torch.randint(1, 4, ()))):
        top, left, bottom, right = _rectangle(side, 0.15, 0.75)
        hole[top:bottom, left:right] = True
    return hole


def _stroke(side: int) -> Tensor:
    """Return a line through three to six random points, 1/16 to 1/4 of the image thick."""
    points = torch.rand(int(torch.randint(3, 7, ())), 2)
    radius = _uniform(1 / 32, 1 / 8)
    pixels = _pixel_centres(side)  # (s, s, 2)
    segments = points[1:] - points[:-1]  # (P, 2)
    offsets = pixels[:, :, None] - points[:-1]  # (s, s, P, 2)
    squares = segments.square().sum(-1).clamp(min=1e-6)
    along = ((offsets * segments).sum(-1) / squares).clamp(0, 1)  # (s, s, P)
    return ((offsets - along[..., None] * segments).norm(dim=-1) < radius).any(dim=-1)


def _half(side: int) -> Tensor:
    angle, offset = _uniform(0, 2 * math.pi), _uniform(-0.25, 0.25)
    normal = torch.tensor([math.cos(angle), math.sin(angle)])
    return (_pixel_centres(side) - 0.5) @ normal > offset


def _border(side: int) -> Tensor:
    top, left, bottom, right = _rectangle(side, 0.3, 0.9)
    hole = torch.ones(side, side, dtype=torch.bool)
    hole[top:bottom, left:right] = False
    return hole


HOLES: dict[str, Callable[[int], Tensor]] = {
    "box": _box,
    "stroke": _stroke,
    "half": _half,
    "border": _border,
    "all": lambda side: torch.ones(side, side, dtype=torch.bool),
}


def _rectangle(side: int, least: float, most: float) -> tuple[int, int, int, int]:
    """Sample top, left, bottom, right in pixels; sides are `least` to `most` of the image's."""
    height, width = (max(1, round(_uniform(least, most) * side)) for _ in range(2))
    top, left = (int(torch.randint(0, side - length + 1, ())) for length in (height, width))
    return top, left, top + height, left + width


def _pixel_centres(side: int) -> Tensor:
    """Return the coordinates (s, s, 2) of pixel centres in [0, 1]."""
    centres = (torch.arange(side) + 0.5) / side
    return torch.stack(torch.meshgrid(centres, centres, indexing="ij"), dim=-1)


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * torch.rand(()).item()
