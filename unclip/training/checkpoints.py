"""The checkpoints of a run: which there are, and how a new one takes its place."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from unclip.files import atomic_folder


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
                raise FileNotFoundError(
                    f"no checkpoint in {self.folder} to resume from; start without --resume"
                )
            return found[-1]
        if not (Path(name) / "state.json").is_file():
            raise FileNotFoundError(
                f"{name} is no checkpoint; expected a folder such as {self.folder}/step-0001000"
            )
        return Path(name)

    @contextlib.contextmanager
    def writing(self, step: int) -> Iterator[Path]:
        """A folder to write the checkpoint of `step` into; then all but the newest are removed."""
        with atomic_folder(self.folder / f"step-{step:07d}") as folder:
            yield folder
        for old in self.all()[: -self.keep]:
            shutil.rmtree(old)
