import pytest
import torch

from unclip.diffusion.guidance import Guided, classifier_free, guide, threshold
from unclip.types import StageOptions


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def denoisers(cond, null):
    """Denoisers that answer constants, and the list of the batch sizes that they were asked for."""
    asked = []

    def denoise_cond(x_t, t):
        asked.append(len(x_t))
        return cond

    def denoise_both(x_t, t):
        asked.append(len(x_t))
        assert len(t) == len(x_t)
        assert torch.equal(x_t[: len(x_t) // 2], x_t[len(x_t) // 2 :])
        return torch.cat([cond, null])

    return denoise_both, denoise_cond, asked


def test_guidance_goes_from_null_past_the_condition():
    cond, null = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1)
    denoise_both, denoise_cond, asked = denoisers(cond, null)
    guided = classifier_free(denoise_both, denoise_cond, StageOptions(1, guidance=3.0), 1000)
    torch.testing.assert_close(
        guided(randn(2, 3, 4, 4), torch.tensor([5, 5])), null + 3 * (cond - null)
    )
    assert asked == [4]


def test_scale_1_never_computes_the_null():
    denoise_both, denoise_cond, _ = denoisers(randn(2, 3), randn(2, 3))
    assert (
        classifier_free(denoise_both, denoise_cond, StageOptions(1, guidance=1.0), 1000)
        is denoise_cond
    )


def test_learned_variance_is_the_conditional_pass_s():
    cond, null = randn(2, 6, 4, 4), randn(2, 6, 4, 4, seed=1)
    denoise_both, denoise_cond, _ = denoisers(cond, null)
    guided = classifier_free(
        denoise_both, denoise_cond, StageOptions(1, guidance=8.0), 1000, learned_variance=True
    )
    mean, variance = guided(randn(2, 3, 4, 4), torch.tensor([5, 5])).chunk(2, dim=1)
    torch.testing.assert_close(mean, null[:, :3] + 8 * (cond - null)[:, :3])
    assert torch.equal(variance, cond[:, 3:])


def test_interval_leaves_the_null_out():
    denoise_both, denoise_cond, asked = denoisers(randn(2, 3), randn(2, 3, seed=1))
    options = StageOptions(1, guidance=2.0, guidance_interval=(0.2, 0.7))
    guided = classifier_free(denoise_both, denoise_cond, options, 1000)
    for t in (0, 199, 200, 500, 700, 701, 999):
        guided(randn(2, 3), torch.tensor([t, t]))
    assert asked == [2, 2, 4, 4, 4, 2, 2]
    assert isinstance(guided, Guided) and guided.at(100) is denoise_cond


def test_full_rescale_has_the_deviation_of_the_condition():
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
    bound = (
        x_0.abs()
        .flatten(1)
        .quantile(percentile, dim=1, interpolation="nearest")
        .clamp(min=1)
        .view(4, 1, 1, 1)
    )
    torch.testing.assert_close(threshold(x_0, 1.0, percentile), x_0.clamp(-bound, bound) / bound)
    assert torch.equal(threshold(x_0, 1.0, percentile)[0], x_0[0])  # in range already: untouched
    torch.testing.assert_close(
        threshold(x_0, 2.0, 1.0).abs().amax((1, 2, 3))[1:], torch.full((3,), 2.0)
    )
