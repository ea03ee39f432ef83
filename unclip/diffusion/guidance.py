"""Classifier-free guidance, and keeping estimates of x_0 in range."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from unclip.types import StageOptions

# B batch, C channels of x

Denoise = Callable[[Tensor, Tensor], Tensor]  # x_t (B, C, ...), t (B,) -> (B, C or 2C, ...)


def at(denoise: Denoise, t: float) -> Denoise:
    """The denoiser for the next step, at timestep t: what its own method `at` answers, if it has one.

    So all that hangs on t is settled on the host: to read t from a device tensor would be to wait for the device.
    """
    return denoise.at(t) if hasattr(denoise, "at") else denoise


def classifier_free(
    denoise_both: Denoise,
    denoise_cond: Denoise,
    options: StageOptions,
    num_timesteps: int,
    learned_variance: bool = False,
) -> Denoise:
    """A denoiser guided as `options` say (2207.12598).

    denoise_cond answers for B rows under the condition; denoise_both for 2B rows, the condition's and then the null's
    (x_t and t come doubled). The latter is never called at scale 1.
    """
    if options.guidance == 1.0:
        return denoise_cond
    return Guided(denoise_both, denoise_cond, options, num_timesteps, learned_variance)


@dataclass(frozen=True)
class Guided:
    """A denoiser under classifier-free guidance; `at` spares the second half where the interval leaves it out."""

    denoise_both: Denoise
    denoise_cond: Denoise
    options: StageOptions
    num_timesteps: int
    learned_variance: bool

    def at(self, t: float) -> Denoise:
        low, high = self.options.guidance_interval
        if not low <= t / self.num_timesteps <= high:
            return at(self.denoise_cond, t)
        return partial(self._guide, at(self.denoise_both, t))

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.at(t[0].item())(x_t, t)

    def _guide(self, denoise_both: Denoise, x_t: Tensor, t: Tensor) -> Tensor:
        cond, null = denoise_both(torch.cat([x_t, x_t]), torch.cat([t, t])).chunk(2)
        if not self.learned_variance:
            return guide(cond, null, self.options.guidance, self.options.guidance_rescale)
        (cond, variance), (null, _) = cond.chunk(2, dim=1), null.chunk(2, dim=1)
        guided = guide(cond, null, self.options.guidance, self.options.guidance_rescale)
        return torch.cat(
            [guided, variance.to(guided.dtype)], dim=1
        )  # the variance is the conditional pass's own


@dataclass(frozen=True)
class Mixed:
    """A denoiser under K conditions at once: the weighted sum of its K answers (2206.01714).

    denoise answers for K * B rows, those of the first condition first; weights (K, B) should sum to 1 over K.
    """

    denoise: Denoise
    weights: Tensor

    def at(self, t: float) -> Denoise:
        return partial(self._mix, at(self.denoise, t))

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self._mix(self.denoise, x_t, t)

    def _mix(self, denoise: Denoise, x_t: Tensor, t: Tensor) -> Tensor:
        K = len(self.weights)
        answers = denoise(x_t.repeat(K, *[1] * (x_t.ndim - 1)), t.repeat(K)).unflatten(
            0, (K, -1)
        )  # (K, B, C, ...)
        return (answers * self.weights.to(answers).view(K, -1, *[1] * (x_t.ndim - 1))).sum(dim=0)


def guide(cond: Tensor, null: Tensor, scale: float, rescale: float = 0.0) -> Tensor:
    """null + scale · (cond − null) in float32 or wider.

    rescale in [0, 1] moves each sample's standard deviation back to that of `cond` (2305.08891, section 3.4).
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
    """x_0 (B, ...) kept within ±limit; None leaves it alone.

    With a percentile in (0, 1], dynamic thresholding (Imagen, 2205.11487, section 2.3): each sample is clipped at that
    percentile of its absolute values and scaled down to the limit, unless it lies within the limit (None: 1) already.
    """
    if percentile is None:
        return x_0 if limit is None else x_0.clamp(-limit, limit)
    limit = 1.0 if limit is None else limit
    magnitudes = x_0.abs().flatten(1)
    above = magnitudes.shape[1] - round(
        percentile * (magnitudes.shape[1] - 1)
    )  # how many are at least the percentile
    bound = magnitudes.topk(above).values[:, -1].clamp(min=limit).view(-1, *[1] * (x_0.ndim - 1))
    return x_0.clamp(-bound, bound) * (limit / bound)
