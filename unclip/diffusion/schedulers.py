"""diffusers' schedulers as samplers: "dpm++", "unipc", or any variance-preserving one."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from unclip.diffusion.schedules import Schedule
from unclip.types import SAMPLERS, StageOptions

# B batch, C channels of x

Estimate = Callable[[Tensor, float], tuple[Tensor, Tensor | None]]
"""x_t (B, C, ...) and t -> estimate of x_0 (B, C, ...), raw learned variance or None."""

OnSample = Callable[[int, int, Tensor], Estimate | None]
"""Called with the step 1 .. num_steps, num_steps, and the estimate of x_0 (B, C, ...).

It may return another estimate, which is used from then on.
"""


MIN_LEVEL = 1e-3  # alpha_bar at which schedulers with two calls of the network a step start


def sample(
    estimate: Estimate,
    x_t: Tensor,
    schedule: Schedule,
    options: StageOptions,
    generators: Sequence[torch.Generator],
    on_step: OnSample | None,
) -> Tensor:
    """Sample x_0 through a scheduler's own API, in the prediction type that it expects."""
    scheduler = _prepare(options, schedule)
    if hasattr(scheduler, "set_begin_index"):
        # Otherwise it looks up its position by t, and fails where rounding made two t equal.
        scheduler.set_begin_index(0)
    accepted = inspect.signature(scheduler.step).parameters
    extra: dict[str, Any] = {"generator": list(generators), "eta": options.eta}
    extra = {name: value for name, value in extra.items() if name in accepted}
    takes_variance = str(scheduler.config.get("variance_type")).startswith("learned")

    ts = _timesteps(scheduler)
    x_t = x_t * float(scheduler.init_noise_sigma)
    for step, t in enumerate(ts, 1):
        t_scheduler = scheduler.timesteps[step - 1]
        x_model = scheduler.scale_model_input(x_t, t_scheduler)
        x_0, variance = estimate(x_model, t)
        level = _level(scheduler, t, schedule)
        output = _as_prediction(x_0, x_model, level, scheduler.config.prediction_type)
        if takes_variance and variance is not None:
            output = torch.cat([output, variance], dim=1)
        if "prev_timestep" in accepted:
            extra["prev_timestep"] = ts[step] if step < len(ts) else None
        x_t = scheduler.step(output, t_scheduler, x_t, **extra).prev_sample
        if on_step is not None:
            estimate = on_step(step, len(ts), x_0) or estimate
    return x_t


def timesteps(options: StageOptions, schedule: Schedule) -> list[float]:
    """Return the timesteps at which `sample` calls the network, in order."""
    return _timesteps(_prepare(options, schedule))


def make_scheduler(name: str, schedule: Schedule) -> Any:
    """Make diffusers' "dpm++" (2M, 2211.01095) or "unipc" (2302.04867) for predictions of x_0."""
    # Slow to import, and rarely needed.
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
    from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

    kind = {"dpm++": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler}[name]
    return kind(
        num_train_timesteps=schedule.num_timesteps,
        trained_betas=scheduler_betas(schedule),
        prediction_type="sample",
    )


def scheduler_betas(schedule: Schedule) -> list[float]:
    """Return the schedule as `trained_betas` of a diffusers scheduler.

    The log SNR stays finite even where the schedule ends at SNR 0.
    """
    levels = torch.cat([torch.ones(1, dtype=torch.float64), schedule.alpha_bar.clamp(min=1e-9)])
    return (1 - levels[1:] / levels[:-1]).tolist()


def _prepare(options: StageOptions, schedule: Schedule) -> Any:
    """Return the scheduler with its timesteps set; a copy, because it keeps state in itself."""
    steps, T = options.steps, schedule.num_timesteps
    if options.sampler in ("dpm++", "unipc"):
        if steps == T:
            # diffusers spaces one more timestep than it uses, and two would be equal.
            raise ValueError(f"steps is {steps}; expected at most {T - 1} with {options.sampler}")
        scheduler = make_scheduler(options.sampler, schedule)
    elif hasattr(options.sampler, "set_timesteps"):
        scheduler = copy.deepcopy(options.sampler)
    else:
        expected = f"one of {', '.join(SAMPLERS)}, or a diffusers scheduler"
        raise ValueError(f"sampler is {options.sampler!r}; expected {expected}")
    _check(scheduler, schedule)
    if _calls(scheduler) > 1:
        # Heun and KDPM2 follow the slope of x_t / α_t. The cosine schedule ends at σ/α = 20,000,
        # and the few steps from there to 1 are too long for them: levels of up to 32 suffice.
        levels = scheduler.alphas_cumprod
        scheduler.alphas_cumprod = MIN_LEVEL + (1 - MIN_LEVEL) * levels
    scheduler.set_timesteps(steps)  # its tables stay on the CPU: no step waits for the device
    return scheduler


def _level(scheduler: Any, t: float, schedule: Schedule) -> float:
    """Return alpha_bar at the scheduler's noise level, which may lie between two timesteps."""
    if _calls(scheduler) == 1 and isinstance(t, int):
        return schedule.level(t)
    # Schedulers of x_t / α_t scale the network's input by α_t; others leave it as it is.
    alpha = float(scheduler.scale_model_input(torch.ones((), dtype=torch.float64), t))
    return schedule.level(round(t)) if alpha == 1 else alpha**2


def _calls(scheduler: Any) -> int:
    """Return how often a step calls the network: twice in Heun's method and in DPM-Solver-2."""
    return getattr(scheduler, "order", 1)


def _timesteps(scheduler: Any) -> list[float]:
    return [int(t) if float(t).is_integer() else t for t in scheduler.timesteps.tolist()]


def _check(scheduler: Any, schedule: Schedule) -> None:
    name, levels = type(scheduler).__name__, getattr(scheduler, "alphas_cumprod", None)
    predictions = ("epsilon", "sample", "v_prediction")
    if levels is None or scheduler.config.get("prediction_type") not in predictions:
        raise ValueError(f"sampler is {name}; expected one for variance-preserving diffusion")
    levels = levels.cpu().double()
    if levels.shape != schedule.alpha_bar.shape or not torch.allclose(
        levels, schedule.alpha_bar, rtol=0, atol=1e-4
    ):
        raise ValueError(
            f"the noise schedule of sampler {name} differs from the model's; make it with "
            f"trained_betas=unclip.diffusion.schedulers.scheduler_betas(schedule)"
        )


def _as_prediction(x_0: Tensor, x_t: Tensor, alpha_bar_t: float, kind: str) -> Tensor:
    """Convert an estimate of x_0 to diffusers' "sample", "epsilon" or "v_prediction"."""
    if kind == "sample":
        return x_0
    alpha, sigma = math.sqrt(alpha_bar_t), math.sqrt(1 - alpha_bar_t)
    eps = (x_t - alpha * x_0) / sigma
    return eps if kind == "epsilon" else alpha * eps - sigma * x_0
