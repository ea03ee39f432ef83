"""How quick a model is and how much memory it takes: each start measured in a process of its own.

This module imports no torch: a process counts its parent's memory at the time it was started as its own.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from unclip.evaluation.report import Row

PROMPT = "a red apple"


@dataclass(frozen=True)
class BenchConfig:
    """What is measured. Steps, guidance and samplers are the model's own."""

    model: str
    dtype: str | None = None  # fp32, fp16, bf16; None = the default of the device
    device: str | None = None
    batch: int = 1  # pictures drawn at once in the warm runs
    repeat: int = 5

    def __post_init__(self) -> None:
        for name in ("batch", "repeat"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")

    @property
    def arguments(self) -> list[str]:
        """Of `unclip generate`, and of `bench_stages`."""
        given = {"--model": self.model, "--dtype": self.dtype, "--device": self.device}
        return [word for name, value in given.items() if value is not None for word in (name, value)]


def bench(config: BenchConfig, progress: bool = True) -> dict[str, Any]:
    """Seconds (lists of `repeat` values) and bytes, as JSON types."""
    with (
        tempfile.TemporaryDirectory() as folder,
        tqdm(total=2 * config.repeat + 1, disable=not progress, leave=False) as bar,
    ):
        imports, cold, peaks = [], [], []
        for _ in range(config.repeat):
            bar.set_description("import unclip")
            imports.append(_import_time())
            bar.update()
        for _ in range(config.repeat):
            bar.set_description("unclip generate")
            command = ["-m", "unclip", "generate", PROMPT, "--seed", "0", "--quiet", "-o", f"{folder}/picture.png"]
            seconds, peak = _run([*command, *config.arguments])
            cold.append(seconds)
            peaks.append(peak)
            bar.update()
        bar.set_description("warm pictures")
        out = Path(folder) / "stages.json"
        sizes = ["--batch", str(config.batch), "--repeat", str(config.repeat), "--out", str(out)]
        _, warm_peak = _run(["-m", "unclip.evaluation.bench_stages", *config.arguments, *sizes])
        measured = json.loads(out.read_text(encoding="utf-8"))
    known = [peak for peak in peaks if peak is not None]
    return {
        "model": config.model,
        "batch": config.batch,
        "repeat": config.repeat,
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "os": platform.system(), **measured.pop("machine")},
        "seconds": {"import": imports, "cold": cold, **measured.pop("seconds")},
        "peak_memory": {"generate": max(known) if known else None, "warm": warm_peak},
        **measured,
    }


def rows(results: dict[str, Any]) -> list[Row]:
    """The figures of `bench`: median, and the lowest and highest value beside it."""
    names = {
        "import": "import unclip",
        "cold": "unclip generate, from cold to PNG",
        "call": f"a further call for {results['batch']} of {results['size']} px",
    }
    table = []
    for name, seconds in results["seconds"].items():
        count = results["steps"].get(name)
        what = names.get(name) or f"of that: {name}" + (f", {count} step{'s' * (count > 1)}" if count else "")
        spread = f"{_seconds(min(seconds))} to {_seconds(max(seconds))}"
        table.append(Row(what, _seconds(statistics.median(seconds)), spread))
    for name, size in results["peak_memory"].items():
        what = {"generate": "peak memory of unclip generate", "warm": "peak memory of the further calls"}[name]
        table.append(Row(what, "not told by this system" if size is None else f"{size / 2**20:.0f} MiB"))
    return table


def describe(machine: dict[str, Any]) -> str:
    """The machine in one line."""
    where = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
    return f"{where}; {machine['dtype']}; torch {machine['torch']}, Python {machine['python']}, {machine['os']}"


def _seconds(value: float) -> str:
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s"


def _import_time() -> float:
    """Seconds of `import unclip` alone, in a process without torch."""
    code = "import time; start = time.perf_counter(); import unclip; print(time.perf_counter() - start)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(ran.stdout)


def _run(arguments: Sequence[str]) -> tuple[float, int | None]:
    """Wall seconds and peak memory in bytes (None where the system does not tell) of a Python process.

    ValueError with its last line if it fails.
    """
    with tempfile.TemporaryFile() as said:
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=said)
        peak = None
        if hasattr(os, "wait4"):
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        else:
            process.wait()
        seconds = time.perf_counter() - start
        if process.returncode:
            said.seek(0)
            lines = said.read().decode(errors="replace").strip().splitlines()
            raise ValueError(lines[-1].removeprefix("error: ") if lines else f"{arguments} failed")
    return seconds, peak


def _cpu() -> str:
    """The processor's name as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()
