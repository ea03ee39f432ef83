"""Inpainting with any diffusion model, trained for it or not (RePaint, 2201.09865)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.config import NonNegative, PositiveFraction, PositiveInt, config
from unclip.diffusion.samplers import ancestral_step
from unclip.diffusion.schedulers import Estimate, OnSample
from unclip.diffusion.schedules import Schedule

# B batch, C channels, h w height and width


@config
class PaintOptions:
    """Options of painting a hole consistently with the rest of the image."""

    # Passes over each group of steps; more passes leave fewer visible seams
    resamples: PositiveInt = 4
    jump: PositiveInt = 5  # steps in a group
    # 1 = from noise; less = from the noised image (SDEdit, 2108.01073)
    strength: PositiveFraction = 1.0
    # Weight that moves the embedding towards the kept part, 0 = none; needs a decoder with layout
    agreement: NonNegative = 3.0
    trained: bool | None = None  # use the inpainting decoder (GLIDE 2.4); None = if there is one

    def steps(self, num_steps: int) -> int:
        """Return how many of a stage's steps remain at this strength, at least one."""
        return max(1, round(self.strength * num_steps))


# For networks that read the known pixels, and upsamplers of an image that is already consistent
ONCE = PaintOptions(resamples=1, trained=False)


@torch.no_grad()
def repaint(
    estimate: Estimate,
    image: Tensor,
    hole: Tensor,
    schedule: Schedule,
    timesteps: Sequence[float],
    noise: Callable[[], Tensor],
    options: PaintOptions = PaintOptions(),
    on_step: OnSample | None = None,
) -> Tensor:
    """Paint where `hole` (1 or B, 1, h, w) is True, consistent with the rest of image (B, C, h, w).

    timesteps: of any sampler; each is rounded and used once. noise: returns fresh noise
    (B, C, h, w) at each call. Returns the last estimate of x_0 everywhere, for `paste`.
    """
    ts = sorted({round(t) for t in timesteps}, reverse=True)  # Heun repeats, Karras interpolates
    steps = list(pairwise([*ts, -1]))[-options.steps(len(ts)) :]
    level = schedule.level(steps[0][0])
    x_t = noise() if options.strength == 1 else _add_noise(image, 1.0, level, noise)
    x_0, total, done = image, len(steps) * options.resamples, 0
    for start in range(0, len(steps), options.jump):
        group = steps[start : start + options.jump]
        low, high = schedule.level(group[-1][1]), schedule.level(group[0][0])
        for repeat in range(options.resamples):
            if repeat:
                x_t = _add_noise(x_t, low, high, noise)
            for t, t_prev in group:
                last = t_prev < 0
                x_0, variance = estimate(x_t, t)
                levels = schedule.level(t), schedule.level(t_prev)
                fresh = None if last else noise()
                painted = ancestral_step(x_t, x_0, *levels, fresh, variance)
                kept = image if last else _add_noise(image, 1.0, levels[1], noise)
                x_t = torch.where(hole, painted, kept)
                done += 1
                if on_step is not None:
                    estimate = on_step(done, total, x_0) or estimate
    return x_0


def _add_noise(x: Tensor, level: float, to_level: float, noise: Callable[[], Tensor]) -> Tensor:
    """Move x from alpha_bar = level to the noisier to_level."""
    return math.sqrt(to_level / level) * x + math.sqrt(1 - to_level / level) * noise()


def paste(painted: Tensor, image: Tensor, hole: Tensor) -> Tensor:
    """Return `image` (B, C, h, w) bit for bit outside of the hole, and `painted` inside.

    Both are in [-1, 1]. Their difference at the seam is blended into the hole over 1/32 of the
    width, at least one pixel.
    """
    radius = max(1, image.shape[-1] // 32)
    near = _blur(torch.where(hole, 0.0, 1.0), radius)  # (1 or B, 1, h, w): 1/2 at the seam
    error = _blur(torch.where(hole, 0.0, image - painted), radius) / near.clamp(min=1e-6)
    return torch.where(hole, painted + error * (2 * near).clamp(max=1), image).clamp(-1, 1)


def fill(image: Tensor, hole: Tensor) -> Tensor:
    """Fill the hole of image (B, C, h, w) with the colours around it, or grey if there are none."""
    filled, empty = torch.where(hole, 0.0, image), hole.expand(len(image), -1, -1, -1)
    radius = 1
    while empty.any() and radius < max(image.shape[2:]):
        near = _blur(torch.where(empty, 0.0, 1.0), radius)
        spread = _blur(torch.where(empty, 0.0, filled), radius) / near.clamp(min=1e-6)
        reached = empty & (near > 1e-3)
        filled, empty, radius = torch.where(reached, spread, filled), empty & ~reached, 2 * radius
    return filled


def _blur(x: Tensor, radius: int) -> Tensor:
    """Apply a box filter twice, a tent filter; borders are replicated."""
    for across, down in ((0, radius), (radius, 0)) * 2:  # separable: columns, then rows
        x = F.pad(x, (across, across, down, down), mode="replicate")
        x = F.avg_pool2d(x, (2 * down + 1, 2 * across + 1), stride=1)
    return x
