"""What the networks share: time embedding, group norm with modulation, keys and values computed in advance."""

# B batch, C channels, H heads, N cached tokens, d width of a head

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from unclip.types import Rows

KV = TypeVar("KV", bound="KeyValues")
M = TypeVar("M", bound=nn.Module)


def timestep_embedding(t: torch.Tensor, dim: int, max_period: float = 10_000.0) -> torch.Tensor:
    """Sinusoids [cos, sin] of t at `dim` / 2 geometric frequencies: (B,) -> (B, dim), always float32 (ADM, GLIDE)."""
    half = dim // 2
    frequencies = torch.exp(
        -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half
    )
    angles = t[:, None].float() * frequencies[None]  # B half
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Linear(nn.Linear):
    """A linear layer of a network that decodes token by token, for a row or few at a time.

    With the weight as the left factor, MKL's product for 2 to 4 rows in float32 takes down to a third of the time.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        few = 1 < x.shape[:-1].numel() <= 4 and x.dtype == torch.float32 and x.device.type == "cpu"
        if not few or torch.is_grad_enabled():
            return super().forward(x)
        rows = x.reshape(-1, x.shape[-1]).T  # I B
        out = (
            self.weight @ rows
            if self.bias is None
            else torch.addmm(self.bias[:, None], self.weight, rows)
        )  # O B
        return out.T.contiguous().view(*x.shape[:-1], -1)


class TimeMLP(nn.Module):
    """Timestep -> sinusoids of width `in_dim` -> Linear, SiLU, Linear: (B,) -> (B, out_dim)."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.in_dim = in_dim
        self.fc1 = nn.Linear(in_dim, out_dim)
        self.fc2 = nn.Linear(out_dim, out_dim)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        h = timestep_embedding(t, self.in_dim).to(self.fc1.bias.dtype)
        return self.fc2(F.silu(self.fc1(h)))


def zeroed(module: M) -> M:
    """The module with all its parameters at zero, so that a residual branch starts as the identity."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v: q (B, H, S, d), k and v (B, H, N, d), mask (B, 1, 1 or S, N) bool -> (B, H, S, d)."""
    if q.is_cpu and q.dtype == torch.bfloat16:
        # PyTorch's fused kernel costs twice as much here as these matrix products, and seven times as much backward.
        bias = (
            q.new_zeros(1, 1, 1, 1)
            if mask is None
            else torch.where(mask, 0.0, -torch.inf).to(q.dtype)
        )
        bias = bias.expand(*q.shape[:2], -1, k.shape[2]).flatten(0, 1)  # B*H 1|S N
        q, k, v, shape = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), q.shape
        with torch.autocast("cpu", enabled=False):  # it would have the softmax in float32
            scores = torch.baddbmm(bias, q, k.mT, alpha=q.shape[-1] ** -0.5)  # B*H S N
            return torch.bmm(scores.softmax(dim=-1), v).view(shape)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def attend_after(
    prefix: tuple[torch.Tensor, torch.Tensor],
    seen: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
) -> torch.Tensor:
    """Causal attention of S tokens (B, H, S, d) to themselves and to all of a prefix that is `seen` -> (B, H, S, d).

    The prefix, keys and values (R, H, N, d) and seen (R, N) bool, has a row for each B / R rows of the tokens in a row,
    and is not copied for them.
    """
    (k_prefix, v_prefix), (R, N), (B, _, S, d) = prefix, seen.shape, q.shape
    causal = torch.ones(S, S, dtype=torch.bool, device=q.device).tril()
    if R == B:
        visible = torch.cat(
            [seen[:, None, None].expand(-1, -1, S, -1), causal.expand(B, 1, S, S)], dim=-1
        )  # B 1 S N+S
        return attend(q, torch.cat([k_prefix, k], dim=2), torch.cat([v_prefix, v], dim=2), visible)

    def together(
        x: torch.Tensor,
    ) -> torch.Tensor:  # the rows that share a row of the prefix, as if they were one
        return rearrange(x, "(r n) h s m -> r h (n s) m", r=R)

    def apart(x: torch.Tensor) -> torch.Tensor:
        return rearrange(x, "r h (n s) m -> (r n) h s m", s=S)

    to_prefix = (together(q) @ k_prefix.mT).masked_fill(
        ~seen[:, None, None], -torch.inf
    )  # R H nS N
    to_selves = (q @ k.mT).masked_fill(~causal, -torch.inf)  # B H S S
    weights = (torch.cat([apart(to_prefix), to_selves], dim=-1) * d**-0.5).softmax(
        dim=-1
    )  # B H S N+S
    return apart(together(weights[..., :N]) @ v_prefix) + weights[..., N:] @ v


