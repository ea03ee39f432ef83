"""The most memory that a process has had at once: on the device that computes, or in main memory under Linux."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # proc(5)


class PeakMemory:
    """In bytes; None where the system does not tell."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.of: dict[str, int | None] = {}
        self._highest = 0

    @contextmanager
    def within(self, name: str) -> Iterator[None]:
        """Keeps in `of` what the block needed at most, all that was there before included."""
        self._highest = max(self._highest, self._now() or 0)
        self._forget()
        yield
        self.of[name] = max(self._now() or 0, self.of.get(name) or 0) or None

    @property
    def highest(self) -> int | None:
        """Since the process started."""
        return max(self._highest, self._now() or 0) or None

    def _now(self) -> int | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:
            found = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text(encoding="utf-8"))
        except OSError:
            return None
        return int(found[1]) * 1024 if found else None

    def _forget(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        try:
            RESET.write_text("5", encoding="utf-8")
        except OSError:
            pass  # not Linux, or not allowed: then it is the peak until now
