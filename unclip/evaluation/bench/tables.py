"""The figures of a benchmark as rows of tables; imports no torch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from unclip.evaluation.report import Row, markdown

MIB, GB, TERA = 2**20, 1e9, 1e12
RESIDENT_SHARE, OFFLOAD_ROOM = (
    1.3,
    1e9,
)  # peak memory stays within 1.3 x all weights, or the largest network + 1 GB


def rows(results: dict[str, Any]) -> list[Row]:
    """The figures of `bench`: median, and the lowest and highest value beside it."""
    names = {
        "import": "import unclip",
        "cold": "unclip generate, from cold to PNG",
        "call": f"a further call for {results['batch']} of {results['size']} px",
        "drawn": f"drawing {results.get('candidates')}",
        "chosen": f"drawing {results.get('candidates')}, and CLIP choosing the best",
    }
    table = []
    for name, seconds in results["seconds"].items():
        count = results["steps"].get(name)
        what = names.get(name) or f"of that: {name}" + (
            f", {count} step{'s' * (count > 1)}" if count else ""
        )
        table.append(Row(what, tell_seconds(statistics.median(seconds)), spread(seconds)))
    for name, size in results["peak_memory"].items():
        what = {
            "generate": "peak memory of unclip generate",
            "warm": "peak memory of the further calls",
            "device": "peak memory on the device",
        }[name]
        table.append(Row(what, _mib(size) or "not told by this system"))
    return table


def stage_table(results: dict[str, Any]) -> str:
    """Each stage and the whole, as Markdown."""
    peak = max(results["machine_peak"].values())
    head = (
        "stage",
        "seconds",
        "lowest to highest",
        "a step",
        "TFLOP",
        "of the machine's peak",
        "peak memory",
    )
    lines = [head]
    stages = {name: results["seconds"][name] for name in results["flops"]}
    for name, seconds in stages.items():
        steps, flops = results["steps"].get(name), results["flops"][name]
        step = tell_seconds(statistics.median(results["step_seconds"][name])) if steps else ""
        what = f"{name}, {steps} steps" if steps else name
        speed = share(flops, statistics.median(seconds), peak)
        lines.append(
            (
                what,
                *_cells(seconds),
                step,
                _tera(flops),
                speed,
                _mib(results["stage_memory"].get(name)),
            )
        )
    whole = results["seconds"].get("call") or [
        sum(turn) for turn in zip(*stages.values(), strict=True)
    ]
    if "call" in results["seconds"] or len(stages) > 1:
        flops, images = sum(results["flops"].values()), results["batch"] / statistics.median(whole)
        what = f"all, {results['batch']} of {results['size']} px: {images:.3g} a second"
        lines.append(
            (
                what,
                *_cells(whole),
                "",
                _tera(flops),
                share(flops, statistics.median(whole), peak),
                "",
            )
        )
    return markdown(lines)


def comparison(row: dict[str, Any]) -> str:
    """One row of a comparison in a line, for while it goes on."""
    theirs, ours = (tell_seconds(statistics.median(row[side])) for side in ("theirs", "ours"))
    return f"{row['what']}: {theirs} against {ours}, {_times(row['ratio'])} ({_ratios(row)})"


def comparison_table(results: dict[str, Any]) -> str:
    """All rows as Markdown; notes below tell what is composed, and how far the answers are apart."""
    peak = max(results["machine_peak"].values())
    lines = [
        (
            "",
            results["against"],
            "unclip",
            "times as fast",
            "lowest to highest",
            "of the machine's peak, or speed",
        )
    ]
    for row in results["rows"]:
        seconds = [statistics.median(row[side]) for side in ("theirs", "ours")]
        if row["flops"]:
            speeds = " and ".join(
                share(flops, s, peak) for flops, s in zip(row["flops"], seconds, strict=True)
            )
        else:
            count, kind = row["made"]
            speeds = " and ".join(_figure(count / s) for s in seconds) + f" {kind} a second"
        what = row["what"] + (" *" if row["composed"] else "")
        lines.append(
            (what, *map(tell_seconds, seconds), _times(row["ratio"]), _ratios(row), speeds)
        )
    notes = []
    if any(row["composed"] for row in results["rows"]):
        notes.append(
            "\\* Put together: single steps x their number, what is computed once added; stages added up."
        )
    apart = {
        row["what"]: f"{row['difference']:.1e} {row['unit']}"
        for row in results["rows"]
        if row["difference"]
    }
    if apart:
        notes.append(
            f"How far both sides' answers are apart: {'; '.join(f'{k} {v}' for k, v in apart.items())}."
        )
    if results["peak_memory"]:
        notes.append(f"Both sides needed {_gb(results['peak_memory'])} of memory at most.")
    return "\n\n".join([markdown(lines), *notes])


def other_claims(results: dict[str, Any]) -> list[str]:
    """Figures of an autoregressive model, and of choosing among candidates: a line each."""
    seconds, lines = results["seconds"], []
    if "codes" in seconds:
        tokens = results["batch"] * results["steps"]["codes"]
        lines.append(
            f"{_figure(tokens / statistics.median(seconds['codes']))} image tokens a second"
        )
    if "chosen" in seconds:
        ratios = [
            chosen / drawn
            for drawn, chosen in zip(seconds["drawn"], seconds["chosen"], strict=True)
        ]
        ratio = statistics.median(seconds["chosen"]) / statistics.median(seconds["drawn"])
        lines.append(
            f"choosing among {results['candidates']} candidates takes {ratio:.3g}x as long as drawing them "
            f"({min(ratios):.3g}x to {max(ratios):.3g}x)"
        )
    return lines


def memory_claim(results: dict[str, Any]) -> str | None:
    """Peak memory beside what it may be at most, in one line; None where the system does not tell."""
    peak = results["peak_memory"].get("device", results["peak_memory"]["warm"])
    if peak is None:
        return None
    if results["offload"]:
        limit = max(results["weights"].values()) + OFFLOAD_ROOM
        what = f"largest network {_gb(max(results['weights'].values()))} + {_gb(OFFLOAD_ROOM)}"
    else:
        limit = RESIDENT_SHARE * sum(results["weights"].values())
        what = f"{RESIDENT_SHARE} x {_gb(sum(results['weights'].values()))} of weights"
    verdict = "kept" if peak <= limit else "EXCEEDED"
    return f"peak memory {_gb(peak)}, at most {_gb(limit)} ({what}): {verdict}"


def describe(machine: dict[str, Any]) -> str:
    """The machine in one line."""
    where = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
    return f"{where}; {machine['dtype']}; torch {machine['torch']}, Python {machine['python']}, {machine['os']}"


def describe_peak(rates: dict[str, float], dtype: str) -> str:
    """The machine's peak in one line."""
    told = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in rates.items())
    return f"measured peak in {dtype}: {told}; shares are of the higher"


def tell_seconds(value: float) -> str:
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s"


def spread(seconds: Sequence[float]) -> str:
    return f"{tell_seconds(min(seconds))} to {tell_seconds(max(seconds))}"


def share(flops: float, seconds: float, peak: float) -> str:
    return f"{flops / seconds / peak:.0%}"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _times(ratio: float) -> str:
    return f"{ratio:.3g}x"


def _ratios(row: dict[str, Any]) -> str:
    return f"{_times(min(row['ratios']))} to {_times(max(row['ratios']))}"


def _cells(seconds: Sequence[float]) -> tuple[str, str]:
    return tell_seconds(statistics.median(seconds)), spread(seconds)


def _tera(flops: float) -> str:
    return f"{flops / TERA:.3g}"


def _mib(size: float | None) -> str:
    return "" if size is None else f"{size / MIB:.0f} MiB"


def _gb(size: float) -> str:
    return f"{size / GB:.2f} GB"