class TransformerBlock(nn.Module):
    """Pre-norm transformer block; `project` and `forward` apart, so that keys and values can come from elsewhere."""

    def __init__(self, width: int, heads: int, mlp_ratio: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, mlp_ratio * width)
        self.fc2 = nn.Linear(mlp_ratio * width, width)
        self.dropout = nn.Dropout(dropout)

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Tokens (B, n, C) -> their queries, keys and values, (B, H, n, d) each."""
        return split_heads(self.qkv(self.norm1(x)), 3, self.heads)

    def forward(
        self, x: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Tokens (B, n, C), their queries, keys and values (B, H, N, d), and which of them they see -> (B, n, C)."""
        return self.finish(x, attend(q, k, v, mask))

    def finish(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        """Tokens (B, n, C) and what each head attended to (B, H, n, d) -> (B, n, C)."""
        x = x + self.dropout(self.out(h.transpose(1, 2).flatten(2)))  # B n C
        return x + self.dropout(self.fc2(F.gelu(self.fc1(self.norm2(x)))))


def split_heads(x: torch.Tensor, parts: int, heads: int) -> tuple[torch.Tensor, ...]:
    """(B, n, parts * H * d) -> `parts` views (B, H, n, d)."""
    return x.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind()


class GroupNorm(nn.GroupNorm):
    """Group norm whose output may be modulated: norm(x) * (1 + scale) + shift, with scale and shift (B, C)."""

    def forward(
        self, x: torch.Tensor, scale: torch.Tensor | None = None, shift: torch.Tensor | None = None
    ) -> torch.Tensor:
        if x.is_cpu and x.dtype == torch.bfloat16 and torch.is_grad_enabled():
            # Plain sums cost less than PyTorch's kernel for channels-last does backward.
            weight, bias = (
                self.weight.float().expand(x.shape[:2]),
                self.bias.float().expand(x.shape[:2]),
            )  # B C
            if scale is not None and shift is not None:
                weight, bias = weight * (1 + scale), torch.addcmul(shift.float(), bias, 1 + scale)
            return _GroupNormBySums.apply(x, weight, bias, self.num_groups, self.eps)
        h = F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        if scale is None or shift is None:
            return h
        gain, shift = 1 + scale[:, :, None, None], shift[:, :, None, None]
        fresh = (
            torch.is_grad_enabled() or torch.compiler.is_compiling()
        )  # which cannot trace `out`, and fuses this
        return torch.addcmul(shift, h, gain, out=None if fresh else h)


class _GroupNormBySums(torch.autograd.Function):
    """y = (x - mean) * rstd * weight + bias with weight and bias (B, C) float32, as one multiply-add of the picture.

    Statistics and gradients come from sums over each channel's pixels; of x less a rough mean of it, since a variance
    that is small beside the mean would drown in the roundings of x.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps):
        n = x[0].numel() // groups
        some = x[:, :, ::4, ::4]
        rough = _group_sums(_pixel_sums(some), groups) / (
            some[0].numel() // groups
        )  # B C, equal within a group
        x = x - _per_pixel(rough, x)
        first, second = _pixel_sums(x), _pixel_sums(x * x)  # B C
        mean, square = (_group_sums(s, groups) / n for s in (first, second))  # B C
        rstd = (square - mean * mean).clamp_min(0).add(eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.groups, ctx.n = groups, n
        gain = rstd * weight
        return torch.addcmul(_per_pixel(bias - mean * gain, x), x, _per_pixel(gain, x))

    @staticmethod
    def backward(ctx, dy):
        x, weight, mean, rstd = ctx.saved_tensors
        d_bias, dyx = _pixel_sums(dy), _pixel_sums(dy * x)  # B C
        d_weight = rstd * (dyx - mean * d_bias)
        # dx = rstd * (g - mean(g) - z * mean(g z)) with z the normalised x and g = dy * weight
        g = _group_sums(weight * d_bias, ctx.groups) / ctx.n
        gz = _group_sums(weight * d_weight, ctx.groups) / ctx.n
        slope = -rstd * rstd * gz
        dx = torch.addcmul(_per_pixel(-rstd * g - slope * mean, x), x, _per_pixel(slope, x))
        return dx.addcmul_(dy, _per_pixel(rstd * weight, x)), d_weight, d_bias, None, None


def _pixel_sums(x: torch.Tensor) -> torch.Tensor:
    # Rows are summed without an enlarged copy of x; their roundings average out in the float32 sum over the column.
    return x.permute(0, 2, 3, 1).sum(2).sum(1, dtype=torch.float32)


def _group_sums(x: torch.Tensor, groups: int) -> torch.Tensor:
    grouped = x.unflatten(1, (groups, -1))
    return grouped.sum(2, keepdim=True).expand_as(grouped).flatten(1)


def _per_pixel(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return x[:, :, None, None].to(like.dtype)


LayerKeyValues = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Keys and values of one attention, (B, H, N, d) each, and the mask (B, N) bool."""


@dataclass(frozen=True)
class KeyValues(Rows):
    """Keys and values of N tokens for each attention of a network, computed once and attended to at every step."""

    k: tuple[torch.Tensor, ...]  # one for each attention: (B, H, N, d)
    v: tuple[torch.Tensor, ...]
    mask: torch.Tensor  # (B, N) bool, True = may be attended to

    def __len__(self) -> int:
        return self.mask.shape[0]

    def layers(self) -> Iterator[LayerKeyValues]:
        """Iterate over the attentions: keys, values and the mask of each."""
        return ((k, v, self.mask) for k, v in zip(self.k, self.v, strict=True))

    def _map(self: KV, f: Callable[[torch.Tensor], torch.Tensor]) -> KV:
        return type(self)(tuple(map(f, self.k)), tuple(map(f, self.v)), f(self.mask))

    def expand(self: KV, batch: int) -> KV:
        """Seen as `batch` rows, each row an equal number of times in a row; a single one without a copy."""
        if len(self) == 1:
            return self._map(lambda x: x.expand(batch, *x.shape[1:]))
        return self if len(self) == batch else self.repeat_interleave(batch // len(self))

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


def per_row(t: torch.Tensor | float, x_t: torch.Tensor) -> torch.Tensor:
    """Return the timestep of each row of x_t (B, ...): t as it is, or one number B times."""
    if isinstance(t, torch.Tensor):
        return t
    return torch.full((len(x_t),), t, device=x_t.device)


class DenoiserCache:
    """What a denoiser reuses between the steps of one sampling run under one context.

    What depends on t alone is computed for all timesteps at once. With interval n > 1, a U-Net
    computes its deep features at every n-th timestep only (DeepCache, 2312.00858).
    """

    def __init__(self, timesteps: Sequence[float], interval: int = 1) -> None:
        self.steps = {t: step for step, t in enumerate(timesteps)}
        self.interval = interval
        self._time: dict[float, torch.Tensor] = {}
        self._deep: torch.Tensor | None = None
        self._deep_step = -math.inf  # at which `_deep` was computed

    def time(
        self, t: float, embed: Callable[[torch.Tensor], torch.Tensor], device: torch.device
    ) -> torch.Tensor:
        """Return row t of `embed` of all timesteps, (T,) -> (T, ...)."""
        if t not in self._time:  # a scheduler may round t to a number that was not announced
            ts = list(self.steps if t in self.steps else [t])
            self._time |= zip(ts, embed(torch.tensor(ts, device=device)), strict=True)
        return self._time[t]

    def deep_features(self, t: float) -> torch.Tensor | None:
        """Return the deep features to reuse at t; None if they must be computed."""
        # Guidance on an interval and going back in time leave steps out.
        age = self.steps.get(t, math.inf) - self._deep_step
        return self._deep if 0 < age < self.interval else None

    def store(self, t: float, deep_features: torch.Tensor) -> None:
        """Keep the deep features of t, unless they are reused ones."""
        if self.interval > 1 and self.deep_features(t) is None:
            self._deep, self._deep_step = deep_features, self.steps.get(t, math.inf)
