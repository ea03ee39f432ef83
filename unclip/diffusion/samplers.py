"""From noise to x_0: unCLIP's ancestral sampling and DDIM here; DPM-Solver++, UniPC and the rest through diffusers.

Every sampler sees the network only as an estimate of x_0, clipped where asked, in float32 or wider.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from unclip.diffusion.guidance import Denoise, at, threshold
from unclip.diffusion.losses import log_variance
from unclip.diffusion.schedules import Prediction, Schedule
from unclip.types import StageOptions

# B batch, C channels of x, T timesteps

OnSample = Callable[
    [int, int, Tensor], None
]  # step 1 .. num_steps, num_steps, estimate of x_0 (B, C, ...)
Estimate = Callable[
    [Tensor, float, bool], tuple[Tensor, Tensor | None]
]  # x_t, t, last -> x_0, raw learned variance


def randn(
    shape: Sequence[int],
    generators: Sequence[torch.Generator],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Normal noise (B, ...) on `device`; row i is drawn from generators[i] alone, on that generator's own device."""
    if len(generators) != shape[0]:
        raise ValueError(f"{len(generators)} generators for {shape[0]} samples; give one for each")
    rows = [
        torch.randn((1, *shape[1:]), generator=g, device=g.device, dtype=dtype) for g in generators
    ]
    if (
        torch.device(device).type == "cuda"
    ):  # from pinned memory, so that the host goes on while they are copied
        rows = [
            row.pin_memory().to(device, non_blocking=True) if row.is_cpu else row for row in rows
        ]
    return torch.cat([row.to(device) for row in rows])


@torch.no_grad()
def sample(
    denoise: Denoise,
    x_T: Tensor,
    schedule: Schedule,
    options: StageOptions,
    *,
    prediction: Prediction,
    learned_variance: bool = False,
    clip: float | None,
    generators: Sequence[torch.Generator],
    on_step: OnSample | None = None,
    denoise_last: Denoise | None = None,
) -> Tensor:
    """x_0 (B, C, ...) from the noise x_T, in float32 or wider.

    denoise takes x_t in the dtype of x_T (make it the network's) and t (B,), long except under those of diffusers'
    schedulers that step between timesteps; it answers the prediction (B, C, ...) or, with learned_variance,
    (B, 2C, ...). clip bounds every estimate of x_0 by ±clip, or is the range that options.dynamic_threshold scales to.
    generators: one for each sample, drawn from once a step where the sampler is stochastic, but not at the last step.
    denoise_last answers at the last step instead of denoise (Karlo's upsampler).
    """
    schedule.check(prediction)
    _check_steps(options, schedule)
    if not 0.0 <= options.eta <= 1.0:
        raise ValueError(
            f"eta is {options.eta}; expected 0 (deterministic) to 1 (as noisy as ancestral sampling)"
        )
    if len(generators) != x_T.shape[0]:
        raise ValueError(
            f"{len(generators)} generators for {x_T.shape[0]} samples; give one for each"
        )
    estimate = estimator(
        denoise,
        schedule,
        prediction=prediction,
        learned_variance=learned_variance,
        clip=clip,
        percentile=options.dynamic_threshold,
        denoise_last=denoise_last,
        dtype=x_T.dtype,
    )

    def noise() -> (
        Tensor
    ):  # in the network's dtype, as diffusers draws it: the same seed gives the same numbers
        return randn(x_T.shape, generators, x_T.device, x_T.dtype).to(x.dtype)

    x = x_T.to(torch.promote_types(x_T.dtype, torch.float32))
    if options.sampler in ("ancestral", "ddim"):
        return _sample_own(estimate, x, schedule, options, noise, on_step)
    return _sample_scheduler(estimate, x, schedule, options, generators, on_step)


def estimator(
    denoise: Denoise,
    schedule: Schedule,
    *,
    prediction: Prediction,
    learned_variance: bool = False,
    clip: float | None,
    percentile: float | None = None,
    denoise_last: Denoise | None = None,
    dtype: torch.dtype = torch.float32,
) -> Estimate:
    """The network as samplers see it, given x_t in `dtype`. See `sample` for the other arguments, and `threshold`."""

    def estimate(x_t: Tensor, t: float, last: bool) -> tuple[Tensor, Tensor | None]:
        network = at(denoise_last if last and denoise_last is not None else denoise, t)
        output, variance = (
            network(x_t.to(dtype), torch.full((x_t.shape[0],), t, device=x_t.device)),
            None,
        )
        if learned_variance:
            output, variance = output.to(x_t.dtype).chunk(2, dim=1)
        x_0 = schedule.predict_x0(output, x_t, round(t), prediction)
        return threshold(x_0, clip, percentile), variance

    return estimate


