"""Layer of DALL-E's transformer (2102.12092, B.1), with the options of DALLE-pytorch."""

# B batch, n tokens, C width, H heads, d width of a head, r rotated channels, T text positions with
# the start, S stream

from __future__ import annotations

import math
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.config import config
from unclip.models.dalle.spans import Span

# Rotary positions of DALLE-pytorch: text position, row and column, a third of a head each.
CODES_ON_TEXT_AXIS = 8192.0  # position of all codes on the text axis
TEXT_ON_IMAGE_AXES = -10.0  # position of all text on the image axes, which run from -1 to 1


@config
class LayerSpec:
    """Options of a layer; the defaults are the paper's."""

    mlp: Literal["gelu", "geglu"] = "gelu"
    qkv_bias: bool = True
    gain: float | None = None  # initial value of learned branch gains (2103.17239); None = no gains
    sandwich: bool = False  # a second norm at the end of each branch
    shift: bool = False  # branches take some channels of each token from its neighbours


class Layer(nn.Module):
    """Pre-norm attention and MLP, with dropout on both branches."""

    def __init__(
        self,
        index: int,
        width: int,
        heads: int,
        head_dim: int,
        mlp_ratio: int,
        dropout: float,
        spec: LayerSpec,
    ) -> None:
        super().__init__()
        self.index, self.heads, self.spec = index, heads, spec
        hidden = mlp_ratio * width
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * heads * head_dim, bias=spec.qkv_bias)
        self.out = nn.Linear(heads * head_dim, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 2 * hidden if spec.mlp == "geglu" else hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)
        if spec.sandwich:
            self.norm1_out, self.norm2_out = nn.LayerNorm(width), nn.LayerNorm(width)
        if spec.gain is not None:
            self.gain1 = nn.Parameter(torch.full((width,), spec.gain))
            self.gain2 = nn.Parameter(torch.full((width,), spec.gain))

    def forward(self, x: Tensor, span: Span, angles: Tensor | None = None) -> Tensor:
        """Tokens of a span (B, n, C), rotary angles (n, r) -> (B, n, C)."""
        x = x + self.attention(x, span, angles)
        return x + self.mlp(x, span)

    def attention(self, x: Tensor, span: Span, angles: Tensor | None = None) -> Tensor:
        """The attention branch, without the residual: (B, n, C) -> (B, n, C)."""
        h = self.norm1(x)
        h = span.shift(self.index, 0, h) if self.spec.shift else h
        qkv = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(0, 2, 3, 1, 4)  # B 3 H n d
        if angles is not None:  # DALLE-pytorch rotates the values too
            qkv = rotate(qkv, angles)
        h = span.attend(self.index, qkv[:, 0], qkv[:, 1:])  # B H n d
        h = self.dropout(self.out(h.transpose(1, 2).flatten(2)))  # B n C
        if self.spec.sandwich:
            h = self.norm1_out(h)
        return h if self.spec.gain is None else self.gain1 * h

    def mlp(self, x: Tensor, span: Span) -> Tensor:
        """The MLP branch, without the residual: (B, n, C) -> (B, n, C)."""
        h = self.norm2(x)
        h = self.fc1(span.shift(self.index, 1, h) if self.spec.shift else h)
        if self.spec.mlp == "geglu":
            h, gate = h.chunk(2, dim=-1)
            h = h * F.gelu(gate)
        else:
            h = F.gelu(h)
        h = self.dropout(self.fc2(h))  # B n C
        if self.spec.sandwich:
            h = self.norm2_out(h)
        return h if self.spec.gain is None else self.gain2 * h


@cache
def rotary_angles(
    text: int, grid: tuple[int, int], head_dim: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Angles of all positions of the stream, (S, r), equal in pairs of channels; r <= d."""
    pairs = head_dim // 3 // 2
    text_frequencies = 10_000.0 ** (-torch.arange(0, head_dim // 3, 2)[:pairs] / (head_dim // 3))
    image_frequencies = torch.linspace(1.0, 5.0, pairs) * math.pi
    codes_on_text_axis = torch.full((grid[0] * grid[1],), CODES_ON_TEXT_AXIS)
    text_on_image_axes = torch.full((text,), TEXT_ON_IMAGE_AXES)
    rows, columns = (torch.linspace(-1, 1, size) for size in grid)
    position = torch.cat([torch.arange(text), codes_on_text_axis])  # S
    row = torch.cat([text_on_image_axes, rows.repeat_interleave(grid[1])])  # S
    column = torch.cat([text_on_image_axes, columns.repeat(grid[0])])  # S
    angles = [
        position[:, None] * text_frequencies,
        row[:, None] * image_frequencies,
        column[:, None] * image_frequencies,
    ]
    return torch.cat(angles, dim=1).repeat_interleave(2, dim=1).to(device)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate the first r channels of queries, keys or values (..., n, d) by angles (n, r)."""
    rotated, kept = x[..., : angles.shape[-1]].float(), x[..., angles.shape[-1] :]
    first, second = rotated.unflatten(-1, (-1, 2)).unbind(-1)
    across = torch.stack([-second, first], dim=-1).flatten(-2)
    return torch.cat([(rotated * angles.cos() + across * angles.sin()).to(x.dtype), kept], dim=-1)
