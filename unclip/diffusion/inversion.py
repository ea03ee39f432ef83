"""From a picture to the noise that DDIM draws it from, and back (2010.02502, section 4.3; unCLIP 3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from unclip.diffusion.samplers import Estimate, OnSample, alpha_bar, ddim_step
from unclip.diffusion.schedules import Schedule

# B batch, C channels


@dataclass(frozen=True)
class InversionOptions:
    """A step of DDIM, x_prev = step(x_t), is turned round by solving it for x_t."""

    iterations: int = 10  # corrections of x_t at each step, at most; 0 = plain DDIM inversion, which guidance derails
    tolerance: float = 1e-4  # root mean square of a correction at which x_t is good enough

    def __post_init__(self) -> None:
        if self.iterations < 0:
            raise ValueError(
                f"iterations is {self.iterations}; expected 0 (plain DDIM inversion) or more"
            )
        if self.tolerance < 0:
            raise ValueError(f"tolerance is {self.tolerance}; expected 0 or more")


@torch.no_grad()
def draw(
    estimate: Estimate,
    x_T: Tensor,
    schedule: Schedule,
    timesteps: Sequence[int],
    eta: float = 0.0,
    noise: Callable[[], Tensor] | None = None,
    on_step: OnSample | None = None,
) -> Tensor:
    """x_0 (B, C, ...) from x_T by DDIM through decreasing timesteps; with eta > 0, `noise` gives each step's."""
    x_t = x_T
    for step, (t, t_prev) in enumerate(pairwise([*timesteps, -1]), 1):
        x_0, _ = estimate(x_t, t, step == len(timesteps))
        fresh = noise() if eta > 0 and step < len(timesteps) else None
        x_t = ddim_step(x_t, x_0, alpha_bar(schedule, t), alpha_bar(schedule, t_prev), eta, fresh)
        if on_step is not None:
            on_step(step, len(timesteps), x_0)
    return x_t


@torch.no_grad()
def invert(
    estimate: Estimate,
    x_0: Tensor,
    schedule: Schedule,
    timesteps: Sequence[int],
    options: InversionOptions = InversionOptions(),
    on_step: OnSample | None = None,
) -> Tensor:
    """The x_T (B, C, ...) from which `draw` at eta 0 gives x_0, as nearly as the network can draw it."""
    x_t, eps = x_0, torch.zeros_like(x_0)  # in a picture there is no noise yet
    for step, (t_prev, t) in enumerate(pairwise([-1, *reversed(timesteps)]), 1):

        def estimate_at(x: Tensor, t: int = t, last: bool = step == 1) -> Tensor:
            return estimate(x, t, last)[0]

        levels = alpha_bar(schedule, t), alpha_bar(schedule, t_prev)
        x_t, x_0 = inverse_step(estimate_at, x_t, eps, *levels, options)
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
    """x_t with ddim_step(x_t, estimate(x_t)) = x_prev, and its estimate of x_0.

    Plain DDIM inversion moves along `eps`, the noise in x_prev, as if it were that in x_t. From there a fixed-point
    iteration (as in 2309.04907) corrects x_t by what its step misses of x_prev, over the slope of the step. For an
    exact denoiser that lies between σ_prev/σ_t and α_prev/α_t; it is taken to be what it is where the velocity
    α ε − σ x_0 does not hang on x_t: the cosine of the angle between the two levels. Under guidance the slope may be
    far from it, so what two corrections in a row tell of it is used (Anderson's mixing of depth 1, per sample).
    """
    (alpha, sigma), (alpha_prev, sigma_prev) = (
        (math.sqrt(level), math.sqrt(1 - level)) for level in (alpha_bar_t, alpha_bar_prev)
    )
    slope = alpha * alpha_prev + sigma * sigma_prev
    x_t = alpha / alpha_prev * (x_prev - sigma_prev * eps) + sigma * eps
    best = last = None
    for i in range(options.iterations + 1):
        x_0 = estimate(x_t)
        correction = (x_prev - ddim_step(x_t, x_0, alpha_bar_t, alpha_bar_prev)) / slope
        size = (
            correction.square().mean(dim=tuple(range(1, x_t.ndim)), keepdim=True).sqrt()
        )  # (B, 1, ...)
        found = x_t, x_0, size
        if best is not None:
            found = tuple(
                torch.where(size < best[2], new, old) for new, old in zip(found, best, strict=True)
            )
        best = found
        unsolved = (
            best[2] > options.tolerance
        )  # a sample that is good enough stays as it is, whatever its batch
        if i == options.iterations or not unsolved.any():
            break
        move = correction if last is None else _mixed(x_t, correction, *last)
        last = x_t, correction
        x_t = torch.where(unsolved, x_t + move, best[0])
    return best[0], best[1]


def _mixed(x_t: Tensor, correction: Tensor, last_x_t: Tensor, last_correction: Tensor) -> Tensor:
    """The correction from where, on the line through the last two x_t, it would be smallest."""
    change = correction - last_correction
    dims = tuple(range(1, x_t.ndim))
    back = (change * correction).sum(dims, keepdim=True) / change.square().sum(
        dims, keepdim=True
    ).clamp(min=1e-20)
    return correction - back * (x_t - last_x_t + change)
