"""The U-Net and its layers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from parity import randomize

from unclip.models.layers import KeyValues, timestep_embedding
from unclip.models.unet import LevelSpec, UNet, UNetConfig

LEVELS = (LevelSpec(16, 1), LevelSpec(32, 2, attention=True))


def make_unet(levels: tuple[LevelSpec, ...] = LEVELS, **options: object) -> UNet:
    torch.manual_seed(0)
    defaults = {"head_dim": 8, "groups": 8, "context_dim": 12}
    return randomize(UNet(UNetConfig(3, 3, levels, **(defaults | options))))


def make_inputs(
    unet: UNet, batch: int = 2, size: int = 8
) -> tuple[torch.Tensor, torch.Tensor, KeyValues | None]:
    torch.manual_seed(1)
    x, t = torch.randn(batch, 3, size, size), torch.arange(batch) * 300
    if unet.config.context_dim is None:
        return x, unet.modulation(unet.time(t)), None
    mask = torch.arange(5) < torch.arange(1, batch + 1)[:, None]
    return (
        x,
        unet.modulation(unet.time(t)),
        unet.project_context(torch.randn(batch, 5, 12), mask),
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"resample": "conv", "patch": 2},
        {"time_shift": "additive", "context_dim": None, "mid_attention": False},
        {"patch": 4, "time_dim": 20, "context_dim": None},
    ],
)
def test_all_variants_have_gradients_for_all_parameters(options: dict[str, object]) -> None:
    unet = make_unet(**options)
    unet(*make_inputs(unet, size=16))[0].square().mean().backward()
    assert unet(*make_inputs(unet, size=16))[0].shape == (2, 3, 16, 16)
    assert [n for n, p in unet.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_patch_moves_pixels_into_channels() -> None:
    unet = make_unet(patch=2, context_dim=None)
    assert unet.stem.weight.shape == (16, 3 * 4, 3, 3)
    assert unet.head.weight.shape == (3 * 4, 16, 3, 3)
    sizes = []
    unet.stem.register_forward_hook(lambda _module, _args, out: sizes.append(out.shape))
    unet(*make_inputs(unet))[0]
    assert sizes == [(2, 16, 4, 4)]
    # pixel unshuffle and shuffle are inverse to each other
    x = torch.randn(1, 3, 8, 6)
    assert torch.equal(F.pixel_shuffle(F.pixel_unshuffle(x, 2), 2), x)


def test_untrained_unet_predicts_zero() -> None:
    unet = UNet(UNetConfig(3, 3, LEVELS, head_dim=8, groups=8))
    assert not unet(*make_inputs(unet))[0].any()


def test_masked_context_has_no_effect() -> None:
    unet = make_unet()
    x, modulation, kv = make_inputs(unet)
    expected = unet(x, modulation, kv)[0]

    def replace_where(where: torch.Tensor) -> KeyValues:
        side = [
            tuple(torch.where(where[:, None, :, None], 100.0, y) for y in ys) for ys in (kv.k, kv.v)
        ]
        return KeyValues(*side, kv.mask)

    assert torch.equal(unet(x, modulation, replace_where(~kv.mask))[0], expected)
    assert not torch.allclose(unet(x, modulation, replace_where(kv.mask))[0], expected)
    assert torch.allclose(unet(x, modulation, kv.pad(9))[0], expected, atol=1e-5)


def test_rows_of_a_batch_are_independent() -> None:
    unet = make_unet()
    x, modulation, kv = make_inputs(unet, batch=3)
    expected = unet(x, modulation, kv)[0]
    for i in range(3):
        torch.testing.assert_close(
            unet(x[i : i + 1], modulation[i : i + 1], kv[i : i + 1])[0], expected[i : i + 1]
        )


@pytest.mark.parametrize("channels_last", [False, True])
def test_gradient_checkpointing_keeps_gradients(channels_last: bool) -> None:
    unet = make_unet()
    if channels_last:
        unet = unet.to(memory_format=torch.channels_last)
    grads = []
    for unet.gradient_checkpointing in (False, True):
        unet.zero_grad()
        unet(*make_inputs(unet))[0].square().mean().backward()
        grads.append([p.grad.clone() for p in unet.parameters()])
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(checkpointed, plain)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_close_to_float32(autocast: bool) -> None:
    unet = make_unet().to(memory_format=torch.channels_last)
    expected = unet(*make_inputs(unet))[0]
    if not autocast:
        unet = unet.bfloat16()
        unet.project_context, project = lambda c, m: project(c.bfloat16(), m), unet.project_context
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = unet(*make_inputs(unet))[0]
    assert out.dtype == torch.bfloat16
    assert (out - expected).norm() / expected.norm() < 0.03


def test_timestep_embedding() -> None:
    emb = timestep_embedding(torch.tensor([0, 7]), 6)
    angles = [7 * 10_000 ** (-i / 3) for i in range(3)]
    expected = [
        [1.0] * 3 + [0.0] * 3,
        [math.cos(a) for a in angles] + [math.sin(a) for a in angles],
    ]
    torch.testing.assert_close(emb, torch.tensor(expected))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": ()}, r"levels is \(\)"),
        ({"groups": 5}, r"levels\[0\].channels is 16; expected a multiple of groups = 5"),
        ({"head_dim": 24}, r"levels\[1\].channels is 32; expected a multiple of head_dim = 24"),
        ({"patch": 0}, "patch is 0; expected at least 1"),
        ({"levels": (LevelSpec(15),), "groups": 5}, "channels is 15; expected a multiple of .* 2"),
        ({"dropout": 1.5}, "dropout is 1.5; expected .*less than 1"),
    ],
)
def test_invalid_configs_raise(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_unet(**options)


def test_invalid_input_raises() -> None:
    unet = make_unet(patch=2)
    _, modulation, kv = make_inputs(unet)
    with pytest.raises(ValueError, match="the image is 8 x 6; this U-Net needs multiples of 4"):
        unet(torch.randn(2, 3, 8, 6), modulation, kv)
    with pytest.raises(ValueError, match="the context is missing; context_dim of this U-Net is 12"):
        unet(torch.randn(2, 3, 8, 8), modulation)
