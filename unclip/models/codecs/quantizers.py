"""Bottleneck of a codec, features <-> codes: the nearest code, or a Gumbel-softmax."""

# B batch, C width of a code, h w grid, K vocabulary, N = B * h * w

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from unclip.config import DropRate, NonNegative, Positive, config
from unclip.models.layers import normal_parameter
from unclip.types import full_precision

CHUNK = 4096  # features compared with the codebook at once, to limit the memory of their distances
USES_DECAY = 0.99  # decay of the running mean of code uses if `ema` is None


@config
class NearestConfig:
    """Vector quantisation (1711.00937): nearest code, straight-through gradient."""

    kind: Literal["nearest"] = "nearest"
    commitment: NonNegative = 0.25  # weight of the loss that pulls features towards their codes
    # decay of a codebook of running means (1711.00937, A.1); None = learned by gradient
    ema: DropRate | None = None
    # codes with fewer uses per batch than this are reset to features; None = never
    revive: Positive | None = None


@config
class GumbelConfig:
    """A distribution over the codes, relaxed in training as in DALL-E's dVAE."""

    kind: Literal["gumbel"] = "gumbel"


@dataclass(frozen=True)
class Quantized:
    z: Tensor  # (B, C, h, w), input of the decoder
    codes: Tensor  # (B, h, w)
    loss: Tensor  # scalar
    logged: dict[str, Tensor]


class Codebook(nn.Module):
    """K codes of width C."""

    codebook: Tensor  # (K, C)

    def embed(self, codes: Tensor) -> Tensor:
        """Codes (B, h, w) -> (B, C, h, w)."""
        return rearrange(F.embedding(codes, self.codebook), "b h w c -> b c h w")


