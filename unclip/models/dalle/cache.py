"""Key-value cache for sampling codes: a layer stores only what its pattern can attend to."""

# B batch, H heads, d width of a head, T text positions, N codes, R slots for codes, M codes that
# one code attends to at most

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from unclip.models.dalle.attention import Kind, Pattern, stream_mask


@dataclass(frozen=True)
class CacheLayout:
    """Slots of a pattern's codes. Code n is in slot n % `slots`, until no later code attends to it.

    Code n attends to count[n] codes: the first slots or, with `gather`, slots gather[n, :count[n]].
    """

    slots: int  # R
    max_visible: int  # M
    count: Tensor  # (N,) long
    gather: Tensor | None  # (N, M) long

    def to(self, device: torch.device) -> CacheLayout:
        gather = None if self.gather is None else self.gather.to(device)
        return replace(self, count=self.count.to(device), gather=gather)


@cache
def cache_layout(pattern: Pattern) -> CacheLayout:
    """Return the layout of the smallest cache for a pattern, derived from its mask."""
    mask = stream_mask(pattern, text=0)  # N N
    q, k = mask.nonzero(as_tuple=True)
    slots, count = int((q - k).max()) + 1, mask.sum(dim=1)
    max_visible = int(count.max())
    gather = torch.zeros(len(mask), max_visible, dtype=torch.long)
    for n, row in enumerate(mask):
        gather[n, : count[n]] = (row.nonzero()[:, 0] % slots).sort().values
    contiguous = (gather == torch.arange(max_visible)) | (
        torch.arange(max_visible) >= count[:, None]
    )
    return CacheLayout(slots, max_visible, count, None if contiguous.all() else gather)


class CacheSlot(NamedTuple):
    """Where the keys and values of one code are written, and what the code reads."""

    slot: Tensor  # (1,) long
    gather: Tensor | None  # slots to copy into the window
    stop: int  # length of the window that is read
    mask: Tensor | None  # (1, 1, 1, stop) bool, if part of it is not visible


class LayerCache:
    """Cache of one layer. `window` holds what a code reads contiguously: text, then codes."""

    def __init__(self, text_kv: Tensor, pattern: Pattern) -> None:
        """text_kv: keys and values of the text, (B, 2, H, T, d)."""
        layout = cache_layout(pattern)
        B, _, H, T, d = text_kv.shape
        self.kind: Kind = pattern.kind
        self.text, self.slots = T, layout.slots
        self.window = text_kv.new_zeros(B, 2, H, T + layout.max_visible, d)
        self.window[:, :, :, :T] = text_kv
        self.separate = layout.gather is not None
        self.store = self.window[:, :, :, T:]  # (B, 2, H, R, d)
        if self.separate:
            self.store = text_kv.new_zeros(B, 2, H, layout.slots, d)

    def select(self, rows: Tensor) -> LayerCache:
        """Return the cache of some streams."""
        selected = copy.copy(self)
        selected.window = self.window[rows]
        codes = selected.window[:, :, :, self.text :]
        selected.store = self.store[rows] if self.separate else codes
        return selected

    @property
    def text_kv(self) -> Tensor:
        return self.window[:, :, :, : self.text]

    def fill(self, kv: Tensor) -> None:
        """Write the keys and values of the first m codes, (B, 2, H, m, d)."""
        m = kv.shape[3]
        kept = torch.arange(max(0, m - self.slots), m, device=kv.device)
        self.store.index_copy_(3, kept % self.slots, kv[:, :, :, kept].to(self.store.dtype))

    def append(self, kv: Tensor, to: CacheSlot) -> Tensor:
        """Write those of one code, (B, 2, H, 1, d); return what it reads, (B, 2, H, stop, d)."""
        self.store.index_copy_(3, to.slot, kv.to(self.store.dtype))
        if to.gather is not None:
            visible = self.store.index_select(3, to.gather)
            self.window[:, :, :, self.text : self.text + visible.shape[3]] = visible
        return self.window[:, :, :, : to.stop]


