"""U-Net of DALLE2-pytorch, for the weights that LAION published: conditioned by cross-attention.

Differences from `UNet` (ADM): cross-attention inside the residual blocks (Imagen, 2205.11487, B), a
first convolution with several kernel sizes (CrossFormer, 2108.00154), attention with one head of
keys and values (1911.02150) or linear in the number of pixels (1812.01243), always with a null
token, and norms at both ends of a branch.
"""

# B batch, C channels, h w height and width, S = h * w pixels, N tokens, T width of the time
# embedding, H heads, d width of a head

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, MinLen, MultipleOf
from einops import rearrange
from torch import Tensor, nn

from unclip.config import NonNegativeInt, PositiveInt, check_multiple, config
from unclip.models.layers import GroupNorm, ModuleList, normal_parameter
from unclip.models.published.relative_prior import COSINE_SCALE, PeakLayerNorm, sinusoids
from unclip.models.unet import UNetShape

TOKEN_HEADS, TOKEN_HEAD_DIM = 8, 64  # of all cross-attention layers


@config
class CrossLevel:
    """One resolution: a residual block, `blocks` more with cross-attention, self-attention.

    The highest resolution has no cross-attention.
    """

    channels: PositiveInt
    blocks: NonNegativeInt = 2
    attention: Literal["full", "linear"] | None = None
    groups: PositiveInt = 8

    def __post_init__(self) -> None:
        check_multiple("channels", self.channels, groups=self.groups)


@config
class CrossAttentionUNetConfig(UNetShape):
    # of the first and last block, and of the time sinusoids
    channels: Annotated[int, Ge(4), MultipleOf(2)]
    levels: Annotated[tuple[CrossLevel, ...], MinLen(1)]
    token_dim: PositiveInt
    time_tokens: PositiveInt = 2
    stem: Annotated[tuple[PositiveInt, ...], MinLen(1)] = (3, 7, 15)  # odd kernel sizes
    shrink_first: bool = False  # downsample before the blocks of a level, not after (Imagen, B.1)
    down: Literal["unshuffle", "conv"] = "unshuffle"
    up: Literal["shuffle", "nearest", "transposed"] = "shuffle"
    heads: PositiveInt = 16  # of self-attention
    head_dim: PositiveInt = 32
    pixel_similarity: Literal["cosine", "dot"] = "dot"  # of queries and keys
    pixel_scale: float | None = None  # of dot products in self-attention; None = head_dim ** -0.5
    token_similarity: Literal["cosine", "dot"] = "dot"
    unit_values: bool = True  # linear attention averages values of unit length
    peak_norms: bool = False  # norms divide by the largest entry (CogView, 2105.13290)
    skip_scale: float = 1.0
    head_kernel: PositiveInt = 1
    head_sees: NonNegativeInt = 0  # the last convolution also gets this many last input channels

    def __post_init__(self) -> None:
        if any(size % 2 == 0 for size in self.stem):
            raise ValueError(f"stem is {self.stem}; expected odd kernel sizes")

    @property
    def time_width(self) -> int:
        return 4 * self.channels

    @property
    def size_divisor(self) -> int:
        return 2 ** (len(self.levels) - (not self.shrink_first))


class Sandwich(nn.Module):
    """Residual branch with a norm over channels at both ends: (B, S, C) -> (B, S, C)."""

    def __init__(self, channels: int, inner: int, config: CrossAttentionUNetConfig) -> None:
        super().__init__()
        Norm = PeakLayerNorm if config.peak_norms else nn.LayerNorm
        self.norm1 = Norm(channels, bias=False)
        self.out = nn.Linear(inner, channels, bias=False)
        self.norm2 = Norm(channels, bias=False)

    def finish(self, x: Tensor, h: Tensor) -> Tensor:
        """Add the output of the heads (B, H, S, d) to the input: (B, S, C)."""
        return x + self.norm2(self.out(rearrange(h, "b h s d -> b s (h d)")))


class TokenAttention(Sandwich):
    """Cross-attention: pixels attend to [null ; tokens]."""

    def __init__(self, channels: int, config: CrossAttentionUNetConfig) -> None:
        inner = TOKEN_HEADS * TOKEN_HEAD_DIM
        super().__init__(channels, inner, config)
        self.cosine = config.token_similarity == "cosine"
        self.q = nn.Linear(channels, inner, bias=False)
        self.kv = nn.Linear(config.token_dim, 2 * inner, bias=False)
        self.null_kv = normal_parameter(2, TOKEN_HEAD_DIM)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        q = rearrange(self.q(self.norm1(x)), "b s (h d) -> b h s d", h=TOKEN_HEADS)
        k, v = rearrange(self.kv(tokens), "b n (p h d) -> p b h n d", p=2, h=TOKEN_HEADS)
        nulls = self.null_kv[:, None, None, None].expand(-1, len(x), TOKEN_HEADS, -1, -1)
        k, v = torch.cat([nulls[0], k], dim=2), torch.cat([nulls[1], v], dim=2)
        return self.finish(x, attend(q, k, v, self.cosine))


