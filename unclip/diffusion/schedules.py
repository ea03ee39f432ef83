"""Noise schedules: x_t = α_t x_0 + σ_t ε with α_t² + σ_t² = 1, where α_t² is written alpha_bar.

All tables are float64; the arithmetic on samples runs in float32 or wider, whatever the model's dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

# B batch, T timesteps

Prediction = Literal["eps", "x0", "v"]


@dataclass(frozen=True)
class ScheduleConfig:
    """Which noise is added at which timestep; the paper has cosine everywhere but in the last upsampler (Table 3)."""

    kind: Literal["cosine", "linear"] = "cosine"
    num_timesteps: int = 1000
    zero_terminal_snr: bool = (
        False  # the last timestep is pure noise (2305.08891); needs x0 or v prediction
    )
    shift: float = 1.0  # divides α/σ: pictures twice as large need 2 for the same shapes to vanish at the same t
    precision: Literal["float64", "float32"] = (
        "float64"  # of betas; rounded as diffusers does, seeds give its pictures
    )

    def __post_init__(self) -> None:
        if self.kind not in ("cosine", "linear"):
            raise ValueError(f"schedule kind is {self.kind!r}; expected 'cosine' or 'linear'")
        if self.num_timesteps < 2:
            raise ValueError(f"num_timesteps is {self.num_timesteps}; a schedule needs at least 2")
        if self.shift <= 0:
            raise ValueError(f"shift is {self.shift}; expected a positive factor, 1 for none")
        if self.precision not in ("float64", "float32"):
            raise ValueError(f"precision is {self.precision!r}; expected 'float64' or 'float32'")


class Schedule:
    """The forward process at T timesteps. Methods take t as a (B,) long tensor on the device of the samples, or as one
    int for all of them, which costs the device nothing.

    `alpha_bar` and `betas` are (T,) float64 on the CPU.
    """

    def __init__(self, config: ScheduleConfig = ScheduleConfig()) -> None:
        self.config = config
        betas = (
            _cosine_betas(config.num_timesteps)
            if config.kind == "cosine"
            else _linear_betas(config.num_timesteps)
        )
        betas = betas.to(getattr(torch, config.precision))
        self.alpha_bar = (1 - betas).cumprod(0).double()
        betas = betas.double()
        if config.shift != 1:  # simple diffusion (2301.11093), section 3.1
            self.alpha_bar = self.alpha_bar / (
                self.alpha_bar + config.shift**2 * (1 - self.alpha_bar)
            )
        if config.zero_terminal_snr:
            self.alpha_bar = _zero_terminal_snr(self.alpha_bar)
        if config.shift != 1 or config.zero_terminal_snr:
            previous = torch.cat([torch.ones(1, dtype=torch.float64), self.alpha_bar[:-1]])
            betas = 1 - self.alpha_bar / previous
        self.betas = betas
        # x_{t-1} given x_t and x_0 is normal with variance beta_tilde (DDPM, 2006.11239, equation 7). It is 0 at
        # t = 0, where Improved DDPM (2102.09672) borrows the next value so that its logarithm exists.
        alpha_bar_prev = torch.cat([torch.ones(1, dtype=torch.float64), self.alpha_bar[:-1]])
        beta_tilde = betas * (1 - alpha_bar_prev) / (1 - self.alpha_bar)
        beta_tilde[0] = beta_tilde[1]
        self._tables = {
            "alpha": self.alpha_bar.sqrt(),
            "sigma": (1 - self.alpha_bar).sqrt(),
            "snr": self.alpha_bar / (1 - self.alpha_bar),
            "log_beta": betas.log(),
            "log_beta_tilde": beta_tilde.log(),
            "posterior_x0": alpha_bar_prev.sqrt() * betas / (1 - self.alpha_bar),
        }
        self._copies: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    @property
    def num_timesteps(self) -> int:
        return self.config.num_timesteps

    def at(self, name: str, t: Tensor | int, like: Tensor) -> Tensor | float:
        """Values of a table at t (B,), shaped (B, 1, ...) to broadcast with `like`, in float32 or wider."""
        if isinstance(t, int):
            return self._tables[name][t].item()
        dtype = torch.promote_types(like.dtype, torch.float32)
        key = (name, t.device, dtype)
        if key not in self._copies:  # cast before moving: not every device has float64
            self._copies[key] = self._tables[name].to(dtype).to(t.device)
        return self._copies[key][t].view(-1, *[1] * (like.ndim - 1))

    def snr(self, t: Tensor) -> Tensor:
        """(B,) -> (B,): α_t² / σ_t², 0 at the last timestep under zero terminal SNR."""
        return self.at("snr", t, like=t.float())

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t (DDPM, 2006.11239, equation 4)."""
        return self.at("alpha", t, x_0) * x_0 + self.at("sigma", t, x_0) * noise

    def velocity(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """v = α_t ε − σ_t x_0 (2202.00512, appendix D)."""
        return self.at("alpha", t, x_0) * noise - self.at("sigma", t, x_0) * x_0

    def target(self, x_0: Tensor, noise: Tensor, t: Tensor, prediction: Prediction) -> Tensor:
        """What a network of this prediction type should answer."""
        self.check(prediction)
        if prediction == "eps":
            return noise
        return x_0 if prediction == "x0" else self.velocity(x_0, noise, t)

    def predict_x0(
        self, output: Tensor, x_t: Tensor, t: Tensor | int, prediction: Prediction
    ) -> Tensor:
        """The network's output as an estimate of x_0, in float32 or wider."""
        self.check(prediction)
        x_t, output = _widen(x_t), _widen(output)
        if prediction == "x0":
            return output
        alpha, sigma = self.at("alpha", t, x_t), self.at("sigma", t, x_t)
        return (
            (x_t - sigma * output) / alpha if prediction == "eps" else alpha * x_t - sigma * output
        )

    def predict_eps(
        self, output: Tensor, x_t: Tensor, t: Tensor | int, prediction: Prediction
    ) -> Tensor:
        """The network's output as an estimate of the noise, in float32 or wider."""
        self.check(prediction)
        x_t, output = _widen(x_t), _widen(output)
        if prediction == "eps":
            return output
        alpha, sigma = self.at("alpha", t, x_t), self.at("sigma", t, x_t)
        return (
            (x_t - alpha * output) / sigma if prediction == "x0" else alpha * output + sigma * x_t
        )

    def check(self, prediction: str) -> None:
        """Raise ValueError unless networks of this prediction type can run on this schedule."""
        if prediction not in get_args(Prediction):
            raise ValueError(
                f"prediction is {prediction!r}; expected one of {', '.join(get_args(Prediction))}"
            )
        if prediction == "eps" and self.config.zero_terminal_snr:
            raise ValueError(
                "prediction is 'eps' on a schedule with zero_terminal_snr, whose last timestep holds no picture to "
                "recover from the noise; predict 'v' or 'x0' instead"
            )


def sample_timesteps(
    batch: int,
    schedule: Schedule,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """(batch,) long, uniform over the timesteps; drawn on the generator's device, so runs repeat across devices."""
    source = "cpu" if generator is None else generator.device
    return torch.randint(schedule.num_timesteps, (batch,), generator=generator, device=source).to(
        device
    )


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _cosine_betas(num_timesteps: int) -> Tensor:
    """Improved DDPM (2102.09672), equation 17, betas capped at 0.999; diffusers calls it squaredcos_cap_v2."""
    edges = [
        math.cos((i / num_timesteps + 0.008) / 1.008 * math.pi / 2) ** 2
        for i in range(num_timesteps + 1)
    ]
    betas = [min(1 - after / before, 0.999) for before, after in pairwise(edges)]
    return torch.tensor(betas, dtype=torch.float64)


def _linear_betas(num_timesteps: int) -> Tensor:
    """DDPM (2006.11239), section 4, with both ends scaled by 1000 / T so that any T ends equally noisy."""
    scale = 1000 / num_timesteps
    return torch.linspace(1e-4 * scale, 2e-2 * scale, num_timesteps, dtype=torch.float64).clamp(
        max=0.999
    )


def _zero_terminal_snr(alpha_bar: Tensor) -> Tensor:
    """2305.08891, algorithm 1: shift √alpha_bar to end at 0, scale it to keep its first value."""
    first, last = alpha_bar[0].sqrt(), alpha_bar[-1].sqrt()
    return ((alpha_bar.sqrt() - last) * first / (first - last)) ** 2
