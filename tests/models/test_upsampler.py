"""The upsampler: equal to diffusers' in Karlo's configuration; images and crops of any size."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from parity import load_from_diffusers, randomize

from unclip.checkpoints.diffusers.names import unet_rules
from unclip.models.unclip.upsampler import Upsampler, UpsamplerConfig
from unclip.models.unet import LevelSpec, UNetConfig

UNET = UNetConfig(
    6,
    3,
    (LevelSpec(16, 1), LevelSpec(32, 1)),
    patch=2,
    groups=8,
    time_shift="additive",
    mid_attention=False,
)
CONFIG = UpsamplerConfig(UNET, low_size=16, high_size=64)


def make(config: UpsamplerConfig = CONFIG) -> Upsampler:
    torch.manual_seed(0)
    return randomize(Upsampler(config))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_equals_diffusers(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    widths = (32, 64, 64)
    options = dict(
        sample_size=32,
        in_channels=6,
        out_channels=3,
        layers_per_block=3,
        block_out_channels=widths,
        down_block_types=("ResnetDownsampleBlock2D",) * 3,
        up_block_types=("ResnetUpsampleBlock2D",) * 3,
        add_attention=False,
    )
    references = [randomize(UNet2DModel(**options), 0.03).to(dtype) for _ in range(2)]

    unet = UNetConfig(
        6, 3, tuple(LevelSpec(c, 3) for c in widths), time_shift="additive", mid_attention=False
    )
    upsampler = Upsampler(UpsamplerConfig(unet, 8, 32, last_unet=unet)).to(dtype)
    load_from_diffusers(upsampler.unet, references[0], unet_rules(unet))
    load_from_diffusers(upsampler.last_unet, references[1], unet_rules(unet))

    x_t, low_res, t = (
        torch.randn(2, 3, 32, 32, dtype=dtype),
        torch.rand(2, 3, 8, 8, dtype=dtype),
        torch.tensor([0, 999]),
    )
    enlarged = F.interpolate(low_res, (32, 32), mode="bicubic", antialias=True)
    for last, reference in enumerate(references):
        theirs = reference(torch.cat([x_t, enlarged], dim=1), t).sample
        denoise = upsampler.denoise_last if last else upsampler.denoise
        ours = denoise(x_t, t, low_res)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


def test_enlarged_once_or_at_every_step() -> None:
    upsampler, t = make(), torch.tensor([3, 900])
    x_t, low_res = torch.randn(2, 3, 64, 64), torch.rand(2, 3, 16, 16) * 2 - 1
    enlarged = upsampler.condition(low_res)
    assert enlarged.shape == x_t.shape
    assert torch.equal(upsampler.denoise(x_t, t, enlarged), upsampler.denoise(x_t, t, low_res))
    assert upsampler.condition(low_res.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("size", [(16, 16), (24, 40), (64, 64), (128, 32)])
def test_crops_of_any_size(size: tuple[int, int]) -> None:
    upsampler, t = make(), torch.tensor([100])
    x_t = torch.randn(1, 3, *size)
    assert upsampler(x_t, t, torch.randn(1, 3, size[0] // 4, size[1] // 4)).shape == x_t.shape
    assert upsampler(x_t, t, torch.randn(1, 3, *size)).shape == x_t.shape


def test_last_step_uses_its_own_network() -> None:
    shared, split = make(), make(replace(CONFIG, last_unet=UNET))
    x_t, t, low_res = torch.randn(1, 3, 16, 16), torch.tensor([0]), torch.randn(1, 3, 4, 4)
    assert shared.last_unet is None
    assert not torch.allclose(split.denoise_last(x_t, t, low_res), split(x_t, t, low_res))


def test_rows_are_independent_and_dtypes_kept() -> None:
    upsampler, t = make(), torch.tensor([3, 900])
    x_t, low_res = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 8, 8)
    expected = upsampler(x_t, t, low_res)
    torch.testing.assert_close(upsampler(x_t[1:], t[1:], low_res[1:]), expected[1:])
    out = upsampler.bfloat16()(x_t, t, low_res)
    assert out.dtype == torch.bfloat16 and (out - expected).norm() / expected.norm() < 0.05


def test_invalid_input_raises() -> None:
    upsampler, t = make(), torch.tensor([0])
    with pytest.raises(
        ValueError, match=r"low_res is \(9, 9\) and x_t \(32, 32\); .* or 4 times smaller"
    ):
        upsampler(torch.randn(1, 3, 32, 32), t, torch.randn(1, 3, 9, 9))
    with pytest.raises(ValueError, match="the image is 18 x 16; this U-Net needs multiples of 4"):
        upsampler(torch.randn(1, 3, 18, 16), t, torch.randn(1, 3, 18, 16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"low_size": 24}, "high_size is 64; expected a multiple of low_size = 24"),
        ({"high_size": 34, "low_size": 17}, "high_size is 34; expected a multiple of .* 4"),
        ({"learned_variance": True}, "unet has 6 channels in and 3 out; .* and 6 out"),
        ({"last_unet": replace(UNET, in_channels=3)}, "last_unet has 3 channels in"),
        ({"unet": replace(UNET, context_dim=8)}, "unet.context_dim is 8; expected none"),
    ],
)
def test_invalid_configs_raise(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)


def test_karlo_size() -> None:
    levels = tuple(LevelSpec(c, 3) for c in (320, 640, 960, 1280))
    unet = UNetConfig(6, 3, levels, time_shift="additive", mid_attention=False)
    with torch.device("meta"):
        upsampler = Upsampler(UpsamplerConfig(unet, 64, 256, last_unet=unet))
    for network in (upsampler.unet, upsampler.last_unet):
        assert sum(p.numel() for p in network.parameters()) == 691_579_523


def test_untrained_residual_upsampler_predicts_the_enlarged_image() -> None:
    config = replace(CONFIG, prediction="x0", residual=True)
    torch.manual_seed(0)
    upsampler, x_t, low_res = (
        Upsampler(config),
        torch.randn(2, 3, 64, 64),
        torch.rand(2, 3, 16, 16) * 2 - 1,
    )
    torch.testing.assert_close(
        upsampler.denoise(x_t, torch.tensor([5, 900]), low_res), upsampler.condition(low_res)
    )
    randomize(upsampler)
    plain = Upsampler(replace(config, residual=False))
    plain.load_state_dict(upsampler.state_dict())
    t = torch.tensor([5, 900])
    difference = upsampler.denoise(x_t, t, low_res) - plain.denoise(x_t, t, low_res)
    torch.testing.assert_close(difference, upsampler.condition(low_res))
    with pytest.raises(ValueError, match="residual needs prediction: x0, but prediction is eps"):
        replace(CONFIG, residual=True)


def test_residual_leaves_the_learned_variance_unchanged() -> None:
    unet = replace(UNET, out_channels=6)
    config = UpsamplerConfig(unet, 16, 64, prediction="x0", residual=True, learned_variance=True)
    upsampler, x_t, t = make(config), torch.randn(1, 3, 64, 64), torch.tensor([500])
    plain = make(replace(config, residual=False))
    low_res = torch.rand(1, 3, 16, 16)
    torch.testing.assert_close(upsampler(x_t, t, low_res)[:, 3:], plain(x_t, t, low_res)[:, 3:])
