"""Sampling of diffusion models: guided estimates of x_0, ancestral and analytic sampling, DDIM.

A sampler sees the network only as an estimate of x_0, in float32 or wider. diffusers' schedulers
are adapted in `schedulers`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from unclip.diffusion import schedulers
from unclip.diffusion.losses import log_variance
from unclip.diffusion.schedulers import Estimate, OnSample
from unclip.diffusion.schedules import Prediction, Schedule
from unclip.types import StageOptions, mix_rows

# B batch, K conditions of each sample, C channels of x

OWN_SAMPLERS = ("ancestral", "analytic", "ddim")  # the others are diffusers'

Denoise = Callable[[Tensor, float], Tensor]
"""x_t (B, C, ...) and t -> prediction (B, C, ...), or (B, 2C, ...) with a learned variance.

t is a number on the host: reading it from a tensor would make each step wait for the device.
"""


@dataclass(frozen=True)
class Estimator:
    """Estimate x_0 from x_t with a denoiser: guidance, mixing, prediction type, clipping."""

    denoise: Denoise  # of K * B rows: the first condition of all samples, then the second, ...
    schedule: Schedule
    options: StageOptions
    prediction: Prediction
    learned_variance: bool = False
    clip: float | None = None  # bound of |x_0|, or the range of a dynamic threshold
    denoise_both: Denoise | None = None  # of 2 * K * B rows: conditions, then nulls; for guidance
    weights: Tensor | None = None  # (K, B) of the conditions, of sum 1 over K; None for K = 1
    dtype: torch.dtype = torch.float32  # of the denoiser's input
    guided_variance: bool = False  # guide the learned variance too; else it stays conditional

    def __post_init__(self) -> None:
        self.schedule.check(self.prediction)

    def __call__(self, x_t: Tensor, t: float) -> tuple[Tensor, Tensor | None]:
        """Return the estimate of x_0 (B, C, ...) and the raw learned variance, or None."""
        x, variance = x_t.to(self.dtype), None
        if self.weights is not None:
            x = torch.cat([x] * len(self.weights))  # K*B C ...
        if self.denoise_both is not None and self._guides_at(t):
            cond, null = self.denoise_both(torch.cat([x, x]), t).chunk(2)
            output = self._guide(cond, null)
        else:
            output = self.denoise(x, t)
        output = mix_rows(output, self.weights)
        if self.learned_variance:
            output, variance = output.to(x_t.dtype).chunk(2, dim=1)
        x_0 = self.schedule.predict_x0(output, x_t, round(t), self.prediction)
        return threshold(x_0, self.clip, self.options.dynamic_threshold), variance

    def _guides_at(self, t: float) -> bool:
        """Return whether t is in the guidance interval (2404.07724)."""
        low, high = self.options.guidance_interval
        return self.options.guidance != 1 and low <= t / self.schedule.num_timesteps <= high

    def _guide(self, cond: Tensor, null: Tensor) -> Tensor:
        """Apply guidance to the prediction and, with `guided_variance`, to the variance."""
        scale, rescale = self.options.guidance, self.options.guidance_rescale
        if not self.learned_variance:
            return guide(cond, null, scale, rescale)
        (cond, variance), (null, null_variance) = cond.chunk(2, dim=1), null.chunk(2, dim=1)
        guided = guide(cond, null, scale, rescale)
        if self.guided_variance:
            variance = guide(variance, null_variance, scale)
        return torch.cat([guided, variance.to(guided.dtype)], dim=1)


def guide(cond: Tensor, null: Tensor, scale: float, rescale: float = 0.0) -> Tensor:
    """Apply guidance (2207.12598) in float32 or wider: null + scale * (cond - null).

    rescale in [0, 1] moves the standard deviation of each sample back to that of `cond`
    (2305.08891, section 3.4).
    """
    dtype = torch.promote_types(cond.dtype, torch.float32)
    cond, null = cond.to(dtype), null.to(dtype)
    guided = null + scale * (cond - null)
    if rescale == 0.0:
        return guided
    per_sample = tuple(range(1, cond.ndim))
    ratio = cond.std(per_sample, keepdim=True) / guided.std(per_sample, keepdim=True)
    return guided * (1 + rescale * (ratio - 1))


def threshold(x_0: Tensor, limit: float | None, percentile: float | None = None) -> Tensor:
    """Clip x_0 (B, ...) to ±limit; None does not clip.

    With a percentile in (0, 1], dynamic thresholding (Imagen, 2205.11487, section 2.3): clip each
    sample to that percentile of its absolute values, if it exceeds the limit (None: 1), and scale
    it down to the limit.
    """
    if percentile is None:
        return x_0 if limit is None else x_0.clamp(-limit, limit)
    limit = 1.0 if limit is None else limit
    magnitudes = x_0.abs().flatten(1)
    n = magnitudes.shape[1]
    count = n - round(percentile * (n - 1))  # of values at or above the percentile
    bound = magnitudes.topk(count).values[:, -1].clamp(min=limit).view(-1, *[1] * (x_0.ndim - 1))
    return x_0.clamp(-bound, bound) * (limit / bound)


def randn(
    shape: Sequence[int],
    generators: Sequence[torch.Generator],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Sample normal noise (B, ...) on `device`; row i comes from generators[i], on its device."""
    if len(generators) != shape[0]:
        raise ValueError(f"{len(generators)} generators for {shape[0]} samples; give one for each")
    size = (1, *shape[1:])
    rows = [torch.randn(size, generator=g, device=g.device, dtype=dtype) for g in generators]
    if torch.device(device).type == "cuda":  # a copy from pinned memory does not block the host
        rows = [row.pin_memory() if row.is_cpu else row for row in rows]
        rows = [row.to(device, non_blocking=True) for row in rows]
    return torch.cat([row.to(device) for row in rows])


