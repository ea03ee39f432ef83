"""Training losses of the denoisers: simple, min-SNR weighted, and hybrid for learned variances."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unclip.config import NonNegative, Positive, config
from unclip.diffusion.schedules import Prediction, Schedule

# B batch, C channels of x


@config
class LossConfig:
    min_snr_gamma: Positive | None = None  # 2303.09556 recommends 5; None = equal weights
    # λ of L_simple + λ L_vlb (2102.09672, eq. 16), for learned variances
    vb_weight: NonNegative = 1e-3


def diffusion_loss(
    output: Tensor,
    x_0: Tensor,
    x_t: Tensor,
    noise: Tensor,
    t: Tensor,
    schedule: Schedule,
    prediction: Prediction,
    learned_variance: bool = False,
    config: LossConfig = LossConfig(),
) -> dict[str, Tensor]:
    """Return losses (B,) in float32 or wider: "loss" to minimise, "mse" unweighted, and "vb".

    output is (B, C, ...) or, with learned_variance, (B, 2C, ...) = [prediction, variance]; x_0,
    x_t and noise are (B, C, ...), t is (B,) long. "vb", the variational bound in bits/dim, exists
    only for learned variances and requires x_0 in [-1, 1].
    """
    channels = x_0.shape[1] * (2 if learned_variance else 1)
    assert output.shape == (len(x_0), channels, *x_0.shape[2:]), (output.shape, x_0.shape)
    output, x_0, x_t, noise = (
        x.to(torch.promote_types(x.dtype, torch.float32)) for x in (output, x_0, x_t, noise)
    )
    variance = None
    if learned_variance:
        output, variance = output.chunk(2, dim=1)

    target = schedule.target(x_0, noise, t, prediction)
    mse = (output - target).square().flatten(1).mean(1)
    loss = mse
    if config.min_snr_gamma is not None:
        loss = mse * min_snr_weight(schedule.snr(t), config.min_snr_gamma, prediction)
    if variance is None:
        return {"loss": loss, "mse": mse}

    # Detached: the bound trains the variance only; its gradient is too noisy for the mean
    # (2102.09672, section 3.1).
    x_0_estimate = schedule.predict_x0(output.detach(), x_t, t, prediction)
    vb = variational_bound(variance, x_0_estimate, x_0, t, schedule)
    # t samples one of the bound's T terms; T times it estimates their sum.
    return {"loss": loss + config.vb_weight * schedule.num_timesteps * vb, "mse": mse, "vb": vb}


def min_snr_weight(snr: Tensor, gamma: float, prediction: Prediction) -> Tensor:
    """Return the weight of each sample's MSE, min(SNR, γ) in terms of x_0 (2303.09556, 3.4)."""
    if prediction == "eps":
        return (gamma / snr).clamp(max=1)  # = min(SNR, γ) / SNR, and its limit 1 at SNR 0
    weight = snr.clamp(max=gamma)
    return weight if prediction == "x0" else weight / (snr + 1)


def variational_bound(
    variance: Tensor, x_0_estimate: Tensor, x_0: Tensor, t: Tensor, schedule: Schedule
) -> Tensor:
    """Return the term of the variational bound at t, (B,), in bits per dimension.

    variance: raw output of the network, see `log_variance` (2102.09672, eq. 4 to 6, 14 and 15).
    """
    log_q = schedule.at("log_beta_tilde", t, x_0)
    log_p = log_variance(variance, log_q, schedule.at("log_beta", t, x_0))
    # Both means are c x_0 + c' x_t with the same c and c': x_t cancels in their difference.
    mean_difference = schedule.at("posterior_x0", t, x_0) * (x_0 - x_0_estimate)
    error = mean_difference.square() * (-log_p).exp()
    kl = 0.5 * (log_p - log_q - 1 + (log_q - log_p).exp() + error)
    # At t = 0 the model's mean is its estimate of x_0: c = 1 and c' = 0.
    nll = _discretised_gaussian_nll(x_0, x_0_estimate, log_p)
    first = t.view(-1, *[1] * (x_0.ndim - 1)) == 0
    return torch.where(first, nll, kl).flatten(1).mean(1) / math.log(2)


def log_variance(variance: Tensor, log_min: Tensor | float, log_max: Tensor | float) -> Tensor:
    """Interpolate the log variance from the posterior's (-1) to beta (1) (2102.09672, eq. 15)."""
    fraction = (variance + 1) / 2
    return fraction * log_max + (1 - fraction) * log_min


def _discretised_gaussian_nll(x: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """Return −log of a normal's mass in the bin of x, one of 256 in [-1, 1] (2006.11239, eq. 13).

    The outer bins extend to infinity.
    """
    inverse_std = (-0.5 * log_var).exp()
    below = torch.special.ndtr((x - mean - 1 / 255) * inverse_std).masked_fill(x < -0.999, 0)
    above = torch.special.ndtr((x - mean + 1 / 255) * inverse_std).masked_fill(x > 0.999, 1)
    return -(above - below).clamp(min=1e-12).log()
