"""Damages an upsampler's low-res input in training, so that it forgives the faults of the stage before (unCLIP 2.1)."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from unclip.image_io import resize

# B batch, s side of the low-res picture, K side of a blur kernel


@dataclass(frozen=True)
class CorruptionConfig:
    """What is done to low-res pictures; ranges are (low, high), drawn uniformly for each picture."""

    kind: Literal["none", "blur", "bsr"] = "blur"  # unCLIP: blur for 64 -> 256, bsr for 256 -> 1024
    probability: float = 1.0  # that a picture is corrupted at all
    kernel: int = 3  # of "blur", in pixels; "bsr" takes as many as its sigma needs
    sigma: tuple[float, float] | None = (
        None  # of the blur in pixels; None: 0.6 for "blur", 0.2 to 1.5 for "bsr"
    )
    resize: tuple[float, float] = (0.5, 1.5)  # bsr: factor, before resizing back
    noise: tuple[float, float] = (0.0, 0.1)  # bsr: standard deviation, for pictures in [-1, 1]
    jpeg: tuple[int, int] = (30, 95)  # bsr: quality

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ValueError(
                f"corruption.probability is {self.probability}; expected a number in [0, 1]"
            )
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(
                f"corruption.kernel is {self.kernel}; expected an odd number of pixels"
            )
        limits = {
            "sigma": (1e-3, math.inf),
            "resize": (1e-3, math.inf),
            "noise": (0, math.inf),
            "jpeg": (1, 100),
        }
        for name, (lowest, highest) in limits.items():
            low, high = self.sigma_range if name == "sigma" else getattr(self, name)
            if not lowest <= low <= high <= highest:
                raise ValueError(
                    f"corruption.{name} is {(low, high)}; expected {lowest} <= low <= high <= {highest}"
                )

    @property
    def sigma_range(self) -> tuple[float, float]:
        if self.sigma is not None:
            return self.sigma
        return (0.2, 1.5) if self.kind == "bsr" else (0.6, 0.6)


def corrupt(
    images: Tensor, config: CorruptionConfig, generator: torch.Generator | None = None
) -> Tensor:
    """Corrupted copies of images (B, 3, s, s) in [-1, 1]; draws from `generator`, or torch's global one on the CPU.

    "bsr" works picture by picture, and its JPEG on the CPU.
    """
    if config.kind == "none":
        return images
    device = "cpu" if generator is None else generator.device
    draws = torch.rand(len(images), 13, generator=generator, device=device).cpu()  # (B, 13)
    chosen = draws[:, 0] < config.probability
    if config.kind == "blur":
        corrupted = gaussian_blur(images, config.kernel, _between(config.sigma_range, draws[:, 1]))
    else:
        noise = torch.randn(images.shape, generator=generator, device=device).to(images)
        corrupted = torch.cat(
            [_bsr(*one, config) for one in zip(images.split(1), noise.split(1), draws, strict=True)]
        )
    return torch.where(chosen.to(images.device)[:, None, None, None], corrupted, images)


def gaussian_blur(images: Tensor, kernel: int = 3, sigma: float | Tensor = 0.6) -> Tensor:
    """Images (B, C, H, W) blurred by a `kernel` x `kernel` Gaussian, borders repeated; sigma in pixels, one or (B,)."""
    sigma = torch.as_tensor(sigma, dtype=torch.float32).expand(len(images))
    return _filter(images, gaussian_kernels(kernel, sigma, sigma, torch.zeros(len(images))))


def gaussian_kernels(size: int, sigma_x: Tensor, sigma_y: Tensor, angle: Tensor) -> Tensor:
    """Kernels (B, K, K) that sum to 1, turned by `angle` in radians; all arguments but `size` are (B,)."""
    offset = torch.arange(size, dtype=torch.float32) - size // 2
    y, x = torch.meshgrid(offset, offset, indexing="ij")  # (K, K)
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    along, across = x * cos + y * sin, y * cos - x * sin  # (B, K, K)
    kernels = torch.exp(
        -0.5 * ((along / sigma_x[:, None, None]) ** 2 + (across / sigma_y[:, None, None]) ** 2)
    )
    return kernels / kernels.sum(dim=(1, 2), keepdim=True)


def _filter(images: Tensor, kernels: Tensor) -> Tensor:
    """Each image (B, C, H, W) with its own kernel (B, K, K)."""
    batch, channels, height, width = images.shape
    pad = kernels.shape[-1] // 2
    padded = F.pad(images, (pad, pad, pad, pad), mode="replicate").flatten(0, 1)[
        None
    ]  # (1, B C, H + 2 pad, W + 2 pad)
    weight = kernels.to(images).repeat_interleave(channels, dim=0)[:, None]  # (B C, 1, K, K)
    with torch.autocast(images.device.type, enabled=False):  # a corruption is not the network's
        return F.conv2d(padded, weight, groups=batch * channels).view(
            batch, channels, height, width
        )


def _bsr(image: Tensor, noise: Tensor, draw: Tensor, config: CorruptionConfig) -> Tensor:
    """Blur, resizing, noise and JPEG in random order on image (1, 3, s, s), after BSRGAN (2103.14006)."""

    def blur(x: Tensor) -> Tensor:
        sigma_x, sigma_y = (_between(config.sigma_range, draw[i : i + 1]) for i in (5, 6))
        if draw[7] < 0.5:  # isotropic
            sigma_y = sigma_x
        size = 2 * math.ceil(2 * config.sigma_range[1]) + 1
        return _filter(x, gaussian_kernels(size, sigma_x, sigma_y, draw[8:9] * math.pi))

    def resize(x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        factor = float(_between(config.resize, draw[9]))
        there = (max(1, round(height * factor)), max(1, round(width * factor)))
        modes = ("bilinear", "bicubic", "nearest-exact")
        choice = int(draw[10] * len(modes) ** 2)
        return _resize(_resize(x, there, modes[choice // 3]), (height, width), modes[choice % 3])

    def add_noise(x: Tensor) -> Tensor:
        return x + noise * float(_between(config.noise, draw[11]))

    def compress(x: Tensor) -> Tensor:
        return jpeg(x, round(float(_between(config.jpeg, draw[12]))))

    steps = (blur, resize, add_noise, compress)
    for number in draw[1:5].argsort():
        image = steps[number](image).clamp(-1, 1)
    return image


def _resize(x: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    return F.interpolate(x, size, mode=mode) if mode == "nearest-exact" else resize(x, size, mode)


def jpeg(image: Tensor, quality: int) -> Tensor:
    """An image (1, 3, H, W) in [-1, 1] after JPEG compression at `quality`, 1 to 100."""
    pixels = (
        (image[0].float() * 127.5 + 127.5)
        .round()
        .clamp(0, 255)
        .to(torch.uint8)
        .permute(1, 2, 0)
        .cpu()
        .numpy()
    )
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    decoded = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)[None]  # (1, 3, H, W)
    return decoded.to(image) / 127.5 - 1


def _between(limits: tuple[float, float], draw: Tensor) -> Tensor:
    return limits[0] + (limits[1] - limits[0]) * draw