@torch.no_grad()
def sample(
    estimate: Estimate,
    x_T: Tensor,
    schedule: Schedule,
    options: StageOptions,
    *,
    timesteps: Sequence[float] | None = None,
    generators: Sequence[torch.Generator] = (),
    on_step: OnSample | None = None,
) -> Tensor:
    """Sample x_0 (B, C, ...) from the noise x_T, in float32 or wider.

    timesteps: decreasing, for the samplers of this file; None = `sampling_timesteps`. generators:
    one for each sample, used once a step by stochastic samplers, except at the last step; noise is
    sampled in the dtype of x_T. A deterministic sampler needs none.
    """
    ts = sampling_timesteps(options, schedule) if timesteps is None else timesteps
    if generators and len(generators) != len(x_T):
        raise ValueError(f"{len(generators)} generators for {len(x_T)} samples; give one for each")
    x_t = x_T.to(torch.promote_types(x_T.dtype, torch.float32))
    if options.sampler not in OWN_SAMPLERS:
        return schedulers.sample(estimate, x_t, schedule, options, generators, on_step)
    ancestral, analytic = (options.sampler == kind for kind in ("ancestral", "analytic"))
    for step, (t, t_prev) in enumerate(pairwise([*ts, -1]), 1):
        x_0, variance = estimate(x_t, t)
        noise = None
        if (ancestral or analytic or options.eta > 0) and t_prev >= 0:
            noise = randn(x_T.shape, generators, x_T.device, x_T.dtype).to(x_t.dtype)
        levels = schedule.level(t), schedule.level(t_prev)
        if ancestral:
            # 1 - alpha_bar / alpha_bar_prev equals beta up to rounding; diffusers uses it only
            # where timesteps are skipped.
            beta = float(schedule.betas[int(t)]) if t_prev == t - 1 else None
            x_t = ancestral_step(x_t, x_0, *levels, noise, variance, beta)
        elif analytic:
            x_t = ancestral_step(x_t, x_0, *levels, noise, x0_error=schedule.x0_error(t))
        else:
            x_t = ddim_step(x_t, x_0, *levels, options.eta, noise)
        if on_step is not None:
            estimate = on_step(step, len(ts), x_0) or estimate
    return x_t


