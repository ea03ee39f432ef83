import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from unclip.diffusion.losses import LossConfig, diffusion_loss, log_variance, min_snr_weight
from unclip.diffusion.schedules import Schedule, ScheduleConfig

T = torch.tensor([0, 1, 300, 700, 950])
PREDICTIONS = ("eps", "x0", "v")


def image_and_noise(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(
        256, (len(T), 3, 4, 4), generator=generator
    )  # the bound is for images of 256 levels
    x_0 = levels.to(dtype) / 127.5 - 1
    return x_0, torch.randn(x_0.shape, dtype=dtype, generator=generator)


def output_for(estimate, x_t, schedule, prediction):
    """Return the network output that corresponds to an estimate of x_0."""
    alpha, sigma = schedule.at("alpha", T, x_t), schedule.at("sigma", T, x_t)
    return schedule.target(estimate, (x_t - alpha * estimate) / sigma, T, prediction)


def test_simple_loss_is_the_mean_square():
    schedule, (x_0, noise) = Schedule(), image_and_noise()
    x_t = schedule.add_noise(x_0, noise, T)
    output = torch.randn(x_0.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    losses = diffusion_loss(output, x_0, x_t, noise, T, schedule, "eps")
    expected = ((output - noise) ** 2).mean((1, 2, 3))
    assert set(losses) == {"loss", "mse"}
    torch.testing.assert_close(losses["loss"], expected)
    torch.testing.assert_close(losses["mse"], expected)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_min_snr_makes_predictions_equal(zero_terminal_snr):
    """With weights, all types have the loss min(SNR, γ) |x_0 - estimate|², and the same bound."""
    schedule, (x_0, noise) = (
        Schedule(ScheduleConfig(zero_terminal_snr=zero_terminal_snr)),
        image_and_noise(),
    )
    x_t = schedule.add_noise(x_0, noise, T)
    estimate = x_0 + 0.1 * torch.randn(
        x_0.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    expected = schedule.snr(T).double().clamp(max=5) * ((estimate - x_0) ** 2).mean((1, 2, 3))
    variance = torch.full_like(x_0, 0.3)
    bounds = []
    for prediction in PREDICTIONS[1:] if zero_terminal_snr else PREDICTIONS:
        output = torch.cat([output_for(estimate, x_t, schedule, prediction), variance], dim=1)
        config = LossConfig(min_snr_gamma=5.0, vb_weight=0.0)
        losses = diffusion_loss(
            output, x_0, x_t, noise, T, schedule, prediction, learned_variance=True, config=config
        )
        torch.testing.assert_close(
            losses["loss"], expected, rtol=1e-5, atol=0
        )  # float32: snr(t) has no wider input
        bounds.append(losses["vb"])
    for bound in bounds[1:]:
        torch.testing.assert_close(bound, bounds[0], rtol=1e-9, atol=0)


def test_min_snr_weights():
    snr = torch.tensor([0.0, 1e-4, 1.0, 5.0, 100.0])
    torch.testing.assert_close(
        min_snr_weight(snr, 5.0, "eps"), torch.tensor([1.0, 1.0, 1.0, 1.0, 0.05])
    )
    torch.testing.assert_close(
        min_snr_weight(snr, 5.0, "x0"), torch.tensor([0.0, 1e-4, 1.0, 5.0, 5.0])
    )
    torch.testing.assert_close(
        min_snr_weight(snr, 5.0, "v"), torch.tensor([0.0, 1e-4 / 1.0001, 0.5, 5 / 6, 5 / 101])
    )


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_bound_is_the_divergence_from_the_posterior(prediction):
    schedule, (x_0, noise) = Schedule(), image_and_noise()
    x_t = schedule.add_noise(x_0, noise, T)
    generator = torch.Generator().manual_seed(1)
    estimate = x_0 + 0.1 * torch.randn(x_0.shape, dtype=torch.float64, generator=generator)
    variance = torch.rand(x_0.shape, dtype=torch.float64, generator=generator) * 2 - 1
    output = torch.cat([output_for(estimate, x_t, schedule, prediction), variance], dim=1)
    vb = diffusion_loss(output, x_0, x_t, noise, T, schedule, prediction, learned_variance=True)[
        "vb"
    ]

    for i, t in enumerate(T.tolist()):
        fraction = (variance[i] + 1) / 2
        now, before = (
            schedule.alpha_bar[t],
            schedule.alpha_bar[t - 1] if t > 0 else torch.tensor(1.0).double(),
        )
        beta = 1 - now / before
        if t == 0:  # Improved DDPM borrows the posterior variance of t = 1
            first, second = schedule.alpha_bar[:2]
            shortest = (1 - first) / (1 - second) * (1 - second / first)
        else:
            shortest = (1 - before) / (1 - now) * beta
        model_std = (beta**fraction * shortest ** (1 - fraction)).sqrt()

        def mean(x, now=now, before=before, beta=beta, x_t=x_t[i]):
            return (before.sqrt() * beta * x + (1 - beta).sqrt() * (1 - before) * x_t) / (1 - now)

        model = Normal(mean(estimate[i]), model_std)
        if t == 0:
            low = torch.where(x_0[i] < -0.999, 0.0, model.cdf(x_0[i] - 1 / 255))
            high = torch.where(x_0[i] > 0.999, 1.0, model.cdf(x_0[i] + 1 / 255))
            nats = -(high - low).clamp(min=1e-12).log()
        else:
            nats = kl_divergence(Normal(mean(x_0[i]), shortest.sqrt()), model)
        assert vb[i] == pytest.approx(float(nats.mean()) / math.log(2), rel=1e-6)


def test_levels_at_t_0_have_probability_one_together():
    """−log p over all 256 grey levels: their probabilities sum to 1."""
    schedule = Schedule()
    x_0 = (torch.arange(256, dtype=torch.float64) / 127.5 - 1).view(256, 1)
    zeros, t = torch.zeros(256, 1, dtype=torch.float64), torch.zeros(256, dtype=torch.long)
    output = torch.cat([zeros + 0.99, zeros], dim=1)
    vb = diffusion_loss(output, x_0, x_0, zeros, t, schedule, "x0", learned_variance=True)["vb"]
    assert float((2**-vb).sum()) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_bound_trains_the_variance_only(prediction):
    schedule, (x_0, noise) = Schedule(), image_and_noise(torch.float32)
    x_t = schedule.add_noise(x_0, noise, T)
    output = torch.zeros(len(T), 6, 4, 4, requires_grad=True)
    diffusion_loss(output, x_0, x_t, noise, T, schedule, prediction, learned_variance=True)[
        "vb"
    ].sum().backward()
    mean_grad, variance_grad = output.grad.chunk(2, dim=1)
    assert (mean_grad == 0).all()
    assert (variance_grad[1:].abs().amax((1, 2, 3)) > 0).all()


def test_hybrid_loss_adds_the_weighted_bound():
    schedule, (x_0, noise) = Schedule(), image_and_noise()
    x_t = schedule.add_noise(x_0, noise, T)
    output = torch.cat([noise + 0.1, torch.zeros_like(x_0)], dim=1)
    losses = diffusion_loss(
        output, x_0, x_t, noise, T, schedule, "eps", True, LossConfig(vb_weight=1e-3)
    )
    torch.testing.assert_close(
        losses["loss"], losses["mse"] + losses["vb"]
    )  # 1e-3 · 1000 timesteps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_half_precision_output_gives_finite_float32_losses(dtype, prediction):
    schedule = Schedule(ScheduleConfig(zero_terminal_snr=prediction != "eps"))
    t = torch.tensor([0, 1, 500, 998, 999])
    x_0, noise = (x.to(dtype) for x in image_and_noise())
    output = torch.cat([2 * x_0 - noise, torch.zeros_like(x_0)], dim=1).requires_grad_()
    x_t = schedule.add_noise(x_0, noise, t).to(dtype)
    config = LossConfig(min_snr_gamma=5.0)
    losses = diffusion_loss(output, x_0, x_t, noise, t, schedule, prediction, True, config)
    losses["loss"].sum().backward()
    for value in losses.values():
        assert value.dtype == torch.float32 and value.shape == (5,) and value.isfinite().all()
    assert output.grad.isfinite().all()


def test_log_variance_spans_its_bounds():
    variance = torch.tensor([-1.0, 0.0, 1.0])
    torch.testing.assert_close(log_variance(variance, -4.0, -2.0), torch.tensor([-4.0, -3.0, -2.0]))


@pytest.mark.parametrize("kwargs", [{"min_snr_gamma": 0.0}, {"vb_weight": -1.0}])
def test_bad_config_is_refused(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        LossConfig(**kwargs)
