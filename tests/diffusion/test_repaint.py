"""Inpainting: the kept part, the painted part and the seam."""

from __future__ import annotations

import math
import time

import pytest
import torch
from diffusers import EulerDiscreteScheduler, HeunDiscreteScheduler, KDPM2DiscreteScheduler

from unclip.diffusion.repaint import PaintOptions, fill, paste, repaint
from unclip.diffusion.samplers import ddim_timesteps, sampling_timesteps
from unclip.diffusion.schedulers import scheduler_betas
from unclip.diffusion.schedules import Schedule
from unclip.types import StageOptions

T = 1000


def noise_like(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, dtype=torch.float64, generator=generator)


def correlated(schedule, rho=0.95):
    """The exact denoiser of two-pixel images, normal with variance 1 and correlation rho."""
    covariance = torch.tensor([[1.0, rho], [rho, 1.0]], dtype=torch.float64)

    def estimate(x_t, t):
        level = float(schedule.alpha_bar[t])
        gain = (
            math.sqrt(level)
            * covariance
            @ torch.linalg.inv(level * covariance + (1 - level) * torch.eye(2))
        )
        return (x_t.flatten(1) @ gain.T).view_as(x_t), None

    return estimate


def test_painted_pixels_follow_the_conditional_distribution():
    """One pixel of two is known; resampling brings the other closer to its distribution."""
    schedule, B = Schedule(), 2000
    image = torch.full((B, 1, 1, 2), 1.5, dtype=torch.float64)
    hole = torch.tensor([False, True]).view(1, 1, 1, 2)

    def painted(resamples: int) -> torch.Tensor:
        noise = noise_like(image.shape)
        options = PaintOptions(resamples, jump=5)
        return repaint(
            correlated(schedule), image, hole, schedule, ddim_timesteps(50, T), noise, options
        )[..., 1]

    once, often = painted(1), painted(8)
    assert often.mean().item() == pytest.approx(0.95 * 1.5, abs=0.06)
    assert often.std().item() == pytest.approx((1 - 0.95**2) ** 0.5, abs=0.1)
    assert abs(often.mean() - 0.95 * 1.5) < abs(once.mean() - 0.95 * 1.5)


def test_steps_are_counted_and_stretches_repeated():
    schedule, seen, steps = Schedule(), [], []

    def estimate(x_t, t):
        seen.append(t)
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
    assert seen == [999, 600, 999, 600, 300, 300]
    assert steps == [(i, 6) for i in range(1, 7)]


def test_strength_sets_the_first_timestep():
    schedule, seen = Schedule(), []
    shape = (1, 3, 2, 2)

    def estimate(x_t, t):
        seen.append((t, x_t.mean().item()))
        return x_t, None

    image, hole = torch.ones(shape), torch.ones(1, 1, 2, 2, dtype=torch.bool)
    ts = ddim_timesteps(10, T)
    repaint(
        estimate,
        image,
        hole,
        schedule,
        ts,
        lambda: torch.zeros(shape),
        PaintOptions(1, strength=0.3),
    )
    assert [t for t, _ in seen] == ts[-3:]
    assert seen[0][1] == pytest.approx(float(schedule.alpha_bar[ts[-3]]) ** 0.5)  # the noised image
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
def test_timesteps_of_any_scheduler_are_used(scheduler, how, variance):
    schedule, seen, shape = Schedule(), [], (1, 3, 2, 2)
    sampler = scheduler(trained_betas=scheduler_betas(schedule), **how)
    ts = sampling_timesteps(StageOptions(4, sampler=sampler), schedule)

    def estimate(x_t, t):
        seen.append(t)
        return x_t.clamp(-1, 1), variance

    hole = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    noise = noise_like(shape)
    painted = repaint(estimate, torch.zeros(shape), hole, schedule, ts, noise, PaintOptions(1))
    assert painted.isfinite().all()
    assert seen == sorted(set(map(round, ts)), reverse=True) and {type(t) for t in seen} == {int}


def test_paste_keeps_known_pixels_and_hides_the_seam():
    image = torch.zeros(2, 3, 64, 64)
    hole = torch.zeros(1, 1, 64, 64, dtype=torch.bool)
    hole[..., 8:24, 8:24] = True
    painted = torch.full_like(image, 0.5)  # lighter than the kept part
    painted[..., 15:17, 15:17] = 1.0
    pasted = paste(painted, image, hole)
    kept = ~hole.expand_as(image)
    assert torch.equal(pasted[kept], image[kept])
    seam = (pasted[..., 8, 8:24] - pasted[..., 7, 8:24]).abs().max()
    assert seam < 0.2  # of a step of 0.5
    assert torch.equal(
        pasted[..., 13:19, 13:19], painted[..., 13:19, 13:19]
    )  # unchanged far from the seam
    assert torch.equal(paste(painted, painted, hole), painted)  # no difference at the seam
    everything = torch.ones_like(hole)
    assert torch.equal(paste(painted, image, everything), painted)


def test_fill_uses_the_surrounding_colours():
    image = torch.zeros(1, 3, 32, 32)
    image[..., :16] = 1.0
    hole = torch.zeros(1, 1, 32, 32, dtype=torch.bool)
    hole[..., 4:28, 2:14] = True
    garbage = image.masked_fill(hole, -1.0)
    filled = fill(garbage, hole)
    assert torch.equal(filled[~hole.expand_as(image)], image[~hole.expand_as(image)])
    assert filled[..., 4:28, 2:10].min() > 0.7  # of the white side
    assert torch.equal(fill(image, torch.zeros_like(hole)), image)
    assert torch.equal(fill(image, torch.ones_like(hole)), torch.zeros_like(image))  # grey


def test_fill_of_a_wide_hole_is_fast():
    image, hole = torch.ones(1, 3, 256, 256), torch.ones(1, 1, 256, 256, dtype=torch.bool)
    hole[..., 0, 0] = False  # one known pixel: all radii are needed
    started = time.process_time()
    fill(image, hole)
    assert (
        time.process_time() - started < 8
    )  # seconds; several times as long without separable filters


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
