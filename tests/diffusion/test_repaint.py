"""Painting into pictures: what is kept, what is painted, and how the two meet."""

from __future__ import annotations

import math
import time

import pytest
import torch
from diffusers import EulerDiscreteScheduler, HeunDiscreteScheduler, KDPM2DiscreteScheduler

from unclip.diffusion.repaint import PaintOptions, fill, paste, repaint
from unclip.diffusion.samplers import ddim_timesteps, scheduler_betas, timesteps
from unclip.diffusion.schedules import Schedule
from unclip.types import StageOptions

T = 1000


def noise_like(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, dtype=torch.float64, generator=generator)


def correlated(schedule, rho=0.95):
    """The exact denoiser of pictures of two pixels, normal with variance 1 and correlation rho."""
    covariance = torch.tensor([[1.0, rho], [rho, 1.0]], dtype=torch.float64)

    def estimate(x_t, t, last):
        level = float(schedule.alpha_bar[t])
        gain = (
            math.sqrt(level)
            * covariance
            @ torch.linalg.inv(level * covariance + (1 - level) * torch.eye(2))
        )
        return (x_t.flatten(1) @ gain.T).view_as(x_t), None

    return estimate


def test_what_is_painted_goes_with_what_is_kept():
    """One pixel of two is known: the other is drawn from the conditional distribution, the better with resampling."""
    schedule, B = Schedule(), 2000
    picture = torch.full((B, 1, 1, 2), 1.5, dtype=torch.float64)
    hole = torch.tensor([False, True]).view(1, 1, 1, 2)

    def painted(resamples: int) -> torch.Tensor:
        noise = noise_like(picture.shape)
        options = PaintOptions(resamples, jump=5)
        return repaint(
            correlated(schedule), picture, hole, schedule, ddim_timesteps(50, T), noise, options
        )[..., 1]

    once, often = painted(1), painted(8)
    assert often.mean().item() == pytest.approx(0.95 * 1.5, abs=0.06)
    assert often.std().item() == pytest.approx((1 - 0.95**2) ** 0.5, abs=0.1)
    assert abs(often.mean() - 0.95 * 1.5) < abs(once.mean() - 0.95 * 1.5)


def test_steps_are_counted_and_stretches_repeated():
    schedule, seen, steps = Schedule(), [], []

    def estimate(x_t, t, last):
        seen.append((t, last))
        return torch.zeros_like(x_t), None

    shape = (1, 3, 2, 2)
    hole, options = torch.ones(1, 1, 2, 2, dtype=torch.bool), PaintOptions(resamples=2, jump=2)
    repaint(
        estimate,
        torch.zeros(shape),
        hole,
        schedule,
        [999, 600, 300],
        lambda: torch.zeros(shape),
        options,
        on_step=lambda *step: steps.append(step[:2]),
    )
    assert [t for t, _ in seen] == [999, 600, 999, 600, 300, 300]
    assert [last for _, last in seen] == [False] * 4 + [True] * 2
    assert steps == [(i, 6) for i in range(1, 7)]


def test_strength_says_where_to_begin():
    schedule, seen = Schedule(), []
    shape = (1, 3, 2, 2)

    def estimate(x_t, t, last):
        seen.append((t, x_t.mean().item()))
        return x_t, None

    picture, hole = torch.ones(shape), torch.ones(1, 1, 2, 2, dtype=torch.bool)
    ts = ddim_timesteps(10, T)
    repaint(
        estimate,
        picture,
        hole,
        schedule,
        ts,
        lambda: torch.zeros(shape),
        PaintOptions(1, strength=0.3),
    )
    assert [t for t, _ in seen] == ts[-3:]
    assert seen[0][1] == pytest.approx(
        float(schedule.alpha_bar[ts[-3]]) ** 0.5
    )  # the picture, noised so far
    assert PaintOptions(strength=0.01).steps(10) == 1


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers, numpy 2
@pytest.mark.parametrize("variance", [None, torch.zeros(1, 3, 2, 2)])
@pytest.mark.parametrize(
    ("scheduler", "how"),
    [
        (EulerDiscreteScheduler, {"use_karras_sigmas": True}),  # between timesteps
        (HeunDiscreteScheduler, {}),  # all but the first twice
        (KDPM2DiscreteScheduler, {}),
    ],
)
def test_it_steps_through_the_timesteps_of_any_scheduler(scheduler, how, variance):
    schedule, seen, shape = Schedule(), [], (1, 3, 2, 2)
    sampler = scheduler(trained_betas=scheduler_betas(schedule), **how)
    ts = timesteps(StageOptions(4, sampler=sampler), schedule)

    def estimate(x_t, t, last):
        seen.append(t)
        return x_t.clamp(-1, 1), variance

    hole = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    noise = noise_like(shape)
    painted = repaint(estimate, torch.zeros(shape), hole, schedule, ts, noise, PaintOptions(1))
    assert painted.isfinite().all()
    assert seen == sorted(set(map(round, ts)), reverse=True) and {type(t) for t in seen} == {int}


def test_pasting_keeps_what_is_kept_and_hides_the_seam():
    picture = torch.zeros(2, 3, 32, 32)
    hole = torch.zeros(1, 1, 32, 32, dtype=torch.bool)
    hole[..., 8:24, 8:24] = True
    painted = torch.full_like(picture, 0.5)  # everywhere lighter than what is kept
    painted[..., 15:17, 15:17] = 1.0
    pasted = paste(painted, picture, hole, radius=2)
    kept = ~hole.expand_as(picture)
    assert torch.equal(pasted[kept], picture[kept])
    seam = (pasted[..., 8, 8:24] - pasted[..., 7, 8:24]).abs().max()
    assert seam < 0.2  # of a step of 0.5
    assert torch.equal(
        pasted[..., 13:19, 13:19], painted[..., 13:19, 13:19]
    )  # far from the seam nothing is changed
    assert torch.equal(paste(painted, painted, hole, 2), painted)  # nothing was amiss
    everything = torch.ones_like(hole)
    assert torch.equal(paste(painted, picture, everything, 2), painted)


def test_holes_are_filled_with_what_is_around_them():
    picture = torch.zeros(1, 3, 32, 32)
    picture[..., :16] = 1.0
    hole = torch.zeros(1, 1, 32, 32, dtype=torch.bool)
    hole[..., 4:28, 2:14] = True
    garbage = picture.masked_fill(hole, -1.0)
    filled = fill(garbage, hole)
    assert torch.equal(filled[~hole.expand_as(picture)], picture[~hole.expand_as(picture)])
    assert filled[..., 4:28, 2:10].min() > 0.7  # of the white side
    assert torch.equal(fill(picture, torch.zeros_like(hole)), picture)
    assert torch.equal(fill(picture, torch.ones_like(hole)), torch.zeros_like(picture))  # grey


def test_a_wide_hole_is_filled_quickly():
    picture, hole = torch.ones(1, 3, 256, 256), torch.ones(1, 1, 256, 256, dtype=torch.bool)
    hole[..., 0, 0] = False  # little to begin with, so that all radii are gone through
    started = time.process_time()
    fill(picture, hole)
    assert (
        time.process_time() - started < 8
    )  # seconds; with boxes that are not taken apart it is several times that


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resamples": 0}, "resamples is 0"),
        ({"jump": 0}, "jump is 0"),
        ({"strength": 0.0}, "strength is 0"),
        ({"agreement": -1.0}, "agreement is -1"),
        ({"agreement": float("nan")}, "agreement is nan"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PaintOptions(**options)
