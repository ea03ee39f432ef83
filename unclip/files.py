"""Folders that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A temporary sibling, flushed to the disk and renamed to `target` at the end.

    On any failure the sibling goes and `target` stays as it was; OSErrors then say so.
    """
    temporary = target.with_name(f".{target.name}.tmp")  # a fixed name: what a killed run left is overwritten
    replaced = target.with_name(f".{target.name}.old")
    try:
        _remove(temporary, replaced)
        temporary.mkdir(parents=True)
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            _flush(path)
        if target.exists():
            target.rename(replaced)
        temporary.rename(target)
        _flush(target.parent)
        _remove(replaced)
    except OSError as error:
        raise OSError(f"cannot write {target}: {error}; what was saved before is untouched") from error
    finally:
        _remove(temporary)


def _flush(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows has no handle to flush a folder by
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
