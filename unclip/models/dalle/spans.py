"""Spans of consecutive tokens in DALL-E's layers, and their attention within the stream."""

# B batch, n tokens of a span, C width, H heads, d width of a head, T text positions with the
# start, w codes in a row

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from unclip.models.dalle.attention import Pattern, flex_attend, stream_mask
from unclip.models.dalle.cache import CodeCache

Kernel = Literal["sdpa", "flex"]
Attend = Callable[..., Tensor]  # q, k, v, mask -> (B, H, n, d), see `DotProductAttention`


class Span(Protocol):
    """n consecutive tokens of a stream."""

    positions: Tensor  # (n,)

    def attend(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        """Attend to all visible tokens: q (B, H, n, d), kv (B, 2, H, n, d) -> (B, H, n, d)."""
        ...

    def shift(self, layer: int, branch: int, h: Tensor) -> Tensor:
        """Take some channels from preceding tokens (`shift_text`, `shift_codes`): (B, n, C)."""
        ...


class FirstTokens:
    """The first n tokens of a stream: all of it, or its text, whose keys and values are kept."""

    def __init__(
        self,
        patterns: Sequence[Pattern],
        text: int,
        n: int,
        device: torch.device,
        attend: Attend,
        kernel: Kernel = "sdpa",
    ) -> None:
        self.patterns, self.text, self.kernel, self.dot_product = patterns, text, kernel, attend
        self.positions = torch.arange(n, device=device)
        self.text_kv: list[Tensor] = []  # of each layer, (B, 2, H, T, d)

    def attend(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        pattern, n = self.patterns[layer], len(self.positions)
        if n == self.text:
            self.text_kv.append(kv)
        if self.kernel == "flex":
            k, v = kv.unbind(1)
            return flex_attend(q, k, v, pattern, self.text)
        mask = stream_mask(pattern, self.text, q.device)[None, None, :n, :n]
        return self.dot_product(q, *kv.unbind(1), mask)

    def shift(self, layer: int, branch: int, h: Tensor) -> Tensor:
        codes = shift_codes(h[:, self.text :], self.patterns[layer].grid[1])
        return torch.cat([shift_text(h[:, : self.text]), codes], dim=1)


class FirstCodes:
    """The first n codes at once, written to the cache of their text."""

    def __init__(
        self, patterns: Sequence[Pattern], cache: CodeCache, n: int, attend: Attend
    ) -> None:
        self.patterns, self.cache, self.dot_product = patterns, cache, attend
        device = cache.layers[0].window.device
        self.positions = torch.arange(cache.text, cache.text + n, device=device)

    def attend(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        cache, T, n = self.cache.layers[layer], self.cache.text, len(self.positions)
        cache.fill(kv)
        visible = torch.cat([cache.text_kv, kv.to(cache.text_kv.dtype)], dim=3)  # B 2 H T+n d
        mask = stream_mask(self.patterns[layer], T, q.device)[None, None, T : T + n, : T + n]
        return self.dot_product(q, *visible.unbind(1), mask)

    def shift(self, layer: int, branch: int, h: Tensor) -> Tensor:
        self.cache.shifts[layer][branch].fill(h)
        return shift_codes(h, self.patterns[layer].grid[1])


class NextCode:
    """The code at `position`, an int or a tensor (); earlier codes are in the cache."""

    def __init__(self, cache: CodeCache, position: int | Tensor, attend: Attend) -> None:
        self.cache, self.dot_product = cache, attend
        self.slots, self.code_position = cache.slots(position), cache.index(position)
        self.positions = cache.text + self.code_position

    def attend(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        cache = self.cache.layers[layer]
        slot = self.slots[cache.kind]
        return self.dot_product(q, *cache.append(kv, slot).unbind(1), slot.mask)

    def shift(self, layer: int, branch: int, h: Tensor) -> Tensor:
        return self.cache.shifts[layer][branch].append(h, self.code_position)


def shift_text(h: Tensor) -> Tensor:
    """Take half of the channels from the preceding token, zero for the first: (B, n, C)."""
    previous, own = h.chunk(2, dim=-1)
    return torch.cat([_delay(previous, 1), own], dim=-1)


def shift_codes(h: Tensor, width: int) -> Tensor:
    """Take a quarter of the channels from the code above and one from the left: (B, n, C)."""
    above, left, *own = h.chunk(4, dim=-1)
    first_in_row = torch.arange(h.shape[1], device=h.device) % width == 0
    left = _delay(left, 1).masked_fill(first_in_row[:, None], 0)
    return torch.cat([_delay(above, width), left, *own], dim=-1)


def _delay(h: Tensor, by: int) -> Tensor:
    """Move tokens to later positions, with zeros in front: (B, n, C) -> (B, n, C)."""
    return torch.cat([torch.zeros_like(h[:, :by]), h[:, :-by]], dim=1)
