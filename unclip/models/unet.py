"""U-Net of ADM and GLIDE: residual blocks modulated by time, attention over [context ; pixels]."""

# B batch, C channels, h w height and width, S = h * w pixels, H heads, d width of a head,
# N context tokens, M modulation of all residual blocks

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from annotated_types import MinLen
from torch import Tensor, nn

from unclip.config import DropRate, PositiveInt, check_multiple, config
from unclip.models.layers import (
    DotProductAttention,
    GroupNorm,
    KeyValues,
    LayerKeyValues,
    ModuleList,
    TimeMLP,
    run_part,
    split_heads,
    zeroed,
)


@config
class LevelSpec:
    """One resolution: `blocks` residual blocks on the way down, and one more on the way up."""

    channels: PositiveInt
    blocks: PositiveInt = 2
    attention: bool = False


@config
class UNetShape:
    """Configuration that all U-Nets have in common."""

    in_channels: PositiveInt
    out_channels: PositiveInt

    @property
    def size_divisor(self) -> int:
        """The number that height and width of images must be multiples of."""
        raise NotImplementedError

    def check(
        self, name: str, inputs: dict[str, int], learned_variance: bool, **sizes: int
    ) -> None:
        """Raise ValueError unless the U-Net takes these inputs (channels of each) and sizes."""
        c_in, c_out = sum(inputs.values()), 6 if learned_variance else 3
        if (self.in_channels, self.out_channels) != (c_in, c_out):
            parts = ", ".join(f"{part} {channels}" for part, channels in inputs.items())
            raise ValueError(
                f"{name} has {self.in_channels} channels in and {self.out_channels} out; expected "
                f"{c_in} in ({parts}) and {c_out} out (learned_variance={learned_variance})"
            )
        for size_name, size in sizes.items():
            check_multiple(size_name, size, size_divisor=self.size_divisor)

    def check_image(self, x: Tensor) -> None:
        """Raise ValueError unless height and width of x (B, C, h, w) fit `size_divisor`."""
        height, width = x.shape[2:]
        if height % self.size_divisor or width % self.size_divisor:
            raise ValueError(
                f"the image is {height} x {width}; "
                f"this U-Net needs multiples of {self.size_divisor}"
            )


@config
class UNetConfig(UNetShape):
    # from the highest resolution; each level has half the resolution of the previous one
    levels: Annotated[tuple[LevelSpec, ...], MinLen(1)]
    patch: PositiveInt = 1  # pixel unshuffle before the first convolution, undone after the last
    head_dim: PositiveInt = 64
    time_dim: PositiveInt | None = None  # of the time embedding; None = 4 * levels[0].channels
    groups: PositiveInt = 32
    dropout: DropRate = 0.0
    time_shift: Literal["scale_shift", "additive"] = "scale_shift"
    context_dim: PositiveInt | None = None  # width of context tokens; None = self-attention only
    # "residual": down- and upsampling by a residual block (ADM); "conv": by one convolution
    resample: Literal["residual", "conv"] = "residual"
    mid_attention: bool = True

    def __post_init__(self) -> None:
        check_multiple("levels[0].channels", self.levels[0].channels, sin_and_cos=2)
        for i, level in enumerate(self.levels):
            check_multiple(f"levels[{i}].channels", level.channels, groups=self.groups)
            if level.attention or (self.mid_attention and i == len(self.levels) - 1):
                check_multiple(f"levels[{i}].channels", level.channels, head_dim=self.head_dim)

    @property
    def time_width(self) -> int:
        return self.time_dim or 4 * self.levels[0].channels

    @property
    def size_divisor(self) -> int:
        return self.patch * 2 ** (len(self.levels) - 1)


