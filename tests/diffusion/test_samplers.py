from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    UnCLIPScheduler,
)
from sampling import COSINE, SAMPLERS, sample_from, seeds, toy_network

from unclip.diffusion.samplers import (
    ancestral_step,
    ancestral_timesteps,
    ddim_step,
    ddim_timesteps,
    randn,
)
from unclip.diffusion.schedulers import make_scheduler, scheduler_betas
from unclip.diffusion.schedules import Schedule, ScheduleConfig
from unclip.types import StageOptions

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # diffusers, numpy 2

TWO_CALLS = [
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
]
DIFFUSERS_NAMES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


def mixture_denoiser(schedule, prediction):
    """The exact denoiser of pixels from 0.3 N(0.6, 0.1²) + 0.7 N(-0.5, 0.1²)."""
    means, std = torch.tensor([0.6, -0.5], dtype=torch.float64), 0.1
    log_weights = torch.tensor([0.3, 0.7], dtype=torch.float64).log()

    def denoise(x_t, t):
        t = round(t)  # Euler and Heun step between timesteps
        alpha, sigma = schedule.at("alpha", t, x_t), schedule.at("sigma", t, x_t)
        rest, variance = x_t[..., None] - alpha * means, alpha**2 * std**2 + sigma**2
        weights = (log_weights - rest**2 / (2 * variance)).softmax(-1)
        x_0 = (weights * (means + alpha * std**2 / variance * rest)).sum(-1)
        return schedule.target(x_0, (x_t - alpha * x_0) / sigma, t, prediction)

    return denoise


def mixture_errors(schedule):
    """The mean squared errors of that denoiser's x_0 at evenly spaced timesteps."""
    generator, errors = seeds(0)[0], []
    right = torch.rand(20_000, dtype=torch.float64, generator=generator) < 0.3
    x_0 = torch.where(right, 0.6, -0.5).double()
    x_0 += 0.1 * torch.randn(x_0.shape, dtype=torch.float64, generator=generator)
    denoise = mixture_denoiser(schedule, "x0")
    for t in torch.linspace(0, schedule.num_timesteps - 1, 100).tolist():
        noise = torch.randn(x_0.shape, dtype=torch.float64, generator=generator)
        x_t = (
            schedule.at("alpha", round(t), x_0) * x_0 + schedule.at("sigma", round(t), x_0) * noise
        )
        errors.append(float((denoise(x_t, t) - x_0).square().mean()))
    return tuple(errors)


MIXTURE_MEAN, MIXTURE_STD = -0.17, (0.1**2 + 0.3 * 0.7 * 1.1**2) ** 0.5


def sample_mixture(sampler, steps, schedule=COSINE, prediction="v", **options):
    """Sample 8192 pixels of the mixture, always from the same x_T."""
    generators = seeds(*range(8))
    x_T = randn((8, 1, 32, 32), generators, dtype=torch.float64)
    return sample_from(
        mixture_denoiser(schedule, prediction),
        x_T,
        schedule,
        StageOptions(steps, sampler=sampler, **options),
        prediction=prediction,
        clip=None,
        generators=generators,
    )


def widen(scheduler, schedule):
    """Replace the float32 tables of UnCLIPScheduler, where 1 - alpha_bar cancels, by float64."""
    scheduler.betas, scheduler.alphas_cumprod = schedule.betas, schedule.alpha_bar
    scheduler.alphas, scheduler.one = 1 - schedule.betas, torch.tensor(1.0, dtype=torch.float64)
    return scheduler


# -- ancestral sampling


@pytest.mark.parametrize("num_steps", [2, 7, 25, 50, 64, 1000])
def test_ancestral_timesteps_equal_karlos(num_steps):
    reference = UnCLIPScheduler()
    reference.set_timesteps(num_steps)
    assert ancestral_timesteps(num_steps, 1000) == reference.timesteps.tolist()
    assert ancestral_timesteps(7, 1000) == [999, 832, 666, 500, 333, 166, 0]


