"""Random holes, around which a decoder learns to inpaint (GLIDE 2.4)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.image_io import resize

# B batch, s picture side

PLAIN = 0.1  # of 2: how far a ground's colours may be from that of its corners


@dataclass(frozen=True)
class HoleConfig:
    """How often a hole is of each kind, in proportion to one another."""

    box: float = 3.0  # one to three rectangles
    stroke: float = 2.0  # of a thick brush, as somebody would paint over a thing
    half: float = 1.0  # all on one side of a line at any angle
    border: float = 1.0  # all but a rectangle: a picture that is to go on beyond its borders
    all: float = 1.0  # nothing is known: so it keeps on drawing whole pictures

    def __post_init__(self) -> None:
        for name, weight in vars(self).items():
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"holes.{name} is {weight}; expected a weight of 0 or more")
        if sum(vars(self).values()) <= 0:
            raise ValueError("all weights in holes are 0; expected one above it")


def random_holes(count: int, side: int, config: HoleConfig = HoleConfig()) -> Tensor:
    """What is to be painted of `count` pictures: (count, 1, side, side) bool, from torch's global generator."""
    names, weights = zip(*vars(config).items(), strict=True)
    kinds = torch.multinomial(
        torch.tensor(weights, dtype=torch.float), count, replacement=True
    ).tolist()
    return torch.stack([HOLES[names[kind]](side) for kind in kinds])[:, None]


def copy_paste(pictures: Tensor, things: Tensor) -> tuple[Tensor, Tensor]:
    """Puts a thing somewhere into each picture, smaller (2012.07177); what is to be painted is a rectangle around it.

    So an inpainter learns to put what a prompt asks for onto what goes on around the hole.

    pictures, things: (B, 3, s, s) in [-1, 1], things on plain grounds, of which they are cut out.
    Returns the pictures, and the holes (B, 1, s, s) bool.
    """
    side, alpha = pictures.shape[-1], cut_out(things)
    pictures, holes = pictures.clone(), torch.zeros_like(alpha, dtype=torch.bool)
    for picture, hole, thing, shape in zip(pictures, holes, things, alpha, strict=True):
        top, left, bottom, right = _rectangle(side, 0.3, 0.9)
        hole[:, top:bottom, left:right] = True
        size = max(1, round(min(bottom - top, right - left) * _uniform(0.6, 1)))
        y, x = (int(torch.randint(a, b - size + 1, ())) for a, b in ((top, bottom), (left, right)))
        small, opaque = (
            resize(one[None], (size, size), "bilinear")[0] for one in (thing * shape, shape)
        )
        picture[:, y : y + size, x : x + size].mul_(1 - opaque).add_(small)
    return pictures, holes


def cut_out(things: Tensor) -> Tensor:
    """How opaque each pixel is of things (B, 3, s, s) on plain grounds: (B, 1, s, s) from 0 to 1.

    The ground is what is joined to a corner by pixels of nearly the corners' colour.
    """
    ends = slice(None, None, things.shape[-1] - 1)  # the first and the last
    colour = things[..., ends, ends].flatten(2).median(dim=2).values
    alike = (things - colour[:, :, None, None]).abs().amax(dim=1, keepdim=True) < PLAIN
    ground, reached = torch.zeros_like(alike), 0
    ground[..., ends, ends] = alike[..., ends, ends]
    while (count := int(ground.sum())) > reached:
        ground, reached = (F.max_pool2d(ground.float(), 3, stride=1, padding=1) > 0) & alike, count
    inside = F.avg_pool2d((~ground).float(), 3, stride=1, padding=1, count_include_pad=False)
    return torch.where(ground, 0.0, 2 * inside - 1).clamp(
        0, 1
    )  # edges, which hold some of the ground, in part


def _box(side: int) -> Tensor:
    hole = torch.zeros(side, side, dtype=torch.bool)
    for _ in range(int(torch.randint(1, 4, ()))):
        top, left, bottom, right = _rectangle(side, 0.15, 0.75)
        hole[top:bottom, left:right] = True
    return hole


def _stroke(side: int) -> Tensor:
    """A line through three to six random points, 1/16 to 1/4 of the picture thick."""
    points = torch.rand(int(torch.randint(3, 7, ())), 2)
    radius = _uniform(1 / 32, 1 / 8)
    pixels = _pixels(side)  # s s 2
    ends = points[1:] - points[:-1]  # P 2
    beside = pixels[:, :, None] - points[:-1]  # s s P 2
    along = ((beside * ends).sum(-1) / ends.square().sum(-1).clamp(min=1e-6)).clamp(0, 1)  # s s P
    return ((beside - along[..., None] * ends).norm(dim=-1) < radius).any(dim=-1)


def _half(side: int) -> Tensor:
    angle, offset = _uniform(0, 2 * math.pi), _uniform(-0.25, 0.25)
    return (_pixels(side) - 0.5) @ torch.tensor([math.cos(angle), math.sin(angle)]) > offset


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
    """Top, left, bottom, right, in pixels; its sides are from `least` to `most` of the picture's, at least a pixel."""
    height, width = (max(1, round(_uniform(least, most) * side)) for _ in range(2))
    top, left = (int(torch.randint(0, side - length + 1, ())) for length in (height, width))
    return top, left, top + height, left + width


def _pixels(side: int) -> Tensor:
    """(s, s, 2): where the middle of each pixel is, from 0 to 1."""
    places = (torch.arange(side) + 0.5) / side
    return torch.stack(torch.meshgrid(places, places, indexing="ij"), dim=-1)


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * torch.rand(()).item()
