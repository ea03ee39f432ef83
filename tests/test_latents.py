import math

import pytest
import torch

from unclip.latents import normalise, slerp


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def test_normalise():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert normalise(x).tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0.0, 0.0]]
    assert normalise(x.half()).dtype == torch.float16
    assert normalise(torch.full((1, 768), 1e-4).half()).float().norm() == pytest.approx(1.0, abs=1e-2)


def test_slerp_is_the_textbook_formula():
    a, b = normalise(randn(5, 16)), normalise(randn(5, 16, seed=1))
    angle = (a * b).sum(-1, keepdim=True).arccos()
    for fraction in (0.0, 0.3, 1.0):
        expected = (((1 - fraction) * angle).sin() * a + (fraction * angle).sin() * b) / angle.sin()
        torch.testing.assert_close(slerp(a, b, fraction), expected)


def test_slerp_runs_through_equal_angles():
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    fractions = torch.linspace(0, 1, 7)
    path = slerp(a.expand(7, 2), b.expand(7, 2), fractions)
    angles = fractions * math.pi / 2
    torch.testing.assert_close(path, torch.stack([angles.cos(), angles.sin()], -1))


def test_lengths_run_linearly():
    a, b = normalise(randn(3, 8)) * 2, normalise(randn(3, 8, seed=1)) * 6
    torch.testing.assert_close(slerp(a, b, 0.25).norm(dim=-1), torch.full((3,), 3.0, dtype=torch.float64))
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [0.0, 1e-12, 1e-7, 1e-6, 1e-4, 1e-2])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_slerp_of_nearly_parallel_and_antipodal_vectors(sign, gap, dtype):
    a = normalise(randn(4, 32, dtype=dtype))
    b = normalise(sign * a + gap * normalise(randn(4, 32, seed=1, dtype=dtype)))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    path = torch.stack([slerp(a, b, k / 8) for k in range(9)])
    torch.testing.assert_close(path.norm(dim=-1), torch.ones(9, 4, dtype=dtype), rtol=0, atol=tolerance)
    torch.testing.assert_close(path[0], a, rtol=0, atol=tolerance)
    torch.testing.assert_close(path[-1], b, rtol=0, atol=tolerance)
    steps = path.diff(dim=0).norm(dim=-1)  # the same chord at each step: constant speed
    torch.testing.assert_close(steps, steps[:1].expand_as(steps), rtol=0, atol=tolerance)
    if sign < 0:
        assert (path[4] * a).sum(-1).abs().max() < 0.02  # half way round, not through the origin


def test_slerp_of_half_precision_keeps_its_dtype():
    a, b = randn(2, 64, dtype=torch.float32), randn(2, 64, seed=1, dtype=torch.float32)
    out = slerp(a.half(), b.half(), 0.5)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.float(), slerp(a, b, 0.5), rtol=0, atol=5e-3)
