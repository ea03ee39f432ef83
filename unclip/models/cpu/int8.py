"""Weights as 8-bit integers with one scale per output channel, at half the memory of bfloat16.

Only weights are rounded (absmax quantisation, as in 2208.07339); activations keep their dtype.
"""

# B rows, O output channels, I input channels

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.models.cpu.kernels import FewRowsLinear
from unclip.models.unet import UpConv2d, upsample_nearest

MIN_SIZE = 4096  # entries of a weight; smaller weights are not worth quantising
MAX_INT8_ROWS = 8  # above this, casting the weight is faster on the CPU than the int8 product


class Int8Layer(nn.Module):
    """Layer that stores its weight (O, ...) as integers and scales (O,)."""

    int8: Tensor
    scale: Tensor

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        weight = layer.weight.detach().float()
        # With a scale that bfloat16 represents exactly, `dequantize` rounds only once in any dtype.
        scale = (weight.flatten(1).abs().amax(dim=1) / 127).clamp_min(1e-30)
        scale = scale.to(torch.bfloat16).float()  # O
        quantized = (weight / _like_weight(scale, weight)).round().clamp(-127, 127)
        self.register_buffer("int8", quantized.to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = layer.bias

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weight (O, ...) in `dtype`."""
        return self.int8.to(dtype).mul_(_like_weight(self.scale.to(dtype), self.int8))


class Int8Linear(Int8Layer):
    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)  # B I
        if not x.is_cpu or len(rows) > MAX_INT8_ROWS or not hasattr(torch, "_weight_int8pack_mm"):
            return F.linear(x, self.dequantize(x.dtype), self.bias)
        scale = self.scale.to(x.dtype)
        y = torch.ops.aten._weight_int8pack_mm(rows.contiguous(), self.int8, scale)  # B O
        y = y if self.bias is None else y + self.bias
        return y.unflatten(0, x.shape[:-1])


class Int8Conv2d(Int8Layer):
    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__(layer)
        self.upsamples = isinstance(layer, UpConv2d)
        self.shape: Any = (layer.stride, layer.padding, layer.dilation, layer.groups)

    def forward(self, x: Tensor) -> Tensor:
        x = upsample_nearest(x) if self.upsamples else x
        return F.conv2d(x, self.dequantize(x.dtype), self.bias, *self.shape)


def _like_weight(scale: Tensor, weight: Tensor) -> Tensor:
    return scale.view(-1, *[1] * (weight.ndim - 1))


LAYERS: dict[type, Callable[..., Int8Layer]] = {
    nn.Linear: Int8Linear,
    FewRowsLinear: Int8Linear,
    nn.Conv2d: Int8Conv2d,
    UpConv2d: Int8Conv2d,
}


def quantize(network: nn.Module) -> None:
    """Replace the layers of a network in place."""
    for name, layer in list(network.named_modules()):
        if type(layer) in LAYERS and layer.get_parameter("weight").numel() >= MIN_SIZE:
            network.set_submodule(name, LAYERS[type(layer)](layer))


def weights(network: nn.Module) -> Iterator[Tensor]:
    """Iterate over the weights of a network, also those that `quantize` made buffers."""
    yield from network.parameters()
    yield from (layer.int8 for layer in network.modules() if isinstance(layer, Int8Layer))


def is_quantized(network: nn.Module) -> bool:
    return any(isinstance(layer, Int8Layer) for layer in network.modules())
