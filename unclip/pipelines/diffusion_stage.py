"""A diffusion stage: a denoiser with its noise schedule, bound to a conditioning, then sampled."""

# K contexts of each sample, B batch, C channels, s image size

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from unclip.diffusion.inversion import InversionOptions, invert
from unclip.diffusion.repaint import PaintOptions, repaint
from unclip.diffusion.samplers import Estimator, randn, sample, sampling_timesteps
from unclip.diffusion.schedulers import Estimate, OnSample
from unclip.diffusion.schedules import Prediction, Schedule
from unclip.models.layers import DenoiserCache
from unclip.models.unclip.decoder import Decoder
from unclip.models.unclip.upsampler import Upsampler
from unclip.pipelines.runtime import Runtime
from unclip.types import BatchReporter, OnStep, Progress, StageOptions

Generators = Sequence[torch.Generator]


@dataclass(frozen=True)
class DiffusionStage:
    """A denoiser with its noise schedule and runtime, without conditioning."""

    name: str
    network: Any  # with a method denoise(x_t, t, context, cache)
    schedule: Schedule
    runtime: Runtime
    prediction: Prediction
    learned_variance: bool = False
    guided_variance: bool = False  # guide the learned variance too (DALLE2-pytorch)

    def bind(
        self,
        context: Any,
        options: StageOptions,
        null: Callable[[], Any] | None = None,
        weights: Tensor | None = None,
        clip: float | None = 1.0,
    ) -> BoundStage:
        """Fix the conditioning and the options.

        null: returns the unconditional context of guidance, with one row or as many as `context`;
        not called without guidance. weights (K, B): of the K contexts of each sample. clip: bound
        of |x_0|.
        """
        timesteps = sampling_timesteps(options, self.schedule)
        denoise, denoise_both = self._denoiser(context, options, timesteps), None
        if null is not None and options.guidance != 1:
            denoise_both = self._denoiser(with_null(context, null()), options, timesteps)
        return BoundStage(self, options, timesteps, denoise, denoise_both, weights, clip)

    def _denoiser(
        self, context: Any, options: StageOptions, timesteps: Sequence[float]
    ) -> partial[Tensor]:
        """Return the network as a function of x_t and t, with its context and cache."""
        network: Any = self.network
        if options.cache_interval > 1 and not isinstance(network, Decoder | Upsampler):
            kind = type(network).__name__
            raise ValueError(
                f"{self.name} is a {kind}; expected cache_interval 1, got {options.cache_interval}"
            )
        module = network.unet if isinstance(network, Upsampler) else network
        denoise = self.runtime.bind(network.denoise, module)
        cache = DenoiserCache(timesteps, options.cache_interval)
        return partial(denoise, context=context, cache=cache)


