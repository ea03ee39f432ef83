"""Classifier-free guidance, mixing of conditions and thresholds."""

import pytest
import torch

from unclip.diffusion.samplers import Estimator, guide, threshold
from unclip.diffusion.schedules import Schedule
from unclip.types import StageOptions


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def estimator(cond, null, options, learned_variance=False, weights=None):
    """An estimator with constant outputs, and the list of the batch sizes of its calls."""
    batch_sizes = []

    def denoise(x_t, t):
        batch_sizes.append(len(x_t))
        return cond

    def denoise_both(x_t, t):
        batch_sizes.append(len(x_t))
        assert torch.equal(*x_t.chunk(2))
        return torch.cat([cond, null])

    estimate = Estimator(
        denoise,
        Schedule(),
        options,
        "x0",
        learned_variance,
        denoise_both=denoise_both,
        weights=weights,
    )
    return estimate, batch_sizes


def test_guidance_extrapolates_from_the_null_past_the_condition():
    cond, null = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1)
    estimate, batch_sizes = estimator(cond, null, StageOptions(1, guidance=3.0))
    x_0, variance = estimate(randn(2, 3, 4, 4), 5)
    torch.testing.assert_close(x_0, null + 3 * (cond - null))
    assert variance is None and batch_sizes == [4]


def test_scale_1_does_not_compute_the_null():
    cond = randn(2, 3)
    estimate, batch_sizes = estimator(cond, randn(2, 3, seed=1), StageOptions(1, guidance=1.0))
    assert torch.equal(estimate(randn(2, 3), 5)[0], cond) and batch_sizes == [2]


def test_the_learned_variance_is_that_of_the_condition():
    cond, null = randn(2, 6, 4, 4), randn(2, 6, 4, 4, seed=1)
    estimate, _ = estimator(cond, null, StageOptions(1, guidance=8.0), learned_variance=True)
    x_0, variance = estimate(randn(2, 3, 4, 4), 5)
    torch.testing.assert_close(x_0, null[:, :3] + 8 * (cond - null)[:, :3])
    assert torch.equal(variance, cond[:, 3:])


def test_the_null_is_not_computed_outside_the_interval():
    options = StageOptions(1, guidance=2.0, guidance_interval=(0.2, 0.7))
    estimate, batch_sizes = estimator(randn(2, 3), randn(2, 3, seed=1), options)
    for t in (0, 199, 200, 500, 700, 701, 999):
        estimate(randn(2, 3), t)
    assert batch_sizes == [2, 2, 4, 4, 4, 2, 2]


def test_a_mixture_is_the_weighted_sum_of_guided_outputs():
    B, K = 3, 2
    cond, null = randn(K * B, 1), torch.full((K * B, 1), 7.0)
    weights = torch.tensor([[0.5, 1.0, 0.2], [0.5, 0.0, 0.8]])
    options = StageOptions(1, guidance=4.0)
    estimate, batch_sizes = estimator(cond, null, options, weights=weights)
    guided = (7 + 4 * (cond - 7)).view(K, B, 1)
    expected = (weights[..., None] * guided).sum(dim=0)
    torch.testing.assert_close(estimate(torch.ones(B, 1), 7)[0], expected)
    assert batch_sizes == [2 * K * B]


def test_full_rescale_restores_the_standard_deviation():
    cond, null = randn(2, 3, 8, 8), randn(2, 3, 8, 8, seed=1)
    plain, half, full = (guide(cond, null, 5.0, rescale) for rescale in (0.0, 0.5, 1.0))
    torch.testing.assert_close(full.std((1, 2, 3)), cond.std((1, 2, 3)))
    torch.testing.assert_close(half, (plain + full) / 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_guidance_is_computed_in_float32(dtype):
    cond, null = randn(2, 64).to(dtype), randn(2, 64, seed=1).to(dtype)
    guided = guide(cond, null, 7.5)
    assert guided.dtype == torch.float32
    torch.testing.assert_close(
        guided.double(), null.double() + 7.5 * (cond.double() - null.double()), rtol=0, atol=1e-5
    )


def test_static_threshold_clips():
    x_0 = torch.tensor([[-3.0, 0.5, 2.0]])
    assert threshold(x_0, 1.0).tolist() == [[-1.0, 0.5, 1.0]]
    assert threshold(x_0, None) is x_0


@pytest.mark.parametrize("percentile", [0.5, 0.9, 0.995, 1.0])
def test_dynamic_threshold_scales_each_sample_by_its_percentile(percentile):
    x_0 = 3 * randn(4, 3, 16, 16) * torch.tensor([0.01, 1.0, 2.0, 5.0]).view(4, 1, 1, 1)
    magnitudes = x_0.abs().flatten(1)
    bound = magnitudes.quantile(percentile, dim=1, interpolation="nearest")
    bound = bound.clamp(min=1).view(4, 1, 1, 1)
    torch.testing.assert_close(threshold(x_0, 1.0, percentile), x_0.clamp(-bound, bound) / bound)
    assert torch.equal(threshold(x_0, 1.0, percentile)[0], x_0[0])  # already in range
    torch.testing.assert_close(
        threshold(x_0, 2.0, 1.0).abs().amax((1, 2, 3))[1:], torch.full((3,), 2.0)
    )
