"""Speed and memory of a model (`unclip bench`); cold starts run in separate processes.

This module does not import torch: a child process inherits its parent's peak memory.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

from tqdm import tqdm

from unclip.config import PositiveInt, config
from unclip.evaluation import STAGES
from unclip.evaluation.bench.processes import host, import_time, run

PROMPT = "a red apple"
# Models with random weights at full size, and small for tests; see random_models.py.
KARLO, DALLE = ("karlo-random", "karlo-tiny"), ("dalle-random", "dalle-tiny")
RANDOM_MODELS = (*KARLO, *DALLE)
WORKER = "unclip.evaluation.bench.worker"


@config
class BenchConfig:
    """Settings of a benchmark."""

    model: str
    dtype: str | None = None  # name in torch, e.g. "bfloat16"; None: default of the device
    device: str | None = None
    batch: PositiveInt = 1  # images of each warm call
    repeat: PositiveInt = 5
    stages: tuple[str, ...] | None = None  # None: all stages of the model
    steps_only: bool = False  # run two steps of each stage and extrapolate
    preset: str | None = None  # of the sampling options; None: the model's own
    set: tuple[str, ...] = ()  # changes of the options, such as "decoder.steps=10"
    compile: bool = False
    quantize: str | None = None
    offload: bool = False
    num_candidates: PositiveInt | None = None  # also time as many images with and without reranking

    def __post_init__(self) -> None:
        known = dict.fromkeys(stage for stages in STAGES.values() for stage in stages)
        if unknown := [stage for stage in self.stages or () if stage not in known]:
            raise ValueError(f"unknown stage {unknown[0]!r}; expected some of {', '.join(known)}")
        if self.steps_only and self.preset not in (None, "exact"):
            raise ValueError(
                f"steps_only needs equal steps; those of preset {self.preset!r} differ"
            )

    @property
    def has_cold_start(self) -> bool:
        """Return whether `unclip generate` runs the same model and options."""
        options = self.preset or self.set or self.steps_only
        changed = options or self.compile or self.quantize or self.offload
        return not changed and self.stages is None and self.model not in RANDOM_MODELS


def bench(config: BenchConfig, progress: bool = True) -> dict[str, Any]:
    """Return seconds (lists of `repeat` values), bytes and operations as JSON types."""
    imports, cold, cold_peaks = [], [], []
    repeat = config.repeat if config.has_cold_start else 0
    bar = tqdm(total=2 * repeat + 2, disable=not progress, leave=False)
    with tempfile.TemporaryDirectory(prefix="unclip-bench-") as folder, bar:
        for _ in range(repeat):
            bar.set_description("import unclip")
            imports.append(import_time())
            bar.update()
        for _ in range(repeat):
            bar.set_description("unclip generate")
            seconds, peak = run([*_generate_command(config), "-o", f"{folder}/image.png"])
            cold.append(seconds)
            cold_peaks.append(peak)
            bar.update()
        bar.set_description("warm calls")
        warm, warm_peak = _measure_warm(config, Path(folder))
        bar.update()
        bar.set_description("peak of the machine")
        peak_rates = machine_peak(warm["machine"])
        bar.update()
    known = [peak for peak in cold_peaks if peak is not None]
    cold_seconds = {"import": imports, "cold": cold} if config.has_cold_start else {}
    cold_memory = {"generate": max(known, default=None)} if config.has_cold_start else {}
    return {
        **warm,
        **dataclasses.asdict(config),
        "machine": {**host(), **warm["machine"]},
        "machine_peak": peak_rates,
        "seconds": {**cold_seconds, **warm["seconds"]},
        # The worker's own measurement, where it has one, replaces that of its process.
        "peak_memory": {**cold_memory, "warm": warm_peak, **warm["peak_memory"]},
    }


def machine_peak(machine: dict[str, Any]) -> dict[str, float]:
    """Measure the peak operations per second of the device and dtype in a separate process."""
    where = {"device": machine["device"], "dtype": machine["dtype"]}
    with tempfile.TemporaryDirectory(prefix="unclip-bench-") as folder:
        return _run_worker("peak", where, Path(folder) / "peak.json")[0]


def _measure_warm(config: BenchConfig, folder: Path) -> tuple[dict[str, Any], int | None]:
    """Run the worker; return its measurements and the peak memory of its process."""
    if config.offload and config.model in KARLO:  # read from a folder, so it is never loaded whole
        run(["-m", WORKER, "save", json.dumps(dataclasses.asdict(config)), str(folder / "model")])
        config = dataclasses.replace(config, model=str(folder / "model"))
    return _run_worker("measure", dataclasses.asdict(config), folder / "measured.json")


def _run_worker(task: str, argument: dict[str, Any], out: Path) -> tuple[Any, int | None]:
    _, peak = run(["-m", WORKER, task, json.dumps(argument), str(out)])
    return json.loads(out.read_text(encoding="utf-8")), peak


def _generate_command(config: BenchConfig) -> list[str]:
    options = ["--model", config.model]
    if config.dtype is not None:
        names = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
        options += ["--dtype", names[config.dtype]]
    if config.device is not None:
        options += ["--device", config.device]
    return ["-m", "unclip", "generate", PROMPT, "--seed", "0", "--quiet", *options]