def timesteps(options: StageOptions, schedule: Schedule) -> list[float]:
    """The timesteps at which `sample` asks the network, in order; whole numbers except under a few of diffusers'."""
    _check_steps(options, schedule)
    if options.sampler == "ancestral":
        return ancestral_timesteps(options.steps, schedule.num_timesteps)
    if options.sampler == "ddim":
        return ddim_timesteps(options.steps, schedule.num_timesteps)
    return _timesteps_of(_scheduler(options, schedule))


def _check_steps(options: StageOptions, schedule: Schedule) -> None:
    if options.steps > schedule.num_timesteps:
        raise ValueError(
            f"steps is {options.steps}, but the model has only {schedule.num_timesteps} timesteps"
        )
    if options.sampler in ("dpm++", "unipc") and options.steps == schedule.num_timesteps:
        # diffusers spaces one timestep more than it steps through: two would be alike, and their step infinite.
        raise ValueError(
            f"steps is {options.steps}; {options.sampler} takes at most {schedule.num_timesteps - 1}, "
            f"one less than the model has timesteps"
        )


def _sample_own(
    estimate: Estimate,
    x_t: Tensor,
    schedule: Schedule,
    options: StageOptions,
    noise: Callable[[], Tensor],
    on_step: OnSample | None,
) -> Tensor:
    ancestral, num_steps = options.sampler == "ancestral", options.steps
    for step, (t, t_prev) in enumerate(pairwise([*timesteps(options, schedule), -1]), 1):
        x_0, variance = estimate(x_t, t, step == num_steps)
        draw = noise() if (ancestral or options.eta > 0) and step < num_steps else None
        levels = alpha_bar(schedule, t), alpha_bar(schedule, t_prev)
        if ancestral:
            # In float32, 1 - alpha_bar / alpha_bar_prev is not quite beta; diffusers takes it only where t is skipped.
            beta = float(schedule.betas[t]) if t_prev == t - 1 else None
            x_t = ancestral_step(x_t, x_0, *levels, draw, variance, beta)
        else:
            x_t = ddim_step(x_t, x_0, *levels, options.eta, draw)
        if on_step is not None:
            on_step(step, num_steps, x_0)
    return x_t


def _sample_scheduler(
    estimate: Estimate,
    x_t: Tensor,
    schedule: Schedule,
    options: StageOptions,
    generators: Sequence[torch.Generator],
    on_step: OnSample | None,
) -> Tensor:
    """Through a diffusers scheduler's own API; it is given the prediction type that it expects."""
    scheduler = _scheduler(options, schedule)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(
            0
        )  # else it looks its place up by t, and misses where rounding made two alike
    accepted = inspect.signature(scheduler.step).parameters
    extra = {"generator": list(generators), "eta": options.eta}
    extra = {name: value for name, value in extra.items() if name in accepted}
    takes_variance = str(scheduler.config.get("variance_type")).startswith("learned")

    ts = _timesteps_of(scheduler)
    x_t = x_t * float(scheduler.init_noise_sigma)
    for step, (t, t_prev) in enumerate(pairwise([*ts, None]), 1):
        t_scheduler = scheduler.timesteps[step - 1]
        x_model = scheduler.scale_model_input(x_t, t_scheduler)
        x_0, variance = estimate(x_model, t, step == len(ts))
        output = _as_prediction(
            x_0, x_model, alpha_bar(schedule, round(t)), scheduler.config.prediction_type
        )
        if takes_variance and variance is not None:
            output = torch.cat([output, variance], dim=1)
        if "prev_timestep" in accepted:
            extra["prev_timestep"] = t_prev
        x_t = scheduler.step(output, t_scheduler, x_t, **extra).prev_sample
        if on_step is not None:
            on_step(step, len(ts), x_0)
    return x_t


def _scheduler(options: StageOptions, schedule: Schedule) -> Any:
    """The diffusers scheduler that is asked for, with its timesteps set; a copy, for it keeps its state in itself."""
    if options.sampler in ("dpm++", "unipc"):
        scheduler = make_scheduler(options.sampler, schedule)
    elif hasattr(options.sampler, "set_timesteps"):
        scheduler = copy.deepcopy(options.sampler)
    else:
        raise ValueError(
            f"sampler is {options.sampler!r}; expected 'ancestral', 'ddim', 'dpm++', 'unipc' or a diffusers scheduler"
        )
    _check_scheduler(scheduler, schedule)
    scheduler.set_timesteps(
        options.steps
    )  # tables stay on the CPU, so that no step waits for the device
    return scheduler


def _timesteps_of(scheduler: Any) -> list[float]:
    return [int(t) if float(t).is_integer() else t for t in scheduler.timesteps.tolist()]


def ancestral_timesteps(num_steps: int, num_timesteps: int) -> list[int]:
    """num_steps timesteps, evenly from T - 1 down to 0 (as Karlo)."""
    if num_steps == 1:
        return [num_timesteps - 1]
    ratio = (num_timesteps - 1) / (num_steps - 1)
    return [round(i * ratio) for i in reversed(range(num_steps))]


