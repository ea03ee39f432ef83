"""A layer of DALL-E's transformer (2102.12092, B.1), and what DALLE-pytorch's have beyond it."""

# B batch, n tokens, C width, H heads, d width of a head

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.models.layers import Linear

Attend = Callable[
    [Tensor, Tensor], Tensor
]  # queries (B, H, n, d), keys and values (B, 2, H, n, d) -> (B, H, n, d)
Shift = Callable[[int, Tensor], Tensor]  # of branch 0 or 1: tokens (B, n, C) -> (B, n, C)


@dataclass(frozen=True)
class LayerSpec:
    """What a layer is made of; as it stands, the paper's."""

    mlp: Literal["gelu", "geglu"] = "gelu"
    qkv_bias: bool = True
    gain: float | None = (
        None  # where a learned gain of each branch starts (2103.17239); None = no gain
    )
    sandwich: bool = False  # a norm behind each branch too
    shift: bool = False  # each branch gets some channels of a token from its neighbours


class Layer(nn.Module):
    """Pre-norm attention and MLP, whose branches forget a fraction `dropout` in training."""

    def __init__(
        self, width: int, heads: int, head_dim: int, mlp_ratio: int, dropout: float, spec: LayerSpec
    ) -> None:
        super().__init__()
        self.heads, self.spec = heads, spec
        hidden = mlp_ratio * width
        self.norm1 = nn.LayerNorm(width)
        self.qkv = Linear(width, 3 * heads * head_dim, bias=spec.qkv_bias)
        self.out = Linear(heads * head_dim, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = Linear(width, 2 * hidden if spec.mlp == "geglu" else hidden)
        self.fc2 = Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)
        if spec.sandwich:
            self.norm1_out, self.norm2_out = nn.LayerNorm(width), nn.LayerNorm(width)
        if spec.gain is not None:
            self.gain1, self.gain2 = (
                nn.Parameter(torch.full((width,), spec.gain)) for _ in range(2)
            )

    def forward(self, x: Tensor, attend: Attend, shift: Shift) -> Tensor:
        """Tokens (B, n, C), of which `attend` and `shift` know what they see -> (B, n, C)."""
        x = x + self.attention(x, attend, shift)
        return x + self.mlp(x, shift)

    def attention(self, x: Tensor, attend: Attend, shift: Shift) -> Tensor:
        """What the first branch adds: (B, n, C) -> (B, n, C)."""
        h = self.norm1(x)
        h = shift(0, h) if self.spec.shift else h
        qkv = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(0, 2, 3, 1, 4)  # B 3 H n d
        h = attend(qkv[:, 0], qkv[:, 1:])  # B H n d
        h = self.dropout(self.out(h.transpose(1, 2).flatten(2)))  # B n C
        if self.spec.sandwich:
            h = self.norm1_out(h)
        return h if self.spec.gain is None else self.gain1 * h

    def mlp(self, x: Tensor, shift: Shift) -> Tensor:
        """What the second branch adds: (B, n, C) -> (B, n, C)."""
        h = self.norm2(x)
        h = self.fc1(shift(1, h) if self.spec.shift else h)
        if self.spec.mlp == "geglu":
            h, gate = h.chunk(2, dim=-1)
            h = h * F.gelu(gate)
        else:
            h = F.gelu(h)
        h = self.dropout(self.fc2(h))  # B n C
        if self.spec.sandwich:
            h = self.norm2_out(h)
        return h if self.spec.gain is None else self.gain2 * h
