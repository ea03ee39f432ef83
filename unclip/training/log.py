"""What a run tells: a progress bar or plain lines, run/metrics.jsonl, and the trackers of accelerate."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

if TYPE_CHECKING:
    from accelerate import Accelerator
    from PIL import Image

    from unclip.training.run_state import RunState

DEFAULT_TRACKERS = ("tensorboard",)


def available_trackers(wanted: tuple[str, ...]) -> list[str]:
    """The trackers whose package is installed; a missing one is an error, or a warning if it was only the default."""
    from accelerate.utils import LoggerType

    names = {str(t.value) for t in LoggerType} - {"all"}
    if unknown := [name for name in wanted if name not in names]:
        raise ValueError(
            f"unknown tracker {unknown[0]!r}; expected one of {', '.join(sorted(names))}"
        )
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing and wanted != DEFAULT_TRACKERS:
        raise ValueError(f"the tracker {missing[0]!r} is not installed; pip install {missing[0]}")
    if missing:
        warnings.warn(f"{missing[0]} is not installed; logging to metrics.jsonl only", stacklevel=2)
    return [name for name in wanted if name not in missing]


class Log:
    """Reports of the main process; the other processes' logs are silent."""

    def __init__(
        self, accelerator: Accelerator, folder: Path, state: RunState, steps: int, bar: bool
    ) -> None:
        self._accelerator, self._folder, self._steps = accelerator, folder, steps
        self._speaks = accelerator.is_main_process
        self._bar: tqdm[Any] | None = None
        if bar and self._speaks and sys.stdout.isatty():  # plain lines in a file or a pipe
            self._bar = tqdm(
                total=steps, initial=state.step, unit="step", dynamic_ncols=True, file=sys.stdout
            )
        self._file = folder / "metrics.jsonl"
        if self._speaks:
            _forget_after(self._file, state.step)
        accelerator.init_trackers(folder.name)
        for tracker in accelerator.trackers:
            if (
                tracker.name != "tensorboard"
            ):  # it would open one more folder for them at every start
                tracker.store_init_configuration(state.settings)
        self._started, self._hours_before = time.perf_counter(), state.hours
        self._forget_sums()
        self.restart_clock()

    def hours(self) -> float:
        """Hours that the run has taken, those before it was resumed included."""
        return self._hours_before + (time.perf_counter() - self._started) / 3600

    def restart_clock(self) -> None:
        """Leave what happened since the last report (validation, saving) out of the speed."""
        self._since, self._timed_samples, self._timed_updates = time.perf_counter(), 0, 0

    def count(self, terms: Mapping[str, Tensor], samples: int) -> None:
        """The losses of one batch, summed on the device until they are reported."""
        for name, value in terms.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach().float()
        self._batches += 1
        self._timed_samples += samples

    def advance(self, norm: Tensor) -> None:
        """One update was made."""
        self._norms = self._norms + norm.detach()
        self._updates += 1
        self._timed_updates += 1
        if self._bar is not None:
            self._bar.update()

    def training(self, step: int, extra: dict[str, float]) -> None:
        """Report the means since the last report, over all processes."""
        means = {name: value / self._batches for name, value in self._sums.items()}
        values = self._averaged({**means, "grad_norm": self._norms / self._updates})
        seconds = max(time.perf_counter() - self._since, 1e-9)
        values["samples_per_s"] = self._timed_samples * self._accelerator.num_processes / seconds
        hours = (self._steps - step) * seconds / max(1, self._timed_updates) / 3600
        self._forget_sums()
        self.restart_clock()
        self._write(step, {**values, **extra})
        if self._bar is not None:  # it shows the time left itself
            self._bar.set_postfix(
                {k: f"{v:.4g}" for k, v in values.items() if k in ("loss", "samples_per_s")}
            )
        else:
            self.say(f"step {step}/{self._steps}  {_line({**values, **extra})}  left {hours:.2f} h")

    def validation(self, step: int, means: dict[str, Tensor]) -> None:
        """Report the mean losses on the validation data, as val_<name>."""
        values = {f"val_{name}": value for name, value in self._averaged(means).items()}
        self._write(step, values)
        self.say(f"step {step}/{self._steps}  {_line(values)}")

    def _averaged(self, values: dict[str, Tensor]) -> dict[str, float]:
        stacked = torch.stack(
            [torch.as_tensor(v, device=self._accelerator.device).float() for v in values.values()]
        )
        means = self._accelerator.reduce(stacked, "mean").tolist()
        return dict(zip(values, means, strict=True))

    def _write(self, step: int, values: dict[str, float]) -> None:
        if self._speaks:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(
                    json.dumps({"step": step, "hours": round(self.hours(), 5), **values}) + "\n"
                )
        self._accelerator.log(values, step=step)

    def _forget_sums(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._norms: Tensor | float = 0.0
        self._batches = self._updates = 0

    def picture(self, step: int, image: Image.Image) -> None:
        """The preview of a step, as run/previews/step-0001000.png and in the trackers that take pictures."""
        if not self._speaks:
            return
        folder = self._folder / "previews"
        folder.mkdir(exist_ok=True)
        image.save(folder / f"step-{step:07d}.png")
        for tracker in self._accelerator.trackers:
            if hasattr(tracker, "log_images"):
                options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images(
                    {"preview": np.asarray(image.convert("RGB"))[None]}, step=step, **options
                )

    def say(self, text: str) -> None:
        """A line on standard output, above the bar if there is one."""
        if self._speaks:
            tqdm.write(text) if self._bar is not None else print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _forget_after(file: Path, step: int) -> None:
    """Drop the rows that a resumed run will write again."""
    if not file.exists():
        return
    rows: list[str] = []
    for row in file.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(row)["step"] <= step:
                rows.append(row + "\n")
        except ValueError:
            continue  # the last row of a run that was killed while it wrote
    file.write_text("".join(rows), encoding="utf-8")


def _line(values: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())
