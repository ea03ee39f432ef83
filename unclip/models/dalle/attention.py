"""Who sees whom in the stream [text | codes], in one mask for all three kinds of attention (DALL-E, 2102.12092)."""

# B batch, H heads, d width of a head, T text positions with the start, N = h * w codes in raster order, S = T + N

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
    """Which codes a code sees, itself included; all codes see the whole text, and the text is causal.

    full: all before it. row: the w before it, of which the first is the one above (figure 11a). column: those above it
    (11b). conv: those under a kernel centred on it, which wraps around as rows do (11d).
    DALLE-pytorch's: own_row, which ends at the row's beginning; corner, a kernel up and left of it, inside the picture.
    """

    kind: Kind
    grid: tuple[int, int]  # h, w
    kernel: int = 11  # side of conv's and corner's

    def sees(self, q: Tensor, k: Tensor) -> Tensor:
        """Whether code q sees code k: 0 .. N - 1 of any shapes that broadcast -> bool."""
        width, apart = self.grid[1], q - k
        if self.kind == "full":
            seen = apart >= 0
        elif self.kind == "row":
            seen = apart <= width
        elif self.kind == "column":
            seen = apart % width == 0
        elif self.kind == "conv":
            half = self.kernel // 2
            rows = ((apart + half) // width).clamp(
                max=half
            )  # up to the row whose centre is nearest
            seen = apart - rows * width <= half
        elif self.kind == "own_row":
            seen = q // width == k // width
        else:
            left = q % width - k % width
            seen = (q // width - k // width < self.kernel) & (left >= 0) & (left < self.kernel)
        return seen & (apart >= 0)

    def sees_in_stream(self, q: Tensor, k: Tensor, text: int) -> Tensor:
        """The same for positions 0 .. S - 1 of a stream that begins with `text` text positions."""
        return (q >= k) & ((k < text) | self.sees(q - text, k - text))


@cache
def stream_mask(pattern: Pattern, text: int, device: torch.device | str = "cpu") -> Tensor:
    """The attention of a stream: (S, S) bool, row q is True where q looks."""
    at = torch.arange(text + pattern.grid[0] * pattern.grid[1], device=device)
    return pattern.sees_in_stream(at[:, None], at[None], text)


def flex_attend(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, text: int) -> Tensor:
    """Attention of the first n positions of a stream by a kernel that skips empty blocks of the mask.

    q, k, v (B, H, n, d) -> (B, H, n, d). Compiled, but on the CPU, where it is slow and serves tests.
    """
    return _flex(q.device.type != "cpu")(
        q, k, v, block_mask=_blocks(pattern, text, q.shape[2], q.device)
    )


@cache
def _flex(compiled: bool) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False) if compiled else flex_attention


@cache
def _blocks(pattern: Pattern, text: int, length: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return pattern.sees_in_stream(q, k, text)

    return create_block_mask(visible, None, None, length, length, device=device)
