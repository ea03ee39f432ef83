"""Helpers for the tests of the samplers."""

from __future__ import annotations

import torch

from unclip.diffusion.samplers import Estimator, sample
from unclip.diffusion.schedules import Schedule, ScheduleConfig
from unclip.pipelines.unclip.stages import DecoderStage

SAMPLERS = ["ancestral", "analytic", "ddim", "dpm++", "unipc"]
ERRORS = (0.01, 0.3)  # of x_0 at the first and the last timestep, for "analytic"
COSINE = Schedule(ScheduleConfig(x0_errors=ERRORS))


def seeds(*values):
    """One generator for each seed."""
    return [torch.Generator().manual_seed(value) for value in values]


def toy_network(channels=3, dtype=torch.float64):
    """A fixed function of x_t and t that treats the rows of a batch independently."""
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(channels, 3, dtype=torch.float64, generator=generator).to(dtype)

    def denoise(x_t, t):
        mixed = [(w.view(-1, 1, 1) * x_t + t / 1000).sum(1).tanh() for w in weight]
        return torch.stack(mixed, dim=1)

    return denoise


def sample_from(
    denoise,
    x_T,
    schedule,
    options,
    *,
    prediction="x0",
    learned_variance=False,
    clip=1.0,
    generators,
    on_step=None,
):
    """Sample with an unguided denoiser in the dtype of x_T."""
    estimate = Estimator(
        denoise, schedule, options, prediction, learned_variance, clip, dtype=x_T.dtype
    )
    return sample(estimate, x_T, schedule, options, generators=generators, on_step=on_step)


def interrupt_the_second_batch(monkeypatch) -> None:
    """Let the decoder of every pipeline raise KeyboardInterrupt when it is called again."""
    sample, calls = DecoderStage.sample, []

    def interrupted(self, *args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return sample(self, *args, **kwargs)

    monkeypatch.setattr(DecoderStage, "sample", interrupted)
