"""Preparation of networks for inference: frozen, cast, channels-last, with CPU kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from unclip.clip import CLIP
from unclip.models.cpu.kernels import use_kernels

M = TypeVar("M", bound=nn.Module)

SMALL_CLIP = 200_000_000  # parameters up to which CLIP stays in float32: it runs once a call


def prepare_for_inference(
    module: M, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> M:
    """Set to eval mode, freeze, cast to `dtype`, and use channels-last convolutions.

    A small CLIP keeps its dtype, and so do buffers, which are statistics. CPU kernels are installed
    or removed for `device`, where the module will compute; default: where its parameters are.
    """
    module.eval().requires_grad_(False)
    convert = parameter_conversion(module, dtype)
    for parameter in module.parameters():
        parameter.data = convert(parameter.data)
    use_kernels(module, next(module.parameters()).device if device is None else device)
    return module


def parameter_conversion(
    module: nn.Module, dtype: torch.dtype | None
) -> Callable[[Tensor], Tensor]:
    """Return the conversion of each parameter for inference: dtype and memory format."""
    is_clip = isinstance(module, CLIP)
    if is_clip and sum(p.numel() for p in module.parameters()) <= SMALL_CLIP:
        dtype = None

    def convert(x: Tensor) -> Tensor:
        memory_format = torch.channels_last if x.ndim == 4 and not is_clip else None
        return x.to(dtype=dtype, memory_format=memory_format)

    return convert
