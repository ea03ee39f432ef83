"""Properties of every sampler: seeds, bounds, callbacks, precision, guidance, bad options."""

from __future__ import annotations

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from sampling import COSINE, ERRORS, SAMPLERS, sample_from, seeds, toy_network

from unclip.diffusion.samplers import Estimator, randn, sample, threshold
from unclip.diffusion.schedulers import scheduler_betas
from unclip.diffusion.schedules import Schedule, ScheduleConfig
from unclip.types import StageOptions

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # diffusers, numpy 2


EVERY = [*SAMPLERS, "ddim, eta 1", "euler"]


def options_for(name, steps, **options):
    if name == "ddim, eta 1":
        return StageOptions(steps, sampler="ddim", eta=1.0, **options)
    if name == "euler":
        return StageOptions(
            steps, sampler=EulerDiscreteScheduler(trained_betas=scheduler_betas(COSINE)), **options
        )
    return StageOptions(steps, sampler=name, **options)


def sample_named(
    name,
    steps,
    *values,
    dtype=torch.float32,
    clip=1.0,
    learned=False,
    on_step=None,
    **options,
):
    generators = seeds(*values)
    x_T = randn((len(values), 3, 8, 8), generators, dtype=dtype)
    return sample_from(
        toy_network(6 if learned else 3, dtype),
        x_T,
        COSINE,
        options_for(name, steps, **options),
        prediction="x0",
        learned_variance=learned,
        clip=clip,
        generators=generators,
        on_step=on_step,
    )


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("learned", [False, True])
def test_each_sample_depends_on_its_own_generator_only(name, learned):
    together = sample_named(name, 6, 10, 11, 12, learned=learned)
    for i, seed in enumerate((10, 11, 12)):
        assert torch.equal(together[i : i + 1], sample_named(name, 6, seed, learned=learned))
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("name", EVERY[:-1])  # not Euler: diffusers starts its one step at t = 0
def test_one_step_gives_the_first_estimate(name):
    generators = seeds(0)
    x_T = randn((1, 3, 8, 8), generators)
    estimate = toy_network(dtype=torch.float32)(x_T, 999).clamp(-1, 1)
    torch.testing.assert_close(sample_named(name, 1, 0), estimate, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", EVERY)
def test_clipping_bounds_every_estimate(name):
    estimates, free = [], []
    out = sample_named(name, 5, 0, clip=0.2, on_step=lambda step, steps, x_0: estimates.append(x_0))
    sample_named(name, 5, 0, clip=None, on_step=lambda step, steps, x_0: free.append(x_0))
    assert len(estimates) == 5 and all(x_0.abs().max() <= 0.2 for x_0 in estimates)
    assert out.abs().max() <= 0.201
    assert max(x_0.abs().max() for x_0 in free) > 0.2


@pytest.mark.parametrize("name", EVERY)
def test_dynamic_threshold_acts_on_every_estimate(name):
    estimates, free = [], []
    sample_named(
        name,
        5,
        0,
        clip=0.2,
        dynamic_threshold=0.9,
        on_step=lambda step, steps, x_0: estimates.append(x_0),
    )
    sample_named(name, 5, 0, clip=None, on_step=lambda step, steps, x_0: free.append(x_0))
    assert torch.equal(estimates[0], threshold(free[0], 0.2, 0.9))
    assert not torch.equal(estimates[0], threshold(free[0], 0.2))
    assert all(float(x_0.abs().max()) == pytest.approx(0.2) for x_0 in estimates)


@pytest.mark.parametrize("name", EVERY)
def test_on_step_counts(name):
    calls = []
    out = sample_named(
        name, 4, 0, 1, on_step=lambda step, num_steps, x_0: calls.append((step, num_steps, x_0))
    )
    assert [call[:2] for call in calls] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    torch.testing.assert_close(
        calls[-1][2], out, rtol=0, atol=1e-3
    )  # the last estimate is the result


@pytest.mark.parametrize("name", ["ddim", "dpm++", "unipc"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_networks_are_sampled_in_float32(name, dtype):
    """Half-precision arithmetic on the same outputs would be off by 0.3."""
    output = 0.9 * randn((1, 3, 8, 8), seeds(1), dtype=dtype)
    x_T = randn((1, 3, 8, 8), seeds(0), dtype=dtype)
    results, seen = [], []

    def denoise(x_t, t):
        seen.append(x_t.dtype)
        return output.to(x_t.dtype)

    for wide in (dtype, torch.float64):
        options = StageOptions(10, sampler=name)
        x_0 = sample_from(
            denoise, x_T.to(wide), COSINE, options, prediction="eps", clip=1.0, generators=seeds(0)
        )
        results.append(x_0)
    assert results[0].dtype == torch.float32 and seen == [dtype] * 10 + [torch.float64] * 10
    assert (results[0] - results[1]).abs().max() < 1e-3


def test_only_ancestral_sampling_uses_the_learned_variance():
    def constant_variance(value):
        return lambda x_t, t: torch.cat([toy_network()(x_t, t), torch.full_like(x_t, value)], dim=1)

    for name, same in (
        ("ddim, eta 1", True),
        ("dpm++", True),
        ("unipc", True),
        ("analytic", True),
        ("ancestral", False),
    ):
        results = []
        for value in (-1.0, 1.0):
            generators = seeds(0)
            x_T = randn((1, 3, 8, 8), generators, dtype=torch.float64)
            results.append(
                sample_from(
                    constant_variance(value),
                    x_T,
                    COSINE,
                    options_for(name, 4),
                    prediction="eps",
                    learned_variance=True,
                    clip=1.0,
                    generators=generators,
                )
            )
        assert torch.equal(*results) == same


def test_deterministic_samplers_use_no_generator():
    for name in ("ddim", "dpm++", "unipc"):
        generators = seeds(5)
        x_T = randn((1, 3, 4, 4), generators)
        state = generators[0].get_state()
        options = options_for(name, 4)
        sample_from(
            toy_network(dtype=x_T.dtype),
            x_T,
            COSINE,
            options,
            prediction="x0",
            clip=1.0,
            generators=generators,
        )
        assert torch.equal(generators[0].get_state(), state)


def test_guidance_outside_its_interval_costs_nothing():
    rows = []

    def denoise(x_t, t):
        rows.append(len(x_t))
        return x_t * 0.5

    def denoise_both(x_t, t):
        rows.append(len(x_t))
        return torch.cat([x_t[: len(x_t) // 2] * 0.5, x_t[len(x_t) // 2 :] * 0.1])

    options = StageOptions(4, guidance=2.0, guidance_interval=(0.3, 0.8))  # t = 999, 749, 499, 249
    estimate = Estimator(denoise, COSINE, options, "x0", denoise_both=denoise_both)
    sample(estimate, randn((2, 3, 4, 4), seeds(0, 1)), COSINE, options)
    assert rows == [2, 4, 4, 2]


def test_embeddings_are_sampled_like_images():
    x_T = randn((2, 16), seeds(0, 1))
    for name in SAMPLERS:
        out = sample_from(
            lambda x_t, t: 0.5 * x_t.tanh(),
            x_T,
            COSINE,
            StageOptions(3, sampler=name),
            prediction="x0",
            clip=5.0,
            generators=seeds(0, 1),
        )
        assert out.shape == (2, 16) and out.isfinite().all()


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_largest_number_of_steps_is_finite(name):
    schedule = Schedule(ScheduleConfig(num_timesteps=10, x0_errors=ERRORS))
    options = StageOptions(9 if name in ("dpm++", "unipc") else 10, sampler=name)
    x_T = randn((1, 3, 4, 4), seeds(0), dtype=torch.float64)
    assert (
        sample_from(
            toy_network(), x_T, schedule, options, prediction="x0", clip=1.0, generators=seeds(0)
        )
        .isfinite()
        .all()
    )


def test_randn_rows_depend_on_their_own_generator():
    noise = randn((3, 4, 5), seeds(1, 2, 3))
    for row, seed in zip(noise, (1, 2, 3), strict=True):
        assert torch.equal(
            row, torch.randn(1, 4, 5, generator=torch.Generator().manual_seed(seed))[0]
        )
    with pytest.raises(ValueError, match="1 generators for 2 samples"):
        randn((2, 4), seeds(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (StageOptions(2, sampler="euler"), "'euler'; expected one of ddim, ancestral"),
        (StageOptions(1001), "only 1000 timesteps"),
        (StageOptions(1000, sampler="dpm++"), r"steps is 1000; expected at most 999"),
        (StageOptions(1000, sampler="unipc"), "steps is 1000; expected at most 999"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sample_from(
            toy_network(),
            torch.zeros(1, 3, 4, 4),
            COSINE,
            options,
            prediction="x0",
            clip=1.0,
            generators=seeds(0),
        )


def test_eps_prediction_under_zero_terminal_snr_is_refused():
    schedule = Schedule(ScheduleConfig(zero_terminal_snr=True))
    options = StageOptions(2)
    with pytest.raises(ValueError, match="zero_terminal_snr"):
        sample_from(
            toy_network(),
            torch.zeros(1, 3, 4, 4),
            schedule,
            options,
            prediction="eps",
            clip=1.0,
            generators=seeds(0),
        )
