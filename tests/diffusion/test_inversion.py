"""DDIM inversion: exact where the noise is known, better with corrections than without."""

from __future__ import annotations

import math

import pytest
import torch

from unclip.diffusion.inversion import InversionOptions, inverse_step, invert
from unclip.diffusion.samplers import Estimator, ddim_step, ddim_timesteps, sample
from unclip.diffusion.schedules import Schedule, ScheduleConfig
from unclip.types import StageOptions

STD = 0.4  # standard deviation of the Gaussian images


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gaussian(schedule, std=STD):
    """The exact denoiser of normal images with mean 0: the mean of x_0 given x_t."""

    def estimate(x_t, t):
        level = float(schedule.alpha_bar[t])
        return math.sqrt(level) * std**2 / (level * std**2 + 1 - level) * x_t, None

    return estimate


def nonlinear(schedule):
    """A nonlinear denoiser, clipped as those of images are."""

    def estimate(x_t, t):
        x_0 = gaussian(schedule)(x_t, t)[0]
        return (x_0 + 0.3 * torch.sin(3 * x_t + x_t.roll(1, -1))).clamp(-1, 1), None

    return estimate


@pytest.fixture(params=[False, True], ids=["usual", "zero terminal SNR"])
def schedule(request):
    return Schedule(ScheduleConfig(zero_terminal_snr=request.param))


def ddim(estimate, x_T, schedule, steps, eta=0.0, generators=()):
    options = StageOptions(steps, sampler="ddim", eta=eta)
    return sample(estimate, x_T, schedule, options, generators=generators)


def test_inversion_inverts_ddim(schedule):
    x_0, exact = randn(3, 3, 4, 4) * STD, InversionOptions(iterations=100, tolerance=1e-12)
    x_T = invert(gaussian(schedule), x_0, schedule, ddim_timesteps(20, 1000), exact)
    torch.testing.assert_close(ddim(gaussian(schedule), x_T, schedule, 20), x_0, rtol=0, atol=1e-8)


def test_inversion_of_a_nonlinear_denoiser():
    schedule = Schedule()
    x_T, timesteps = randn(3, 3, 4, 4), ddim_timesteps(20, 1000)
    x_0 = ddim(nonlinear(schedule), x_T, schedule, 20)
    found = invert(nonlinear(schedule), x_0, schedule, timesteps, InversionOptions(200, 1e-12))
    again = ddim(nonlinear(schedule), found, schedule, 20)
    torch.testing.assert_close(again, x_0, rtol=0, atol=1e-5)


def test_noise_of_gaussian_images_has_unit_variance():
    schedule, timesteps = Schedule(), ddim_timesteps(250, 1000)
    x_T = invert(
        gaussian(schedule),
        randn(4, 3, 16, 16) * STD,
        schedule,
        timesteps,
        InversionOptions(100, 1e-10),
    )
    assert x_T.std().item() == pytest.approx(1.0, abs=0.03)


def test_corrections_are_better_than_none():
    schedule, timesteps, x_0 = (
        Schedule(),
        ddim_timesteps(20, 1000),
        randn(2, 3, 4, 4).clamp(-1, 1) * 0.9,
    )

    def error(iterations):
        x_T = invert(
            nonlinear(schedule), x_0, schedule, timesteps, InversionOptions(iterations, 1e-8)
        )
        return (ddim(nonlinear(schedule), x_T, schedule, 20) - x_0).square().mean().sqrt().item()

    plain, few, many = error(0), error(3), error(30)
    assert many < few < plain and many < plain / 5


def test_plain_inversion_calls_the_network_once_a_step():
    schedule, calls = Schedule(), []

    def estimate(x_t, t):
        calls.append(t)
        return gaussian(schedule)(x_t, t)

    invert(estimate, randn(1, 3, 2, 2), schedule, [999, 500, 100], InversionOptions(0))
    assert calls == [100, 500, 999]
    calls.clear()
    invert(estimate, randn(1, 3, 2, 2), schedule, [999, 500, 100], InversionOptions(50, 1e-6))
    assert 3 < len(calls) < 60 and set(calls) == {100, 500, 999}


def test_plain_inversion_is_ddim_with_the_previous_noise():
    """Song et al.'s inversion: a step of DDIM towards more noise."""
    schedule, (t, t_prev) = Schedule(), (500, 450)
    levels = [float(schedule.alpha_bar[one]) for one in (t, t_prev)]
    x_prev, x_0 = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1)
    eps = (x_prev - math.sqrt(levels[1]) * x_0) / math.sqrt(1 - levels[1])
    x_t, _ = inverse_step(lambda x: x_0, x_prev, eps, *levels, InversionOptions(0))
    torch.testing.assert_close(x_t, ddim_step(x_prev, x_0, levels[1], levels[0]))


def test_a_sample_does_not_depend_on_its_batch():
    schedule, timesteps, options = Schedule(), ddim_timesteps(5, 1000), InversionOptions(10, 1e-2)
    x_0 = torch.stack([randn(3, 4, 4) * scale for scale in (0.01, 0.3, 1.0)])
    together = invert(nonlinear(schedule), x_0, schedule, timesteps, options)
    for i in range(3):
        alone = invert(nonlinear(schedule), x_0[i : i + 1], schedule, timesteps, options)
        torch.testing.assert_close(together[i : i + 1], alone)


def test_harmful_corrections_are_discarded():
    """Guidance can make the slope so large that the plain iteration diverges."""
    levels = (0.5, 0.6)

    def estimate(x):
        return 30 * x

    x_prev = randn(2, 3, 4, 4)
    x_t, x_0 = inverse_step(
        estimate, x_prev, torch.zeros_like(x_prev), *levels, InversionOptions(60, 1e-10)
    )
    torch.testing.assert_close(ddim_step(x_t, x_0, *levels), x_prev, rtol=0, atol=1e-6)


def test_eta_uses_generators_except_at_the_last_step():
    schedule, generator = Schedule(), torch.Generator().manual_seed(0)
    x_T, reference = randn(1, 3, 2, 2), torch.Generator().manual_seed(0)
    first = ddim(gaussian(schedule), x_T, schedule, 3, 0.5, [generator])
    for _ in range(2):
        torch.randn(x_T.shape, generator=reference, dtype=x_T.dtype)
    assert torch.equal(generator.get_state(), reference.get_state())
    assert not torch.allclose(first, ddim(gaussian(schedule), x_T, schedule, 3))


def test_steps_are_reported():
    schedule, steps = Schedule(), []
    estimate = Estimator(lambda x, t: x * 0.5, schedule, StageOptions(2), "v", clip=1.0)
    x_T = invert(
        estimate,
        torch.zeros(1, 3, 2, 2),
        schedule,
        [999, 499],
        on_step=lambda *step: steps.append(step[:2]),
    )
    assert steps == [(1, 2), (2, 2)] and x_T.dtype == torch.float32


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="iterations is -1"):
        InversionOptions(iterations=-1)
    with pytest.raises(ValueError, match="tolerance is -1"):
        InversionOptions(tolerance=-1.0)
