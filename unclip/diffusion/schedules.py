"""Noise schedules: x_t = α_t x_0 + σ_t ε with α_t² + σ_t² = 1, where α_t² is written alpha_bar.

Tables are float64. Arithmetic on samples is in float32 or wider, whatever the model's dtype.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated, Any, Literal, get_args

import numpy as np
import torch
from annotated_types import Ge, Le
from torch import Tensor

from unclip.config import NonNegative, Positive, config

# B batch, T timesteps

Prediction = Literal["eps", "x0", "v"]


@config
class ScheduleConfig:
    """Noise level at each timestep (unCLIP, table 3: cosine, but linear in the last upsampler)."""

    kind: Literal["cosine", "linear"] = "cosine"
    num_timesteps: Annotated[int, Ge(2), Le(1_000_000)] = 1000
    zero_terminal_snr: bool = False  # end in pure noise (2305.08891); needs x0 or v prediction
    shift: Positive = 1.0  # divides α/σ; twice the image size needs 2 for the same visible noise
    precision: Literal["float64", "float32"] = "float64"  # of betas; diffusers uses float32
    # For the sampler "analytic": mean squared error of the network's x_0 at evenly spaced timesteps
    # from 0 to T - 1, measured by train/analytic.py
    x0_errors: tuple[NonNegative, ...] | None = None


class Schedule:
    """The forward process at T timesteps.

    Methods take t as a (B,) long tensor on the device of the samples, or as one int for all of
    them, which needs no device operation. `alpha_bar` and `betas` are (T,) float64 on the CPU.
    """

    def __init__(self, config: ScheduleConfig = ScheduleConfig()) -> None:
        self.config = config
        make_betas = _cosine_betas if config.kind == "cosine" else _linear_betas
        betas = make_betas(config.num_timesteps).to(getattr(torch, config.precision))
        self.alpha_bar = (1 - betas).cumprod(0).double()
        betas = betas.double()
        if config.shift != 1:  # simple diffusion (2301.11093), section 3.1
            noise = config.shift**2 * (1 - self.alpha_bar)
            self.alpha_bar = self.alpha_bar / (self.alpha_bar + noise)
        if config.zero_terminal_snr:
            self.alpha_bar = _zero_terminal_snr(self.alpha_bar)
        if config.shift != 1 or config.zero_terminal_snr:
            previous = torch.cat([torch.ones(1, dtype=torch.float64), self.alpha_bar[:-1]])
            betas = 1 - self.alpha_bar / previous
        self.betas = betas
        # x_{t-1} given x_t and x_0 is normal with variance beta_tilde (2006.11239, eq. 7). It is 0
        # at t = 0; Improved DDPM (2102.09672) uses the next value there, to have a logarithm.
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

    def level(self, t: float) -> float:
        """Return alpha_bar at t as a number on the host; 1 at t = -1, the index of x_0."""
        return 1.0 if t < 0 else float(self.alpha_bar[int(t)])

    def x0_error(self, t: float) -> float:
        """Return the mean squared error of the network's x_0 at t, interpolated."""
        errors = self.config.x0_errors
        if not errors:
            raise ValueError(
                "sampler is 'analytic', but the model has no x0_errors; "
                "measure them with train/analytic.py, or choose 'ancestral'"
            )
        return float(np.interp(t, np.linspace(0, self.num_timesteps - 1, len(errors)), errors))

    def at(self, name: str, t: Tensor | int, like: Tensor) -> Any:
        """Return a table's values at t as (B, 1, ...), to broadcast with `like`, or one number."""
        if isinstance(t, int):
            return self._tables[name][t].item()
        dtype = torch.promote_types(like.dtype, torch.float32)
        key = (name, t.device, dtype)
        if key not in self._copies:  # cast before the move: some devices have no float64
            self._copies[key] = self._tables[name].to(dtype).to(t.device)
        return self._copies[key][t].view(-1, *[1] * (like.ndim - 1))

    def snr(self, t: Tensor) -> Tensor:
        """Return α_t² / σ_t², (B,) -> (B,); 0 at the last timestep with zero terminal SNR."""
        return self.at("snr", t, like=t.float())

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return x_t (DDPM, 2006.11239, equation 4)."""
        return self.at("alpha", t, x_0) * x_0 + self.at("sigma", t, x_0) * noise

    def velocity(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return v = α_t ε − σ_t x_0 (2202.00512, appendix D)."""
        return self.at("alpha", t, x_0) * noise - self.at("sigma", t, x_0) * x_0

    def target(self, x_0: Tensor, noise: Tensor, t: Tensor, prediction: Prediction) -> Tensor:
        """Return the training target of a network with this prediction type."""
        self.check(prediction)
        if prediction == "eps":
            return noise
        return x_0 if prediction == "x0" else self.velocity(x_0, noise, t)

    def predict_x0(
        self, output: Tensor, x_t: Tensor, t: Tensor | int, prediction: Prediction
    ) -> Tensor:
        """Convert the network's output to an estimate of x_0, in float32 or wider."""
        self.check(prediction)
        x_t, output = _widen(x_t), _widen(output)
        if prediction == "x0":
            return output
        alpha, sigma = self.at("alpha", t, x_t), self.at("sigma", t, x_t)
        if prediction == "eps":
            return (x_t - sigma * output) / alpha
        return alpha * x_t - sigma * output

    def check(self, prediction: str) -> None:
        """Raise ValueError unless this prediction type works with this schedule."""
        if prediction not in (known := get_args(Prediction)):
            raise ValueError(f"prediction is {prediction!r}; expected one of {', '.join(known)}")
        if prediction == "eps" and self.config.zero_terminal_snr:
            raise ValueError("prediction is 'eps', but zero_terminal_snr needs 'v' or 'x0'")


def sample_timesteps(
    batch: int,
    schedule: Schedule,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw (batch,) uniform timesteps on the generator's device, so that devices agree."""
    source = "cpu" if generator is None else generator.device
    t = torch.randint(schedule.num_timesteps, (batch,), generator=generator, device=source)
    return t.to(device)


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _cosine_betas(num_timesteps: int) -> Tensor:
    """Return the betas of 2102.09672, equation 17, capped at 0.999 (squaredcos_cap_v2)."""
    edges = [
        math.cos((i / num_timesteps + 0.008) / 1.008 * math.pi / 2) ** 2
        for i in range(num_timesteps + 1)
    ]
    betas = [min(1 - after / before, 0.999) for before, after in pairwise(edges)]
    return torch.tensor(betas, dtype=torch.float64)


def _linear_betas(num_timesteps: int) -> Tensor:
    """Return the betas of 2006.11239, section 4, scaled by 1000 / T to end at the same noise."""
    scale = 1000 / num_timesteps
    betas = torch.linspace(1e-4 * scale, 2e-2 * scale, num_timesteps, dtype=torch.float64)
    return betas.clamp(max=0.999)


def _zero_terminal_snr(alpha_bar: Tensor) -> Tensor:
    """Shift √alpha_bar to end at 0, and scale it to keep its first value (2305.08891, alg. 1)."""
    first, last = alpha_bar[0].sqrt(), alpha_bar[-1].sqrt()
    return ((alpha_bar.sqrt() - last) * first / (first - last)) ** 2
