"""Layer of DALL-E's transformer (2102.12092, B.1), with the options of DALLE-pytorch."""

# B batch, n tokens, C width, H heads, d width of a head, r rotated channels

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.config import config
from unclip.models.dalle.rotary import rotate
from unclip.models.dalle.spans import Span


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
