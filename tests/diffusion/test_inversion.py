"""DDIM backwards: exact where the answer is known, better with corrections than without."""

from __future__ import annotations

import math

import pytest
import torch

from unclip.diffusion.inversion import InversionOptions, draw, inverse_step, invert
from unclip.diffusion.samplers import ancestral_timesteps, ddim_step, ddim_timesteps, estimator
from unclip.diffusion.schedules import Schedule, ScheduleConfig

SPREAD = 0.4  # standard deviation of the pictures of the Gaussian world


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gaussian(schedule, spread=SPREAD):
    """The exact denoiser where pictures are normal with mean 0: the mean of x_0 given x_t."""

    def estimate(x_t, t, last):
        level = float(schedule.alpha_bar[t])
        return math.sqrt(level) * spread**2 / (level * spread**2 + 1 - level) * x_t, None

    return estimate


def bent(schedule):
    """A denoiser that hangs on x_t in no simple way, and is clipped as those of pictures are."""

    def estimate(x_t, t, last):
        x_0 = gaussian(schedule)(x_t, t, last)[0]
        return (x_0 + 0.3 * torch.sin(3 * x_t + x_t.roll(1, -1))).clamp(-1, 1), None

    return estimate


@pytest.fixture(params=[False, True], ids=["usual", "zero terminal SNR"])
def schedule(request):
    return Schedule(ScheduleConfig(zero_terminal_snr=request.param))


def test_drawing_is_ddim(schedule):
    from unclip.diffusion.samplers import sample
    from unclip.types import StageOptions

    x_T, steps = randn(2, 3, 4, 4), 7
    world = bent(schedule)
    expected = sample(
        lambda x, t: world(x, int(t[0]), False)[0],
        x_T,
        schedule,
        StageOptions(steps, sampler="ddim"),
        prediction="x0",
        clip=1.0,
        generators=[torch.Generator()] * 2,
    )
    torch.testing.assert_close(draw(world, x_T, schedule, ddim_timesteps(steps, 1000)), expected)


def test_an_inverted_picture_is_drawn_again(schedule):
    x_0 = randn(3, 3, 4, 4) * SPREAD
    exact = InversionOptions(iterations=100, tolerance=1e-12)
    for timesteps in (ddim_timesteps(20, 1000), ancestral_timesteps(20, 1000)):
        x_T = invert(gaussian(schedule), x_0, schedule, timesteps, exact)
        torch.testing.assert_close(
            draw(gaussian(schedule), x_T, schedule, timesteps), x_0, rtol=0, atol=1e-8
        )


def test_noise_is_found_again():
    schedule = Schedule()
    x_T, timesteps = randn(3, 3, 4, 4), ddim_timesteps(20, 1000)
    x_0 = draw(bent(schedule), x_T, schedule, timesteps)
    found = invert(bent(schedule), x_0, schedule, timesteps, InversionOptions(200, 1e-12))
    torch.testing.assert_close(
        draw(bent(schedule), found, schedule, timesteps), x_0, rtol=0, atol=1e-5
    )


def test_in_the_gaussian_world_the_noise_has_the_spread_of_noise():
    schedule, timesteps = Schedule(), ddim_timesteps(250, 1000)
    x_T = invert(
        gaussian(schedule),
        randn(4, 3, 16, 16) * SPREAD,
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
        x_T = invert(bent(schedule), x_0, schedule, timesteps, InversionOptions(iterations, 1e-8))
        return (draw(bent(schedule), x_T, schedule, timesteps) - x_0).square().mean().sqrt().item()

    plain, few, many = error(0), error(3), error(30)
    assert many < few < plain and many < plain / 5


def test_plain_inversion_asks_the_network_once_a_step():
    schedule, calls = Schedule(), []

    def estimate(x_t, t, last):
        calls.append((t, last))
        return gaussian(schedule)(x_t, t, last)

    invert(estimate, randn(1, 3, 2, 2), schedule, [999, 500, 100], InversionOptions(0))
    assert calls == [(100, True), (500, False), (999, False)]
    calls.clear()
    invert(estimate, randn(1, 3, 2, 2), schedule, [999, 500, 100], InversionOptions(50, 1e-6))
    assert 3 < len(calls) < 60 and {t for t, last in calls if last} == {100}


def test_plain_inversion_is_ddim_with_the_noise_before():
    """Song et al.'s own inversion: a step of DDIM towards more noise."""
    schedule, (t, t_prev) = Schedule(), (500, 450)
    levels = [float(schedule.alpha_bar[one]) for one in (t, t_prev)]
    x_prev, x_0 = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1)
    eps = (x_prev - math.sqrt(levels[1]) * x_0) / math.sqrt(1 - levels[1])
    x_t, _ = inverse_step(lambda x: x_0, x_prev, eps, *levels, InversionOptions(0))
    torch.testing.assert_close(x_t, ddim_step(x_prev, x_0, levels[1], levels[0]))


def test_a_sample_does_not_depend_on_its_batch():
    schedule, timesteps, options = Schedule(), ddim_timesteps(5, 1000), InversionOptions(10, 1e-2)
    x_0 = torch.stack([randn(3, 4, 4) * scale for scale in (0.01, 0.3, 1.0)])
    together = invert(bent(schedule), x_0, schedule, timesteps, options)
    for i in range(3):
        alone = invert(bent(schedule), x_0[i : i + 1], schedule, timesteps, options)
        torch.testing.assert_close(together[i : i + 1], alone)


def test_a_correction_that_does_harm_is_not_kept():
    """Guidance can make the estimate hang on x_t so much that the plain iteration runs away."""
    levels = (0.5, 0.6)

    def estimate(x):
        return 30 * x

    x_prev = randn(2, 3, 4, 4)
    x_t, x_0 = inverse_step(
        estimate, x_prev, torch.zeros_like(x_prev), *levels, InversionOptions(60, 1e-10)
    )
    torch.testing.assert_close(ddim_step(x_t, x_0, *levels), x_prev, rtol=0, atol=1e-6)


def test_eta_draws_afresh_but_at_the_last_step():
    schedule, drawn = Schedule(), []

    def noise():
        drawn.append(randn(1, 3, 2, 2, seed=len(drawn)))
        return drawn[-1]

    x_T, world = randn(1, 3, 2, 2), gaussian(schedule)
    first = draw(world, x_T, schedule, [999, 500, 100], 0.5, noise)
    assert len(drawn) == 2
    assert not torch.allclose(first, draw(world, x_T, schedule, [999, 500, 100]))


def test_steps_are_reported_and_the_dtype_of_the_network_is_free():
    schedule, steps = Schedule(), []
    estimate = estimator(
        lambda x, t: x * 0.5, schedule, prediction="v", clip=1.0, dtype=torch.float32
    )
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
