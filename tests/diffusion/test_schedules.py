import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

from unclip.diffusion.schedules import Schedule, ScheduleConfig, sample_timesteps

ALL = [
    ScheduleConfig(kind, zero_terminal_snr=zero)
    for kind in ("cosine", "linear")
    for zero in (False, True)
]


@pytest.mark.parametrize(("kind", "name"), [("cosine", "squaredcos_cap_v2"), ("linear", "linear")])
def test_betas_are_those_of_diffusers(kind, name):
    reference = DDPMScheduler(beta_schedule=name)
    schedule = Schedule(ScheduleConfig(kind))
    torch.testing.assert_close(schedule.betas.float(), reference.betas, rtol=2e-6, atol=1e-9)
    torch.testing.assert_close(
        schedule.alpha_bar.float(), reference.alphas_cumprod, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_zero_terminal_snr_ends_in_pure_noise(kind):
    plain = Schedule(ScheduleConfig(kind))
    schedule = Schedule(ScheduleConfig(kind, zero_terminal_snr=True))
    assert schedule.alpha_bar[-1] == 0 and schedule.alpha_bar[-2] > 0
    assert schedule.alpha_bar[0] == pytest.approx(float(plain.alpha_bar[0]), abs=1e-12)
    torch.testing.assert_close(schedule.betas, rescale_zero_terminal_snr(plain.betas))
    torch.testing.assert_close((1 - schedule.betas).cumprod(0), schedule.alpha_bar)


@pytest.mark.parametrize("config", ALL, ids=str)
def test_schedule_only_adds_noise(config):
    schedule = Schedule(config)
    assert schedule.alpha_bar.dtype == torch.float64
    assert (schedule.alpha_bar.diff() < 0).all()
    assert ((schedule.betas > 0) & (schedule.betas <= 1)).all()


@pytest.mark.parametrize("num_timesteps", [10, 4000])
@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_any_number_of_timesteps_ends_in_noise(kind, num_timesteps):
    assert Schedule(ScheduleConfig(kind, num_timesteps)).alpha_bar[-1] < 1e-3


@pytest.mark.parametrize("config", ALL, ids=str)
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_predictions_recover_the_image(config, prediction):
    schedule = Schedule(config)
    if prediction == "eps" and config.zero_terminal_snr:
        with pytest.raises(ValueError, match="needs 'v' or 'x0'"):
            schedule.check(prediction)
        return
    x_0, noise = torch.randn(
        2, 5, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    t = torch.tensor([0, 1, 500, 998, 999])
    x_t = schedule.add_noise(x_0, noise, t)
    target = schedule.target(x_0, noise, t, prediction)
    torch.testing.assert_close(
        schedule.predict_x0(target, x_t, t, prediction), x_0, rtol=0, atol=1e-10
    )


def test_noise_and_velocity_are_those_of_diffusers():
    schedule, reference = Schedule(), DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    x_0, noise = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 10, 700, 999])
    ours = schedule.add_noise(x_0, noise, t)
    torch.testing.assert_close(ours, reference.add_noise(x_0, noise, t), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        schedule.velocity(x_0, noise, t), reference.get_velocity(x_0, noise, t), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    schedule, t = Schedule(), torch.tensor([999])
    x_t, eps = torch.randn(2, 1, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = schedule.predict_x0(eps.double(), x_t.double(), t, "eps")
    ours = schedule.predict_x0(eps, x_t, t, "eps")
    alpha, sigma = (
        schedule.alpha_bar[-1].sqrt().to(dtype),
        (1 - schedule.alpha_bar[-1]).sqrt().to(dtype),
    )
    assert ours.dtype == torch.float32
    assert (ours - exact).abs().max() < 0.1
    assert ((x_t - sigma * eps) / alpha - exact).abs().max() > 0.3


def test_snr():
    schedule = Schedule(ScheduleConfig(zero_terminal_snr=True))
    snr = schedule.snr(torch.tensor([0, 500, 999]))
    expected = schedule.alpha_bar[[0, 500, 999]] / (1 - schedule.alpha_bar[[0, 500, 999]])
    assert snr.shape == (3,)
    torch.testing.assert_close(snr, expected.float())
    assert snr[-1] == 0


def test_timesteps_are_uniform_and_repeatable():
    schedule = Schedule(ScheduleConfig(num_timesteps=10))
    t = sample_timesteps(10_000, schedule, torch.Generator().manual_seed(0))
    assert t.dtype == torch.long
    counts = t.bincount(minlength=10)
    assert len(counts) == 10 and (counts - 1000).abs().max() < 150
    assert torch.equal(t, sample_timesteps(10_000, schedule, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(
    ("kwargs", "message"), [({"kind": "cosin"}, "cosin"), ({"num_timesteps": 1}, "at least 2")]
)
def test_bad_config_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ScheduleConfig(**kwargs)


def test_unknown_prediction_is_refused():
    with pytest.raises(ValueError, match="'epsilon'; expected one of eps, x0, v"):
        Schedule().check("epsilon")


def test_shift_2_matches_the_visible_noise_of_images_of_twice_the_size():
    """Averaging 2 x 2 pixels halves the noise: SNR / 4 leaves the coarse shapes as visible."""
    plain, shifted = Schedule(ScheduleConfig()), Schedule(ScheduleConfig(shift=2.0))
    t = torch.tensor([0, 10, 500, 900])
    torch.testing.assert_close(shifted.snr(t), plain.snr(t) / 4)
    torch.testing.assert_close((1 - shifted.betas).cumprod(0), shifted.alpha_bar)
    with pytest.raises(ValueError, match="shift is 0"):
        ScheduleConfig(shift=0)


def test_shift_and_zero_terminal_snr_go_together():
    schedule = Schedule(ScheduleConfig(shift=2.0, zero_terminal_snr=True))
    assert schedule.alpha_bar[-1] == 0 and (schedule.alpha_bar.diff() < 0).all()
