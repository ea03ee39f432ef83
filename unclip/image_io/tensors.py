"""Conversion between images and tensors."""

# B images, C channels, H W height and width

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

if TYPE_CHECKING:  # the command line opens images without importing torch
    from torch import Tensor


RESIZE_RULE = "Lanczos, centre crop"  # of `fit`, for results that depend on it


def fit(image: Image.Image, size: int) -> Image.Image:
    """Crop the central square of an image and resize it to size x size pixels."""
    if image.size == (size, size):
        return image
    return ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)


def to_tensor(images: Sequence[Image.Image | np.ndarray] | np.ndarray) -> Tensor:
    """Convert B images of one size to (B, 3, H, W) in [-1, 1]."""
    import torch

    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return from_uint8(pixels.permute(0, 3, 1, 2))


def from_uint8(pixels: Tensor) -> Tensor:
    """Convert values from 0 to 255 to float32 in [-1, 1]."""
    return pixels.float().div(127.5).sub(1)


def small_images(images: Sequence[Image.Image], size: int) -> Tensor:
    """Crop and reduce B images to means of 4 x 4 pixels: (B, 3, size, size) in [-1, 1]."""
    import torch.nn.functional as F

    return F.avg_pool2d(to_tensor([fit(image, 4 * size) for image in images]), 4)


def to_pil(images: Tensor) -> list[Image.Image]:
    """Convert (B, 3, H, W) in [-1, 1] to B images; values outside are clipped."""
    pixels = images.float().mul(127.5).add(127.5).round().clamp(0, 255).byte()
    return [Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def resize(images: Tensor, size: tuple[int, int], mode: str = "bicubic") -> Tensor:
    """Resize with antialiasing, without clamping: (B, C, H, W) -> (B, C, *size).

    mode is "bilinear" or "bicubic". Computed in float32 or wider and returned in the input's dtype.
    MPS tensors are resized on the CPU, because MPS lacks the gradient of this operation.
    """
    import torch

    wide = images.to(torch.promote_types(images.dtype, torch.float32))
    wide = wide.cpu() if wide.device.type == "mps" else wide
    return torch.nn.functional.interpolate(wide, size, mode=mode, antialias=True).to(images)
