"""Discrete VAE of DALLE-pytorch: strided convolutions, a codebook, squared or smooth L1 error."""

# B batch, H W image, h w grid of codes, K vocabulary, C width of a code

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from unclip.config import NonNegativeInt, PositiveInt, check_multiple, config
from unclip.models.codecs.codec import ImageCodec, LossTerms, code_statistics
from unclip.models.codecs.quantizers import kl_to_uniform


@config
class PlainDVAEConfig:
    kind: Literal["plain_dvae"] = "plain_dvae"
    image_size: PositiveInt = 256
    vocab_size: PositiveInt = 512
    code_width: PositiveInt = 512
    halvings: PositiveInt = 3  # 2 ** halvings pixels per position, in each direction
    blocks: NonNegativeInt = 0  # residual blocks at the grid's resolution, in encoder and decoder
    width: PositiveInt = 64
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # normalisation of pixels in [0, 1]
    deviation: tuple[float, float, float] = (0.5, 0.5, 0.5)
    smooth_l1: bool = False

    def __post_init__(self) -> None:
        check_multiple("image_size", self.image_size, factor=self.factor)

    @property
    def factor(self) -> int:
        return 2**self.halvings


class ResBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        first, second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.net = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


class PlainDVAE(ImageCodec):
    """Gumbel-softmax codes in training, else the most likely ones. Tensors as in DALLE-pytorch."""

    annealed = ("temperature", "kl_weight")

    def __init__(self, config: PlainDVAEConfig) -> None:
        super().__init__(config)
        width = config.width

        def resize(
            kind: type[nn.Conv2d] | type[nn.ConvTranspose2d], c_in: int
        ) -> list[nn.Sequential]:
            widths = [c_in, *[width] * (config.halvings - 1)]
            convs = [kind(c, width, 4, stride=2, padding=1) for c in widths]
            return [nn.Sequential(conv, nn.ReLU()) for conv in convs]

        blocks = [ResBlock(width) for _ in range(2 * config.blocks)]
        down = resize(nn.Conv2d, 3)
        up = resize(nn.ConvTranspose2d, width if blocks else config.code_width)
        project = [nn.Conv2d(config.code_width, width, 1)] if blocks else []
        self.codebook = nn.Embedding(config.vocab_size, config.code_width)
        self.encoder = nn.Sequential(
            *down, *blocks[: config.blocks], nn.Conv2d(width, config.vocab_size, 1)
        )
        self.decoder = nn.Sequential(
            *project, *blocks[config.blocks :], *up, nn.Conv2d(width, 3, 1)
        )

    def logits(self, images: Tensor) -> Tensor:
        return rearrange(self.encoder(self._normalize(images)).float(), "b k h w -> b h w k")

    def _decode(self, codes: Tensor) -> Tensor:
        return self._pixels(self.decoder(self._embed(codes)))

    def _embed(self, codes: Tensor) -> Tensor:
        """Embed codes (B, h, w), or weights over the codebook (B, h, w, K) -> (B, C, h, w)."""
        if codes.ndim == 3:
            return rearrange(self.codebook(codes), "b h w c -> b c h w")
        codebook = self.codebook.weight
        return einsum(codes.to(codebook.dtype), codebook, "b h w k, k c -> b c h w")

    def _normalize(self, images: Tensor) -> Tensor:
        mean, deviation = self._statistics(images)
        return ((images + 1) / 2 - mean) / deviation

    def _pixels(self, x: Tensor) -> Tensor:
        """Undo the normalisation of the decoder's output: to [-1, 1]."""
        mean, deviation = self._statistics(x)
        return (x * deviation + mean) * 2 - 1

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, deviation = self.config.mean, self.config.deviation
        return like.new_tensor(mean).view(3, 1, 1), like.new_tensor(deviation).view(3, 1, 1)

    def loss(self, images: Tensor, temperature: float = 0.9, kl_weight: float = 0.0) -> LossTerms:
        """Error of the normalised pixels + kl_weight * mean KL of a position, in nats.

        In eval mode the codes are hard.
        """
        logits = self.logits(images)  # B h w K
        codes = logits.argmax(dim=-1)
        soft = F.gumbel_softmax(logits, tau=temperature, dim=-1) if self.training else codes
        out = self.decoder(self._embed(soft))  # B 3 H W
        distance = F.smooth_l1_loss if self.config.smooth_l1 else F.mse_loss
        error = distance(out, self._normalize(images))
        kl = kl_to_uniform(logits).mean()
        logged = {"error": error.detach(), "kl": kl.detach()}
        logged |= code_statistics(codes, self.vocab_size)
        return LossTerms(error + kl_weight * kl, self._pixels(out), logged)
