"""Corruption of an upsampler's low-resolution input in training (unCLIP 2.1).

It makes the upsampler robust to errors of the stage before it.
"""

# B batch, s low-resolution side, K side of a blur kernel

from __future__ import annotations

import io
import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.config import Fraction, PositiveInt, config
from unclip.image_io import open_image, resize, to_pil, to_tensor

RESIZE_MODES = ("bilinear", "bicubic", "nearest-exact")


@config
class CorruptionConfig:
    """Corruption of low-resolution images; ranges (low, high) are sampled for each image."""

    kind: Literal["none", "blur", "bsr"] = "blur"  # unCLIP: blur for 64 -> 256, bsr for 256 -> 1024
    probability: Fraction = 1.0  # of corrupting an image at all
    kernel: PositiveInt = 3  # blur: side in pixels (bsr derives it from sigma)
    sigma: tuple[float, float] | None = None  # in pixels; null: 0.6 for blur, 0.2 to 1.5 for bsr
    resize: tuple[float, float] = (0.5, 1.5)  # bsr: factor, before resizing back
    noise: tuple[float, float] = (0.0, 0.1)  # bsr: standard deviation, for images in [-1, 1]
    jpeg: tuple[int, int] = (30, 95)  # bsr: quality

    def __post_init__(self) -> None:
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel is {self.kernel}; expected an odd number of pixels")
        for name, (low, high), (least, most) in (
            ("sigma", self.sigma_range, (1e-3, math.inf)),
            ("resize", self.resize, (1e-3, math.inf)),
            ("noise", self.noise, (0, math.inf)),
            ("jpeg", self.jpeg, (1, 100)),
        ):
            if not least <= low <= high <= most:
                raise ValueError(
                    f"{name} is {(low, high)}; expected {least} <= low <= high <= {most}"
                )

    @property
    def sigma_range(self) -> tuple[float, float]:
        if self.sigma is not None:
            return self.sigma
        return (0.2, 1.5) if self.kind == "bsr" else (0.6, 0.6)


def corrupt(
    images: Tensor, corruption: CorruptionConfig, generator: torch.Generator | None = None
) -> Tensor:
    """Corrupt images (B, 3, s, s) in [-1, 1]; random numbers are from `generator` or torch's.

    "bsr" processes one image at a time, and its JPEG runs on the CPU.
    """
    if corruption.kind == "none":
        return images
    device = "cpu" if generator is None else generator.device
    draws = torch.rand(len(images), 13, generator=generator, device=device).cpu()  # (B, 13)
    if corruption.kind == "blur":
        sigma = _interpolate(corruption.sigma_range, draws[:, 1])  # (B,)
        corrupted = gaussian_blur(images, corruption.kernel, sigma)
    else:
        noise = torch.randn(images.shape, generator=generator, device=device).to(images)
        rows = zip(images.split(1), noise.split(1), draws, strict=True)
        corrupted = torch.cat([_bsr(*row, corruption) for row in rows])
    chosen = (draws[:, 0] < corruption.probability).to(images.device)
    return torch.where(chosen[:, None, None, None], corrupted, images)


def gaussian_blur(images: Tensor, kernel: PositiveInt = 3, sigma: float | Tensor = 0.6) -> Tensor:
    """Blur images (B, C, H, W) with replicated borders; sigma in pixels, a number or (B,)."""
    sigma = torch.as_tensor(sigma, dtype=torch.float32).expand(len(images))
    return _filter(images, gaussian_kernels(kernel, sigma, sigma, torch.zeros(len(images))))


def gaussian_kernels(size: int, sigma_x: Tensor, sigma_y: Tensor, angle: Tensor) -> Tensor:
    """Return normalised kernels (B, K, K), rotated by `angle` in radians; arguments are (B,)."""
    offset = torch.arange(size, dtype=torch.float32) - size // 2
    y, x = torch.meshgrid(offset, offset, indexing="ij")  # (K, K)
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    u, v = x * cos + y * sin, y * cos - x * sin  # (B, K, K)
    squares = (u / sigma_x[:, None, None]) ** 2 + (v / sigma_y[:, None, None]) ** 2
    kernels = torch.exp(-0.5 * squares)
    return kernels / kernels.sum(dim=(1, 2), keepdim=True)


def _filter(images: Tensor, kernels: Tensor) -> Tensor:
    """Filter each image (B, C, H, W) with its own kernel (B, K, K)."""
    batch, channels, _, _ = images.shape
    pad = kernels.shape[-1] // 2
    padded = F.pad(images, (pad, pad, pad, pad), mode="replicate")
    weight = kernels.to(images).repeat_interleave(channels, dim=0)[:, None]  # (B C, 1, K, K)
    with torch.autocast(images.device.type, enabled=False):  # data, not a part of the network
        filtered = F.conv2d(padded.flatten(0, 1)[None], weight, groups=batch * channels)
    return filtered.view_as(images)


def _bsr(image: Tensor, noise: Tensor, draw: Tensor, corruption: CorruptionConfig) -> Tensor:
    """Apply blur, resizing, noise and JPEG in random order, after BSRGAN (2103.14006).

    image, noise (1, 3, s, s); draw (13,) in [0, 1).
    """

    def blur(x: Tensor) -> Tensor:
        sigma_x, sigma_y = (_interpolate(corruption.sigma_range, draw[i : i + 1]) for i in (5, 6))
        if draw[7] < 0.5:  # isotropic
            sigma_y = sigma_x
        size = 2 * math.ceil(2 * corruption.sigma_range[1]) + 1
        return _filter(x, gaussian_kernels(size, sigma_x, sigma_y, draw[8:9] * math.pi))

    def rescale(x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        factor = float(_interpolate(corruption.resize, draw[9]))
        size = (max(1, round(height * factor)), max(1, round(width * factor)))
        there, back = divmod(int(draw[10] * len(RESIZE_MODES) ** 2), len(RESIZE_MODES))
        resized = _resize(x, size, RESIZE_MODES[there])
        return _resize(resized, (height, width), RESIZE_MODES[back])

    def add_noise(x: Tensor) -> Tensor:
        return x + noise * float(_interpolate(corruption.noise, draw[11]))

    def compress(x: Tensor) -> Tensor:
        return jpeg(x, round(float(_interpolate(corruption.jpeg, draw[12]))))

    steps = (blur, rescale, add_noise, compress)
    for number in draw[1:5].argsort():
        image = steps[number](image).clamp(-1, 1)
    return image


def _resize(x: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    return F.interpolate(x, size, mode=mode) if mode == "nearest-exact" else resize(x, size, mode)


def jpeg(image: Tensor, quality: int) -> Tensor:
    """Compress and decompress an image (1, 3, H, W) in [-1, 1] at `quality` 1 to 100."""
    file = io.BytesIO()
    to_pil(image)[0].save(file, "JPEG", quality=quality)
    return to_tensor([open_image(file)]).to(image)


def _interpolate(limits: tuple[float, float], draw: Tensor) -> Tensor:
    return limits[0] + (limits[1] - limits[0]) * draw
