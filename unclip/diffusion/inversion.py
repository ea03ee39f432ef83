"""DDIM inversion: from an image to the noise that DDIM samples it from (2010.02502, 4.3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from unclip.config import NonNegative, NonNegativeInt, config
from unclip.diffusion.samplers import ddim_step
from unclip.diffusion.schedulers import Estimate, OnSample
from unclip.diffusion.schedules import Schedule

# B batch, C channels


@config
class InversionOptions:
    """Options for solving each DDIM step x_prev = step(x_t) for x_t."""

    # Corrections of x_t per step; 0 = plain DDIM inversion, which is poor with guidance
    iterations: NonNegativeInt = 10
    tolerance: NonNegative = 1e-4  # root mean square of a correction at which x_t is accepted


@torch.no_grad()
def invert(
    estimate: Estimate,
    x_0: Tensor,
    schedule: Schedule,
    timesteps: Sequence[float],
    options: InversionOptions = InversionOptions(),
    on_step: OnSample | None = None,
) -> Tensor:
    """Return the x_T (B, C, ...) from which DDIM at eta 0 approximately samples x_0.

    timesteps: those of DDIM, decreasing.
    """
    x_t, eps = x_0, torch.zeros_like(x_0)  # an image contains no noise
    for step, (t_prev, t) in enumerate(pairwise([-1, *reversed(timesteps)]), 1):
        levels = schedule.level(t), schedule.level(t_prev)
        x_t, x_0 = inverse_step(lambda x, t=t: estimate(x, t)[0], x_t, eps, *levels, options)
        eps = (x_t - math.sqrt(levels[0]) * x_0) / math.sqrt(1 - levels[0])
        if on_step is not None:
            on_step(step, len(timesteps), x_0)
    return x_t


def inverse_step(
    estimate: Callable[[Tensor], Tensor],
    x_prev: Tensor,
    eps: Tensor,
    alpha_bar_t: float,
    alpha_bar_prev: float,
    options: InversionOptions,
) -> tuple[Tensor, Tensor]:
    """Solve ddim_step(x_t, estimate(x_t)) = x_prev for x_t -> x_t and its estimate of x_0.

    Plain DDIM inversion, along the noise `eps` of x_prev, gives a first x_t. A fixed-point
    iteration (as in 2309.04907) then corrects x_t by the residual in x_prev over the slope of the
    step. For an exact denoiser the slope lies between σ_prev/σ_t and α_prev/α_t; we use its value
    where the velocity α ε − σ x_0 is constant in x_t: the cosine of the angle between the levels.
    Guidance can make the slope very different, so the last two corrections are combined
    (Anderson mixing of depth 1, per sample).
    """
    (alpha, sigma), (alpha_prev, sigma_prev) = (
        (math.sqrt(level), math.sqrt(1 - level)) for level in (alpha_bar_t, alpha_bar_prev)
    )
    slope = alpha * alpha_prev + sigma * sigma_prev
    x_t = alpha / alpha_prev * (x_prev - sigma_prev * eps) + sigma * eps
    dims = tuple(range(1, x_t.ndim))
    best = last = None
    for i in range(options.iterations + 1):
        x_0 = estimate(x_t)
        correction = (x_prev - ddim_step(x_t, x_0, alpha_bar_t, alpha_bar_prev)) / slope
        size = correction.square().mean(dims, keepdim=True).sqrt()  # B 1 ...
        found = x_t, x_0, size
        if best is not None:
            pairs = zip(found, best, strict=True)
            found = tuple(torch.where(size < best[2], new, old) for new, old in pairs)
        best = found
        unsolved = best[2] > options.tolerance  # a solved sample stays as it is in any batch
        if i == options.iterations or not unsolved.any():
            break
        move = correction if last is None else _anderson(x_t, correction, *last)
        last = x_t, correction
        x_t = torch.where(unsolved, x_t + move, best[0])
    assert best is not None
    return best[0], best[1]


def _anderson(x_t: Tensor, correction: Tensor, last_x_t: Tensor, last_correction: Tensor) -> Tensor:
    """Return the move to the point between both x_t with the smallest correction, plus it."""
    change = correction - last_correction
    dims = tuple(range(1, x_t.ndim))
    norm = change.square().sum(dims, keepdim=True).clamp(min=1e-20)
    back = (change * correction).sum(dims, keepdim=True) / norm
    return correction - back * (x_t - last_x_t + change)
