"""How quick a model is and how much memory it takes: each start measured in a process of its own.

This module imports no torch: a process counts its parent's memory at the time it was started as its own.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from unclip.evaluation import CODE_STAGES, STAGES
from unclip.evaluation.bench.processes import host, import_time, run
from unclip.evaluation.bench.tables import describe as describe
from unclip.evaluation.bench.tables import rows as rows

PROMPT = "a red apple"
# Models with random weights, the second for tests: karlo.py, dalle.py
KARLO, DALLE, MEGA = (
    ("karlo-random", "karlo-tiny"),
    ("dalle-random", "dalle-tiny"),
    ("mega-random", "mega-tiny"),
)
RANDOM = (*KARLO, *DALLE, *MEGA)


@dataclass(frozen=True)
class BenchConfig:
    """What is measured. Steps, guidance and samplers are the model's own, unless a preset changes them."""

    model: str
    dtype: str | None = None  # fp32, fp16, bf16; None = the default of the device
    device: str | None = None
    batch: int = 1  # pictures drawn at once in the warm runs
    repeat: int = 5
    stages: tuple[str, ...] | None = None  # None = all that the model has
    steps_only: bool = False  # two steps of each stage instead of all
    preset: str | None = None
    compile: bool = False
    quantize: str | None = None
    offload: bool = False
    candidates: int | None = None  # how many are drawn and compared, beside drawing as many

    def __post_init__(self) -> None:
        for name in ("batch", "repeat"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        known = dict.fromkeys((*STAGES, *CODE_STAGES))
        if unknown := [stage for stage in self.stages or () if stage not in known]:
            raise ValueError(f"unknown stage {unknown[0]!r}; expected some of {', '.join(known)}")
        if self.candidates is not None and self.candidates < 1:
            raise ValueError(f"candidates is {self.candidates}; expected at least 1")
        if self.steps_only and self.preset not in (None, "exact"):
            raise ValueError(
                f"the steps of {self.preset!r} are not alike; measure it without --steps-only"
            )

    @property
    def plain(self) -> bool:
        """Whether `unclip generate` draws what is measured."""
        changed = self.preset or self.compile or self.quantize or self.offload or self.steps_only
        return not changed and self.stages is None and self.model not in RANDOM


def bench(config: BenchConfig, progress: bool = True) -> dict[str, Any]:
    """Seconds (lists of `repeat` values), bytes and floating-point operations, as JSON types."""
    imports, cold, peaks = [], [], []
    with (
        tempfile.TemporaryDirectory(prefix="unclip-bench-") as folder,
        tqdm(
            total=(2 * config.repeat if config.plain else 0) + 2, disable=not progress, leave=False
        ) as bar,
    ):
        for _ in range(config.repeat if config.plain else 0):
            bar.set_description("import unclip")
            imports.append(import_time())
            bar.update()
        for _ in range(config.repeat if config.plain else 0):
            bar.set_description("unclip generate")
            seconds, peak = run([*_generate(config), "-o", f"{folder}/picture.png"])
            cold.append(seconds)
            peaks.append(peak)
            bar.update()
        bar.set_description("warm pictures")
        measured, warm_peak = _warm(config, Path(folder))
        bar.update()
        bar.set_description("the machine's peak")
        rates = machine_peak(measured["machine"])
        bar.update()
    known = [peak for peak in peaks if peak is not None]
    started = {"import": imports, "cold": cold} if config.plain else {}
    at_start = {"generate": max(known) if known else None} if config.plain else {}
    return {
        **dataclasses.asdict(config),
        "machine": {**host(), **measured.pop("machine")},
        "machine_peak": rates,
        "seconds": {**started, **measured.pop("seconds")},
        "peak_memory": {
            **at_start,
            "warm": warm_peak,
            **measured.pop("peak_memory"),
        },  # where it knows better
        **measured,
    }


def _generate(config: BenchConfig) -> list[str]:
    given = {"--model": config.model, "--dtype": config.dtype, "--device": config.device}
    said = [word for name, value in given.items() if value is not None for word in (name, value)]
    return ["-m", "unclip", "generate", PROMPT, "--seed", "0", "--quiet", *said]


def _warm(config: BenchConfig, folder: Path) -> tuple[dict[str, Any], int | None]:
    """What stages.py measures, and the peak memory of that process."""
    if (
        config.offload and config.model in KARLO
    ):  # else all of it would be in memory once, to begin with
        dtype = [] if config.dtype is None else ["--dtype", config.dtype]
        run(["-m", "unclip.evaluation.bench.karlo", config.model, str(folder / "model"), *dtype])
        config = dataclasses.replace(config, model=str(folder / "model"))
    out = folder / "stages.json"
    _, peak = run(
        ["-m", "unclip.evaluation.bench.stages", json.dumps(dataclasses.asdict(config)), str(out)]
    )
    return json.loads(out.read_text(encoding="utf-8")), peak


def machine_peak(where: dict[str, Any]) -> dict[str, float]:
    """Operations a second that its device reaches in its dtype, see peak.py; in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="unclip-bench-") as folder:
        out = Path(folder) / "peak.json"
        place = ["--device", where["device"], "--dtype", where["dtype"]]
        run(["-m", "unclip.evaluation.bench.peak", *place, "--out", str(out)])
        return json.loads(out.read_text(encoding="utf-8"))
