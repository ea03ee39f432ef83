"""Reports of a run: a progress bar or plain lines, metrics.jsonl, and accelerate's trackers."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from accelerate.utils import LoggerType
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from unclip.extras import install
from unclip.files import replace_text, write_errors

Trackers = tuple[str, ...] | dict[str, dict[str, Any]]
DEFAULT_TRACKERS = ("tensorboard",)


def available_trackers(trackers: Trackers) -> list[str]:
    """Return the names of the installed trackers; accelerate's, or registered with it.

    A missing tracker is a ValueError, or a warning if the default was not changed.
    """
    if unknown := [name for name in trackers if name not in LOGGER_TYPE_TO_CLASS]:
        expected = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
        raise ValueError(f"unknown tracker {unknown[0]!r}; expected one of {expected}")
    packages = {str(kind.value) for kind in LoggerType}
    missing = [n for n in trackers if n in packages and importlib.util.find_spec(n) is None]
    if missing and trackers != DEFAULT_TRACKERS:
        command = (
            install("train") if missing[0] in DEFAULT_TRACKERS else f"pip install {missing[0]}"
        )
        raise ValueError(f"the tracker {missing[0]!r} is not installed: {command}")
    if missing:
        warnings.warn(f"{missing[0]} is not installed; logging to metrics.jsonl only", stacklevel=2)
    return [name for name in trackers if name not in missing]


def _start_trackers(accelerator: Accelerator, project: str, trackers: Trackers) -> None:
    options = dict(trackers) if isinstance(trackers, dict) else {}
    try:
        accelerator.init_trackers(project, init_kwargs=options)
    except Exception as error:  # each tracker raises its own types, for options or a missing login
        reason = " ".join(str(error).split())
        raise ValueError(
            f"a tracker of fit.trackers, {', '.join(trackers)}, did not start with its options: "
            f"{type(error).__name__}: {reason}"
        ) from None


class Log:
    """Reports of a run of `steps` updates, continued after update `step` and `hours` of training.

    Means are over all processes; only the main process writes and prints.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path,
        settings: dict[str, Any],
        steps: int,
        step: int,
        hours: float,
        progress: bool,
        trackers: Trackers = (),
        validation_pending: bool = False,
    ) -> None:
        self._accelerator, self._folder, self._steps = accelerator, folder, steps
        self._is_main = accelerator.is_main_process
        self._bar: tqdm[Any] | None = None
        if progress and self._is_main and sys.stdout.isatty():  # plain lines in a file or a pipe
            self._bar = tqdm(
                total=steps, initial=step, unit="step", dynamic_ncols=True, file=sys.stdout
            )
        self._file = folder / "metrics.jsonl"
        if self._is_main:
            _drop_rows_after(self._file, (step, not validation_pending))
        _start_trackers(accelerator, folder.name, trackers)
        for tracker in accelerator.trackers:
            if tracker.name != "tensorboard":  # it would add a folder for them at every start
                tracker.store_init_configuration(settings)
        self._started, self._hours_before = time.perf_counter(), hours
        self._reset_sums()
        self.restart_clock()

    def sums(self) -> dict[str, Any]:
        """Return the sums since the last report, of this process, for `restore`."""
        return {
            "losses": {name: float(value) for name, value in self._sums.items()},
            "norms": float(self._norms),
            "batches": self._batches,
            "updates": self._updates,
        }

    def restore(self, sums: Mapping[str, Any]) -> None:
        """Go on from the sums that `sums` returned, so that the next report covers them."""
        device = self._accelerator.device
        self._sums = {n: torch.tensor(x, device=device) for n, x in sums["losses"].items()}
        self._norms = torch.tensor(sums["norms"], device=device)
        self._batches, self._updates = sums["batches"], sums["updates"]

    def hours(self) -> float:
        """Return the training time in hours, including the time before a resume."""
        return self._hours_before + (time.perf_counter() - self._started) / 3600

    def restart_clock(self) -> None:
        """Exclude the time since the last report (validation, saving) from the speed."""
        self._since, self._timed_samples, self._timed_updates = time.perf_counter(), 0, 0

    def count(self, terms: Mapping[str, Tensor], samples: int) -> None:
        """Add the losses of a batch. The sums stay on the device until they are reported."""
        for name, value in terms.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach().float()
        self._batches += 1
        self._timed_samples += samples

    def advance(self, norm: Tensor | None) -> None:
        """Count an update with this gradient norm; None if fp16 overflowed and skipped it."""
        if norm is not None:
            self._norms = self._norms + norm.detach()
            self._updates += 1
        self._timed_updates += 1
        if self._bar is not None:
            self._bar.update()

    def training(self, step: int, extra: dict[str, float]) -> None:
        """Report the means since the last report."""
        means = {name: value / self._batches for name, value in self._sums.items()}
        norm = {"grad_norm": self._norms / self._updates} if self._updates else {}
        values = self._mean({**means, **norm})
        seconds = max(time.perf_counter() - self._since, 1e-9)
        values["samples_per_s"] = self._timed_samples * self._accelerator.num_processes / seconds
        hours = (self._steps - step) * seconds / max(1, self._timed_updates) / 3600
        self._reset_sums()
        self.restart_clock()
        values |= extra
        self._write(step, values)
        if self._bar is not None:  # it shows the remaining time itself
            shown = {k: f"{values[k]:.4g}" for k in ("loss", "samples_per_s") if k in values}
            self._bar.set_postfix(shown)
        else:
            self.print(f"step {step}/{self._steps}  {_line(values)}  left {hours:.2f} h")

    def validation(self, step: int, means: Mapping[str, Tensor | float]) -> None:
        """Report means over the validation data as val_<name>."""
        values = {f"val_{name}": value for name, value in self._mean(means).items()}
        self._write(step, values)
        self.print(f"step {step}/{self._steps}  {_line(values)}")

    def image(self, step: int, image: Image.Image) -> None:
        """Write a preview to previews/step-0001000.png and to the trackers that support images."""
        if not self._is_main:
            return
        file = self._folder / f"previews/step-{step:07d}.png"
        with write_errors(file):
            file.parent.mkdir(exist_ok=True)
            image.save(file)
        pixels = np.asarray(image.convert("RGB"))[None]
        for tracker in self._accelerator.trackers:
            if hasattr(tracker, "log_images"):
                options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"preview": pixels}, step=step, **options)

    def print(self, text: str) -> None:
        """Print a line to standard output, above the bar if there is one."""
        if self._is_main:
            tqdm.write(text) if self._bar is not None else print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _mean(self, values: Mapping[str, Tensor | float]) -> dict[str, float]:
        """Average over processes."""
        device = self._accelerator.device
        stacked = torch.stack([torch.as_tensor(v, device=device).float() for v in values.values()])
        means: Any = self._accelerator.reduce(stacked, "mean")
        return dict(zip(values, means.tolist(), strict=True))

    def _write(self, step: int, values: dict[str, float]) -> None:
        if self._is_main:
            row = {"step": step, "hours": round(self.hours(), 5), **values}
            with write_errors(self._file), self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        self._accelerator.log(values, step=step)

    def _reset_sums(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._norms: Tensor | float = 0.0
        self._batches = self._updates = 0


def _drop_rows_after(file: Path, last: tuple[int, bool]) -> None:
    """Remove the rows after `last` (see `_order_of`), which a resumed run will write again."""
    if not file.exists():
        return
    kept = [
        row + "\n"
        for row in file.read_text(encoding="utf-8", errors="replace").splitlines()
        if (order := _order_of(row)) is not None and order <= last
    ]
    replace_text(file, "".join(kept))


def _order_of(row: str) -> tuple[float, bool] | None:
    """Return the step of a row, and whether it is the validation, which follows the training.

    None for a damaged row, such as the last one of a killed run.
    """
    try:
        values = json.loads(row)
    except ValueError:
        return None
    step = values.get("step") if isinstance(values, dict) else None
    if not isinstance(step, (int, float)):
        return None
    return step, any(name.startswith("val_") for name in values)


def _line(values: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())