def sampling_timesteps(options: StageOptions, schedule: Schedule) -> list[float]:
    """Return the decreasing timesteps of `sample`; whole numbers, except for some schedulers."""
    steps, T = options.steps, schedule.num_timesteps
    if steps > T:
        raise ValueError(f"steps is {steps}, but the model has only {T} timesteps")
    if options.timesteps is not None and options.sampler in OWN_SAMPLERS:
        if options.timesteps[0] >= T:
            raise ValueError(f"timesteps start at {options.timesteps[0]}; the model has {T}")
        return [*options.timesteps]
    if options.sampler in ("ancestral", "analytic"):
        return [*ancestral_timesteps(steps, T)]
    if options.sampler == "ddim":
        return [*ddim_timesteps(steps, T)]
    return schedulers.timesteps(options, schedule)


def ancestral_timesteps(num_steps: int, num_timesteps: int) -> list[int]:
    """Return num_steps timesteps, evenly from T - 1 down to 0 (as Karlo)."""
    if num_steps == 1:
        return [num_timesteps - 1]
    ratio = (num_timesteps - 1) / (num_steps - 1)
    return [round(i * ratio) for i in reversed(range(num_steps))]


def ddim_timesteps(num_steps: int, num_timesteps: int) -> list[int]:
    """Return num_steps timesteps, evenly from T - 1 down ("trailing" in 2305.08891)."""
    return [round(i * num_timesteps / num_steps) - 1 for i in range(num_steps, 0, -1)]


def ancestral_step(
    x_t: Tensor,
    x_0: Tensor,
    alpha_bar_t: float,
    alpha_bar_prev: float,
    noise: Tensor | None = None,
    variance: Tensor | None = None,
    beta: float | None = None,
    x0_error: float = 0.0,
) -> Tensor:
    """Sample q(x_prev | x_t, x_0), or return its mean without noise (2006.11239, eq. 6 and 7).

    variance: raw output of the network (see `losses.log_variance`); None = the posterior's.
    beta: of the step; None = computed from alpha_bar. x0_error: mean squared error of x_0, which
    adds to the posterior's variance. The sum is the optimal one (Analytic-DPM, 2201.06503; for the
    mean that the network predicts, 2206.07309).
    """
    if beta is None:
        beta = 1 - alpha_bar_t / alpha_bar_prev
    remaining = (1 - alpha_bar_prev) / (1 - alpha_bar_t)
    weight_0 = math.sqrt(alpha_bar_prev) * beta / (1 - alpha_bar_t)
    mean = weight_0 * x_0 + math.sqrt(1 - beta) * remaining * x_t
    if noise is None:
        return mean
    if variance is None:
        return mean + math.sqrt(remaining * beta + weight_0**2 * x0_error) * noise
    log_var = log_variance(variance, math.log(remaining * beta), math.log(beta))
    return mean + (0.5 * log_var).exp() * noise


def ddim_step(
    x_t: Tensor,
    x_0: Tensor,
    alpha_bar_t: float,
    alpha_bar_prev: float,
    eta: float = 0.0,
    noise: Tensor | None = None,
) -> Tensor:
    """Take a DDIM step (2010.02502, eq. 12 and 16); without noise, also to a noisier level."""
    eps = (x_t - math.sqrt(alpha_bar_t) * x_0) / math.sqrt(1 - alpha_bar_t)
    if noise is None:
        return math.sqrt(alpha_bar_prev) * x_0 + math.sqrt(1 - alpha_bar_prev) * eps
    posterior = (1 - alpha_bar_prev) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_prev)
    std = eta * math.sqrt(posterior)
    weight = math.sqrt(max(0.0, 1 - alpha_bar_prev - std**2))
    return math.sqrt(alpha_bar_prev) * x_0 + weight * eps + std * noise
