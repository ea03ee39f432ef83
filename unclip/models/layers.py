"""What the networks share: time embedding, group norm with modulation, keys and values computed in advance."""

# B batch, C channels, H heads, N cached tokens, d width of a head

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import nn

KV = TypeVar("KV", bound="KeyValues")
M = TypeVar("M", bound=nn.Module)


def timestep_embedding(t: torch.Tensor, dim: int, max_period: float = 10_000.0) -> torch.Tensor:
    """Sinusoids [cos, sin] of t at `dim` / 2 geometric frequencies: (B,) -> (B, dim), always float32 (ADM, GLIDE)."""
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t[:, None].float() * frequencies[None]  # B half
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeMLP(nn.Module):
    """Timestep -> sinusoids of width `in_dim` -> Linear, SiLU, Linear: (B,) -> (B, out_dim)."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.in_dim = in_dim
        self.fc1 = nn.Linear(in_dim, out_dim)
        self.fc2 = nn.Linear(out_dim, out_dim)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        h = timestep_embedding(t, self.in_dim).to(self.fc1.weight.dtype)
        return self.fc2(F.silu(self.fc1(h)))


def zeroed(module: M) -> M:
    """The module with all its parameters at zero, so that a residual branch starts as the identity."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


class GroupNorm(nn.GroupNorm):
    """Group norm whose output may be modulated: norm(x) * (1 + scale) + shift, with scale and shift (B, C)."""

    def forward(
        self, x: torch.Tensor, scale: torch.Tensor | None = None, shift: torch.Tensor | None = None
    ) -> torch.Tensor:
        h = F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        if scale is None or shift is None:
            return h
        return torch.addcmul(shift[:, :, None, None], h, 1 + scale[:, :, None, None])


@dataclass(frozen=True)
class KeyValues:
    """Keys and values of N tokens for each attention of a network, computed once and attended to at every step."""

    k: tuple[torch.Tensor, ...]  # one for each attention: (B, H, N, d)
    v: tuple[torch.Tensor, ...]
    mask: torch.Tensor  # (B, N) bool, True = may be attended to

    def __len__(self) -> int:
        return self.mask.shape[0]

    def _map(self: KV, f: Callable[[torch.Tensor], torch.Tensor]) -> KV:
        return type(self)(tuple(map(f, self.k)), tuple(map(f, self.v)), f(self.mask))

    def __getitem__(self: KV, rows: slice | torch.Tensor) -> KV:
        """Some rows of the batch; `rows` is a slice or an index or mask tensor."""
        return self._map(lambda x: x[rows])

    def repeat_interleave(self: KV, n: int) -> KV:
        """Each row n times in a row: (B, ...) -> (B * n, ...)."""
        return self._map(lambda x: x.repeat_interleave(n, dim=0))

    def expand(self: KV, batch: int) -> KV:
        """A single row seen as `batch` equal rows, without a copy."""
        return self._map(lambda x: x.expand(batch, *x.shape[1:]))

    def pad(self: KV, n: int) -> KV:
        """Lengthened to n tokens by closed positions."""
        missing = n - self.mask.shape[1]
        if missing == 0:
            return self
        longer = [tuple(F.pad(x, (0, 0, 0, missing)) for x in side) for side in (self.k, self.v)]
        return type(self)(*longer, F.pad(self.mask, (0, missing), value=False))

    @classmethod
    def cat(cls: type[KV], parts: Sequence[KV]) -> KV:
        """Rows of all parts one after the other; the shorter are padded to the longest."""
        n = max(part.mask.shape[1] for part in parts)
        parts = [part.pad(n) for part in parts]
        ks = tuple(torch.cat(layer) for layer in zip(*(part.k for part in parts), strict=True))
        vs = tuple(torch.cat(layer) for layer in zip(*(part.v for part in parts), strict=True))
        return cls(ks, vs, torch.cat([part.mask for part in parts]))