@pytest.mark.parametrize("variance_type", ["fixed_small_log", "learned_range"])
@pytest.mark.parametrize("prediction", ["eps", "x0"])
@pytest.mark.parametrize(("tables", "tolerance"), [("float64", 1e-12), ("float32", 1e-5)])
def test_ancestral_step_equals_unclip_scheduler(variance_type, prediction, tables, tolerance):
    """Exact with the same tables. The reference's float32 tables lose digits of 1 - alpha_bar near
    t = 0: its last step scales the sample by 1.0005, as does `precision` "float32"."""
    schedule = Schedule(ScheduleConfig(precision=tables))
    reference = UnCLIPScheduler(
        variance_type=variance_type, prediction_type=DIFFUSERS_NAMES[prediction]
    )
    reference = widen(reference, COSINE) if tables == "float64" else reference
    learned = variance_type == "learned_range"
    generator = torch.Generator().manual_seed(0)
    for t, t_prev in pairwise([999, 998, 958, 916, 500, 499, 83, 42, 2, 1, 0, -1]):
        x_t, output, variance = torch.randn(3, 1, 3, 4, 4, dtype=torch.float64, generator=generator)
        model_output = torch.cat([output, variance], dim=1) if learned else output
        seed = seeds(t)[0]
        expected = reference.step(
            model_output, t, x_t, prev_timestep=t_prev, generator=seed
        ).prev_sample

        x_0 = schedule.predict_x0(output, x_t, torch.tensor([t]), prediction).clamp(-1, 1)
        noise = randn(x_t.shape, seeds(t), dtype=torch.float64) if t > 0 else None
        levels = schedule.level(t), schedule.level(t_prev)
        beta = float(schedule.betas[t]) if t_prev == t - 1 else None
        ours = ancestral_step(x_t, x_0, *levels, noise, variance if learned else None, beta)
        torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("prediction", ["eps", "x0"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-10), (torch.float32, 2e-3)],
    ids=["float64", "float32"],
)
def test_ancestral_trajectory_equals_unclip_scheduler(learned, prediction, dtype, tolerance):
    """As in diffusers' pipelines with batch 1; in float32 with the reference's inexact tables."""
    variance_type = "learned_range" if learned else "fixed_small_log"
    reference = UnCLIPScheduler(
        variance_type=variance_type, prediction_type=DIFFUSERS_NAMES[prediction]
    )
    reference = widen(reference, COSINE) if dtype == torch.float64 else reference
    reference.set_timesteps(25)
    denoise = toy_network(6 if learned else 3, dtype)

    generator = seeds(3)[0]
    x_t = torch.randn(1, 3, 8, 8, generator=generator, dtype=dtype)
    for t, t_prev in pairwise([*reference.timesteps.tolist(), None]):
        x_t = reference.step(denoise(x_t, t), t, x_t, t_prev, generator).prev_sample

    generators = seeds(3)
    x_T = randn((1, 3, 8, 8), generators, dtype=dtype)
    options = StageOptions(25, sampler="ancestral")
    ours = sample_from(
        denoise,
        x_T,
        COSINE,
        options,
        prediction=prediction,
        learned_variance=learned,
        clip=1.0,
        generators=generators,
    )
    torch.testing.assert_close(ours, x_t, rtol=0, atol=tolerance)
    assert torch.equal(generator.get_state(), generators[0].get_state())  # equal numbers of draws


# -- DDIM


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 27, 250, 999, 1000])
def test_ddim_timesteps_start_from_pure_noise(num_steps):
    timesteps = ddim_timesteps(num_steps, 1000)
    assert len(timesteps) == num_steps and timesteps[0] == 999
    steps = [t - t_prev for t, t_prev in pairwise([*timesteps, -1])]
    assert min(steps) > 0 and max(steps) - min(steps) <= 1


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_ddim_equals_diffusers(prediction, eta):
    reference = DDIMScheduler(
        trained_betas=COSINE.betas.tolist(),
        prediction_type=DIFFUSERS_NAMES[prediction],
        timestep_spacing="trailing",
    )
    reference.alphas_cumprod, reference.final_alpha_cumprod = (
        COSINE.alpha_bar,
        torch.tensor(1.0, dtype=torch.float64),
    )
    reference.set_timesteps(20)
    denoise, generator = toy_network(), seeds(3)[0]
    x_t = torch.randn(1, 3, 8, 8, generator=generator, dtype=torch.float64)
    for t in reference.timesteps:
        output = denoise(x_t, int(t))
        x_t = reference.step(
            output, t, x_t, eta, use_clipped_model_output=True, generator=generator
        ).prev_sample

    generators = seeds(3)
    x_T = randn((1, 3, 8, 8), generators, dtype=torch.float64)
    options = StageOptions(20, sampler="ddim", eta=eta)
    ours = sample_from(
        denoise, x_T, COSINE, options, prediction=prediction, clip=1.0, generators=generators
    )
    torch.testing.assert_close(ours, x_t, rtol=0, atol=1e-10)


