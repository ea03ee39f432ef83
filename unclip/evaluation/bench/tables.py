"""Results of `unclip bench` as tables. This module does not import torch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from unclip.evaluation.report import Row, markdown_table

MIB, GB, TERA = 2**20, 1e9, 1e12
# Bounds of peak memory: 1.3 x all weights, or with offloading the largest network + 1 GB.
RESIDENT_SHARE, OFFLOAD_ROOM = 1.3, 1e9


def bench_rows(results: dict[str, Any]) -> list[Row]:
    """Return the median of each time, with the lowest and highest, and the peak memory."""
    count = results.get("num_candidates")
    names = {
        "import": "import unclip",
        "cold": "unclip generate, from cold start to PNG",
        "call": f"warm call for {results['batch']} of {results['size']} px",
        "generated": f"generating {count}",
        "reranked": f"generating {count} and reranking them by CLIP",
    }
    table = []
    for name, seconds in results["seconds"].items():
        steps = results["steps"].get(name)
        suffix = f", {steps} step{'s' * (steps > 1)}" if steps else ""
        figure = names.get(name, f"... {name}{suffix}")
        table.append(Row(figure, *time_cells(seconds)))
    memory = {
        "generate": "peak memory of unclip generate",
        "warm": "peak memory of the warm calls",
        "device": "peak memory on the device",
    }
    for name, size in results["peak_memory"].items():
        table.append(Row(memory[name], _mib(size) or "not reported by this system"))
    return table


def stage_table(results: dict[str, Any]) -> str:
    """Format each stage, and all together, as Markdown."""
    peak = max(results["machine_peak"].values())
    head = ("stage", "seconds", "lowest to highest", "per step", "TFLOP")
    table: list[tuple[str, ...]] = [(*head, "share of the machine's peak", "peak memory")]
    stages = {name: results["seconds"][name] for name in results["flops"]}

    def add(name: str, seconds: Sequence[float], step: str, flops: float, memory: str) -> None:
        share = share_of_peak(flops, statistics.median(seconds), peak)
        table.append((name, *time_cells(seconds), step, f"{flops / TERA:.3g}", share, memory))

    for name, seconds in stages.items():
        figure, step, memory = name, "", _mib(results["stage_memory"].get(name))
        if steps := results["steps"].get(name):
            step = format_seconds(statistics.median(results["step_seconds"][name]))
            figure = f"{name}, {steps} steps"
        add(figure, seconds, step, results["flops"][name], memory)
    total = results["seconds"].get("call")
    if total is None and len(stages) > 1:
        total = [sum(round_) for round_ in zip(*stages.values(), strict=True)]
    if total is not None:
        rate = results["batch"] / statistics.median(total)
        name = f"all, {results['batch']} of {results['size']} px: {rate:.3g} per second"
        add(name, total, "", sum(results["flops"].values()), "")
    return markdown_table(table)


def token_and_reranking_lines(results: dict[str, Any]) -> list[str]:
    """Return the rate of image tokens and the cost of reranking, one line each."""
    seconds, lines = results["seconds"], []
    if "codes" in seconds:
        tokens = results["batch"] * results["steps"]["codes"]
        rate = format_number(tokens / statistics.median(seconds["codes"]))
        lines.append(f"{rate} image tokens per second")
    if "reranked" in seconds:
        generated, reranked = seconds["generated"], seconds["reranked"]
        ratios = [b / a for a, b in zip(generated, reranked, strict=True)]
        ratio = statistics.median(reranked) / statistics.median(generated)
        lines.append(
            f"generating and reranking {results['num_candidates']} candidates takes {ratio:.3g}x "
            f"as long as generating them ({min(ratios):.3g}x to {max(ratios):.3g}x)"
        )
    return lines


def memory_bound(results: dict[str, Any]) -> str | None:
    """Compare the peak memory to its bound in one line; None if the system does not report it."""
    peak = results["peak_memory"].get("device", results["peak_memory"]["warm"])
    if peak is None:
        return None
    weights = results["weights"].values()
    if results["offload"]:
        bound = max(weights) + OFFLOAD_ROOM
        formula = f"largest network {format_gb(max(weights))} + {format_gb(OFFLOAD_ROOM)}"
    else:
        bound = RESIDENT_SHARE * sum(weights)
        formula = f"{RESIDENT_SHARE} x {format_gb(sum(weights))} of weights"
    verdict = "met" if peak <= bound else "EXCEEDED"
    return f"peak memory {format_gb(peak)}, bound {format_gb(bound)} ({formula}): {verdict}"


def describe_machine(machine: dict[str, Any]) -> str:
    """Describe the machine in one line."""
    processor = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
    software = f"torch {machine['torch']}, Python {machine['python']}, {machine['os']}"
    return f"{processor}; {machine['dtype']}; {software}"


def describe_peak(rates: dict[str, float], dtype: str) -> str:
    """Describe the peak rate of the machine in one line."""
    values = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in rates.items())
    return f"measured peak in {dtype}: {values}; shares refer to the higher"


def time_cells(seconds: Sequence[float]) -> tuple[str, str]:
    """Return the median, and the lowest to the highest."""
    spread = f"{format_seconds(min(seconds))} to {format_seconds(max(seconds))}"
    return format_seconds(statistics.median(seconds)), spread


def format_seconds(value: float) -> str:
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s"


def format_number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def format_gb(size: float) -> str:
    return f"{size / GB:.2f} GB"


def share_of_peak(flops: float, seconds: float, peak: float) -> str:
    return f"{flops / seconds / peak:.0%}"


def _mib(size: float | None) -> str:
    return "" if size is None else f"{size / MIB:.0f} MiB"
