"""Interleaved benchmarks of a reference and of unclip, as rows of one table.

The scripts compare_*.py measure both sides on the same weights in one process: A B, B A, A B, ...
"""

from __future__ import annotations

import json
import statistics
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from unclip.evaluation.bench import BenchConfig, machine_peak
from unclip.evaluation.bench.memory import PeakMemory
from unclip.evaluation.bench.processes import host
from unclip.evaluation.bench.tables import (
    describe_machine,
    describe_peak,
    format_gb,
    format_number,
    format_seconds,
    share_of_peak,
)
from unclip.evaluation.bench.timing import Stage, StepCosts, interleave, time_stage
from unclip.evaluation.bench.worker import machine, placement
from unclip.evaluation.report import markdown_table
from unclip.files import exit_on_error
from unclip.pipelines.memory import enable_memory_reuse

REFERENCE, OURS = "reference", "unclip"

Timings = dict[str, list[StepCosts[Any]]]  # by candidate


@dataclass(frozen=True)
class Candidate:
    """One side of a comparison, and how many of its steps are run in a round (None: all)."""

    call: Stage[Any]
    max_steps: int | None = None


@dataclass(frozen=True)
class Comparison:
    """A row of the table, with the seconds of each round."""

    name: str
    reference: list[float]
    ours: list[float]
    extrapolated: bool = False  # from single steps or stages, not run as a whole
    flops: tuple[float, float] | None = None  # of the reference, ours
    difference: float | None = None  # the largest between both outputs
    unit: str = "standard deviations at most"  # of the difference
    produced: tuple[int, str] | None = None  # number and kind of results in that time

    @property
    def speedup(self) -> float:
        """The ratio of the medians."""
        return statistics.median(self.reference) / statistics.median(self.ours)

    @property
    def speedups(self) -> list[float]:
        """The ratio of each round."""
        return [a / b for a, b in zip(self.reference, self.ours, strict=True)]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "speedup": self.speedup, "speedups": self.speedups}


def time_interleaved(
    candidates: dict[str, Candidate], device: torch.device, repeat: int, name: str, progress: bool
) -> Timings:
    """Time each candidate `repeat` times: in order, in reverse order, in order, ..."""

    def run(candidate: Candidate) -> Callable[[int], StepCosts[Any]]:
        return lambda _: time_stage(candidate.call, device, candidate.max_steps)

    with tqdm(total=repeat * len(candidates), disable=not progress, leave=False) as bar:

        def on_run(candidate: str) -> None:
            bar.set_description(f"{name}: {candidate}")
            bar.update()

        runs = {key: run(candidate) for key, candidate in candidates.items()}
        return interleave(runs, repeat, on_run)


def totals(timings: list[StepCosts[Any]], num_steps: int) -> list[float]:
    """Return the seconds of all steps, for each round."""
    return [costs.total(num_steps) for costs in timings]


def count_images(count: int) -> str:
    return f"{count} image{'s' * (count > 1)}"


# -- the scripts


def add_arguments(parser: ArgumentParser, model: str) -> None:
    parser.add_argument("--model", default=model, help=f"(default: {model})")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the fastest available)")
    names = ("float32", "float16", "bfloat16")
    about = "of the networks (default: half precision on CUDA, else float32)"
    parser.add_argument("--dtype", choices=names, help=about)
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images per call")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="rounds (default: 3)")
    parser.add_argument("--compile", action="store_true", help="apply unclip.compile to our side")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    parser.add_argument("--quiet", action="store_true", help="show no progress bars")


def bench_config(args: Namespace, stages: tuple[str, ...] | None = None) -> BenchConfig:
    return BenchConfig(
        args.model,
        args.dtype,
        args.device,
        batch=args.batch,
        repeat=args.repeat,
        stages=stages,
        compile=args.compile,
    )


def run(
    config: BenchConfig,
    compare: Callable[[], tuple[str, Iterator[Comparison]]],
    json_file: Path | None,
) -> None:
    """Print rows as they are measured, then the table; errors in one line."""
    enable_memory_reuse()  # as the command line does, for both sides
    with exit_on_error():
        reference, rows = compare()
        _run(config, reference, rows, json_file)


def _run(
    config: BenchConfig, reference: str, rows: Iterator[Comparison], json_file: Path | None
) -> None:
    device, dtype = placement(config)
    where = {**host(), **machine(device, dtype)}
    results: dict[str, Any] = {
        **asdict(config),
        "reference": reference,
        "machine": where,
        "machine_peak": machine_peak(where),
        "rows": [],
    }
    memory = PeakMemory(device)
    print(describe_machine(where))
    print(describe_peak(results["machine_peak"], where["dtype"]))
    try:
        for row in rows:
            results["rows"].append(row.to_dict())
            print(row_line(results["rows"][-1]), flush=True)
            _write(results, json_file)  # kept if the script is interrupted
    finally:
        if results["rows"]:
            results["peak_memory"] = memory.highest
            print(f"\n{comparison_table(results)}")
            _write(results, json_file)


def _write(results: dict[str, Any], file: Path | None) -> None:
    if file is not None:
        file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def row_line(row: dict[str, Any]) -> str:
    """Describe one row in a line."""
    reference, ours = (
        format_seconds(statistics.median(row[side])) for side in ("reference", "ours")
    )
    return f"{row['name']}: {reference} against {ours}, {row['speedup']:.3g}x ({_spread(row)})"


def comparison_table(results: dict[str, Any]) -> str:
    """Format all rows as Markdown, with notes on extrapolated rows and differences of outputs."""
    peak = max(results["machine_peak"].values())
    head = ("", results["reference"], "unclip", "speed-up", "lowest to highest")
    table: list[tuple[str, ...]] = [(*head, "share of the machine's peak, or rate")]
    for row in results["rows"]:
        seconds = [statistics.median(row[side]) for side in ("reference", "ours")]
        if row["flops"]:
            shares = zip(row["flops"], seconds, strict=True)
            rates = " and ".join(share_of_peak(flops, s, peak) for flops, s in shares)
        else:
            count, kind = row["produced"]
            rates = " and ".join(format_number(count / s) for s in seconds) + f" {kind} per second"
        name = row["name"] + (" *" if row["extrapolated"] else "")
        times = map(format_seconds, seconds)
        table.append((name, *times, f"{row['speedup']:.3g}x", _spread(row), rates))
    notes = []
    if any(row["extrapolated"] for row in results["rows"]):
        notes.append(
            "\\* Extrapolated: the sum of the stages, or of single steps times their number."
        )
    differences = [
        f"{row['name']} {row['difference']:.1e} {row['unit']}"
        for row in results["rows"]
        if row["difference"]
    ]
    if differences:
        notes.append(f"Differences between the outputs of both sides: {'; '.join(differences)}.")
    if results["peak_memory"]:
        notes.append(f"Peak memory of both sides: {format_gb(results['peak_memory'])}.")
    return "\n\n".join([markdown_table(table), *notes])


def _spread(row: dict[str, Any]) -> str:
    return f"{min(row['speedups']):.3g}x to {max(row['speedups']):.3g}x"
