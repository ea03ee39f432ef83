"""Layers that several networks share: time embedding, attention, transformer block, group norm."""

# B batch, C channels, H heads, S tokens, N tokens they attend to, d width of a head

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import Self

from unclip.types import Rows

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")


class ModuleList(nn.ModuleList, Generic[M]):
    """nn.ModuleList with a type for its items."""

    if TYPE_CHECKING:

        def __iter__(self) -> Iterator[M]: ...

        def __getitem__(self, index: int) -> M: ...


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoids [cos, sin] of t at `dim` / 2 frequencies: (...) -> (..., dim) float32 (ADM)."""
    half = dim // 2
    frequencies = torch.exp(
        -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half
    )
    angles = t[..., None].float() * frequencies  # ... half
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeMLP(nn.Module):
    """Timestep -> sinusoids of width `in_dim` -> Linear, SiLU, Linear: (...) -> (..., out_dim)."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.in_dim = in_dim
        self.fc1 = nn.Linear(in_dim, out_dim)
        self.fc2 = nn.Linear(out_dim, out_dim)

    def forward(self, t: Tensor) -> Tensor:
        h = timestep_embedding(t, self.in_dim).to(self.fc1.bias.dtype)
        return self.fc2(F.silu(self.fc1(h)))


def normal_parameter(*shape: int, std: float = 1.0) -> nn.Parameter:
    """Return a parameter that is drawn from a normal distribution of mean 0."""
    return nn.Parameter(nn.init.normal_(torch.empty(shape), std=std))


def zeroed(module: M) -> M:
    """Set all parameters to zero, so that a residual branch starts as the identity."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def run_part(function: Callable[..., T], *inputs: Any, recompute: bool) -> T:
    """Call a part of a network; `recompute`: its activations are not kept for the backward pass."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(function, *inputs, use_reentrant=False)
    return function(*inputs)


def enable_gradient_checkpointing(model: nn.Module) -> None:
    """Recompute activations in the backward pass; ValueError if the network does not support it."""
    flags = ("gradient_checkpointing", "grad_checkpointing")  # ours, open_clip's
    found = [(m, flag) for m in model.modules() for flag in flags if hasattr(m, flag)]
    for module, flag in found:
        setattr(module, flag, True)
    if not found:
        raise ValueError(f"{type(model).__name__} does not support gradient checkpointing")


def replace_rows(x: Tensor, rows: Tensor | None, value: Tensor) -> Tensor:
    """Replace the rows of x (B, ...) where `rows` (B,) bool is True; None = nowhere."""
    return x if rows is None else torch.where(rows.view(-1, *[1] * (x.ndim - 1)), value, x)


def random_rows(
    sample: Callable[..., Tensor], n: int, generators: Sequence[torch.Generator], like: Tensor
) -> Tensor:
    """Sample n numbers from each generator with torch.rand or torch.randn: (B, n)."""
    rows = [sample(n, generator=g, device=g.device).cpu() for g in generators]
    return torch.stack(rows).to(like.device)


class DotProductAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v. A module, so that `unclip.models.cpu` can replace the kernel."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """q (B, H, S, d), k and v (B, H, N, d), mask (B, 1, 1 or S, N) bool -> (B, H, S, d)."""
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def split_heads(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """Split a projection: (B, S, parts * H * d) -> `parts` views (B, H, S, d)."""
    return x.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind()


class TransformerBlock(nn.Module):
    """Pre-norm transformer block. The caller passes keys and values, which may be cached."""

    def __init__(self, width: int, heads: int, mlp_ratio: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attend = DotProductAttention()
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, mlp_ratio * width)
        self.fc2 = nn.Linear(mlp_ratio * width, width)
        self.dropout = nn.Dropout(dropout)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute queries, keys and values: (B, S, C) -> (B, H, S, d) each."""
        return split_heads(self.qkv(self.norm1(x)), 3, self.heads)

    def read(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Process tokens (B, S, C); return also their keys and values (B, H, S, d)."""
        q, k, v = self.project(x)
        return self(x, q, k, v, mask), k, v

    def forward(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Tokens (B, S, C), their queries, all keys and values (B, H, N, d), mask -> (B, S, C)."""
        return self._finish(x, self.attend(q, k, v, mask))

    def extend(self, x: Tensor, k_prefix: Tensor, v_prefix: Tensor, visible: Tensor) -> Tensor:
        """Process tokens that follow a prefix: causal among themselves, (B, S, C) -> (B, S, C).

        The prefix has keys and values (R, H, N, d) and a mask `visible` (R, N) bool. Each of its
        rows serves B / R consecutive rows of the tokens, without a copy.
        """
        q, k, v = self.project(x)
        (R, N), (B, _, S, d) = visible.shape, q.shape
        causal = torch.ones(S, S, dtype=torch.bool, device=x.device).tril()
        if R == B:
            mask = torch.cat(
                [visible[:, None, None].expand(-1, -1, S, -1), causal.expand(B, 1, S, S)], dim=-1
            )  # B 1 S N+S
            k, v = torch.cat([k_prefix, k], dim=2), torch.cat([v_prefix, v], dim=2)
            return self(x, q, k, v, mask)
        q = q * d**-0.5  # before the products, which may overflow in fp16
        q_shared = _merge_rows(q, R)  # R H B/R*S d
        to_prefix = q_shared @ k_prefix.mT
        to_prefix = to_prefix.masked_fill(~visible[:, None, None], -torch.inf)  # R H B/R*S N
        to_own = (q @ k.mT).masked_fill(~causal, -torch.inf)  # B H S S
        scores = torch.cat([_split_rows(to_prefix, S), to_own], dim=-1)
        weights = scores.softmax(dim=-1)  # B H S N+S
        from_prefix = _split_rows(_merge_rows(weights[..., :N], R) @ v_prefix, S)
        return self._finish(x, from_prefix + weights[..., N:] @ v)

    def _finish(self, x: Tensor, h: Tensor) -> Tensor:
        """Output projection of the heads (B, H, S, d), residual and MLP."""
        x = x + self.dropout(self.out(h.transpose(1, 2).flatten(2)))  # B S C
        return x + self.dropout(self.fc2(F.gelu(self.fc1(self.norm2(x)))))


def _merge_rows(x: Tensor, rows: int) -> Tensor:
    return rearrange(x, "(r n) h s m -> r h (n s) m", r=rows)


def _split_rows(x: Tensor, tokens: int) -> Tensor:
    return rearrange(x, "r h (n s) m -> (r n) h s m", s=tokens)


class GroupNorm(nn.GroupNorm):
    """Group norm with optional modulation: norm(x) * (1 + scale) + shift; scale, shift (B, C)."""

    def forward(
        self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        h = F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        if scale is None or shift is None:
            return h
        return torch.addcmul(shift[:, :, None, None], h, 1 + scale[:, :, None, None])


LayerKeyValues = tuple[Tensor, Tensor, Tensor]
"""Keys and values of one attention, (B, H, N, d) each, and the mask (B, N) bool."""


@dataclass(frozen=True)
class KeyValues(Rows):
    """Keys and values of N tokens for every attention of a network, computed once per call."""

    k: tuple[Tensor, ...]  # one for each attention: (B, H, N, d)
    v: tuple[Tensor, ...]
    mask: Tensor  # (B, N) bool, True = visible

    def __len__(self) -> int:
        return self.mask.shape[0]

    def layers(self) -> Iterator[LayerKeyValues]:
        """Iterate over the attentions: keys, values and mask of each."""
        return ((k, v, self.mask) for k, v in zip(self.k, self.v, strict=True))

    def expand(self, batch: int) -> Self:
        """Repeat each row equally often, `batch` rows in all; a single row is not copied."""
        if len(self) == 1:
            return self._map(lambda x: x.expand(batch, *x.shape[1:]))
        return self if len(self) == batch else self.repeat_interleave(batch // len(self))

    def pad(self, n: int) -> Self:
        """Pad to n tokens; the new positions are masked."""
        missing = n - self.mask.shape[1]
        if missing == 0:
            return self
        k, v = (tuple(F.pad(x, (0, 0, 0, missing)) for x in side) for side in (self.k, self.v))
        return type(self)(k, v, F.pad(self.mask, (0, missing), value=False))

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """Concatenate the rows of all parts, padded to the longest."""
        n = max(part.mask.shape[1] for part in parts)
        return super().cat([part.pad(n) for part in parts])


Timestep = Tensor | float
"""Timestep of each row (B,), or one number for all rows."""


def per_row(t: Timestep, x_t: Tensor) -> Tensor:
    """Return the timestep of each row of x_t (B, ...): t as it is, or one number B times."""
    return t if isinstance(t, Tensor) else torch.full((len(x_t),), t, device=x_t.device)


class Denoiser(nn.Module):
    """Network with a context, computed once per call by `condition`, and `denoise` for a step."""

    condition: Callable[..., Any]
    denoise: Callable[..., Tensor]

    def forward(self, x_t: Tensor, t: Tensor, *inputs: Any, **options: Any) -> Tensor:
        """Denoise with the context that `condition` computes from the other arguments."""
        return self.denoise(x_t, t, self.condition(*inputs, **options))


class DenoiserCache:
    """Values that a denoiser reuses between the steps of one sampling run with one context.

    Values that depend on t alone are computed for all timesteps at once. With interval n > 1, a
    U-Net computes its deep features at every n-th timestep only (DeepCache, 2312.00858).
    """

    def __init__(self, timesteps: Sequence[float], interval: int = 1) -> None:
        self.steps = {t: step for step, t in enumerate(timesteps)}
        self.interval = interval
        self._time: dict[float, Tensor] = {}
        self._deep: Tensor | None = None
        self._deep_step = -math.inf  # at which `_deep` was computed

    def time(self, t: Timestep, embed: Callable[[Tensor], Tensor], device: torch.device) -> Tensor:
        """Return row t of `embed` of all timesteps, (T, 1) -> (T, B or 1, ...). t is one number."""
        t = float(t)
        if t not in self._time:  # a scheduler may round t to a number not in `timesteps`
            ts = list(self.steps if t in self.steps else [t])
            rows = embed(torch.tensor(ts, device=device)[:, None])
            self._time |= zip(ts, rows, strict=True)
        return self._time[t]

    def deep_features(self, t: Timestep) -> Tensor | None:
        """Return the deep features to reuse at t; None if they must be computed."""
        t = float(t)
        # Guidance on an interval and resampling (going back in time) skip steps.
        age = self.steps.get(t, math.inf) - self._deep_step
        return self._deep if 0 < age < self.interval else None

    def select(self, rows: Tensor) -> DenoiserCache:
        """Return the cache of some rows of the context."""
        selected = copy.copy(self)
        selected._time = {}
        selected._deep = None if self._deep is None else self._deep[rows]
        return selected

    def store(self, t: Timestep, deep_features: Tensor) -> None:
        """Keep the deep features of t, unless they were reused from an earlier step."""
        t = float(t)
        if self.interval > 1 and self.deep_features(t) is None:
            self._deep, self._deep_step = deep_features, self.steps.get(t, math.inf)


def embed_time(
    embed: Callable[[Tensor], Tensor], t: Timestep, x_t: Tensor, cache: DenoiserCache | None
) -> Tensor:
    """Return `embed` of the timestep of each row of x_t: (B, ...), or (1, ...) for all rows.

    With a cache, t is one number, and all timesteps of the run are embedded at once.
    """
    return embed(per_row(t, x_t)) if cache is None else cache.time(t, embed, x_t.device)
