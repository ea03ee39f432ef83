"""VQ-GAN (2012.09841): the autoencoder of taming-transformers. See also discriminator.py."""

# B batch, H W image, C channels, h w grid, K vocabulary, S = h * w

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

import torch.nn.functional as F
from annotated_types import MinLen
from torch import Tensor, nn

from unclip.config import DropRate, PositiveInt, check_multiple, config
from unclip.models.codecs.quantizers import NearestConfig, QuantizerConfig, make_quantizer
from unclip.models.codecs.vqvae import QuantizedCodec
from unclip.models.layers import DotProductAttention, GroupNorm
from unclip.models.unet import LevelSpec, UpConv2d

F16 = tuple(LevelSpec(c, attention=c == 512) for c in (128, 128, 256, 256, 512))


@config
class VQGANConfig:
    """The defaults are those of the published f16 model with 1,024 codes."""

    kind: Literal["vqgan"] = "vqgan"
    image_size: PositiveInt = 256
    vocab_size: PositiveInt = 1024
    code_width: PositiveInt = 256
    # from the highest resolution; each level has half the resolution of the previous one
    levels: Annotated[tuple[LevelSpec, ...], MinLen(1)] = F16
    feature_width: PositiveInt = 256  # between the convolutions and the codes
    groups: PositiveInt = 32  # of the group norms
    dropout: DropRate = 0.0
    quantizer: QuantizerConfig = field(default_factory=NearestConfig)
    pixel_loss: Literal["l1", "l2"] = "l1"
    parts: Literal["both", "decoder"] = "both"  # "decoder": cannot encode

    def __post_init__(self) -> None:
        for i, level in enumerate(self.levels):
            check_multiple(f"levels[{i}].channels", level.channels, groups=self.groups)
        check_multiple("image_size", self.image_size, factor=self.factor)

    @property
    def factor(self) -> int:
        return 2 ** (len(self.levels) - 1)


class ResBlock(nn.Module):
    """Norm, SiLU, conv, twice, plus the input."""

    def __init__(self, c_in: int, c_out: int, config: VQGANConfig) -> None:
        super().__init__()
        self.norm1 = _norm(c_in, config)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = _norm(c_out, config)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(self.dropout(F.silu(self.norm2(h))))


class Attention(nn.Module):
    """Self-attention of the pixels with one head, plus the input."""

    def __init__(self, channels: int, config: VQGANConfig) -> None:
        super().__init__()
        self.norm = _norm(channels, config)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.attend = DotProductAttention()
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).mT[:, None].chunk(3, dim=-1)  # B 1 S C
        h = self.attend(q, k, v)[:, 0].mT.unflatten(2, x.shape[2:])  # B C h w
        return x + self.out(h)


class Downsample(nn.Conv2d):
    """Strided convolution that halves the size, padded on the right and below only."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


def make_encoder(config: VQGANConfig) -> nn.Sequential:
    """(B, 3, H, W) -> (B, feature_width, h, w)."""
    c = config.levels[0].channels
    layers: list[nn.Module] = [nn.Conv2d(3, c, 3, padding=1)]
    for i, level in enumerate(config.levels):
        for _ in range(level.blocks):
            layers += [ResBlock(c, level.channels, config)]
            c = level.channels
            layers += [Attention(c, config)] if level.attention else []
        layers += [Downsample(c)] if i < len(config.levels) - 1 else []
    layers += _middle(c, config)
    return nn.Sequential(
        *layers, _norm(c, config), nn.SiLU(), nn.Conv2d(c, config.feature_width, 3, padding=1)
    )


def make_decoder(config: VQGANConfig) -> nn.Sequential:
    """(B, feature_width, h, w) -> (B, 3, H, W)."""
    c = config.levels[-1].channels
    layers: list[nn.Module] = [
        nn.Conv2d(config.feature_width, c, 3, padding=1),
        *_middle(c, config),
    ]
    for i, level in reversed(list(enumerate(config.levels))):
        for _ in range(level.blocks + 1):
            layers += [ResBlock(c, level.channels, config)]
            c = level.channels
            layers += [Attention(c, config)] if level.attention else []
        layers += [UpConv2d(c, c)] if i > 0 else []
    return nn.Sequential(*layers, _norm(c, config), nn.SiLU(), nn.Conv2d(c, 3, 3, padding=1))


def _middle(c: int, config: VQGANConfig) -> list[nn.Module]:
    return [ResBlock(c, c, config), Attention(c, config), ResBlock(c, c, config)]


def _norm(channels: int, config: VQGANConfig) -> GroupNorm:
    return GroupNorm(config.groups, channels, eps=1e-6)


class VQGAN(QuantizedCodec):
    """Autoencoder of VQ-GAN. Discriminator and perceptual network are part of the training."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__(config)
        if config.parts == "both":
            self.encoder = make_encoder(config)
            self.quant_conv = nn.Conv2d(config.feature_width, config.code_width, 1)
        self.quantizer = make_quantizer(config.quantizer, config.vocab_size, config.code_width)
        self.post_quant_conv = nn.Conv2d(config.code_width, config.feature_width, 1)
        self.decoder = make_decoder(config)

    def _features(self, images: Tensor) -> Tensor:
        if self.config.parts == "decoder":
            raise ValueError("this codec cannot encode images: it has only a decoder (parts)")
        return self.quant_conv(self.encoder(images.to(self.last_layer.dtype)))

    def _generate(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z.to(self.last_layer.dtype))).float()
