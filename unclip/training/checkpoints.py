"""Checkpoint folders of a run, each written as a whole and verified before it is used.

step-0001000/
  model.safetensors        the weights being optimised
  ema.safetensors          their average, as a full set of weights (absent without EMA)
  optimizer.safetensors    "exp_avg/<parameter>" and so on
  statistics.safetensors   buffers that the loss reads, such as means of the data (if any)
  rng-0.json               the random state of each process
  state.json               step, position in the data, settings, versions
  tokenizer.json           for networks that read captions themselves
  manifest.json            size and SHA-256 of every other file; written last

A sharded run writes model-00000.safetensors, model-00001.safetensors and so on, the rows of each
process: see tensors.py. No file is a pickle.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unclip.config import NonNegativeInt, PositiveInt, config, parse, save_json
from unclip.files import atomic_folder, read_json, sha256
from unclip.training.tensors import SavedTensors

MANIFEST = "manifest.json"
STATE = "state.json"


@config
class SavedState:
    """state.json. Fields with a default are absent in checkpoints of older versions."""

    step: NonNegativeInt
    hours: float
    data: dict[str, Any]  # position of the loader
    ema_updates: int | None
    scaler: dict[str, Any] | None
    processes: PositiveInt
    settings: dict[str, Any]
    versions: dict[str, str]
    samples: str | None = None  # hash of the data's samples
    pending: tuple[str, ...] = ()  # validation or preview of this step, still to be done
    reports: tuple[dict[str, Any], ...] = ()  # sums since the last report, of each process


class Checkpoints:
    """The checkpoint folders of one run, of which the `keep` newest are kept."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def all(self) -> list[Path]:
        """Return the checkpoints, oldest first, including damaged ones."""
        found = self.folder.glob("step-*") if self.folder.is_dir() else ()
        numbered = [path for path in found if re.fullmatch(r"step-\d{7,}", path.name)]
        return sorted(numbered, key=step_of)

    def find(self, name: str, only: str | None = None) -> Path:
        """Return the newest whole checkpoint for "latest", or the checkpoint with this path.

        only: the only file that is read. FileNotFoundError if there is no checkpoint,
        ValueError if it is damaged.
        """
        if name != "latest":
            if not Path(name).is_dir():
                raise FileNotFoundError(
                    f"{name} is not a checkpoint; expected a folder such as "
                    f"{self.folder}/step-0001000"
                )
            if reason := fault(Path(name), only):
                raise ValueError(f"{name} is damaged: {reason}; --resume latest skips it")
            return Path(name)
        reasons = {}
        for path in reversed(self.all()):
            if not (reason := fault(path, only)):
                return path
            reasons[path.name] = reason
        if not reasons:
            raise FileNotFoundError(f"no checkpoint in {self.folder}; start without --resume")
        listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise ValueError(
            f"every checkpoint in {self.folder} is damaged ({listed}); choose another fit.output, "
            f"and --init {self.folder.parent}/model to start from the averaged weights"
        )

    def newer(self, than: Path) -> list[Path]:
        """Return the checkpoints of this run after another one."""
        found = self.all()
        names = [path.name for path in found]
        same = than.resolve().parent == self.folder.resolve() and than.name in names
        return found[names.index(than.name) + 1 :] if same else found

    def set_aside(self, damaged: Path) -> Path:
        """Rename a damaged checkpoint, so that it is ignored, and return its new path."""
        target = damaged.with_name(f"damaged-{damaged.name}")
        shutil.rmtree(target, ignore_errors=True)
        return damaged.rename(target)

    @contextlib.contextmanager
    def writing(self, step: int) -> Iterator[Path]:
        """Yield a folder for the checkpoint of `step`; on success, remove all but the newest."""
        with atomic_folder(self.folder / f"step-{step:07d}") as folder:
            yield folder
        for old in self.all()[: -self.keep]:
            shutil.rmtree(old)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])


def read_state(checkpoint: Path) -> SavedState:
    """Read state.json; FileNotFoundError or ValueError names the file."""
    file = checkpoint / STATE
    return parse(SavedState, read_json(file), str(file))


def fault(checkpoint: Path, only: str | None = None) -> str | None:
    """Return what is missing or damaged in a checkpoint, or in one file; None if it is whole."""
    try:
        if (checkpoint / MANIFEST).is_file():
            _check_files(checkpoint, only)
        state = read_state(checkpoint)
        if only is not None:
            return None
        for kind in ("model", "optimizer", *(["ema"] if state.ema_updates is not None else [])):
            SavedTensors(checkpoint, kind)
        for process in range(state.processes):
            read_json(checkpoint / f"rng-{process}.json")
    except (ValueError, OSError) as error:
        return str(error).splitlines()[0].replace(f"{checkpoint}/", "")
    return None


def file_entry(file: Path) -> dict[str, Any]:
    """Return a file's entry in the manifest."""
    return {"bytes": file.stat().st_size, "sha256": sha256(file)}


def write_manifest(folder: Path, entries: dict[str, Any]) -> None:
    """Write the manifest of a folder; entries of files that other processes wrote are given."""
    for file in folder.iterdir():
        if file.name not in entries:
            entries[file.name] = file_entry(file)
    save_json({"files": dict(sorted(entries.items()))}, folder / MANIFEST)


def _check_files(folder: Path, only: str | None) -> None:
    """Raise ValueError for the first file, or the one given, that differs from the manifest."""
    files = read_json(folder / MANIFEST).get("files")
    if not isinstance(files, dict):
        raise ValueError(f"{MANIFEST} has no list of files")
    for name, entry in files.items():
        if only not in (None, name):
            continue
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{name} is missing")
        size = entry.get("bytes") if isinstance(entry, dict) else None
        if file.stat().st_size != size:
            raise ValueError(f"{name} has {file.stat().st_size} bytes; expected {size}")
        if file_entry(file) != entry:
            raise ValueError(f"{name} differs from its hash in {MANIFEST}")
