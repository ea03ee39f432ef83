"""Opt-in reuse of freed CPU memory between the steps of a call (glibc).

By default glibc returns large tensors to the system when they are freed, and page faults on new
ones take several times as long as adding two images. `enable_memory_reuse` changes malloc for the
whole process while a pipeline computes; `unclip.compile` and the command line call it.
"""

from __future__ import annotations

import contextlib
import ctypes
import platform
import threading
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the command line imports this file before it needs torch
    import torch

# Parameters of mallopt(3), their values during a call, and values that stand for glibc's defaults
# (which adapt until a parameter is set).
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
REUSE = {TRIM_THRESHOLD: 2**31 - 1, MMAP_MAX: 0}
DEFAULTS = {TRIM_THRESHOLD: 2**26, MMAP_THRESHOLD: 2**25, MMAP_MAX: 2**16}

enabled = False
_lock, _users = threading.Lock(), 0


def enable_memory_reuse() -> None:
    """Let pipelines of this process keep freed memory during their calls."""
    global enabled
    enabled = True


@contextlib.contextmanager
def kept_memory(device: torch.device) -> Iterator[None]:
    """Keep freed memory for new tensors within the context, if `device` is a CPU."""
    global _users
    if device.type != "cpu" or _libc() is None:
        yield
        return
    with _lock:
        _users += 1
        _set(REUSE)
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                _set(DEFAULTS)


def give_back(device: torch.device) -> None:
    """Return all free memory of this process to the system, if `device` is a CPU."""
    if device.type == "cpu" and _libc() is not None:
        _libc().malloc_trim(0)


@cache
def _libc() -> Any:
    if platform.libc_ver()[0] != "glibc":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") else None


def _set(values: dict[int, int]) -> None:
    for parameter, value in values.items():
        _libc().mallopt(parameter, value)
