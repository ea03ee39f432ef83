"""Weights as 8-bit integers with one scale for each output: half of bfloat16's memory, at a small loss.

Only weights are rounded (absmax quantisation, as in 2208.07339); the arithmetic stays that of the network's dtype.
"""

# O outputs, I inputs of each

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from unclip.models.layers import Linear
from unclip.models.unet import UpConv2d, double

SMALLEST = 4096  # numbers in a weight; smaller ones gain nothing
FEW_ROWS = 8  # up to which the CPU multiplies by integers as they are, sooner than it widens them


class Int8Weight(nn.Module):
    """Stands in for a layer whose weight (O, ...) it keeps as integers and scales (O,)."""

    int8: torch.Tensor
    scale: torch.Tensor

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        wide = layer.weight.detach().float()
        # A scale that bfloat16 can tell: its product with 7 bits is then rounded only once, whatever the dtype.
        scale = (
            (wide.flatten(1).abs().amax(dim=1) / 127).clamp_min(1e-30).to(torch.bfloat16).float()
        )  # O
        per_weight = scale.view(-1, *[1] * (wide.ndim - 1))
        self.register_buffer("int8", (wide / per_weight).round().clamp(-127, 127).to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = layer.bias

    def widened(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight (O, ...) that is computed with."""
        return self.int8.to(dtype).mul_(self.scale.to(dtype).view(-1, *[1] * (self.int8.ndim - 1)))


class Int8Linear(Int8Weight):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, -2)  # B I
        if not x.is_cpu or len(rows) > FEW_ROWS or not hasattr(torch, "_weight_int8pack_mm"):
            return F.linear(x, self.widened(x.dtype), self.bias)
        y = torch._weight_int8pack_mm(rows.contiguous(), self.int8, self.scale.to(x.dtype))  # B O
        y = y if self.bias is None else y + self.bias
        return y.unflatten(0, x.shape[:-1])


class Int8Conv2d(Int8Weight):
    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__(layer)
        self.shape = (layer.stride, layer.padding, layer.dilation, layer.groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.widened(x.dtype), self.bias, *self.shape)


class Int8UpConv2d(Int8Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(double(x))


LAYERS = {nn.Linear: Int8Linear, Linear: Int8Linear, nn.Conv2d: Int8Conv2d, UpConv2d: Int8UpConv2d}


def quantize(network: nn.Module) -> None:
    """Replaces layers in place, one by one."""
    for name, layer in list(network.named_modules()):
        if type(layer) in LAYERS and layer.weight.numel() >= SMALLEST:
            network.set_submodule(name, LAYERS[type(layer)](layer))


def is_quantized(network: nn.Module) -> bool:
    return any(isinstance(layer, Int8Weight) for layer in network.modules())
