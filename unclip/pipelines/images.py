"""Images that users pass in: one or several, as PIL images, paths or tensors."""

# B images, H W height and width

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from unclip.image_io import open_image

ImageInput = Image.Image | str | Path | Tensor  # a tensor is (3, H, W) or (B, 3, H, W) in [-1, 1]
Images = ImageInput | Sequence[ImageInput]


def open_images(images: Images) -> list[Image.Image]:
    """Open all images as upright RGB."""
    return [open_image(image) for image in list_images(images)]


def list_images(images: Images) -> list[Image.Image | str | Path]:
    """Return one entry per image for `open_image`: large ones need not be in memory together."""
    if isinstance(images, Tensor):
        return [*to_pil(check_images(images))]
    if not isinstance(images, Sequence) or isinstance(images, str):
        return [images]
    if not images:
        raise ValueError("the list of images is empty; expected at least one image")
    return [
        entry
        for image in images
        for entry in (list_images(image) if isinstance(image, Tensor) else [image])
    ]


def check_images(images: Tensor) -> Tensor:
    """Return one image (3, H, W) or several as (B, 3, H, W). ValueError outside of [-1, 1]."""
    if images.ndim not in (3, 4) or images.shape[-3] != 3 or not images.numel():
        raise ValueError(
            f"image is of shape {tuple(images.shape)}; expected (3, H, W) or (B, 3, H, W)"
        )
    if not images.is_floating_point():
        raise ValueError(
            f"image is a tensor of {images.dtype}; expected floating-point values in [-1, 1]"
        )
    if not (images.abs() <= 1).all():
        low, high = (value.item() for value in images.aminmax())
        raise ValueError(f"image has values from {low:g} to {high:g}; expected them in [-1, 1]")
    return images if images.ndim == 4 else images[None]


def fit(image: Image.Image, size: int) -> Image.Image:
    """Crop the central square of an image and resize it to size x size, as for training."""
    if image.size == (size, size):
        return image
    return ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)


def to_tensor(images: Sequence[Image.Image | np.ndarray] | np.ndarray) -> Tensor:
    """Convert B images of one size to (B, 3, H, W) in [-1, 1]."""
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return pixels.permute(0, 3, 1, 2).float().div(127.5).sub(1)


def to_pil(images: Tensor) -> list[Image.Image]:
    """Convert (B, 3, H, W) in [-1, 1] to B images; values outside are clipped."""
    pixels = images.float().mul(127.5).add(127.5).round().clamp(0, 255).byte()
    return [Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).cpu().numpy()]
