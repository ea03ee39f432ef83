"""Memory of the CPU that is used again rather than given back."""

from __future__ import annotations

import contextlib
import ctypes
import platform
import threading
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch

# mallopt(3), of glibc: parameters, what they are set to, and what stands for the defaults (which adapt until then).
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
KEEPING = {TRIM_THRESHOLD: 2**31 - 1, MMAP_MAX: 0}
USUAL = {TRIM_THRESHOLD: 2**26, MMAP_THRESHOLD: 2**25, MMAP_MAX: 2**16}

_lock, _users = threading.Lock(), 0


@contextlib.contextmanager
def kept_memory(device: torch.device) -> Iterator[None]:
    """Within it, memory that tensors leave is kept for the next ones, where the CPU computes under Linux.

    Otherwise every large tensor is given fresh pages by the system, and to fault them in takes several times as long
    as it takes to add two pictures. It holds for the whole process; afterwards memory is given back as usual.
    """
    global _users
    if device.type != "cpu" or _libc() is None:
        yield
        return
    with _lock:
        _users += 1
        _set(KEEPING)
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                _set(USUAL)


def give_back(device: torch.device) -> None:
    """All free memory of this process to the system, likewise."""
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
