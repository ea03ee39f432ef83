"""Painting into a picture, also with a model that was trained to draw whole ones only (RePaint, 2201.09865)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.diffusion.samplers import Estimate, OnSample, alpha_bar, ancestral_step
from unclip.diffusion.schedules import Schedule

# B batch, C channels, h w height and width


@dataclass(frozen=True)
class PaintOptions:
    """How what is painted is brought into harmony with what is kept."""

    resamples: int = (
        4  # times that each stretch of steps is gone through; the more, the less of a seam
    )
    jump: int = 5  # steps in a stretch
    strength: float = (
        1.0  # 1 = paint from noise; less = from what is there, noised so far (SDEdit, 2108.01073)
    )
    agreement: float = 3.0  # how far what is asked for bends to what is kept; 0 = not. For a decoder shown a layout
    trained: bool | None = (
        None  # by a decoder that was trained to inpaint (GLIDE 2.4); None = if there is one
    )

    def __post_init__(self) -> None:
        for name in ("resamples", "jump"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if not (math.isfinite(self.agreement) and self.agreement >= 0):
            raise ValueError(f"agreement is {self.agreement}; expected 0 (none) or more")
        if not 0.0 < self.strength <= 1.0:
            raise ValueError(
                f"strength is {self.strength}; expected more than 0 (nearly the same) to 1 (from noise)"
            )

    def steps(self, num_steps: int) -> int:
        """How many of a stage's steps the strength leaves, at least one."""
        return max(1, round(self.strength * num_steps))


@torch.no_grad()
def repaint(
    estimate: Estimate,
    picture: Tensor,
    hole: Tensor,
    schedule: Schedule,
    timesteps: Sequence[float],
    noise: Callable[[], Tensor],
    options: PaintOptions = PaintOptions(),
    on_step: OnSample | None = None,
) -> Tensor:
    """Paints where `hole` (1 or B, 1, h, w) is True, so that it goes with the rest of picture (B, C, h, w).

    A network that was trained for it is told by its `estimate` what is known; any other sees it in x_t alone.

    It steps down through the timesteps of any sampler: each but once, to the nearest whole one.

    The last estimate of x_0 is given as it is, also where the picture is kept: `paste` needs both.
    noise gives (B, C, h, w) afresh at each call.
    """
    ts = sorted(
        {round(t) for t in timesteps}, reverse=True
    )  # Heun asks twice at most, Karras between them
    steps = list(pairwise([*ts, -1]))[-options.steps(len(ts)) :]
    x_t = (
        noise()
        if options.strength == 1
        else _noised(picture, 1.0, alpha_bar(schedule, steps[0][0]), noise)
    )
    total, done = len(steps) * options.resamples, 0
    for start in range(0, len(steps), options.jump):
        stretch = steps[start : start + options.jump]
        for again in range(options.resamples):
            if again:
                x_t = _noised(
                    x_t, *(alpha_bar(schedule, t) for t in (stretch[-1][1], stretch[0][0])), noise
                )
            for t, t_prev in stretch:
                x_0, variance = estimate(x_t, t, t_prev < 0)
                levels = alpha_bar(schedule, t), alpha_bar(schedule, t_prev)
                drawn = ancestral_step(
                    x_t, x_0, *levels, noise() if t_prev >= 0 else None, variance
                )
                kept = _noised(picture, 1.0, levels[1], noise) if t_prev >= 0 else picture
                x_t = torch.where(hole, drawn, kept)
                done += 1
                if on_step is not None:
                    on_step(done, total, x_0)
    return x_0


def _noised(x: Tensor, level: float, to_level: float, noise: Callable[[], Tensor]) -> Tensor:
    """x at alpha_bar = level with so much noise more that it is at to_level."""
    return math.sqrt(to_level / level) * x + math.sqrt(1 - to_level / level) * noise()


def paste(painted: Tensor, picture: Tensor, hole: Tensor, radius: int) -> Tensor:
    """`picture` (B, C, h, w) outside the hole, bit for bit; inside it `painted`, without a step at the seam.

    What `painted` misses of the picture beside the seam is added inside, less and less over `radius` pixels.
    """
    near = _blur(
        torch.where(hole, 0.0, 1.0), radius
    )  # (1 or B, 1, h, w): about 1/2 at the seam, 0 far inside
    miss = _blur(torch.where(hole, 0.0, picture - painted), radius) / near.clamp(min=1e-6)
    return torch.where(hole, painted + miss * (2 * near).clamp(max=1), picture)


def fill(picture: Tensor, hole: Tensor) -> Tensor:
    """The hole of picture (B, C, h, w) filled with the colours around it; with grey if there are none."""
    filled, empty, radius = (
        torch.where(hole, 0.0, picture),
        hole.expand(len(picture), -1, -1, -1),
        1,
    )
    while empty.any() and radius < max(picture.shape[2:]):
        near = _blur(torch.where(empty, 0.0, 1.0), radius)
        spread = _blur(torch.where(empty, 0.0, filled), radius) / near.clamp(min=1e-6)
        reached = empty & (near > 1e-3)
        filled, empty, radius = torch.where(reached, spread, filled), empty & ~reached, 2 * radius
    return filled


def _blur(x: Tensor, radius: int) -> Tensor:
    """Two box filters, which together weigh like a tent; beyond the border the picture goes on as it ends."""
    for across, down in (
        (0, radius),
        (radius, 0),
    ) * 2:  # a box is a column, then a row: far less work when it is wide
        x = F.pad(x, (across, across, down, down), mode="replicate")
        x = F.avg_pool2d(x, (2 * down + 1, 2 * across + 1), stride=1)
    return x
