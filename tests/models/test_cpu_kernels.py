"""CPU kernels: installed and removed without changing parameters, with the same outputs."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_decoder
from parity import randomize
from test_dalle import make as make_dalle
from torch import nn

from unclip.models.cpu.kernels import (
    BFloat16Attention,
    CPUGroupNorm,
    FewRowsLinear,
    remove_kernels,
    use_kernels,
)
from unclip.models.layers import DotProductAttention, GroupNorm
from unclip.models.unet import Attention, LevelSpec, ResBlock, UNet, UNetConfig

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def types(network: nn.Module) -> list[type]:
    return [type(module) for module in network.modules()]


@pytest.mark.parametrize("make", [tiny_decoder, make_dalle])
def test_kernels_are_installed_and_removed(make):
    network = make()
    plain, state = types(network), network.state_dict()
    use_kernels(network, CPU)
    installed = types(network)
    assert not {ResBlock, Attention, DotProductAttention, GroupNorm} & set(installed)
    assert installed != plain
    assert all(issubclass(a, b) for a, b in zip(installed, plain, strict=True))
    assert network.state_dict().keys() == state.keys()
    assert types(copy.deepcopy(network)) == installed
    use_kernels(network, CUDA)
    assert types(network) == plain


def test_only_networks_that_decode_token_by_token_get_a_linear_kernel():
    decoder, dalle = tiny_decoder(), make_dalle()
    for network in (decoder, dalle):
        use_kernels(network, CPU)
    assert FewRowsLinear not in types(decoder)
    assert nn.Linear not in types(dalle)


@pytest.mark.parametrize("time_shift", ["scale_shift", "additive"])
@pytest.mark.parametrize("training", [False, True])
def test_float32_outputs_are_bit_identical(time_shift, training):
    torch.manual_seed(0)
    levels = (LevelSpec(16, 1), LevelSpec(16, 1, attention=True))
    config = UNetConfig(3, 3, levels, head_dim=8, groups=8, time_shift=time_shift)
    unet = randomize(UNet(config)).to(memory_format=torch.channels_last)
    x, modulation = torch.randn(2, 3, 8, 8), unet.modulation(unet.time(torch.ones(2)))
    with torch.set_grad_enabled(training):
        expected, _ = unet(x, modulation)
        use_kernels(unet, CPU)
        output, _ = unet(x, modulation)
    assert torch.equal(output, expected)
    remove_kernels(unet)
    assert ResBlock in types(unet)


def test_pipelines_install_kernels_for_their_device(tiny_pipe):
    pipe = copy.deepcopy(tiny_pipe)
    assert GroupNorm not in types(pipe.decoder) and CPUGroupNorm in types(pipe.decoder)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 3), (4, 1), (4, 2)])
def test_few_rows_linear_equals_linear(shape, bias):
    layer, x = FewRowsLinear(24, 40, bias=bias), torch.randn(*shape, 24)
    expected = F.linear(x, layer.weight, layer.bias)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
        assert layer(x).is_contiguous()
    assert torch.equal(layer(x), expected)  # in training


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_bfloat16_group_norm_is_close_to_float64(modulated: bool, channels_last: bool) -> None:
    torch.manual_seed(0)
    norm = randomize(CPUGroupNorm(8, 32), std=1.0)
    # with an offset, the variance is a small difference of large sums
    x = (torch.randn(3, 32, 7, 5) + torch.randn(3, 32, 1, 1) * 2).bfloat16()
    dy, scale, shift = (torch.randn(*shape).bfloat16() for shape in (x.shape, (3, 32), (3, 32)))
    if channels_last:
        x, dy = (y.to(memory_format=torch.channels_last) for y in (x, dy))

    def run(dtype: torch.dtype) -> list[torch.Tensor]:
        arguments = [
            y.to(dtype).requires_grad_() for y in ((x, scale, shift) if modulated else (x,))
        ]
        y = norm.to(torch.float64 if dtype == torch.float64 else torch.float32)(*arguments)
        return [y, *torch.autograd.grad(y, [*arguments, norm.weight, norm.bias], dy.to(dtype))]

    for exact, ours in zip(run(torch.float64), run(torch.bfloat16), strict=True):
        assert (ours - exact).norm() / exact.norm() < 0.01
        assert ours.stride() == exact.stride()


@pytest.mark.parametrize("mean", [20, 1000])
def test_bfloat16_group_norm_far_from_zero(mean: float) -> None:
    torch.manual_seed(0)
    x, norm = (mean + torch.randn(4, 32, 8, 8) * mean / 20).bfloat16(), CPUGroupNorm(8, 32)
    exact = F.group_norm(x.double(), 8)
    assert (norm(x) - exact).norm() / exact.norm() < 0.01


def test_bfloat16_attention() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8) for n in (4, 6, 6))
    for mask in (None, torch.rand(2, 1, 1, 6) < 0.7, torch.rand(2, 1, 4, 6) < 0.7):
        if mask is not None:
            mask[..., 0] = True
        expected = F.scaled_dot_product_attention(q, k, v, mask)
        out = BFloat16Attention()(q.bfloat16(), k.bfloat16(), v.bfloat16(), mask)
        assert out.dtype == torch.bfloat16 and (out - expected).norm() / expected.norm() < 0.01
