"""Attention patterns over the stream [text | codes], as masks (DALL-E, 2102.12092, figure 11)."""

# B batch, H heads, d width of a head, T text positions with the start, N = h * w codes in raster
# order, S = T + N

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

Kind = Literal["full", "row", "column", "conv", "own_row", "corner"]


@dataclass(frozen=True)
class Pattern:
    """Codes that each code attends to, itself included. All codes attend to all text.

    full: all previous codes. row: the previous w codes, back to the one above (figure 11a).
    column: the codes above (11b). conv: previous codes under a kernel centred on the code, which
    wraps around at the image border (11d). From DALLE-pytorch: own_row, previous codes of the same
    row; corner, a kernel up and left of the code, cut off at the border.
    """

    kind: Kind
    grid: tuple[int, int]  # h, w
    kernel: int = 11  # kernel size of conv and corner

    def visible(self, q: Tensor, k: Tensor) -> Tensor:
        """Return whether code q attends to code k, 0 .. N - 1 each; broadcasts."""
        width, distance = self.grid[1], q - k
        if self.kind == "full":
            visible = distance >= 0
        elif self.kind == "row":
            visible = distance <= width
        elif self.kind == "column":
            visible = distance % width == 0
        elif self.kind == "conv":
            half = self.kernel // 2
            rows = ((distance + half) // width).clamp(max=half)  # to the nearest kernel row
            visible = distance - rows * width <= half
        elif self.kind == "own_row":
            visible = q // width == k // width
        else:
            left = q % width - k % width
            visible = (q // width - k // width < self.kernel) & (left >= 0) & (left < self.kernel)
        return visible & (distance >= 0)

    def visible_in_stream(self, q: Tensor, k: Tensor, text: int) -> Tensor:
        """Like `visible`, for positions 0 .. S - 1 of a stream with `text` text positions."""
        return (q >= k) & ((k < text) | self.visible(q - text, k - text))


@cache
def stream_mask(pattern: Pattern, text: int, device: torch.device | str = "cpu") -> Tensor:
    """Attention mask of a stream: (S, S) bool, queries in rows."""
    at = torch.arange(text + pattern.grid[0] * pattern.grid[1], device=device)
    return pattern.visible_in_stream(at[:, None], at[None], text)


def flex_attend(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, text: int) -> Tensor:
    """Attention among the first n positions of a stream, by a kernel that skips masked blocks.

    q, k, v (B, H, n, d) -> (B, H, n, d). Compiled, except on the CPU, where it is slow and only
    serves tests.
    """
    flex_attention = _flex_attention(q.device.type != "cpu")
    return flex_attention(q, k, v, block_mask=_block_mask(pattern, text, q.shape[2], q.device))


@cache
def _flex_attention(compiled: bool) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False) if compiled else flex_attention


@cache
def _block_mask(pattern: Pattern, text: int, length: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return pattern.visible_in_stream(q, k, text)

    return create_block_mask(visible, None, None, length, length, device=device)