def with_null(context: Any, null: Any) -> Any:
    """Append the null context of guidance, of one row or as many as `context`."""
    return type(context).cat([context, null.repeat_interleave(len(context) // len(null))])


@dataclass(frozen=True)
class BoundStage:
    """A diffusion stage with its conditioning, ready to be sampled, inverted or painted with."""

    stage: DiffusionStage
    options: StageOptions
    timesteps: list[float]
    denoise: partial[Tensor]  # with the keyword arguments `context` and `cache`
    denoise_both: partial[Tensor] | None = None  # of contexts, then their nulls; for guidance
    weights: Tensor | None = None
    clip: float | None = 1.0

    @cached_property
    def estimate(self) -> Estimator:
        """The guided estimate of x_0."""
        stage = self.stage
        return Estimator(
            self.denoise,
            stage.schedule,
            self.options,
            stage.prediction,
            learned_variance=stage.learned_variance,
            guided_variance=stage.guided_variance,
            clip=self.clip,
            denoise_both=self.denoise_both,
            weights=self.weights,
            dtype=stage.runtime.dtype,
        )

    def noise(self, shape: Sequence[int], generators: Generators) -> Tensor:
        """Return the initial noise (B, ...), in float32 for every dtype of the network."""
        x_T = randn(shape, generators, self.stage.runtime.device) * self.options.temperature
        return x_T.to(memory_format=torch.channels_last) if x_T.ndim == 4 else x_T

    def sample(
        self, x_T: Tensor, generators: Generators = (), on_step: OnStep | None = None
    ) -> Tensor:
        """Sample x_0 from the noise x_T (B, ...)."""
        estimate, report = self._start(on_step)
        with self.stage.runtime.memory():
            return sample(
                estimate,
                x_T,
                self.stage.schedule,
                self.options,
                timesteps=self.timesteps,
                generators=generators,
                on_step=report,
            )

    def invert(self, images: Tensor, options: InversionOptions, on_step: OnStep | None) -> Tensor:
        """Return the noise from which DDIM samples `images`."""
        schedule, (_, report) = self.stage.schedule, self._start(on_step)
        with self.stage.runtime.memory():
            return invert(self.estimate, images, schedule, self.timesteps, options, report)

    def repaint(
        self,
        image: Tensor,
        hole: Tensor,
        generators: Generators,
        options: PaintOptions,
        on_step: OnStep | None,
    ) -> Tensor:
        """Paint the hole (1 or B, 1, s, s) of images (B, 3, s, s)."""
        schedule, (estimate, report) = self.stage.schedule, self._start(on_step)
        noise = partial(randn, image.shape, generators, self.stage.runtime.device)
        with self.stage.runtime.memory():
            return repaint(estimate, image, hole, schedule, self.timesteps, noise, options, report)

    def select(self, rows: Tensor) -> BoundStage:
        """Return the stage bound to some of its contexts; `estimate` takes only their samples."""

        def some(denoise: partial[Tensor]) -> partial[Tensor]:
            context, cache = denoise.keywords["context"], denoise.keywords["cache"]
            parts = torch.arange(0, len(context), self.num_contexts, device=rows.device)
            at = (parts[:, None] + rows).flatten()
            return partial(denoise.func, context=context[at], cache=cache.select(at))

        both = None if self.denoise_both is None else some(self.denoise_both)
        weights = self.weights
        if weights is not None:
            weights = weights.unflatten(1, (self.num_contexts, -1))[:, rows].flatten(1)
        return replace(self, denoise=some(self.denoise), denoise_both=both, weights=weights)

    @property
    def num_contexts(self) -> int:
        """Number of contexts per text of a mixture; each is for an equal share of the samples."""
        K = 1 if self.weights is None else len(self.weights)
        return len(self.denoise.keywords["context"]) // K

    def _start(self, on_step: OnStep | None) -> tuple[Estimate, OnSample | None]:
        """Return the estimate of x_0, and a callback of unclip.diffusion that calls `on_step`."""
        if on_step is None:
            return self.estimate, None
        of_wanted = None
        if isinstance(on_step, BatchReporter) and not self.stage.runtime.compiled:
            of_wanted = WantedEstimate(self, on_step)

        def estimate() -> Estimate:
            return of_wanted if of_wanted and of_wanted.reporter.dropped else self.estimate

        def report(step: int, num_steps: int, x_0: Tensor) -> Estimate:
            preview = x_0 if x_0.ndim == 4 else None
            on_step(Progress(self.stage.name, step, num_steps, preview))
            return estimate()

        return estimate(), report


class WantedEstimate:
    """Estimates x_0 of the images that are not dropped; returns zeros for the others."""

    def __init__(self, bound: BoundStage, reporter: BatchReporter) -> None:
        self.bound, self.reporter, self.num_contexts = bound, reporter, bound.num_contexts
        self.contexts = torch.arange(bound.num_contexts)  # indices of those that are left

    def __call__(self, x_t: Tensor, t: float) -> tuple[Tensor, Tensor | None]:
        rows = self._select(len(x_t)).to(x_t.device)
        x_0, variance = self.bound.estimate(x_t[rows], t)

        def spread(x: Tensor) -> Tensor:
            return torch.zeros_like(x_t, dtype=x.dtype).index_copy(0, rows, x)

        return spread(x_0), None if variance is None else spread(variance)

    def _select(self, num_rows: int) -> Tensor:
        """Drop contexts without a wanted image; return the samples of the others."""
        wanted = torch.zeros(self.reporter.num_images, dtype=torch.bool)
        wanted[self.reporter.kept()] = True
        samples = torch.arange(num_rows).view(self.num_contexts, -1)
        wanted = wanted.repeat_interleave(num_rows // len(wanted)).view_as(samples).any(dim=1)
        still = wanted[self.contexts]
        if not still.any():  # networks take at least one image
            still[0] = True
        if not still.all():
            rows = still.nonzero()[:, 0].to(self.bound.stage.runtime.device)
            self.bound, self.contexts = self.bound.select(rows), self.contexts[still]
        return samples[self.contexts].flatten()
