"""Runs of tokens on their way through DALL-E's layers: what they see of themselves and of the runs before them."""

# B batch, n tokens of a run, C width, H heads, d width of a head, T text positions with the start, w codes in a row

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from unclip.models.dalle.attention import Pattern, flex_attend, stream_mask
from unclip.models.dalle.cache import CodeCache
from unclip.models.layers import attend

Kernel = Literal["sdpa", "flex"]


class Run(Protocol):
    """Of n tokens in a row."""

    at: Tensor  # (n,) their positions in the stream

    def attend(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        """Queries (B, H, n, d), keys and values (B, 2, H, n, d) -> (B, H, n, d)."""
        ...

    def shift(self, layer: int, branch: int, h: Tensor) -> Tensor:
        """Tokens (B, n, C) with some channels taken from neighbours before them (`shift_text`, `shift_codes`)."""
        ...


class FromStart:
    """The first n tokens of a stream: all of it, or the text, whose keys and values are then kept for its pictures."""

    def __init__(
        self,
        patterns: Sequence[Pattern],
        text: int,
        n: int,
        device: torch.device,
        kernel: Kernel = "sdpa",
    ) -> None:
        self.patterns, self.text, self.kernel = patterns, text, kernel
        self.at = torch.arange(n, device=device)
        self.kept: list[Tensor] | None = [] if n == text else None  # (B, 2, H, T, d) of each layer

    def attend(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        if self.kept is not None:
            self.kept.append(kv)
        pattern, n = self.patterns[layer], len(self.at)
        if self.kernel == "flex":
            return flex_attend(q, *kv.unbind(1), pattern, self.text)
        return attend(
            q, *kv.unbind(1), stream_mask(pattern, self.text, q.device)[None, None, :n, :n]
        )

    def shift(self, layer: int, branch: int, h: Tensor) -> Tensor:
        text, codes = h[:, : self.text], h[:, self.text :]
        return torch.cat(
            [shift_text(text), shift_codes(codes, self.patterns[layer].grid[1])], dim=1
        )


class FirstCodes:
    """The first n codes at once, into the cache of their text."""

    def __init__(
        self, patterns: Sequence[Pattern], cache: CodeCache, n: int, device: torch.device
    ) -> None:
        self.patterns, self.cache = patterns, cache
        self.at = torch.arange(cache.text, cache.text + n, device=device)

    def attend(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        cache, T, n = self.cache.layers[layer], self.cache.text, len(self.at)
        cache.fill(kv)
        seen = torch.cat([cache.text_kv, kv.to(cache.text_kv.dtype)], dim=3)  # B 2 H T+n d
        mask = stream_mask(self.patterns[layer], T, q.device)[None, None, T : T + n, : T + n]
        return attend(q, *seen.unbind(1), mask)

    def shift(self, layer: int, branch: int, h: Tensor) -> Tensor:
        self.cache.shifts[layer][branch].fill(h)
        return shift_codes(h, self.patterns[layer].grid[1])


class NextCode:
    """The code at `position`, a number or a tensor (), of a picture whose earlier codes are in the cache."""

    def __init__(self, cache: CodeCache, position: int | Tensor) -> None:
        self.cache, self.places, self.position = (
            cache,
            cache.places(position),
            cache.index(position),
        )
        self.at = cache.text + self.position

    def attend(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        cache = self.cache.layers[layer]
        place = self.places[cache.kind]
        return attend(q, *cache.append(kv, place).unbind(1), place.mask)

    def shift(self, layer: int, branch: int, h: Tensor) -> Tensor:
        return self.cache.shifts[layer][branch].append(h, self.position)


def shift_text(h: Tensor) -> Tensor:
    """Half of the channels from the token before, zero for the first: (B, n, C) -> (B, n, C)."""
    before, own = h.chunk(2, dim=-1)
    return torch.cat([_later(before, 1), own], dim=-1)


def shift_codes(h: Tensor, width: int) -> Tensor:
    """Of the first codes of a picture, a quarter of the channels from the code above, one from that on the left."""
    above, left, *own = h.chunk(4, dim=-1)
    first_in_row = torch.arange(h.shape[1], device=h.device) % width == 0
    left = _later(left, 1).masked_fill(first_in_row[:, None], 0)
    return torch.cat([_later(above, width), left, *own], dim=-1)


def _later(h: Tensor, by: int) -> Tensor:
    """Moved by so many positions, zeros first: (B, n, C) -> (B, n, C)."""
    return torch.cat([torch.zeros_like(h[:, :by]), h[:, :-by]], dim=1)