def ddim_timesteps(num_steps: int, num_timesteps: int) -> list[int]:
    """num_steps timesteps, evenly from T - 1 down, so that x_0 would come next ("trailing" in 2305.08891)."""
    return [round(i * num_timesteps / num_steps) - 1 for i in range(num_steps, 0, -1)]


def alpha_bar(schedule: Schedule, t: int) -> float:
    """alpha_bar at t as a number of the host; 1 at t = -1, which stands for x_0."""
    return 1.0 if t < 0 else float(schedule.alpha_bar[t])


def ancestral_step(
    x_t: Tensor,
    x_0: Tensor,
    alpha_bar_t: float,
    alpha_bar_prev: float,
    noise: Tensor | None = None,
    variance: Tensor | None = None,
    beta: float | None = None,
) -> Tensor:
    """A draw from q(x_prev | x_t, x_0), or its mean if noise is None (DDPM, 2006.11239, equations 6 and 7).

    variance is the network's raw answer (see `losses.log_variance`); None = the posterior's own. beta is that of the
    step; None = as alpha_bar tells.
    """
    if beta is None:
        beta = 1 - alpha_bar_t / alpha_bar_prev
    remaining = (1 - alpha_bar_prev) / (1 - alpha_bar_t)
    mean = (
        math.sqrt(alpha_bar_prev) * beta / (1 - alpha_bar_t) * x_0
        + math.sqrt(1 - beta) * remaining * x_t
    )
    if noise is None:
        return mean
    if variance is None:
        return mean + math.sqrt(remaining * beta) * noise
    return (
        mean
        + (0.5 * log_variance(variance, math.log(remaining * beta), math.log(beta))).exp() * noise
    )


def ddim_step(
    x_t: Tensor,
    x_0: Tensor,
    alpha_bar_t: float,
    alpha_bar_prev: float,
    eta: float = 0.0,
    noise: Tensor | None = None,
) -> Tensor:
    """DDIM (2010.02502, equations 12 and 16). With eta 0, alpha_bar_prev may as well be noisier: that inverts."""
    eps = (x_t - math.sqrt(alpha_bar_t) * x_0) / math.sqrt(1 - alpha_bar_t)
    if noise is None:
        return math.sqrt(alpha_bar_prev) * x_0 + math.sqrt(1 - alpha_bar_prev) * eps
    posterior = (1 - alpha_bar_prev) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_prev)
    std = eta * math.sqrt(posterior)
    return (
        math.sqrt(alpha_bar_prev) * x_0
        + math.sqrt(max(0.0, 1 - alpha_bar_prev - std**2)) * eps
        + std * noise
    )


def make_scheduler(name: str, schedule: Schedule) -> Any:
    """diffusers' "dpm++" (2M, 2211.01095) or "unipc" (2302.04867) on our schedule; takes predictions of x_0."""
    from diffusers import (
        DPMSolverMultistepScheduler,
        UniPCMultistepScheduler,
    )  # late: slow to import, seldom needed

    kind = {"dpm++": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler}[name]
    betas = scheduler_betas(schedule)
    return kind(
        num_train_timesteps=schedule.num_timesteps, trained_betas=betas, prediction_type="sample"
    )


def scheduler_betas(schedule: Schedule) -> list[float]:
    """The schedule as `trained_betas` of a diffusers scheduler, with a finite log SNR even where ours ends at SNR 0."""
    levels = torch.cat([torch.ones(1, dtype=torch.float64), schedule.alpha_bar.clamp(min=1e-9)])
    return (1 - levels[1:] / levels[:-1]).tolist()


def _check_scheduler(scheduler: Any, schedule: Schedule) -> None:
    name, levels = type(scheduler).__name__, getattr(scheduler, "alphas_cumprod", None)
    if levels is None or scheduler.config.get("prediction_type") not in (
        "epsilon",
        "sample",
        "v_prediction",
    ):
        raise ValueError(
            f"sampler {name} is not for variance-preserving diffusion, in which this model was trained"
        )
    levels = levels.cpu().double()
    if levels.shape != schedule.alpha_bar.shape or not torch.allclose(
        levels, schedule.alpha_bar, rtol=0, atol=1e-4
    ):
        raise ValueError(
            f"sampler {name} has another noise schedule than the model was trained with; "
            f"make it with trained_betas=scheduler_betas(schedule), which is in unclip.diffusion.samplers"
        )


def _as_prediction(x_0: Tensor, x_t: Tensor, alpha_bar_t: float, kind: str) -> Tensor:
    """An estimate of x_0 in diffusers' terms: "sample", "epsilon" or "v_prediction"."""
    if kind == "sample":
        return x_0
    alpha, sigma = math.sqrt(alpha_bar_t), math.sqrt(1 - alpha_bar_t)
    eps = (x_t - alpha * x_0) / sigma
    return eps if kind == "epsilon" else alpha * eps - sigma * x_0
