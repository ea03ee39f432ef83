"""Folders that are written whole or not at all, and the checkpoints of a run."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError


class Checkpoints:
    """The folders `step-0001000` of one run, of which the `keep` newest stay."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def all(self) -> list[Path]:
        """Whole checkpoints, the oldest first."""
        found = self.folder.glob("step-*") if self.folder.is_dir() else ()
        return sorted(path for path in found if re.fullmatch(r"step-\d{7}", path.name))

    def find(self, name: str) -> Path:
        """The folder of "latest", or of a path; FileNotFoundError if there is none."""
        if name == "latest":
            if not (found := self.all()):
                raise FileNotFoundError(f"no checkpoint in {self.folder} to resume from; start without --resume")
            return found[-1]
        if not (Path(name) / "state.json").is_file():
            raise FileNotFoundError(f"{name} is no checkpoint; expected a folder such as {self.folder}/step-0001000")
        return Path(name)

    @contextlib.contextmanager
    def writing(self, step: int) -> Iterator[Path]:
        """A folder to write the checkpoint of `step` into; then all but the newest are removed."""
        with atomic_folder(self.folder / f"step-{step:07d}") as folder:
            yield folder
        for old in self.all()[: -self.keep]:
            shutil.rmtree(old)


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A temporary sibling that becomes `target` when all of it is on the disk.

    After any failure it is gone and `target` is as it was; a failure to write is an OSError of one line.
    """
    temporary = target.with_name(f".{target.name}.new")  # fixed names: what a killed run left is overwritten
    replaced = target.with_name(f".{target.name}.old")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            _flush(path)
        shutil.rmtree(replaced, ignore_errors=True)
        if target.exists():
            target.rename(replaced)
        temporary.rename(target)
        _flush(target.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot write {target}: {error}; what was saved before is untouched") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if replaced.exists() and not target.exists():
            replaced.rename(target)


def _flush(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a folder
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
