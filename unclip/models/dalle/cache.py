"""Keys and values of a stream while its codes are drawn: each layer keeps and reads only what its pattern can see."""

# B batch, H heads, d width of a head, T text positions, N codes, R codes kept, M codes that one code sees at most

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from unclip.models.dalle.attention import Kind, Pattern, stream_mask


@dataclass(frozen=True)
class Reading:
    """Where a pattern's codes lie: code n in slot n % `slots`, overwritten once nobody can see it.

    Code n sees the first count[n] slots, or, where those it sees are scattered, the slots scattered[n, :count[n]].
    """

    slots: int  # R
    most: int  # M
    count: Tensor  # (N,) long
    scattered: Tensor | None  # (N, M) long


@cache
def reading(pattern: Pattern) -> Reading:
    """The smallest cache for a pattern, found from its mask."""
    mask = stream_mask(pattern, text=0)  # N N
    q, k = mask.nonzero(as_tuple=True)
    slots, count = int((q - k).max()) + 1, mask.sum(dim=1)
    most = int(count.max())
    scattered = torch.zeros(len(mask), most, dtype=torch.long)
    for n, row in enumerate(mask):
        scattered[n, : count[n]] = (row.nonzero()[:, 0] % slots).sort().values
    in_front = (scattered == torch.arange(most)) | (torch.arange(most) >= count[:, None])
    return Reading(slots, most, count, None if in_front.all() else scattered)


class Place(NamedTuple):
    """Where the keys and values of one code go, and what that code reads."""

    slot: Tensor  # (1,) long
    scattered: Tensor | None  # slots to be fetched
    stop: int  # how much of the window is read
    mask: Tensor | None  # (1, 1, 1, stop) bool, where some of it is not to be seen


class LayerCache:
    """Of one layer. What a code reads lies together in `window`: text, then codes, fetched if they are scattered."""

    def __init__(self, text_kv: Tensor, pattern: Pattern) -> None:
        """text_kv: keys and values of the text, (B, 2, H, T, d)."""
        how = reading(pattern)
        B, _, H, T, d = text_kv.shape
        self.kind, self.text, self.slots = pattern.kind, T, how.slots
        self.window = text_kv.new_zeros(B, 2, H, T + how.most, d)
        self.window[:, :, :, :T] = text_kv
        self.store = self.window[:, :, :, T:]  # (B, 2, H, R, d)
        if how.scattered is not None:
            self.store = text_kv.new_zeros(B, 2, H, how.slots, d)

    @property
    def text_kv(self) -> Tensor:
        return self.window[:, :, :, : self.text]

    def fill(self, kv: Tensor) -> None:
        """Keys and values of the first m codes, (B, 2, H, m, d)."""
        m = kv.shape[3]
        kept = torch.arange(max(0, m - self.slots), m, device=kv.device)
        self.store.index_copy_(3, kept % self.slots, kv[:, :, :, kept].to(self.store.dtype))

    def append(self, kv: Tensor, place: Place) -> Tensor:
        """Takes those of one code, (B, 2, H, 1, d), and gives all that it sees, (B, 2, H, stop, d)."""
        self.store.index_copy_(3, place.slot, kv.to(self.store.dtype))
        if place.scattered is not None:
            seen = self.store.index_select(3, place.scattered)
            self.window[:, :, :, self.text : self.text + seen.shape[3]] = seen
        return self.window[:, :, :, : place.stop]


class ShiftCache:
    """The last row of codes before a branch whose tokens take channels from their neighbours."""

    def __init__(self, row: Tensor) -> None:
        """row: (B, w, C / 2), zeros."""
        self.row = row

    def fill(self, h: Tensor) -> None:
        """The first m codes, (B, m, C)."""
        m, w = h.shape[1], self.row.shape[1]
        kept = torch.arange(max(0, m - w), m, device=h.device)
        self.row.index_copy_(1, kept % w, h[:, kept, : self.row.shape[2]].to(self.row.dtype))

    def append(self, h: Tensor, position: Tensor) -> Tensor:
        """One code (B, 1, C) at `position` (1,) -> the same, shifted as `shift_codes` does."""
        w, half = self.row.shape[1:]
        above = self.row.index_select(1, position % w)[..., : half // 2]
        left = self.row.index_select(1, (position - 1) % w)[..., half // 2 :] * (position % w != 0)
        self.row.index_copy_(1, position % w, h[..., :half].to(self.row.dtype))
        return torch.cat([above.to(h.dtype), left.to(h.dtype), h[..., half:]], dim=-1)


class CodeCache:
    """Of all layers, for B streams whose text is given."""

    def __init__(
        self, text_kv: Tensor, patterns: Sequence[Pattern], shifted_width: int = 0
    ) -> None:
        """text_kv: (B, layers, 2, H, T, d). shifted_width: C, if the layers' tokens are shifted."""
        self.layers = [LayerCache(text_kv[:, i], pattern) for i, pattern in enumerate(patterns)]
        row = (len(text_kv), patterns[0].grid[1], shifted_width // 2)
        self.shifts = [
            [ShiftCache(text_kv.new_zeros(row)) for _ in range(2)]
            for _ in patterns
            if shifted_width
        ]
        self.text = text_kv.shape[4]
        device = text_kv.device
        self.readings: dict[Kind, Reading] = {}
        for pattern in patterns:
            how = reading(pattern)
            scattered = None if how.scattered is None else how.scattered.to(device)
            self.readings[pattern.kind] = Reading(
                how.slots, how.most, how.count.to(device), scattered
            )
        self._counts = {pattern.kind: reading(pattern).count.tolist() for pattern in patterns}
        self._numbers = torch.arange(patterns[0].grid[0] * patterns[0].grid[1], device=device)

    def index(self, position: int | Tensor) -> Tensor:
        """A number, or a tensor (), as a tensor (1,) on the device."""
        return (
            self._numbers[position : position + 1]
            if isinstance(position, int)
            else position.view(1)
        )

    def places(self, position: int | Tensor) -> dict[Kind, Place]:
        """For the code at `position`: a number reads exactly what is seen; with a tensor () shapes never change."""
        if isinstance(position, int):
            return {kind: self._exact(kind, how, position) for kind, how in self.readings.items()}
        return {kind: self._masked(how, position.view(1)) for kind, how in self.readings.items()}

    def _exact(self, kind: Kind, how: Reading, n: int) -> Place:
        count = self._counts[kind][n]
        slot = self.index(n % how.slots)
        return Place(
            slot,
            None if how.scattered is None else how.scattered[n, :count],
            self.text + count,
            None,
        )

    def _masked(self, how: Reading, n: Tensor) -> Place:
        stop = self.text + how.most
        scattered = None if how.scattered is None else how.scattered.index_select(0, n)[0]
        mask = torch.arange(stop, device=n.device) < self.text + how.count.index_select(
            0, n
        )  # stop
        return Place(n % how.slots, scattered, stop, mask[None, None, None])