def test_ddim_with_eta_1_is_ancestral():
    x_t, x_0, noise = torch.randn(3, 2, 3, 4, 4, dtype=torch.float64, generator=seeds(0)[0])
    levels = COSINE.level(600), COSINE.level(400)
    torch.testing.assert_close(
        ddim_step(x_t, x_0, *levels, 1.0, noise), ancestral_step(x_t, x_0, *levels, noise)
    )


@pytest.mark.parametrize("steps", [3, 25, 40])
def test_ddim_with_eta_1_is_finite_at_zero_terminal_snr(steps):
    schedule = Schedule(ScheduleConfig(zero_terminal_snr=True))
    x_T, options = randn((1, 3, 4, 4), seeds(0)), StageOptions(steps, eta=1.0)
    samples = sample_from(
        lambda x, t: 0 * x, x_T, schedule, options, prediction="v", clip=None, generators=seeds(0)
    )
    assert samples.isfinite().all()


def test_ddim_step_runs_backwards():
    x_t, x_0 = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64, generator=seeds(0)[0])
    low, high = COSINE.level(400), COSINE.level(600)
    torch.testing.assert_close(ddim_step(ddim_step(x_t, x_0, low, high), x_0, high, low), x_t)


# -- all samplers on data whose denoiser is known exactly


@pytest.mark.parametrize(
    ("config", "prediction"),
    [
        (ScheduleConfig("cosine"), "eps"),
        (ScheduleConfig("cosine"), "x0"),
        (ScheduleConfig("cosine", zero_terminal_snr=True), "v"),
        (ScheduleConfig("linear"), "v"),
        (ScheduleConfig("linear", zero_terminal_snr=True), "x0"),
    ],
    ids=str,
)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_reproduce_the_data_distribution(sampler, config, prediction):
    steps = 250 if sampler == "ancestral" else 80
    schedule = Schedule(config)
    if sampler == "analytic":
        schedule = Schedule(replace(config, x0_errors=mixture_errors(schedule)))
    x_0 = sample_mixture(sampler, steps, schedule, prediction)
    right = x_0 > 0.05
    assert float(x_0.mean()) == pytest.approx(MIXTURE_MEAN, abs=0.03)
    assert float(x_0.std()) == pytest.approx(MIXTURE_STD, abs=0.03)
    assert float(right.double().mean()) == pytest.approx(0.3, abs=0.03)
    assert float(x_0[right].mean()) == pytest.approx(0.6, abs=0.02)
    assert float(x_0[right].std()) == pytest.approx(0.1, abs=0.02)
    assert float(x_0[~right].std()) == pytest.approx(0.1, abs=0.02)


# -- analytic variances


def sample_gaussian(sampler, steps, std=0.5):
    """Sample pixels of N(0, std²) with the exact denoiser and its exact error at each timestep."""
    level = COSINE.alpha_bar
    gain = level.sqrt() * std**2 / (level * std**2 + 1 - level)
    errors = std**2 * (1 - level) / (level * std**2 + 1 - level)
    schedule = Schedule(ScheduleConfig(x0_errors=tuple(errors.tolist())))
    generators = seeds(*range(8))
    x_T = randn((8, 1, 64, 64), generators, dtype=torch.float64)
    options = StageOptions(steps, sampler=sampler)
    return sample_from(
        lambda x_t, t: gain[t] * x_t,
        *(x_T, schedule, options),
        prediction="x0",
        clip=None,
        generators=generators,
    )


def test_analytic_variances_are_exact_for_gaussian_data():
    """The last step returns the mean of x_0, whose variance lacks the error of x_0 there."""
    found = {s: float(sample_gaussian(s, 8).std()) for s in ("ancestral", "analytic")}
    assert found["analytic"] == pytest.approx(0.5, abs=0.005)
    assert found["ancestral"] < 0.4


def test_the_sampler_needs_measured_errors():
    with pytest.raises(ValueError, match="no x0_errors; measure them with train/analytic.py"):
        sample_mixture("analytic", 4, Schedule())