class PixelAttention(Sandwich):
    """Self-attention: pixels attend to [null ; pixels]; all heads share keys and values."""

    def __init__(self, channels: int, config: CrossAttentionUNetConfig) -> None:
        super().__init__(channels, config.heads * config.head_dim, config)
        self.heads, self.scale = config.heads, config.pixel_scale
        self.cosine = config.pixel_similarity == "cosine"
        self.q = nn.Linear(channels, config.heads * config.head_dim, bias=False)
        self.kv = nn.Linear(channels, 2 * config.head_dim, bias=False)
        self.null_kv = normal_parameter(2, config.head_dim)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q = rearrange(self.q(h), "b s (h d) -> b h s d", h=self.heads)
        nulls = self.null_kv.reshape(1, 1, -1).expand(len(x), -1, -1)
        k, v = torch.cat([nulls, self.kv(h)], dim=1)[:, None].chunk(2, dim=-1)  # B 1 S+1 d
        k, v = (y.expand(-1, self.heads, -1, -1) for y in (k, v))
        return self.finish(x, attend(q, k, v, self.cosine, self.scale))


class LinearAttention(Sandwich):
    """Self-attention in O(S): softmax(q) (softmax(k)^T v) (1812.01243)."""

    def __init__(self, channels: int, config: CrossAttentionUNetConfig) -> None:
        inner = config.heads * config.head_dim
        super().__init__(channels, inner, config)
        self.heads, self.unit_values = config.heads, config.unit_values
        self.qkv = nn.Linear(channels, 3 * inner, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(self.norm1(x)), "b s (p h d) -> p b h s d", p=3, h=self.heads)
        q, k = q.softmax(dim=-1) * q.shape[-1] ** -0.5, k.softmax(dim=-2)
        if self.unit_values:
            v = F.normalize(v, dim=-1) / x.shape[1]
        return self.finish(x, F.gelu(q @ (k.mT @ v)))  # B H S d


def attend(q: Tensor, k: Tensor, v: Tensor, cosine: bool, scale: float | None = None) -> Tensor:
    """softmax(scale q k^T) v: q (B, H, S, d), k and v (B, H, N, d) -> (B, H, S, d).

    With `cosine`, the scores are 16 times the cosine of q and k.
    """
    if cosine:
        q, k, scale = F.normalize(q, dim=-1), F.normalize(k, dim=-1), COSINE_SCALE
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


class CrossResBlock(nn.Module):
    """Conv, modulated norm, SiLU, cross-attention, conv, norm, SiLU, plus the input."""

    def __init__(
        self, c_in: int, c_out: int, groups: int, config: CrossAttentionUNetConfig, tokens: bool
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm1 = GroupNorm(groups, c_out)
        self.time = nn.Linear(config.time_width, 2 * c_out)
        self.attention = TokenAttention(c_out, config) if tokens else None
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.norm2 = GroupNorm(groups, c_out)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor, tokens: Tensor | None = None) -> Tensor:
        h = F.silu(self.norm1(self.conv1(x), *self.time(F.silu(time)).chunk(2, dim=1)))
        if self.attention is not None:
            h = over_pixels(self.attention, h, tokens)
        return self.skip(x) + F.silu(self.norm2(self.conv2(h)))


def over_pixels(attention: nn.Module, x: Tensor, *args: Tensor | None) -> Tensor:
    """Apply a module for sequences to the pixels of (B, C, h, w)."""
    return attention(x.flatten(2).mT, *args).mT.unflatten(2, x.shape[2:])


