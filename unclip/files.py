"""JSON files, and folders that are written atomically."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object; FileNotFoundError or ValueError names the file."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{file} holds a {type(data).__name__}; expected a JSON object")
    return data


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `target` that replaces it once everything is on disk.

    On failure the temporary folder is removed and `target` stays as it was; write errors are
    OSError.
    """
    # Fixed names: what an interrupted run left is overwritten.
    temporary, replaced = (target.with_name(f".{target.name}.{end}") for end in ("new", "old"))
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            if not path.is_symlink():  # its target need not exist
                _flush(path)
        shutil.rmtree(replaced, ignore_errors=True)
        if target.exists():
            target.rename(replaced)
        temporary.rename(target)
        _flush(target.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"cannot write {target}: {error}; what was saved before is untouched"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if replaced.exists() and not target.exists():
            replaced.rename(target)


def keep_others(old: Path, new: Path, replaced: Collection[str]) -> None:
    """Copy what `old`, if it exists, holds apart from `replaced` into `new`; links stay links.

    ValueError for an entry that `new` has too.
    """
    for path in old.iterdir() if old.is_dir() else ():
        if path.name in replaced:
            continue
        if (new / path.name).exists():
            raise ValueError(f"{path} would be overwritten by a new file; move it away")
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, new / path.name, symlinks=True)
        else:
            shutil.copy2(path, new, follow_symlinks=False)


def _flush(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a folder
    # Windows needs write access to flush; elsewhere the file may be read-only.
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