def test_multistep_solvers_beat_ddim_in_10_steps():
    exact = sample_mixture("ddim", 1000)
    errors = {
        s: float((sample_mixture(s, 10) - exact).square().mean().sqrt())
        for s in ("ddim", "dpm++", "unipc")
    }
    assert errors["dpm++"] < 0.85 * errors["ddim"]
    assert errors["unipc"] < 0.85 * errors["ddim"]


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, HeunDiscreteScheduler, DDPMScheduler])
@pytest.mark.parametrize("expects", ["epsilon", "v_prediction"])
def test_diffusers_schedulers_reproduce_the_data_distribution(kind, expects):
    """The scheduler's and the network's prediction type may differ."""
    extra = {"clip_sample": False} if kind is DDPMScheduler else {}
    scheduler = kind(trained_betas=scheduler_betas(COSINE), prediction_type=expects, **extra)
    before = scheduler.timesteps
    x_0 = sample_mixture(scheduler, 50, prediction="eps")
    assert scheduler.timesteps is before  # the caller's object is not changed
    assert float(x_0.mean()) == pytest.approx(MIXTURE_MEAN, abs=0.03)
    assert float(x_0.std()) == pytest.approx(MIXTURE_STD, abs=0.03)


@pytest.mark.parametrize("kind", TWO_CALLS)
@pytest.mark.parametrize("steps", [10, 25])
def test_schedulers_with_two_calls_a_step_need_few_steps(kind, steps):
    """Their steps from the noisy end of the cosine schedule would be too long, or not finite."""
    x_0 = sample_mixture(kind(trained_betas=scheduler_betas(COSINE)), steps, prediction="eps")
    assert float(x_0.mean()) == pytest.approx(MIXTURE_MEAN, abs=0.06)
    assert float(x_0.std()) == pytest.approx(MIXTURE_STD, abs=0.12 if steps == 10 else 0.04)


def test_the_prediction_type_of_a_scheduler_between_timesteps_changes_nothing():
    kind, betas = KDPM2DiscreteScheduler, scheduler_betas(COSINE)
    eps, v = (
        sample_mixture(kind(trained_betas=betas, prediction_type=name), 5)
        for name in ("epsilon", "v_prediction")
    )
    torch.testing.assert_close(eps, v, rtol=0, atol=1e-3)


def test_diffusers_scheduler_may_repeat_a_timestep():
    """Karras' noise levels are dense at the noisy end, where they round to the same t."""
    betas = scheduler_betas(COSINE)
    scheduler = DPMSolverMultistepScheduler(
        trained_betas=betas, prediction_type="sample", use_karras_sigmas=True
    )
    scheduler.set_timesteps(10)
    assert len(scheduler.timesteps.unique()) < 10
    assert float(sample_mixture(scheduler, 10).mean()) == pytest.approx(MIXTURE_MEAN, abs=0.1)


@pytest.mark.parametrize("learned", [False, True])
def test_unclip_scheduler_object_is_ancestral(learned):
    scheduler = UnCLIPScheduler(
        variance_type="learned_range" if learned else "fixed_small_log", clip_sample=False
    )
    results = []
    for sampler in ("ancestral", widen(scheduler, COSINE)):
        generators = seeds(1, 2)
        x_T = randn((2, 3, 4, 4), generators, dtype=torch.float64)
        results.append(
            sample_from(
                toy_network(6 if learned else 3),
                x_T,
                COSINE,
                StageOptions(5, sampler=sampler),
                prediction="eps",
                learned_variance=learned,
                clip=1.0,
                generators=generators,
            )
        )
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-10)


def test_incompatible_schedulers_are_refused():
    for scheduler in (
        EulerDiscreteScheduler(),
        DPMSolverMultistepScheduler(num_train_timesteps=500),
    ):
        with pytest.raises(ValueError, match=r"noise schedule .*trained_betas"):
            sample_mixture(scheduler, 2)
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler; expected"):
        sample_mixture(FlowMatchEulerDiscreteScheduler(), 2)


@pytest.mark.parametrize("name", ["dpm++", "unipc"])
@pytest.mark.parametrize("kind", ["cosine", "linear"])
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_schedulers_get_the_schedule(name, kind, zero_terminal_snr):
    schedule = Schedule(ScheduleConfig(kind, zero_terminal_snr=zero_terminal_snr))
    scheduler = make_scheduler(name, schedule)
    torch.testing.assert_close(
        scheduler.alphas_cumprod.double(), schedule.alpha_bar, rtol=0, atol=1e-6
    )
    scheduler.set_timesteps(10)
    assert scheduler.timesteps[0] == 999
    assert scheduler.sigmas.isfinite().all()
