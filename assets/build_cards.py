"""Fill in a model card: loss curves, sheets of images, and the tables between markers of its pages.

    python assets/build_cards.py --out assets/emoji-dalle1 --runs runs/emoji/codec runs/emoji/dalle
    python assets/build_cards.py --out assets/emoji --model assets/emoji \
        --data 'data/emoji/heldout-*.tar' --train-data 'data/emoji/train-*.tar'

With --data the model is evaluated first, by `unclip evaluate`, which gets all other arguments.
Without, the figures are those of evaluation.json in the folder. The tables of bench.json (`unclip
bench --json`) and priors.json (`unclip evaluate-priors --json`) are added where they exist. Each
block `<!-- name -->` ... `<!-- /name -->` is in one of the folder's .md files: `runs` (losses of
--runs), `figures` (all results), and `summary` (the main results).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unclip.cli.main import main as unclip
from unclip.evaluation import report
from unclip.evaluation.bench.tables import bench_rows, describe_machine
from unclip.files import exit_on_error

LOSS, METRICS = "loss.png", "metrics.jsonl"
EVALUATION, BENCH, PRIORS = "evaluation.json", "bench.json", "priors.json"
ORDER = ("clip", "prior", "decoder", "upsampler", "codec", "dalle")  # other runs follow
SUMMARY = (  # starts of the rows in the summary
    "recall@1 of the caption, all",
    "judge:",
    "unseen combinations",
    "unclip generate, from cold start",
    "warm call",
    "peak memory of unclip generate",
)

Metrics = list[dict[str, float]]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    about = "folder of the card"
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help=about)
    about = "training runs with a metrics.jsonl, or folders of several"
    parser.add_argument("--runs", type=Path, nargs="+", default=(), metavar="FOLDER", help=about)
    args, evaluate_arguments = parser.parse_known_args(argv)
    with exit_on_error():
        if evaluate_arguments:
            outputs = ["--json", str(args.out / EVALUATION), "--sheets", str(args.out)]
            if code := unclip(["evaluate", *evaluate_arguments, *outputs]):
                sys.exit(code)
        build_card(args.out, args.runs)


def build_card(folder: Path, run_folders: Sequence[Path] = ()) -> None:
    """Fill in the card of a folder from the metrics of runs and the results in the folder."""
    runs = read_runs(run_folders)
    if runs:
        plot_losses(runs, folder / LOSS)
        fill(folder, "runs", runs_table(runs))
    if not runs or (folder / EVALUATION).is_file():
        fill(folder, "figures", figures(folder))
        fill(folder, "summary", summary(folder))


def figures(folder: Path) -> str:
    """Format the results in a folder as Markdown tables."""
    results = read_results(folder / EVALUATION)
    pairs, options = results["held_out"]["pairs"], describe_options(results["options"])
    parts = [
        f"On {pairs} held-out pairs, seed {results['seed']}; {options}",
        report.markdown_table([report.HEAD, *report.evaluation_rows(results)]),
    ]
    if (folder / PRIORS).is_file():
        compared = read_results(folder / PRIORS)
        parts += [
            f"Comparison of priors on {compared['pairs']} held-out captions, by `unclip "
            "evaluate-priors`; all embeddings are decoded from the same noise:",
            report.prior_table(compared["rows"]),
        ]
    if (folder / BENCH).is_file():
        timed = read_results(folder / BENCH)
        head = report.Row("speed and memory", f"median of {timed['repeat']}", "lowest to highest")
        table = report.markdown_table([head, *bench_rows(timed)])
        parts += [describe_machine(timed["machine"]), table]
    return "\n\n".join(parts)


def summary(folder: Path) -> str:
    """Format the main results in a folder as a Markdown table."""
    results = read_results(folder / EVALUATION)
    rows = report.evaluation_rows(results)
    if (folder / BENCH).is_file():
        timed = read_results(folder / BENCH)
        machine = describe_machine(timed["machine"]).split(";")[0]
        rows += [row._replace(reference=machine) for row in bench_rows(timed)]
    selected = [row for row in rows if row.figure.startswith(SUMMARY)]
    return report.markdown_table([report.HEAD, *selected])


def read_results(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing; write it with `unclip evaluate --json {file}`, or pass --data"
        )
    return json.loads(file.read_text(encoding="utf-8"))


def describe_options(options: dict[str, Any]) -> str:
    """Describe the sampling options in a line."""
    if "decoder" not in options:
        given = {name: value for name, value in options.items() if value is not None}
        values = (f"{name.replace('_', '-')} {value:g}" for name, value in given.items())
        return ", ".join(values) + "."
    stages = {"prior": options["prior"], "decoder": options["decoder"]}
    stages |= {f"upsampler {i}": stage for i, stage in enumerate(options["upsamplers"])}
    described = "; ".join(
        f"{name} {stage['sampler']}, {stage['steps']} steps, guidance {stage['guidance']:g}"
        for name, stage in stages.items()
    )
    return (
        f"{described}. Images are measured before the upsampler: CLIP and the style classifier "
        "use no higher resolution."
    )


def fill(folder: Path, block: str, content: str) -> None:
    """Replace the text between the markers <!-- block --> and <!-- /block --> in a page."""
    pattern = re.compile(rf"(<!-- {block} -->\n).*?(<!-- /{block} -->)", re.DOTALL)
    pages = {page: page.read_text(encoding="utf-8") for page in sorted(folder.glob("*.md"))}
    if sum(len(pattern.findall(text)) for text in pages.values()) != 1:
        markers = f"<!-- {block} --> and <!-- /{block} -->"
        raise ValueError(f"expected the lines {markers} once in the .md files of {folder}")
    for page, text in pages.items():
        filled = pattern.sub(lambda match: f"{match[1]}{content}\n{match[2]}", text)
        if filled != text:
            page.write_text(filled, encoding="utf-8")
            print(page)


def read_runs(folders: Sequence[Path]) -> dict[str, Metrics]:
    """Read the metrics of each run by the name of its folder; runs without a loss are left out."""
    files: dict[str, Path] = {}
    for folder in folders:
        file = folder / METRICS
        found = [file] if file.is_file() else list(folder.glob(f"*/{METRICS}"))
        if not found:
            raise FileNotFoundError(f"no {METRICS} in {folder} or in folders inside it")
        files |= {file.parent.name: file for file in found}

    def order(name: str) -> tuple[int, str]:
        return ORDER.index(name) if name in ORDER else len(ORDER), name

    runs = {
        name: [json.loads(line) for line in files[name].read_text(encoding="utf-8").splitlines()]
        for name in sorted(files, key=order)
    }
    return {name: metrics for name, metrics in runs.items() if curve(metrics, "loss")}


def runs_table(runs: dict[str, Metrics]) -> str:
    """Format updates, hours and final losses of each run as Markdown."""
    table: list[tuple[str, ...]] = [
        ("run", "updates", "hours", "final loss", "final loss on held-out pairs")
    ]
    for name, metrics in runs.items():
        curves = [curve(metrics, key) for key in ("loss", "val_loss")]
        losses = (f"{points[-1][1]:.4f}" if points else "–" for points in curves)
        table.append((name, f"{metrics[-1]['step']:,}", f"{metrics[-1]['hours']:.1f}", *losses))
    return report.markdown_table(table)


def curve(metrics: Metrics, key: str) -> list[tuple[int, float]]:
    """Return (step, value) of the rows that have `key`."""
    return [(int(row["step"]), row[key]) for row in metrics if key in row]


def plot_losses(runs: dict[str, Metrics], file: Path) -> None:
    """Plot the smoothed training loss and the held-out loss, one panel for each run."""
    try:
        from matplotlib.figure import Figure  # pyplot would need a display
    except ImportError:
        raise ValueError(
            "loss curves need matplotlib: pip install matplotlib, or pip install '.[dev]'"
        ) from None
    columns, rows = min(4, len(runs)), -(-len(runs) // 4)
    figure = Figure(figsize=(3.2 * columns, 2.6 * rows), layout="constrained")
    for position, (name, metrics) in enumerate(runs.items(), start=1):
        axes = figure.add_subplot(rows, columns, position)
        steps, losses = zip(*curve(metrics, "loss"), strict=True)
        axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
        axes.plot(steps, smooth(losses), color="tab:blue", label="training")
        if held_out := curve(metrics, "val_loss"):
            axes.plot(*zip(*held_out, strict=True), color="tab:orange", label="held out")
        axes.set(title=name, xlabel="updates", yscale="log")
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    figure.savefig(file, dpi=110, metadata={"Software": None})


def smooth(values: Sequence[float]) -> list[float]:
    """Average each value with those before it, over a twentieth of all."""
    width = max(1, len(values) // 20)
    windows = (values[max(0, i + 1 - width) : i + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


if __name__ == "__main__":
    main()
