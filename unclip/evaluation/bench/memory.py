"""Peak memory of the process: on the CUDA device, or in main memory under Linux."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # proc(5)


class PeakMemory:
    """Peak memory in bytes; None where the system does not report it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.by_name: dict[str, int | None] = {}
        self._highest = 0

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Record the peak within the block, including memory in use before it."""
        self._highest = max(self._highest, self._current() or 0)
        self._reset()
        yield
        self.by_name[name] = max(self._current() or 0, self.by_name.get(name) or 0) or None

    @property
    def highest(self) -> int | None:
        """The peak since the process started."""
        return max(self._highest, self._current() or 0) or None

    def _current(self) -> int | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:
            peak = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text(encoding="utf-8"))
        except OSError:
            return None
        return int(peak[1]) * 1024 if peak else None

    def _reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        try:
            RESET.write_text("5", encoding="utf-8")
        except OSError:
            pass  # not Linux, or not permitted: the peak is that since the start
