"""DALLE-pytorch's own discrete VAE: strided convolutions, a codebook, and a squared error (or a smooth L1)."""

# B batch, H W picture, h w grid of codes, K vocabulary, C width of a code

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from unclip.models.codecs.codec import (
    ImageCodec,
    LossTerms,
    check_positive,
    code_statistics,
    laplace_mixture,
)
from unclip.models.codecs.quantizers import kl_to_uniform


@dataclass(frozen=True)
class PlainDVAEConfig:
    kind: Literal["plain_dvae"] = "plain_dvae"
    image_size: int = 256
    vocab_size: int = 512
    code_width: int = 512
    halvings: int = 3  # 2 ** halvings pixels to a position, in each direction
    blocks: int = 0  # residual blocks on the grid, on each side
    width: int = 64
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # pixels in [0, 1] are normalised by these
    deviation: tuple[float, float, float] = (0.5, 0.5, 0.5)
    smooth_l1: bool = False

    def __post_init__(self) -> None:
        check_positive(self, "image_size", "vocab_size", "code_width", "halvings", "width")
        if self.image_size % 2**self.halvings:
            raise ValueError(
                f"image_size is {self.image_size}; expected a multiple of {2**self.halvings}"
            )


class ResBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(
                nn.Conv2d(width, width, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1),
                nn.ReLU(),
            ),
            nn.Conv2d(width, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


class PlainDVAE(ImageCodec):
    """Gumbel-softmax codes in training, the likeliest ones else; its tensors have DALLE-pytorch's names."""

    annealed = ("temperature", "kl_weight")

    def __init__(self, config: PlainDVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.image_size, self.factor, self.vocab_size = (
            config.image_size,
            2**config.halvings,
            config.vocab_size,
        )
        width, blocks = config.width, [ResBlock(config.width) for _ in range(2 * config.blocks)]
        halve = [_step(nn.Conv2d, 3 if i == 0 else width, width) for i in range(config.halvings)]
        first = width if blocks else config.code_width
        double = [
            _step(nn.ConvTranspose2d, first if i == 0 else width, width)
            for i in range(config.halvings)
        ]
        widen = [nn.Conv2d(config.code_width, width, 1)] if blocks else []
        self.codebook = nn.Embedding(config.vocab_size, config.code_width)
        self.encoder = nn.Sequential(
            *halve, *blocks[: config.blocks], nn.Conv2d(width, config.vocab_size, 1)
        )
        self.decoder = nn.Sequential(
            *widen, *blocks[config.blocks :], *double, nn.Conv2d(width, 3, 1)
        )

    @property
    def last_layer(self) -> Tensor:
        return self.decoder[-1].weight

    def logits(self, images: Tensor) -> Tensor:
        """Of q(code | picture): (B, 3, H, W) in [-1, 1] -> (B, h, w, K) float32."""
        return rearrange(self.encoder(self._normalised(images)).float(), "b k h w -> b h w k")

    def _encode(self, images: Tensor) -> Tensor:
        return self.logits(images).argmax(dim=-1)

    def _decode(self, codes: Tensor) -> Tensor:
        return self._pixels(self.decoder(rearrange(self.codebook(codes), "b h w c -> b c h w")))

    def log_likelihood(self, images: Tensor, codes: Tensor) -> Tensor:
        return laplace_mixture(images, self._decode(codes))

    def _normalised(self, images: Tensor) -> Tensor:
        mean, deviation = self._statistics(images)
        return ((images + 1) / 2 - mean) / deviation

    def _pixels(self, x: Tensor) -> Tensor:
        """What the decoder gives -> [-1, 1]."""
        mean, deviation = self._statistics(x)
        return (x * deviation + mean) * 2 - 1

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        config = self.config
        return tuple(
            like.new_tensor(values).view(3, 1, 1) for values in (config.mean, config.deviation)
        )

    def loss(self, images: Tensor, temperature: float = 0.9, kl_weight: float = 0.0) -> LossTerms:
        """Error of the normalised pixels + kl_weight * mean KL of a position in nats; hard codes in eval mode."""
        logits = self.logits(images)  # B h w K
        codes = logits.argmax(dim=-1)
        if self.training:
            weights = F.gumbel_softmax(logits, tau=temperature, dim=-1).to(
                self.codebook.weight.dtype
            )
            embedded = einsum(weights, self.codebook.weight, "b h w k, k c -> b c h w")
        else:
            embedded = rearrange(self.codebook(codes), "b h w c -> b c h w")
        out = self.decoder(embedded)  # B 3 H W
        error = (F.smooth_l1_loss if self.config.smooth_l1 else F.mse_loss)(
            out, self._normalised(images)
        )
        kl = kl_to_uniform(logits).mean()
        logged = {
            "error": error.detach(),
            "kl": kl.detach(),
            **code_statistics(codes, self.vocab_size),
        }
        return LossTerms(error + kl_weight * kl, self._pixels(out), logged)


def _step(
    convolution: type[nn.Conv2d] | type[nn.ConvTranspose2d], c_in: int, c_out: int
) -> nn.Sequential:
    """Halves or doubles the sides."""
    return nn.Sequential(convolution(c_in, c_out, 4, stride=2, padding=1), nn.ReLU())
