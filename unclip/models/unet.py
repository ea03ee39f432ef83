"""The U-Net of ADM and GLIDE: residual blocks modulated by time, attention over [context ; self] at chosen levels."""

# B batch, C channels, h w height and width, H heads, d width of a head, N context tokens, S = h * w pixels

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from unclip.models.layers import (
    GroupNorm,
    KeyValues,
    LayerKeyValues,
    TimeMLP,
    attend,
    split_heads,
    zeroed,
)


@dataclass(frozen=True)
class LevelSpec:
    """One resolution: `blocks` residual blocks on the way down and one more on the way up."""

    channels: int
    blocks: int = 2
    attention: bool = False


@dataclass(frozen=True)
class UNetConfig:
    in_channels: int
    out_channels: int
    levels: tuple[LevelSpec, ...]  # from the highest resolution; each halves the one before
    patch: int = 1  # space-to-depth before the first convolution, undone after the last
    head_dim: int = 64
    time_dim: int | None = None  # width of the time embedding; None = 4 * levels[0].channels
    groups: int = 32
    dropout: float = 0.0
    time_shift: Literal["scale_shift", "additive"] = "scale_shift"
    context_dim: int | None = (
        None  # width of the context tokens; None = attention over the picture only
    )
    resample: Literal["residual", "conv"] = (
        "residual"  # a whole residual block (ADM), or one convolution
    )
    mid_attention: bool = True

    def __post_init__(self) -> None:
        if not self.levels:
            raise ValueError("levels is empty; a U-Net needs at least one LevelSpec")
        for name in ("in_channels", "out_channels", "patch", "head_dim", "groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout}; expected a fraction in [0, 1)")
        if self.levels[0].channels % 2:
            raise ValueError(
                f"levels[0].channels is {self.levels[0].channels}; the time sinusoids need an even number"
            )
        for i, level in enumerate(self.levels):
            if level.blocks < 1:
                raise ValueError(f"levels[{i}].blocks is {level.blocks}; expected at least 1")
            if level.channels % self.groups:
                raise ValueError(
                    f"levels[{i}].channels is {level.channels}; groups = {self.groups} must divide it"
                )
            attends = level.attention or (self.mid_attention and i == len(self.levels) - 1)
            if attends and level.channels % self.head_dim:
                raise ValueError(
                    f"levels[{i}].channels is {level.channels}; head_dim = {self.head_dim} must divide it"
                )

    @property
    def time_width(self) -> int:
        return self.time_dim or 4 * self.levels[0].channels

    @property
    def size_divisor(self) -> int:
        """Height and width of a picture must be multiples of this."""
        return self.patch * 2 ** (len(self.levels) - 1)


class ResBlock(nn.Module):
    """norm, SiLU, conv, norm modulated by time, SiLU, conv, plus the input (ADM); `resize` "up" or "down" by 2.

    The modulation M is computed outside, by `time`: (B, time_dim) -> (B, M).
    """

    def __init__(
        self, c_in: int, c_out: int, config: UNetConfig, resize: Literal["up", "down"] | None = None
    ) -> None:
        super().__init__()
        self.resize = resize
        self.scale_shift = config.time_shift == "scale_shift"
        self.modulation_dim = 2 * c_out if self.scale_shift else c_out  # M
        self.norm1 = GroupNorm(config.groups, c_in)
        self.conv1 = (
            UpConv2d(c_in, c_out) if resize == "up" else nn.Conv2d(c_in, c_out, 3, padding=1)
        )
        self.time = nn.Linear(config.time_width, self.modulation_dim)
        self.norm2 = GroupNorm(config.groups, c_out)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = zeroed(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: torch.Tensor, modulation: torch.Tensor) -> torch.Tensor:
        h = silu(self.norm1(x))  # B C h w
        if self.resize == "up":
            x = double(x)  # as conv1 doubles h
        elif self.resize == "down":
            x, h = F.avg_pool2d(x, 2), F.avg_pool2d(h, 2)
        h = self.conv1(h)
        if self.scale_shift:
            h = self.norm2(h, *modulation.chunk(2, dim=1))
        else:
            h = self.norm2(add_(h, modulation[:, :, None, None]))
        return add_(self.conv2(self.dropout(silu(h))), self.skip(x))


def silu(x: torch.Tensor) -> torch.Tensor:
    """SiLU, in the memory of x where no gradient needs x: fresh memory costs more than the arithmetic."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def add_(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x + y, likewise in the memory of x."""
    return x + y if torch.is_grad_enabled() else x.add_(y)


