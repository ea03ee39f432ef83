"""Image codecs, stage one of DALL-E (2102.12092): a picture as a grid of codes, and back.

Each kind stands in its own file: dvae.py (OpenAI's), vqvae.py, vqgan.py; vae.py is the continuous baseline.
"""

# B batch, H W picture, h w grid of codes, K vocabulary

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LossTerms:
    """What training needs of one batch; the scalars in `logged` are reported, the reconstruction may be judged."""

    loss: Tensor  # scalar
    reconstruction: Tensor  # (B, 3, H, W), differentiable, in [-1, 1] but for small overshoots
    logged: dict[str, Tensor] = field(default_factory=dict)  # detached scalars


class Autoencoder(nn.Module, ABC):
    """Learns to give a picture back through something smaller; `forward` is `loss`."""

    annealed: tuple[
        str, ...
    ] = ()  # keyword arguments of `loss` that a training may change from step to step
    image_size: (
        int  # side of the pictures it is made for; others are taken if they divide by `factor`
    )
    factor: int  # pixels to a position of the grid, in each direction

    @property
    def grid(self) -> tuple[int, int]:
        """Positions (h, w) of a picture of `image_size`."""
        return self.image_size // self.factor, self.image_size // self.factor

    @abstractmethod
    def loss(self, images: Tensor, **annealed: float) -> LossTerms:
        """(B, 3, H, W) in [-1, 1] -> what is minimised and what is logged."""

    @abstractmethod
    def reconstruct(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> the same pictures after coding, (B, 3, H, W) in [-1, 1]; draws no noise."""

    @property
    @abstractmethod
    def last_layer(self) -> Tensor:
        """The weight that the reconstruction leaves by: gradients are compared there (VQ-GAN's adaptive weight)."""

    def forward(self, images: Tensor, **annealed: float) -> LossTerms:
        return self.loss(self.checked(images), **annealed)

    def checked(self, images: Tensor) -> Tensor:
        """The pictures, or a ValueError if they are not (B, 3, H, W) with sides that divide by `factor`."""
        shape = tuple(images.shape)
        if (
            len(shape) != 4
            or shape[1] != 3
            or shape[2] % self.factor
            or shape[3] % self.factor
            or 0 in shape
        ):
            raise ValueError(
                f"pictures are {shape}; expected (B, 3, H, W) with H and W multiples of {self.factor}"
            )
        return images


class ImageCodec(Autoencoder):
    """An autoencoder whose middle is a grid of codes 0 .. vocab_size - 1, which a transformer can learn to write."""

    vocab_size: int

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> codes (B, h, w) long: the likeliest or nearest one, without noise."""
        return self._encode(self.checked(images))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, h, w) of any grid -> pictures (B, 3, h * factor, w * factor) in [-1, 1]."""
        if codes.ndim != 3 or codes.is_floating_point():
            raise ValueError(
                f"codes are {tuple(codes.shape)} of {codes.dtype}; expected (B, h, w) of integers"
            )
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.vocab_size:
            raise ValueError(
                f"codes run from {int(codes.min())} to {int(codes.max())}; this codec knows 0 to {self.vocab_size - 1}"
            )
        return self._decode(codes).clamp(-1, 1)

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        return self.decode(self.encode(images))

    @abstractmethod
    def logits(self, images: Tensor) -> Tensor:
        """Of q(code | picture): (B, 3, H, W) in [-1, 1] -> (B, h, w, K) float32; -inf for codes that it excludes."""

    @abstractmethod
    def log_likelihood(self, images: Tensor, codes: Tensor) -> Tensor:
        """ln p(picture | codes) in nats, a density of pixels in [0, 1]: (B, 3, H, W) in [-1, 1], (B, h, w) -> (B,)."""

    @abstractmethod
    def _encode(self, images: Tensor) -> Tensor: ...

    @abstractmethod
    def _decode(self, codes: Tensor) -> Tensor: ...


def code_statistics(codes: Tensor, vocab_size: int) -> dict[str, Tensor]:
    """How much of the codebook codes of any shape use.

    usage: the fraction of codes that occur; perplexity: exp of their entropy, in [1, vocab_size].
    """
    codes = codes.flatten()
    counts = torch.zeros(vocab_size, device=codes.device).index_add_(
        0, codes, torch.ones_like(codes, dtype=torch.float)
    )
    p = counts / counts.sum()  # K
    return {"usage": (counts > 0).float().mean(), "perplexity": torch.special.entr(p).sum().exp()}


def laplace_mixture(images: Tensor, drawn: Tensor) -> Tensor:
    """ln p of pictures around drawn ones, (B, 3, H, W) in [-1, 1] each, as a density of pixels in [0, 1]: (B,) in nats.

    A Laplace distribution of the error whose scale is one of 64, all as likely, for the whole picture. The smallest
    keeps a step of 1 / 256 from being likelier than 1.
    """
    scales = torch.logspace(-9, 0, 64, base=2.0, dtype=torch.float64)
    error = (
        ((images - drawn).cpu().double() / 2).abs().flatten(1)
    )  # B 3HW; not every device has float64
    each = -error.shape[1] * torch.log(2 * scales) - error.sum(dim=1, keepdim=True) / scales  # B 64
    return (each.logsumexp(dim=1) - math.log(len(scales))).float().to(images.device)


ConvKind = Literal["plain", "gated"]


class GatedConv(nn.Module):
    """conv(x) * sigmoid(gate(x)): what passes is learned for each place and channel (1606.05328, 1612.08083)."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.conv, self.gate = make(), make()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * torch.sigmoid(self.gate(x))


def convolution(kind: ConvKind, make: Callable[[], nn.Module]) -> nn.Module:
    """The convolution that `make` gives, or a gated pair of them."""
    return make() if kind == "plain" else GatedConv(make)


def check_positive(config: object, *names: str) -> None:
    """ValueError naming the first of these fields of a config that is below 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}; expected at least 1")
