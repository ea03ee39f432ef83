"""Image codecs, the first stage of DALL-E (2102.12092): an image as a grid of codes, and back.

One file for each kind: dvae.py (OpenAI's), vqvae.py, vqgan.py; vae.py is the continuous baseline.
"""

# B batch, H W image, h w grid of codes, K vocabulary

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LossTerms:
    """Result of a training step: the loss, its reconstruction and values to log."""

    loss: Tensor  # scalar
    reconstruction: Tensor  # (B, 3, H, W), differentiable, in [-1, 1] with small overshoots
    logged: dict[str, Tensor] = field(default_factory=dict)  # detached scalars


class Reconstructor(nn.Module, ABC):
    """Network that reconstructs images; `forward` is `loss`."""

    annealed: tuple[str, ...] = ()  # arguments of `loss` that training may anneal

    @abstractmethod
    def loss(self, images: Tensor, **annealed: float) -> LossTerms:
        """Compute the loss of images (B, 3, H, W) in [-1, 1]."""

    @abstractmethod
    def reconstruct(self, images: Tensor) -> Tensor:
        """Reconstruct images: (B, 3, H, W) in [-1, 1] -> the same."""

    @property
    @abstractmethod
    def last_layer(self) -> Tensor:
        """The last weight, where VQ-GAN's adaptive weight compares gradients."""

    def forward(self, images: Tensor, **annealed: float) -> LossTerms:
        return self.loss(images, **annealed)


class Autoencoder(Reconstructor):
    """Network that reconstructs images from a smaller representation, without noise."""

    decoder: nn.Sequential

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.image_size: int = config.image_size  # of training; see `checked` for other sizes
        self.factor: int = config.factor  # pixels per position of the grid, in each direction

    @property
    def grid(self) -> tuple[int, int]:
        """Grid (h, w) of an image of `image_size`."""
        return self.image_size // self.factor, self.image_size // self.factor

    @property
    def last_layer(self) -> Tensor:
        last: Any = self.decoder[-1]
        return last.weight  # a parameter, or a property of a packed layer

    def forward(self, images: Tensor, **annealed: float) -> LossTerms:
        return self.loss(self.checked(images), **annealed)

    def checked(self, images: Tensor) -> Tensor:
        """Return the images.

        Raises ValueError unless they are (B, 3, H, W), with H and W multiples of `factor`.
        """
        shape, n = tuple(images.shape), self.factor
        if len(shape) != 4 or shape[1] != 3 or shape[2] % n or shape[3] % n or 0 in shape:
            raise ValueError(
                f"images are {shape}; expected (B, 3, H, W) with H and W multiples of {n}"
            )
        return images


class ImageCodec(Autoencoder):
    """Autoencoder whose bottleneck is a grid of codes 0 .. vocab_size - 1."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.vocab_size: int = config.vocab_size

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [-1, 1] -> most likely or nearest codes (B, h, w) long."""
        return self._encode(self.checked(images))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes (B, h, w), any grid -> images (B, 3, h * factor, w * factor) in [-1, 1]."""
        if codes.ndim != 3 or codes.is_floating_point():
            raise ValueError(
                f"codes are {tuple(codes.shape)} of {codes.dtype}; expected (B, h, w) of integers"
            )
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.vocab_size:
            raise ValueError(
                f"codes are {int(codes.min())} to {int(codes.max())}; "
                f"this codec expects 0 to {self.vocab_size - 1}"
            )
        return self._decode(codes).clamp(-1, 1)

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        return self.decode(self.encode(images))

    @abstractmethod
    def logits(self, images: Tensor) -> Tensor:
        """Logits of q(code | image): (B, 3, H, W) in [-1, 1] -> (B, h, w, K) float32."""

    def log_likelihood(self, images: Tensor, codes: Tensor) -> Tensor:
        """ln p(image | codes) in nats, a density over pixels in [0, 1].

        Images (B, 3, H, W) in [-1, 1], codes (B, h, w) -> (B,).
        """
        return laplace_mixture(images, self._decode(codes))

    def _encode(self, images: Tensor) -> Tensor:
        return self.logits(images).argmax(dim=-1)

    @abstractmethod
    def _decode(self, codes: Tensor) -> Tensor: ...


def code_statistics(codes: Tensor, vocab_size: int) -> dict[str, Tensor]:
    """Statistics of codebook use.

    usage: fraction of the codes that occur; perplexity: exp of their entropy, in [1, vocab_size].
    """
    codes = codes.flatten()
    ones = torch.ones_like(codes, dtype=torch.float)
    counts = torch.zeros(vocab_size, device=codes.device).index_add_(0, codes, ones)
    p = counts / counts.sum()  # K
    return {"usage": (counts > 0).float().mean(), "perplexity": torch.special.entr(p).sum().exp()}


def laplace_mixture(images: Tensor, reconstructions: Tensor) -> Tensor:
    """ln p of images given reconstructions, (B, 3, H, W) in [-1, 1] each -> (B,) in nats.

    A density over pixels in [0, 1]: a uniform mixture of Laplace distributions of the error with
    64 scales, one scale for the whole image. The smallest scale keeps the probability of a step of
    1 / 256 below 1.
    """
    scales = torch.logspace(-9, 0, 64, base=2.0, dtype=torch.float64)
    # on the CPU, as not every device has float64
    error = ((images - reconstructions).cpu().double() / 2).abs().flatten(1)  # B 3HW
    each = -error.shape[1] * torch.log(2 * scales) - error.sum(dim=1, keepdim=True) / scales  # B 64
    return (each.logsumexp(dim=1) - math.log(len(scales))).float().to(images.device)


ConvKind = Literal["plain", "gated"]


class GatedConv(nn.Module):
    """conv(x) * sigmoid(gate(x)) (1606.05328, 1612.08083)."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.conv, self.gate = make(), make()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * torch.sigmoid(self.gate(x))


def convolution(kind: ConvKind, make: Callable[[], nn.Module]) -> nn.Module:
    """Return the convolution that `make` creates, or a gated pair of them."""
    return make() if kind == "plain" else GatedConv(make)
