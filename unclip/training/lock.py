"""A lock of the run folder: two runs in one folder would mix their checkpoints."""

from __future__ import annotations

import contextlib
import os
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows, where run folders are not locked
    fcntl = None

LOCK_FILE = ".lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder`, which is created; ValueError names the process that has it.

    OSError if the folder cannot be written. It is a POSIX record lock: the system releases it when
    the process ends, however it ends, and NFS knows it too.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _acquire(folder)
    except OSError as error:
        raise OSError(f"cannot write to {folder}: {error}; choose another fit.output") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # read-only by now: another error says so
            if os.fstat(file.fileno()).st_nlink:  # else it was removed, and may be another run's
                (folder / LOCK_FILE).unlink()
        file.close()
        with contextlib.suppress(OSError):  # not empty
            folder.rmdir()


def lock_id(folder: Path) -> int | None:
    """Return a number that does not change while a run holds its lock; None without a lock."""
    try:
        return (folder / LOCK_FILE).stat().st_ino
    except OSError:
        return None


def check_unlocked(folder: Path) -> None:
    """Raise ValueError if another process holds the lock of `folder`; nothing is created."""
    if (folder / LOCK_FILE).is_file():
        _acquire(folder).close()


def _acquire(folder: Path) -> IO[str]:
    while True:
        file = (folder / LOCK_FILE).open("a+", encoding="utf-8")
        if fcntl is None:
            return file
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            owner = " ".join(file.read(200).split()) or "another process"
            file.close()
            raise ValueError(
                f"{folder} is in use by {owner}; stop that run, or choose another fit.output"
            ) from None
        except OSError as error:
            warnings.warn(f"{folder} cannot be locked: {error}", stacklevel=5)
            return file
        if os.fstat(file.fileno()).st_nlink:  # else the other run ended and removed this file
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            return file
        file.close()
