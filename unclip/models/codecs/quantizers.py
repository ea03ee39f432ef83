"""The middle of a codec: features become codes, and codes features. By the nearest code, or by Gumbel-softmax."""

# B batch, C width of a code, h w grid, K vocabulary, N = B * h * w

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

ROWS = 4096  # features compared with the codebook at once: their distances are rows of K numbers
USES_DECAY = (
    0.99  # of the count of a code's uses, where the codebook has no running mean of its own
)


@dataclass(frozen=True)
class NearestConfig:
    """Vector quantisation (1711.00937): the nearest code; its gradient goes to the encoder as it is."""

    kind: Literal["nearest"] = "nearest"
    commitment: float = 0.25  # weight of the pull of features towards their codes
    ema: float | None = (
        None  # decay of a codebook of running means (1711.00937, A.1); None = learned by gradient
    )
    revive: float | None = (
        None  # a code that is chosen less often than this in a batch is drawn anew
    )

    def __post_init__(self) -> None:
        if self.commitment < 0:
            raise ValueError(f"commitment is {self.commitment}; expected 0 or more")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ValueError(
                f"ema is {self.ema}; expected a decay in [0, 1), such as 0.99, or null"
            )
        if self.revive is not None and self.revive <= 0:
            raise ValueError(
                f"revive is {self.revive}; expected a positive number of uses a batch, or null for never"
            )


@dataclass(frozen=True)
class GumbelConfig:
    """A distribution over the codes, relaxed in training as in DALL-E's dVAE."""

    kind: Literal["gumbel"] = "gumbel"


@dataclass(frozen=True)
class Quantized:
    z: Tensor  # (B, C, h, w), what the decoder gets
    codes: Tensor  # (B, h, w)
    loss: Tensor  # scalar
    logged: dict[str, Tensor]


