"""Resizing of picture tensors, the same on every device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def resize(images: Tensor, size: tuple[int, int], mode: str = "bicubic") -> Tensor:
    """Images (B, C, H, W) -> (B, C, *size), antialiased, not clamped; computed in float32 or wider, in their own dtype.

    mode: "bilinear" or "bicubic". On the CPU for MPS, which learned the second in PyTorch 2.8, and no gradient of it.
    """
    wide = images.to(torch.promote_types(images.dtype, torch.float32))
    there = wide.cpu() if wide.device.type == "mps" else wide
    return F.interpolate(there, size, mode=mode, antialias=True).to(images)
