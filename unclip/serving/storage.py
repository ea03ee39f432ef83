"""Results that clients fetch by URL: in memory, in a folder, or in any fsspec file system."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import threading
import time
from collections import OrderedDict
from typing import Any, Protocol

from unclip.extras import install

TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
# The time of expiry and a random id, so that every replica knows when a file expires.
NAME = re.compile(r"([0-9a-f]{8,10})-([A-Za-z0-9_-]{32})\.(png|jpeg|webp)", re.ASCII)


class Files(Protocol):
    """A store of bytes by name."""

    def write(self, name: str, data: bytes) -> None: ...

    def read(self, name: str) -> bytes | None: ...

    def names(self) -> list[str]: ...

    def delete(self, name: str) -> None: ...


class Storage:
    """Files with random names that expire."""

    def __init__(self, files: Files, seconds: float) -> None:
        self.files, self.seconds = files, seconds

    def put(self, data: bytes, kind: str) -> str:
        """Store an image; return its name."""
        expiry = int(time.time() + self.seconds)
        name = f"{expiry:08x}-{secrets.token_urlsafe(24)}.{kind}"
        self.files.write(name, data)
        return name

    def get(self, name: str) -> tuple[bytes, str] | None:
        """Return the bytes and the media type of an image; None if it is missing or expired."""
        expiry, kind = parse_name(name)
        if kind is None or expiry <= time.time():
            return None
        data = self.files.read(name)
        return None if data is None else (data, TYPES[kind])

    def sweep(self) -> int:
        """Delete expired files; return how many."""
        now, count = time.time(), 0
        for name in self.files.names():
            expiry, kind = parse_name(name)
            if kind is not None and expiry <= now:
                self.files.delete(name)
                count += 1
        return count


def parse_name(name: str) -> tuple[int, str | None]:
    """Return the expiry and kind of a file's name; kind None for other names."""
    found = NAME.fullmatch(name)
    return (int(found[1], 16), found[3]) if found else (0, None)


class MemoryFiles:
    """Files in memory; new files replace the oldest ones."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._files: OrderedDict[str, bytes] = OrderedDict()
        self._bytes, self._lock = 0, threading.Lock()

    def write(self, name: str, data: bytes) -> None:
        with self._lock:
            self._files[name] = data
            self._bytes += len(data)
            while self._bytes > self.max_bytes and len(self._files) > 1:
                _, oldest = self._files.popitem(last=False)
                self._bytes -= len(oldest)

    def read(self, name: str) -> bytes | None:
        return self._files.get(name)

    def names(self) -> list[str]:
        with self._lock:
            return list(self._files)

    def delete(self, name: str) -> None:
        with self._lock:
            self._bytes -= len(self._files.pop(name, b""))


class StoredFiles:
    """Files in a folder or in any other file system of fsspec: "s3://bucket/results".

    They survive a restart, and replicas can share them.
    """

    def __init__(self, target: str) -> None:
        """Create the folder if it does not exist. OSError if files cannot be written in it."""
        import fsspec

        self.fs: Any
        try:
            self.fs, self.root = fsspec.core.url_to_fs(target)
            self.fs.makedirs(self.root, exist_ok=True)
            if "://" not in target and not os.access(self.root, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, "no permission to write in it")
        except ImportError as error:
            advice = f"{install('remote')}, or the package it names"
            raise ValueError(f"cannot store results in {target}: {error}; {advice}") from None
        except ValueError as error:  # an unknown protocol
            raise ValueError(f"cannot store results in {target}: {error}; give a folder") from None
        except OSError as error:
            reason = "it is a file" if os.path.isfile(target) else error.strerror or error
            raise OSError(f"cannot store results in {target}: {reason}; give a folder") from None

    def write(self, name: str, data: bytes) -> None:
        try:
            self.fs.pipe_file(f"{self.root}/{name}", data)
        except Exception:  # a part of the file would occupy space until it expires
            with contextlib.suppress(Exception):
                self.delete(name)
            raise

    def read(self, name: str) -> bytes | None:
        try:
            return self.fs.cat_file(f"{self.root}/{name}")
        except FileNotFoundError:
            return None

    def names(self) -> list[str]:
        self.fs.invalidate_cache(self.root)
        return [path.rpartition("/")[2] for path in self.fs.ls(self.root, detail=False)]

    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(f"{self.root}/{name}")


def open_storage(target: str | None, seconds: float, memory_bytes: int) -> Storage:
    """Return storage in memory (None), in a folder, or at an fsspec URL."""
    return Storage(MemoryFiles(memory_bytes) if target is None else StoredFiles(target), seconds)