class VectorQuantizer(nn.Module):
    """Features (B, C, h, w) -> the nearest of K codes, its values with the gradient of the features."""

    annealed: tuple[str, ...] = ()

    def __init__(self, config: NearestConfig, vocab_size: int, width: int) -> None:
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        codebook = torch.empty(vocab_size, width).uniform_(-1 / vocab_size, 1 / vocab_size)
        if config.ema is None:
            self.codebook = nn.Parameter(codebook)
        else:
            self.register_buffer("codebook", codebook)
            self.register_buffer(
                "sums", codebook.clone()
            )  # of the features that chose each code, a running mean
        if config.ema is not None or config.revive is not None:
            # How many chose each code, a running mean. From 0, the first batch revives (fills) the whole codebook.
            self.register_buffer(
                "uses", torch.full((vocab_size,), 1.0 if config.revive is None else 0.0)
            )

    def encode(self, z: Tensor) -> Tensor:
        """(B, C, h, w) -> codes (B, h, w)."""
        return self._nearest(_rows(z)).view(z.shape[0], *z.shape[2:])

    def logits(self, z: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, h, w, K): 0 for the nearest code, -inf for all others."""
        nearest = F.one_hot(self.encode(z), self.vocab_size)
        return torch.where(nearest.bool(), 0.0, -torch.inf)

    def embed(self, codes: Tensor) -> Tensor:
        """Codes (B, h, w) -> (B, C, h, w)."""
        return rearrange(F.embedding(codes, self.codebook), "b h w c -> b c h w")

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
            self._count(_rows(z.detach()), codes.flatten())
        return Quantized(
            z + (z_q - z).detach(), codes, loss, {"codebook_loss": loss.detach()}
        )  # dz_q = dz

    @torch.no_grad()
    def _nearest(self, rows: Tensor) -> Tensor:
        codebook = self.codebook.float()
        squares = codebook.square().sum(dim=1)  # K
        with full_precision(rows):
            # |z - e|^2 without |z|^2, which is the same for all codes
            return torch.cat(
                [
                    torch.addmm(squares, x, codebook.T, alpha=-2).argmin(dim=1)
                    for x in rows.split(ROWS)
                ]
            )

    @torch.no_grad()
    def _count(self, rows: Tensor, codes: Tensor) -> None:
        """Running means of who chose which code and, with `ema`, of the codebook, over the batches of all processes."""
        config = self.config
        if config.ema is None and config.revive is None:
            return
        decay = USES_DECAY if config.ema is None else config.ema
        uses = torch.zeros_like(self.uses).index_add_(
            0, codes, torch.ones_like(codes, dtype=self.uses.dtype)
        )  # K
        self.uses.lerp_(_over_processes(uses), 1 - decay)
        if config.ema is not None:
            sums = torch.zeros_like(self.sums).index_add_(0, codes, rows)  # K C
            self.sums.lerp_(_over_processes(sums), 1 - decay)
            chosen = self.uses[:, None] > 1e-5  # a code that nobody chooses stays where it is
            self.codebook.copy_(torch.where(chosen, self.sums / self.uses[:, None], self.codebook))

    @torch.no_grad()
    def _revive(self, rows: Tensor) -> None:
        """Codes that hardly anyone chooses become features of this batch (2005.00341, random restarts)."""
        dead = self.uses[:, None] < self.config.revive  # K 1
        drawn = rows[torch.randint(len(rows), (self.vocab_size,), device=rows.device)]  # K C
        if _several_processes():  # one draw for all
            torch.distributed.broadcast(drawn, src=0)
        self.codebook.copy_(torch.where(dead, drawn, self.codebook))
        self.uses.clamp_(
            min=self.config.revive
        )  # one step to be chosen in, or they are drawn again
        if self.config.ema is not None:
            self.sums.copy_(torch.where(dead, drawn * self.config.revive, self.sums))


class GumbelQuantizer(nn.Module):
    """Features -> logits over K codes -> in training soft weights of the codebook, else the likeliest code."""

    annealed = ("temperature", "kl_weight")

    def __init__(self, config: GumbelConfig, vocab_size: int, width: int) -> None:
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        self.head = nn.Conv2d(width, vocab_size, 1)
        self.codebook = nn.Parameter(torch.randn(vocab_size, width))

    def encode(self, z: Tensor) -> Tensor:
        """(B, C, h, w) -> codes (B, h, w)."""
        return self.logits(z).argmax(dim=-1)

    def logits(self, z: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, h, w, K) float32."""
        with full_precision(z):  # which code is the likeliest must not hang on a rounding
            return rearrange(self.head(z.to(self.head.weight.dtype)).float(), "b k h w -> b h w k")

    def embed(self, codes: Tensor) -> Tensor:
        """Codes (B, h, w) -> (B, C, h, w)."""
        return rearrange(F.embedding(codes, self.codebook), "b h w c -> b c h w")

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
    """The quantizer that the type of `config` stands for."""
    kinds: dict[type, Callable] = {NearestConfig: VectorQuantizer, GumbelConfig: GumbelQuantizer}
    return kinds[type(config)](config, vocab_size, width)


def kl_to_uniform(logits: Tensor) -> Tensor:
    """KL of softmax(logits) (..., K) from the uniform distribution: ln K - entropy, (...) in nats, never below 0."""
    log_q = logits.log_softmax(dim=-1)
    entropy = -(log_q.exp() * log_q).sum(dim=-1)
    return (math.log(logits.shape[-1]) - entropy).clamp(
        min=0
    )  # rounding may take a uniform one below


def full_precision(x: Tensor) -> torch.autocast:
    """Where `x` is computed with, autocast is off."""
    return torch.autocast(x.device.type, enabled=False)


def _rows(z: Tensor) -> Tensor:
    """(B, C, h, w) -> (N, C) float32."""
    return rearrange(z.float(), "b c h w -> (b h w) c")


def _over_processes(x: Tensor) -> Tensor:
    """The sum of what each process has."""
    if _several_processes():
        torch.distributed.all_reduce(x)
    return x


def _several_processes() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
