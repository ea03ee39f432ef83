"""VQ-VAE (1711.00937): strided convolutions, residual blocks, and vector quantisation."""

# B batch, H W image, h w grid of codes, K vocabulary, C width of a code

from __future__ import annotations

from abc import abstractmethod
from dataclasses import field
from itertools import pairwise
from typing import Annotated, Literal

import torch.nn.functional as F
from annotated_types import MultipleOf
from torch import Tensor, nn

from unclip.config import PositiveInt, check_multiple, config
from unclip.models.codecs.codec import ConvKind, ImageCodec, LossTerms, code_statistics, convolution
from unclip.models.codecs.quantizers import NearestConfig, Quantizer, VectorQuantizer


@config
class ConvNetConfig:
    """Convolutions of encoder and decoder. Most of the computation is at the grid's resolution."""

    width: Annotated[PositiveInt, MultipleOf(2)] = 128
    factor: int = 8  # pixels per position; a power of 2
    blocks: PositiveInt = 2  # residual blocks at the grid's resolution
    block_width: PositiveInt = 32  # inside a residual block
    conv: ConvKind = "plain"  # in the residual blocks

    def __post_init__(self) -> None:
        if self.factor < 2 or self.factor & (self.factor - 1):
            raise ValueError(f"factor is {self.factor}; expected a power of 2, at least 2")

    @property
    def halvings(self) -> int:
        return self.factor.bit_length() - 1


class Residual(nn.Module):
    """A 3x3 and a 1x1 convolution, plus the input."""

    def __init__(self, config: ConvNetConfig) -> None:
        super().__init__()
        width, inner = config.width, config.block_width
        self.conv1 = convolution(config.conv, lambda: nn.Conv2d(width, inner, 3, padding=1))
        self.conv2 = nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


def make_encoder(config: ConvNetConfig, c_out: int) -> nn.Sequential:
    """(B, 3, H, W) -> (B, c_out, H / factor, W / factor)."""
    width = config.width
    widths = [3, width // 2, *[width] * (config.halvings - 1)]
    layers: list[nn.Module] = []
    for c_in, c in pairwise(widths):
        layers += [nn.Conv2d(c_in, c, 4, stride=2, padding=1), nn.ReLU()]
    blocks = [Residual(config) for _ in range(config.blocks)]
    layers += [nn.Conv2d(widths[-1], width, 3, padding=1), *blocks]
    return nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(width, c_out, 1))


def make_decoder(config: ConvNetConfig, c_in: int) -> nn.Sequential:
    """(B, c_in, h, w) -> (B, 3, h * factor, w * factor)."""
    width = config.width
    widths = [*[width] * config.halvings, width // 2]
    blocks = [Residual(config) for _ in range(config.blocks)]
    upsample: list[nn.Module] = []
    for c, c_out in pairwise(widths):
        upsample += [nn.ReLU(), nn.ConvTranspose2d(c, c_out, 4, stride=2, padding=1)]
    layers = [nn.Conv2d(c_in, width, 3, padding=1), *blocks, *upsample]
    return nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(width // 2, 3, 3, padding=1))


@config
class VQVAEConfig:
    kind: Literal["vqvae"] = "vqvae"
    image_size: PositiveInt = 256
    vocab_size: PositiveInt = 512
    code_width: PositiveInt = 64
    net: ConvNetConfig = field(default_factory=ConvNetConfig)
    quantizer: NearestConfig = field(default_factory=NearestConfig)
    pixel_loss: Literal["l1", "l2"] = "l2"

    def __post_init__(self) -> None:
        check_multiple("image_size", self.image_size, factor=self.factor)

    @property
    def factor(self) -> int:
        return self.net.factor


class QuantizedCodec(ImageCodec):
    """Codec that quantises the features of an encoder."""

    quantizer: Quantizer

    @property
    def annealed(self) -> tuple[str, ...]:
        return self.quantizer.annealed

    @abstractmethod
    def _features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C, h, w)."""

    @abstractmethod
    def _generate(self, z: Tensor) -> Tensor:
        """Quantised features (B, C, h, w) -> (B, 3, H, W) float32."""

    def _encode(self, images: Tensor) -> Tensor:
        return self.quantizer.encode(self._features(images))

    def _decode(self, codes: Tensor) -> Tensor:
        return self._generate(self.quantizer.embed(codes))

    def logits(self, images: Tensor) -> Tensor:
        return self.quantizer.logits(self._features(self.checked(images)))

    def loss(self, images: Tensor, **annealed: float) -> LossTerms:
        """Pixel error + loss of the quantizer."""
        quantized = self.quantizer(self._features(images), **annealed)
        reconstruction = self._generate(quantized.z)  # B 3 H W
        pixel = {"l1": F.l1_loss, "l2": F.mse_loss}[self.config.pixel_loss](reconstruction, images)
        logged = {
            "pixel": pixel.detach(),
            "mse": F.mse_loss(reconstruction.detach(), images),
            **quantized.logged,
            **code_statistics(quantized.codes, self.vocab_size),
        }
        return LossTerms(pixel + quantized.loss, reconstruction, logged)


class VQVAE(QuantizedCodec):
    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__(config)
        self.encoder = make_encoder(config.net, config.code_width)
        self.quantizer = VectorQuantizer(config.quantizer, config.vocab_size, config.code_width)
        self.decoder = make_decoder(config.net, config.code_width)

    def _features(self, images: Tensor) -> Tensor:
        return self.encoder(images.to(self.last_layer.dtype))

    def _generate(self, z: Tensor) -> Tensor:
        return self.decoder(z.to(self.last_layer.dtype)).float()