class ResBlock(nn.Module):
    """Residual block of ADM: norm, SiLU, conv, modulated norm, SiLU, conv, plus the input.

    The caller computes the modulation with `time`: (B, time_dim) -> (B, modulation_dim).
    """

    def __init__(
        self, c_in: int, c_out: int, config: UNetConfig, resize: Literal["up", "down"] | None = None
    ) -> None:
        super().__init__()
        self.resize = resize
        self.scale_shift = config.time_shift == "scale_shift"
        self.modulation_dim = 2 * c_out if self.scale_shift else c_out
        self.norm1 = GroupNorm(config.groups, c_in)
        self.conv1 = (
            UpConv2d(c_in, c_out) if resize == "up" else nn.Conv2d(c_in, c_out, 3, padding=1)
        )
        self.time = nn.Linear(config.time_width, self.modulation_dim)
        self.norm2 = GroupNorm(config.groups, c_out)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = zeroed(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        x, h = self.resample(x, F.silu(self.norm1(x)))  # B C h w
        h = self.conv1(h)
        if self.scale_shift:
            h = self.norm2(h, *modulation.chunk(2, dim=1))
        else:
            h = self.norm2(h + modulation[:, :, None, None])
        return self.conv2(self.dropout(F.silu(h))) + self.skip(x)

    def resample(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Resize the input and its branch."""
        if self.resize == "up":
            return upsample_nearest(x), h  # conv1 upsamples h
        return (F.avg_pool2d(x, 2), F.avg_pool2d(h, 2)) if self.resize == "down" else (x, h)


def upsample_nearest(x: Tensor) -> Tensor:
    """Double height and width: (B, C, h, w) -> (B, C, 2h, 2w)."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class UpConv2d(nn.Conv2d):
    """Nearest-neighbour upsampling and a 3x3 convolution: (B, C, h, w) -> (B, C', 2h, 2w)."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__(c_in, c_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(upsample_nearest(x))


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
        self.attend = DotProductAttention()
        self.out = zeroed(nn.Linear(channels, channels))

    def project_context(self, context: Tensor) -> tuple[Tensor, ...]:
        """Compute keys and values of the context: (B, N, context_dim) -> (B, H, N, d) each."""
        assert self.context_kv is not None
        return split_heads(self.context_kv(context), 2, self.heads)

    def forward(self, x: Tensor, context: LayerKeyValues | None = None) -> Tensor:
        return self.branch(x, context) + x

    def branch(self, x: Tensor, context: LayerKeyValues | None) -> Tensor:
        """The residual branch: (B, C, h, w) -> (B, C, h, w)."""
        mask = None
        q, k, v = split_heads(self.qkv(self.norm(x).flatten(2).mT), 3, self.heads)  # B H S d
        if context is not None:
            k_context, v_context, mask = context
            k = torch.cat([k_context, k], dim=2)  # B H N+S d
            v = torch.cat([v_context, v], dim=2)
            mask = F.pad(mask, (0, q.shape[2]), value=True)[:, None, None]  # B 1 1 N+S
        h = self.attend(q, k, v, mask)  # B H S d
        h = self.out(h.transpose(1, 2).flatten(2))  # B S C
        return h.mT.unflatten(2, x.shape[2:])


class Block(nn.Module):
    """One step of the U-Net: a residual block or downsampling, attention, upsampling."""

    def __init__(
        self, res: nn.Module, attention: Attention | None = None, resize: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.res, self.attention, self.resize = res, attention, resize
        self.modulation_dims = [
            part.modulation_dim if isinstance(part, ResBlock) else 0 for part in (res, resize)
        ]

    def forward(
        self, x: Tensor, modulation: Tensor, context: LayerKeyValues | None = None
    ) -> Tensor:
        res_modulation, resize_modulation = modulation.split(self.modulation_dims, dim=1)
        x = self.res(x, res_modulation) if isinstance(self.res, ResBlock) else self.res(x)
        if self.attention is not None:
            x = self.attention(x, context)
        if isinstance(self.resize, ResBlock):
            return self.resize(x, resize_modulation)
        return x if self.resize is None else self.resize(x)


class UNet(nn.Module):
    """Denoising network: (B, in_channels, s, s) -> (B, out_channels, s, s).

    Every block of `down`, and the first convolution, leaves a skip connection for a block of `up`.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        first, last = config.levels[0].channels, config.levels[-1].channels

        def attention(channels: int, wanted: bool) -> Attention | None:
            return Attention(channels, config) if wanted else None

        def resample(c: int, resize: Literal["up", "down"]) -> nn.Module:
            if config.resample == "residual":
                return ResBlock(c, c, config, resize)
            return UpConv2d(c, c) if resize == "up" else nn.Conv2d(c, c, 3, stride=2, padding=1)

        self.time = TimeMLP(first, config.time_width)
        self.stem = nn.Conv2d(config.in_channels * config.patch**2, first, 3, padding=1)

        self.down: ModuleList[Block] = ModuleList()
        skips, c = [first], first
        for i, level in enumerate(config.levels):
            for _ in range(level.blocks):
                res = ResBlock(c, level.channels, config)
                c = level.channels
                self.down.append(Block(res, attention(c, level.attention)))
                skips.append(c)
            if i < len(config.levels) - 1:
                self.down.append(Block(resample(c, "down")))
                skips.append(c)

        mid_attention = (config.mid_attention, False)
        self.mid = ModuleList[Block](
            Block(ResBlock(last, last, config), attention(last, wanted)) for wanted in mid_attention
        )

        self.up: ModuleList[Block] = ModuleList()
        for i, level in reversed(list(enumerate(config.levels))):
            for j in range(level.blocks + 1):
                res = ResBlock(c + skips.pop(), level.channels, config)
                c = level.channels
                resize = resample(c, "up") if i > 0 and j == level.blocks else None
                self.up.append(Block(res, attention(c, level.attention), resize))
        assert not skips

        self.norm = GroupNorm(config.groups, first)
        self.head = zeroed(nn.Conv2d(first, config.out_channels * config.patch**2, 3, padding=1))

    def attentions(self) -> Iterator[Attention]:
        """Iterate over the attention layers in the order of `forward`."""
        return (m for m in self.modules() if isinstance(m, Attention))

    def modulation(self, time_emb: Tensor) -> Tensor:
        """Project a time embedding for all residual blocks: (..., time_dim) -> (..., M)."""
        time = F.silu(time_emb)
        blocks = (block for block in self.modules() if isinstance(block, ResBlock))  # in order
        return torch.cat([block.time(time) for block in blocks], dim=-1)

    def project_context(self, context: Tensor, mask: Tensor) -> KeyValues:
        """Compute every attention's keys and values of a context (B, N, C) with mask (B, N)."""
        k, v = zip(*(a.project_context(context) for a in self.attentions()), strict=True)
        return KeyValues(k, v, mask)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        context: KeyValues | None = None,
        deep_features: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the output (B, out_channels, s, s) and the deep features (B, C, s', s').

        x: (B, in_channels, s, s). modulation: (B or 1, M) from `modulation`. context: from
        `project_context`. The deep features are the output of all levels below the first; passed
        to a later call, they replace the computation of these levels (DeepCache, 2312.00858).
        """
        self.config.check_image(x)
        if (context is None) != (self.config.context_dim is None):
            state = "missing" if context is None else "not expected"
            raise ValueError(
                f"the context is {state}; context_dim of this U-Net is {self.config.context_dim}"
            )
        down, mid, up = self._conditioned_blocks(modulation, context)
        shallow = self.config.levels[0].blocks  # first level: `shallow` blocks down, one more up

        x = F.pixel_unshuffle(x.to(self.norm.weight.dtype), self.config.patch)
        h: Tensor = self.stem(x)  # B C h w
        skips: list[Tensor] = [h]
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
        h = self.head(F.silu(self.norm(h)))
        return F.pixel_shuffle(h, self.config.patch), deep_features

    def _conditioned_blocks(
        self, modulation: Tensor, context: KeyValues | None
    ) -> list[list[tuple[Block, Tensor, LayerKeyValues | None]]]:
        """Pair each block of `down`, `mid` and `up` with its modulation, keys and values."""
        parts = (self.down, self.mid, self.up)
        dims = [sum(block.modulation_dims) for part in parts for block in part]
        modulations = iter(modulation.split(dims, dim=1))
        contexts = iter(() if context is None else context.layers())

        def condition(block: Block) -> tuple[Block, Tensor, LayerKeyValues | None]:
            attends = block.attention is not None
            return block, next(modulations), next(contexts, None) if attends else None

        return [[condition(block) for block in part] for part in parts]

    def _run(
        self, x: Tensor, block: Block, modulation: Tensor, context: LayerKeyValues | None
    ) -> Tensor:
        return run_part(block, x, modulation, context, recompute=self.gradient_checkpointing)