class ShiftCache:
    """The last row of codes, for layers whose tokens take channels from their neighbours."""

    def __init__(self, row: Tensor) -> None:
        """row: (B, w, C / 2), zeros."""
        self.row = row

    def fill(self, h: Tensor) -> None:
        """Write the first m codes, (B, m, C)."""
        m, w = h.shape[1], self.row.shape[1]
        kept = torch.arange(max(0, m - w), m, device=h.device)
        self.row.index_copy_(1, kept % w, h[:, kept, : self.row.shape[2]].to(self.row.dtype))

    def append(self, h: Tensor, position: Tensor) -> Tensor:
        """Write one code (B, 1, C) at `position` (1,); return it shifted as by `shift_codes`."""
        w, half = self.row.shape[1:]
        above = self.row.index_select(1, position % w)[..., : half // 2]
        left = self.row.index_select(1, (position - 1) % w)[..., half // 2 :] * (position % w != 0)
        self.row.index_copy_(1, position % w, h[..., :half].to(self.row.dtype))
        return torch.cat([above.to(h.dtype), left.to(h.dtype), h[..., half:]], dim=-1)


class CodeCache:
    """Caches of all layers, for B streams with a given text."""

    def __init__(
        self, text_kv: Tensor, patterns: Sequence[Pattern], shifted_width: int = 0
    ) -> None:
        """text_kv: (B, layers, 2, H, T, d). shifted_width: C if tokens are shifted, else 0."""
        self.layers = [LayerCache(text_kv[:, i], pattern) for i, pattern in enumerate(patterns)]
        row = (len(text_kv), patterns[0].grid[1], shifted_width // 2)
        self.shifts = [
            [ShiftCache(text_kv.new_zeros(row)) for _ in range(2)]
            for _ in patterns
            if shifted_width
        ]
        self.text = text_kv.shape[4]
        layouts: dict[Kind, CacheLayout] = {p.kind: cache_layout(p) for p in patterns}
        self.layouts: dict[Kind, CacheLayout] = {
            kind: layout.to(text_kv.device) for kind, layout in layouts.items()
        }
        self._counts = {kind: layout.count.tolist() for kind, layout in layouts.items()}
        self._numbers = torch.arange(len(layouts[patterns[0].kind].count), device=text_kv.device)

    def select(self, rows: Tensor) -> CodeCache:
        """Return the cache of some streams."""
        selected = copy.copy(self)
        selected.layers = [layer.select(rows) for layer in self.layers]
        selected.shifts = [[ShiftCache(one.row[rows]) for one in pair] for pair in self.shifts]
        return selected

    def index(self, position: int | Tensor) -> Tensor:
        """Convert an int or a tensor () to a tensor (1,) on the device."""
        if isinstance(position, int):
            return self._numbers[position : position + 1]
        return position.view(1)

    def slots(self, position: int | Tensor) -> dict[Kind, CacheSlot]:
        """Return the slot of the code at `position` for each kind of pattern.

        With an int, only the visible codes are read. With a tensor (), all shapes are static.
        """
        if isinstance(position, int):
            return {kind: self._exact_slot(kind, position) for kind in self.layouts}
        n = position.view(1)
        return {kind: self._static_slot(layout, n) for kind, layout in self.layouts.items()}

    def _exact_slot(self, kind: Kind, n: int) -> CacheSlot:
        layout, count = self.layouts[kind], self._counts[kind][n]
        gather = None if layout.gather is None else layout.gather[n, :count]
        return CacheSlot(self.index(n % layout.slots), gather, self.text + count, None)

    def _static_slot(self, layout: CacheLayout, n: Tensor) -> CacheSlot:
        stop = self.text + layout.max_visible
        gather = None if layout.gather is None else layout.gather.index_select(0, n)[0]
        visible = self.text + layout.count.index_select(0, n)
        mask = torch.arange(stop, device=n.device) < visible  # stop
        return CacheSlot(n % layout.slots, gather, stop, mask[None, None, None])