class CrossStage(nn.Module):
    """One level on the way down or up: resampling, blocks, self-attention, resampling."""

    def __init__(
        self,
        c_in: int,
        level: CrossLevel,
        config: CrossAttentionUNetConfig,
        skip: int,
        tokens: bool,
        before: nn.Module | None = None,
        after: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.before, self.after = before or nn.Identity(), after or nn.Identity()
        blocks = range(level.blocks + 1)
        # on the way down, where there are no skips, the first block has no cross-attention
        attends = [tokens and (skip > 0 or j > 0) for j in blocks]
        self.blocks = ModuleList[CrossResBlock](
            CrossResBlock(c_in + skip, c_in, level.groups, config, attends[j]) for j in blocks
        )
        kinds = {"full": PixelAttention, "linear": LinearAttention}
        self.attention = kinds[level.attention](c_in, config) if level.attention else None

    def attend(self, x: Tensor) -> Tensor:
        return x if self.attention is None else over_pixels(self.attention, x)


class CrossAttentionUNet(nn.Module):
    """Denoising network: (B, in_channels, s, s) -> (B, out_channels, s, s).

    Skip connections leave from all blocks of a level except its first, and from its end.
    """

    def __init__(self, config: CrossAttentionUNetConfig) -> None:
        super().__init__()
        self.config = config
        C, T, levels = config.channels, config.time_width, config.levels
        self.time_in = nn.Linear(C, T)
        self.time_out = nn.Linear(T, T)
        self.time_to_tokens = nn.Linear(T, config.time_tokens * config.token_dim)
        self.token_norm = nn.LayerNorm(config.token_dim)
        self.mid_token_norm = nn.LayerNorm(config.token_dim)
        widths = [C // 2**i for i in range(1, len(config.stem))]  # small kernels get more channels
        widths.append(C - sum(widths))
        self.stem = nn.ModuleList(
            nn.Conv2d(config.in_channels, c, k, padding=k // 2)
            for k, c in zip(sorted(config.stem), widths, strict=True)
        )

        groups, ends = levels[0].groups, [C, *(level.channels for level in levels)]
        self.first = (
            CrossResBlock(C, C, groups, config, tokens=False) if config.shrink_first else None
        )
        self.down: ModuleList[CrossStage] = ModuleList()
        self.up: ModuleList[CrossStage] = ModuleList()
        for i, level in enumerate(levels):
            c_in, c_out, lowest = ends[i], level.channels, i == len(levels) - 1
            within = c_out if config.shrink_first else c_in
            halves = not lowest and not config.shrink_first
            before = downsample(c_in, c_out, config) if config.shrink_first else None
            after = downsample(c_in, c_out, config) if halves else nn.Conv2d(within, c_out, 1)
            self.down.append(
                CrossStage(within, level, config, skip=0, tokens=i > 0, before=before, after=after)
            )
            doubles = i > 0 or config.shrink_first
            after = upsample(c_out, c_in, config) if doubles else None
            self.up.insert(
                0, CrossStage(c_out, level, config, skip=within, tokens=i > 0, after=after)
            )

        c, groups_mid = levels[-1].channels, levels[-1].groups
        self.mid = ModuleList[CrossResBlock](
            CrossResBlock(c, c, groups_mid, config, tokens=True) for _ in range(2)
        )
        self.mid_attention = PixelAttention(c, config)
        self.last = CrossResBlock(2 * C, C, groups, config, tokens=False)
        k = config.head_kernel
        self.head = nn.Conv2d(C + config.head_sees, config.out_channels, k, padding=k // 2)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        time_shift: Tensor | None = None,
        tokens: Tensor | None = None,
        mid_tokens: Tensor | None = None,
    ) -> Tensor:
        """Return (B, out_channels, s, s).

        x: (B, in_channels, s, s). t: (B,). time_shift: (B, T), added to the time embedding. tokens:
        (B, N, token_dim), for all levels except the highest. mid_tokens: (B, N', token_dim),
        additional tokens for the middle blocks.
        """
        self.config.check_image(x)
        x = x.to(self.token_norm.weight.dtype)
        hidden = F.gelu(self.time_in(sinusoids(t, self.config.channels).to(x.dtype)))  # B T
        time = self.time_out(hidden) if time_shift is None else self.time_out(hidden) + time_shift
        time_tokens = self.time_to_tokens(hidden)
        parts = [rearrange(time_tokens, "b (n c) -> b n c", n=self.config.time_tokens)]
        parts += [] if tokens is None else [tokens]
        tokens = self.token_norm(torch.cat(parts, dim=1))  # B N token_dim
        parts += [] if mid_tokens is None else [mid_tokens]
        mid_tokens = self.mid_token_norm(torch.cat(parts, dim=1))

        h = stem = torch.cat([conv(x) for conv in self.stem], dim=1)  # B C s s
        if self.first is not None:
            h = self.first(h, time)
        skips = []
        for stage in self.down:
            h = stage.before(h)
            for j, block in enumerate(stage.blocks):
                h = block(h, time, tokens)
                if j > 0:
                    skips.append(h)
            h = stage.attend(h)
            skips.append(h)
            h = stage.after(h)
        h = self.mid[0](h, time, mid_tokens)
        h = over_pixels(self.mid_attention, h)
        h = self.mid[1](h, time, mid_tokens)
        for stage in self.up:
            for block in stage.blocks:
                h = block(torch.cat([h, skips.pop() * self.config.skip_scale], dim=1), time, tokens)
            h = stage.after(stage.attend(h))
        h = self.last(torch.cat([h, stem], dim=1), time)
        last_inputs = x[:, x.shape[1] - self.config.head_sees :]
        return self.head(torch.cat([h, last_inputs], dim=1))


def downsample(c_in: int, c_out: int, config: CrossAttentionUNetConfig) -> nn.Module:
    """Halve the size, by a strided convolution or a pixel unshuffle (SPD-Conv, 2208.03641)."""
    if config.down == "conv":
        return nn.Conv2d(c_in, c_out, 4, stride=2, padding=1)
    return nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * c_in, c_out, 1))


def upsample(c_in: int, c_out: int, config: CrossAttentionUNetConfig) -> nn.Module:
    """Double height and width."""
    if config.up == "transposed":
        return nn.ConvTranspose2d(c_in, c_out, 4, stride=2, padding=1)
    if config.up == "nearest":
        return nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(c_in, c_out, 3, padding=1))
    return nn.Sequential(nn.Conv2d(c_in, 4 * c_out, 1), nn.SiLU(), nn.PixelShuffle(2))