class VectorQuantizer(Codebook):
    """Replace features (B, C, h, w) by the nearest of K codes, with a straight-through gradient."""

    annealed: tuple[str, ...] = ()
    sums: Tensor  # (K, C), with `ema`
    uses: Tensor  # (K,), with `ema` or `revive`

    def __init__(self, config: NearestConfig, vocab_size: int, width: int) -> None:
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        codebook = torch.empty(vocab_size, width).uniform_(-1 / vocab_size, 1 / vocab_size)
        if config.ema is None:
            self.codebook = nn.Parameter(codebook)
        else:
            self.register_buffer("codebook", codebook)
            # running mean of the sum of the features that chose each code
            self.register_buffer("sums", codebook.clone())
        if config.ema is not None or config.revive is not None:
            # running mean of each code's uses; starting at 0, the first batch revives all codes
            uses = torch.full((vocab_size,), 1.0 if config.revive is None else 0.0)
            self.register_buffer("uses", uses)

    def encode(self, z: Tensor) -> Tensor:
        """(B, C, h, w) -> codes (B, h, w)."""
        return self._nearest(_rows(z)).view(z.shape[0], *z.shape[2:])

    def logits(self, z: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, h, w, K): 0 for the nearest code, -inf for all others."""
        nearest = F.one_hot(self.encode(z), self.vocab_size)
        return torch.where(nearest.bool(), 0.0, -torch.inf)

    def forward(self, z: Tensor) -> Quantized:
        z = z.float()
        if self.training and self.config.revive is not None:
            self._revive(_rows(z.detach()))
        codes = self.encode(z)  # B h w
        z_q = self.embed(codes)  # B C h w
        loss = self.config.commitment * F.mse_loss(z, z_q.detach())
        if self.config.ema is None:
            loss = loss + F.mse_loss(z_q, z.detach())
        if self.training:
            self._update_means(_rows(z.detach()), codes.flatten())
        z_q = z + (z_q - z).detach()  # straight-through
        return Quantized(z_q, codes, loss, {"codebook_loss": loss.detach()})

    @torch.no_grad()
    def _nearest(self, rows: Tensor) -> Tensor:
        codebook = self.codebook.float()
        squares = codebook.square().sum(dim=1)  # K

        def nearest(x: Tensor) -> Tensor:  # |z - e|^2 without |z|^2, which is equal for all codes
            return torch.addmm(squares, x, codebook.T, alpha=-2).argmin(dim=1)

        with full_precision(rows):
            return torch.cat([nearest(x) for x in rows.split(CHUNK)])

    @torch.no_grad()
    def _update_means(self, rows: Tensor, codes: Tensor) -> None:
        """Update the running means of uses and, with `ema`, of codes, over all processes."""
        config = self.config
        if config.ema is None and config.revive is None:
            return
        decay = USES_DECAY if config.ema is None else config.ema
        ones = torch.ones_like(codes, dtype=self.uses.dtype)
        uses = torch.zeros_like(self.uses).index_add_(0, codes, ones)  # K
        self.uses.lerp_(_sum_over_processes(uses), 1 - decay)
        if config.ema is not None:
            sums = torch.zeros_like(self.sums).index_add_(0, codes, rows)  # K C
            self.sums.lerp_(_sum_over_processes(sums), 1 - decay)
            used = self.uses[:, None] > 1e-5  # an unused code keeps its place
            self.codebook.copy_(torch.where(used, self.sums / self.uses[:, None], self.codebook))

    @torch.no_grad()
    def _revive(self, rows: Tensor) -> None:
        """Reset rarely used codes to random features of the batch (2005.00341)."""
        minimum = self.config.revive
        assert minimum is not None
        dead = self.uses[:, None] < minimum  # K 1
        features = rows[torch.randint(len(rows), (self.vocab_size,), device=rows.device)]  # K C
        if _is_distributed():  # the same in all processes
            torch.distributed.broadcast(features, src=0)
        self.codebook.copy_(torch.where(dead, features, self.codebook))
        self.uses.clamp_(min=minimum)  # give revived codes at least one step to be used
        if self.config.ema is not None:
            self.sums.copy_(torch.where(dead, features * minimum, self.sums))


class GumbelQuantizer(Codebook):
    """Features -> logits over K codes -> soft codes in training, else the most likely codes."""

    annealed = ("temperature", "kl_weight")

    def __init__(self, config: GumbelConfig, vocab_size: int, width: int) -> None:
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        self.head = nn.Conv2d(width, vocab_size, 1)
        self.codebook = normal_parameter(vocab_size, width)

    def encode(self, z: Tensor) -> Tensor:
        """(B, C, h, w) -> codes (B, h, w)."""
        return self.logits(z).argmax(dim=-1)

    def logits(self, z: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, h, w, K) float32."""
        with full_precision(z):  # a rounding error must not decide which code is the most likely
            return rearrange(self.head(z.to(self.head.weight.dtype)).float(), "b k h w -> b h w k")

    def forward(self, z: Tensor, temperature: float = 1.0, kl_weight: float = 5e-4) -> Quantized:
        logits = self.logits(z)  # B h w K
        codes = logits.argmax(dim=-1)  # B h w
        if self.training:
            soft = F.gumbel_softmax(logits, tau=temperature, dim=-1)  # B h w K
            with full_precision(z):
                z_q = rearrange(soft @ self.codebook, "b h w c -> b c h w")
        else:
            z_q = self.embed(codes)
        kl = kl_to_uniform(logits).mean()
        return Quantized(z_q, codes, kl_weight * kl, {"kl_bits": kl.detach() / math.log(2)})


Quantizer = VectorQuantizer | GumbelQuantizer
QuantizerConfig = NearestConfig | GumbelConfig


def make_quantizer(config: QuantizerConfig, vocab_size: int, width: int) -> Quantizer:
    """Create the quantizer of a config."""
    if isinstance(config, NearestConfig):
        return VectorQuantizer(config, vocab_size, width)
    return GumbelQuantizer(config, vocab_size, width)


def kl_to_uniform(logits: Tensor) -> Tensor:
    """KL of softmax(logits) from the uniform distribution: (..., K) -> (...) in nats."""
    log_q = logits.log_softmax(dim=-1)
    entropy = -(log_q.exp() * log_q).sum(dim=-1)
    return (math.log(logits.shape[-1]) - entropy).clamp(min=0)  # rounding may give less than 0


def _rows(z: Tensor) -> Tensor:
    """(B, C, h, w) -> (N, C) float32."""
    return rearrange(z.float(), "b c h w -> (b h w) c")


def _sum_over_processes(x: Tensor) -> Tensor:
    if _is_distributed():
        torch.distributed.all_reduce(x)
    return x


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