def double(x: torch.Tensor) -> torch.Tensor:
    """Nearest-neighbour enlargement: (B, C, h, w) -> (B, C, 2h, 2w)."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class UpConv2d(nn.Conv2d):
    """Double the size by nearest neighbour and one convolution: (B, C, h, w) -> (B, C', 2h, 2w)."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__(c_in, c_out, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(double(x))


class Attention(nn.Module):
    """Each pixel attends to [context ; pixels] in one softmax (GLIDE), plus the input."""

    def __init__(self, channels: int, config: UNetConfig) -> None:
        super().__init__()
        self.heads = channels // config.head_dim
        self.norm = GroupNorm(config.groups, channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.context_kv = (
            nn.Linear(config.context_dim, 2 * channels) if config.context_dim else None
        )
        self.out = zeroed(nn.Linear(channels, channels))

    def project_context(self, context: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(B, N, context_dim) -> keys and values, (B, H, N, d) each."""
        return split_heads(self.context_kv(context), 2, self.heads)

    def forward(self, x: torch.Tensor, context: LayerKeyValues | None = None) -> torch.Tensor:
        size, mask = x.shape[2:], None
        q, k, v = split_heads(self.qkv(self.norm(x).flatten(2).mT), 3, self.heads)  # B H S d
        if context is not None:
            k_context, v_context, mask = context
            k = torch.cat([k_context, k], dim=2)  # B H N+S d
            v = torch.cat([v_context, v], dim=2)
            mask = F.pad(mask, (0, q.shape[2]), value=True)[:, None, None]  # B 1 1 N+S
        h = attend(q, k, v, mask)  # B H S d
        h = self.out(h.transpose(1, 2).flatten(2))  # B S C
        return add_(h.mT.unflatten(2, size), x)


class Block(nn.Module):
    """One step of the U-Net: a residual block or downsampling, optional attention, optional upsampling."""

    def __init__(
        self, res: nn.Module, attention: Attention | None = None, resize: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.res, self.attention, self.resize = res, attention, resize
        self.modulation_dims = [
            part.modulation_dim if isinstance(part, ResBlock) else 0 for part in (res, resize)
        ]

    def forward(
        self, x: torch.Tensor, modulation: torch.Tensor, context: LayerKeyValues | None = None
    ) -> torch.Tensor:
        res_modulation, resize_modulation = modulation.split(self.modulation_dims, dim=1)
        x = self.res(x, res_modulation) if isinstance(self.res, ResBlock) else self.res(x)
        if self.attention is not None:
            x = self.attention(x, context)
        if isinstance(self.resize, ResBlock):
            return self.resize(x, resize_modulation)
        return x if self.resize is None else self.resize(x)


class UNet(nn.Module):
    """(B, in_channels, s, s) -> (B, out_channels, s, s). Each block of `down` leaves a skip that one of `up` takes."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        first, last = config.levels[0].channels, config.levels[-1].channels
        residual = config.resample == "residual"

        def attention(channels: int, wanted: bool) -> Attention | None:
            return Attention(channels, config) if wanted else None

        self.time = TimeMLP(first, config.time_width)
        self.stem = nn.Conv2d(config.in_channels * config.patch**2, first, 3, padding=1)

        self.down = nn.ModuleList()
        skips, c = [first], first
        for i, level in enumerate(config.levels):
            for _ in range(level.blocks):
                self.down.append(
                    Block(
                        ResBlock(c, level.channels, config),
                        attention(level.channels, level.attention),
                    )
                )
                c = level.channels
                skips.append(c)
            if i < len(config.levels) - 1:
                down = (
                    ResBlock(c, c, config, "down")
                    if residual
                    else nn.Conv2d(c, c, 3, stride=2, padding=1)
                )
                self.down.append(Block(down))
                skips.append(c)

        self.mid = nn.ModuleList(
            [
                Block(ResBlock(last, last, config), attention(last, config.mid_attention)),
                Block(ResBlock(last, last, config)),
            ]
        )

        self.up = nn.ModuleList()
        for i, level in reversed(list(enumerate(config.levels))):
            for j in range(level.blocks + 1):
                res = ResBlock(c + skips.pop(), level.channels, config)
                c = level.channels
                ends_level = i > 0 and j == level.blocks
                resize = (
                    (ResBlock(c, c, config, "up") if residual else UpConv2d(c, c))
                    if ends_level
                    else None
                )
                self.up.append(Block(res, attention(c, level.attention), resize))
        assert not skips

        self.norm = GroupNorm(config.groups, first)
        self.head = zeroed(nn.Conv2d(first, config.out_channels * config.patch**2, 3, padding=1))

    def attentions(self) -> Iterator[Attention]:
        """The attention layers in the order in which `forward` meets them."""
        return (m for m in self.modules() if isinstance(m, Attention))

    def res_blocks(self) -> Iterator[ResBlock]:
        """The residual blocks in the order in which `forward` meets them."""
        return (m for m in self.modules() if isinstance(m, ResBlock))

    def time_embedding(self, t: torch.Tensor) -> torch.Tensor:
        """(B,) -> (B, time_dim)."""
        return self.time(t)

    def modulation(self, time_emb: torch.Tensor) -> torch.Tensor:
        """(..., time_dim) -> (..., M): what the time embedding says to every residual block, side by side."""
        time = F.silu(time_emb)
        return torch.cat([block.time(time) for block in self.res_blocks()], dim=-1)

    def project_context(self, context: torch.Tensor, mask: torch.Tensor) -> KeyValues:
        """Context (B, N, context_dim), mask (B, N) bool -> keys and values for every attention."""
        k, v = zip(*(a.project_context(context) for a in self.attentions()), strict=True)
        return KeyValues(k, v, mask)

    def forward(
        self,
        x: torch.Tensor,
        modulation: torch.Tensor,
        context: KeyValues | None = None,
        deep_features: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the output (B, out_channels, s, s) and the deep features (B, C, s', s').

        x: (B, in_channels, s, s). modulation: (B or 1, M), from `modulation`. context: from `project_context`.
        The deep features are the output of all levels below the first. Passed to a later call, they replace the
        computation of these levels (DeepCache, 2312.00858).
        """
        self._check_inputs(x, context)
        down, mid, up = self._conditioned_blocks(modulation, context)
        shallow = self.config.levels[
            0
        ].blocks  # the first level has so many blocks down, one more up

        h = self.stem(F.pixel_unshuffle(x.to(self.stem.bias.dtype), self.config.patch))  # B C h w
        skips = [h]
        for block in down[:shallow]:
            skips.append(h := self._run(h, *block))
        if deep_features is None:
            for block in down[shallow:]:
                skips.append(h := self._run(h, *block))
            for block in mid:
                h = self._run(h, *block)
            for block in up[: -shallow - 1]:
                h = self._run(torch.cat([h, skips.pop()], dim=1), *block)
            deep_features = h
        h = deep_features
        for block in up[-shallow - 1 :]:
            h = self._run(torch.cat([h, skips.pop()], dim=1), *block)
        h = self.head(silu(self.norm(h)))
        return F.pixel_shuffle(h, self.config.patch), deep_features

    def _check_inputs(self, x: torch.Tensor, context: KeyValues | None) -> None:
        divisor = self.config.size_divisor
        if x.shape[2] % divisor or x.shape[3] % divisor:
            raise ValueError(
                f"the image is {x.shape[2]} x {x.shape[3]}; this U-Net needs multiples of {divisor}"
            )
        if (context is None) != (self.config.context_dim is None):
            state = "missing" if context is None else "not expected"
            raise ValueError(
                f"the context is {state}; context_dim of this U-Net is {self.config.context_dim}"
            )

    def _conditioned_blocks(
        self, modulation: torch.Tensor, context: KeyValues | None
    ) -> list[list[tuple[Block, torch.Tensor, LayerKeyValues | None]]]:
        """Pair every block of `down`, `mid` and `up` with its modulation and its keys and values."""
        parts = (self.down, self.mid, self.up)
        modulations = iter(
            modulation.split(
                [sum(block.modulation_dims) for part in parts for block in part], dim=1
            )
        )
        contexts = iter(() if context is None else context.layers())
        return [
            [
                (
                    block,
                    next(modulations),
                    next(contexts, None) if block.attention is not None else None,
                )
                for block in part
            ]
            for part in parts
        ]

    def _run(
        self,
        x: torch.Tensor,
        block: Block,
        modulation: torch.Tensor,
        context: LayerKeyValues | None,
    ) -> torch.Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, modulation, context, use_reentrant=False)
        return block(x, modulation, context)
