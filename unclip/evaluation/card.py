"""The figures of a model card: loss curves, sheets of pictures, and the tables between the markers of its README.md.

    python -m unclip.evaluation.card --out assets/emoji-dalle1 --runs runs/emoji/codec runs/emoji/dalle
    python -m unclip.evaluation.card --out assets/emoji --model assets/emoji --data 'data/emoji/heldout-*.tar' \
        --train-data 'data/emoji/train-*.tar'

With --data the model is evaluated first; without, the figures are those that evaluation.json in the folder holds. Where
bench.json (`unclip bench --json`) and priors.json (`unclip evaluate-priors --json`) lie, their tables are added.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unclip.cli.evaluate import add_evaluation, make_evaluation
from unclip.evaluation import bench, priors, report

README, EVALUATION, BENCH, PRIORS, LOSS = (
    "README.md",
    "evaluation.json",
    "bench.json",
    "priors.json",
    "loss.png",
)
METRICS = "metrics.jsonl"  # of a run
ORDER = (
    "clip",
    "prior",
    "decoder",
    "upsampler",
    "codec",
    "dalle",
)  # runs of other names come after these

Metrics = list[dict[str, float]]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="of the card")
    about = "training runs, which have a metrics.jsonl, or folders of several"
    parser.add_argument("--runs", type=Path, nargs="+", metavar="FOLDER", help=about)
    add_evaluation(parser, data_required=False)
    args = parser.parse_args(argv)
    try:
        make_card(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def make_card(args: argparse.Namespace) -> None:
    out: Path = args.out
    card = (out / README).read_text(encoding="utf-8")
    runs = read_runs(args.runs or ())
    if runs:
        draw_losses(runs, out / LOSS)
        card = fill(card, "runs", runs_table(runs))
    if args.data:
        from unclip.evaluation.sheets import write_sheets

        evaluation = make_evaluation(args)
        results = evaluation.run(args.parts)
        (out / EVALUATION).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        write_sheets(evaluation, out)
    if not runs or (out / EVALUATION).is_file():
        card = fill(card, "figures", figures(out))
    (out / README).write_text(card, encoding="utf-8")
    print(out / README)


def figures(folder: Path) -> str:
    """The tables of evaluation.json and, where they are, of priors.json and bench.json, as Markdown."""
    results = _read(folder / EVALUATION)
    parts = [
        f"On {results['held_out']['pairs']} held-out pairs, seed {results['seed']}; {sampling(results['options'])}",
        report.markdown([report.HEAD, *report.rows(results)]),
    ]
    if (folder / PRIORS).is_file():
        compared = _read(folder / PRIORS)
        about = "held-out captions, by `unclip evaluate-priors`; the decoder draws all embeddings from the same noise"
        parts += [
            f"Other priors, and none, on {compared['pairs']} {about}:",
            priors.table(compared["rows"]),
        ]
    if (folder / BENCH).is_file():
        timed = _read(folder / BENCH)
        head = report.Row("speed and memory", f"median of {timed['repeat']}", "spread")
        parts += [bench.describe(timed["machine"]), report.markdown([head, *bench.rows(timed)])]
    return "\n\n".join(parts)


def sampling(options: dict[str, Any]) -> str:
    """How pictures were drawn, and what of them is measured."""
    if "decoder" not in options:
        told = {name: value for name, value in options.items() if value is not None}
        return (
            ", ".join(f"{name.replace('_', '-')} {value:g}" for name, value in told.items()) + "."
        )
    stages = {"prior": options["prior"], "decoder": options["decoder"]}
    stages |= {f"upsampler {i}": stage for i, stage in enumerate(options["upsamplers"])}
    told = "; ".join(
        f"{name} {stage['sampler']}, {stage['steps']} steps, guidance {stage['guidance']:g}"
        for name, stage in stages.items()
    )
    return (
        f"{told}. Pictures are measured as the decoder draws them, before the upsampler: CLIP and the style classifier "
        "see no more pixels than that."
    )


def fill(text: str, name: str, content: str) -> str:
    """The text with `content` between its markers <!-- name --> and <!-- /name -->; ValueError if they are missing."""
    block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if len(block.findall(text)) != 1:
        raise ValueError(
            f"{README} needs the lines <!-- {name} --> and <!-- /{name} --> once, for what goes between"
        )
    return block.sub(lambda match: f"{match[1]}{content}\n{match[2]}", text)


def read_runs(folders: Sequence[Path]) -> dict[str, Metrics]:
    """The rows of each run's metrics.jsonl, by the name of its folder; runs without a loss yet are left out."""
    files: dict[str, Path] = {}
    for folder in folders:
        found = (
            [folder / METRICS]
            if (folder / METRICS).is_file()
            else list(folder.glob(f"*/{METRICS}"))
        )
        if not found:
            raise FileNotFoundError(
                f"no runs in {folder}; expected a {METRICS}, or folders with one"
            )
        files |= {file.parent.name: file for file in found}
    names = sorted(
        files, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name)
    )
    runs = {
        name: [json.loads(line) for line in files[name].read_text(encoding="utf-8").splitlines()]
        for name in names
    }
    return {name: metrics for name, metrics in runs.items() if curve(metrics, "loss")}


def runs_table(runs: dict[str, Metrics]) -> str:
    """Updates, hours and the last losses of each run, as Markdown."""
    lines = [
        "| run | updates | hours | last loss | last loss on held-out pairs |",
        "|---|---|---|---|---|",
    ]
    for name, metrics in runs.items():
        curves = [curve(metrics, key) for key in ("loss", "val_loss")]
        losses = [f"{found[-1][1]:.4f}" if found else "–" for found in curves]
        lines.append(
            f"| {name} | {metrics[-1]['step']:,} | {metrics[-1]['hours']:.1f} | {' | '.join(losses)} |"
        )
    return "\n".join(lines)


def curve(metrics: Metrics, key: str) -> list[tuple[int, float]]:
    """(step, value) of the rows that tell of `key`."""
    return [(int(row["step"]), row[key]) for row in metrics if key in row]


def draw_losses(runs: dict[str, Metrics], file: Path) -> None:
    """A panel for each run: its training loss, smoothed, and the loss on held-out pairs."""
    try:
        from matplotlib.figure import Figure  # not pyplot: no display is asked for
    except ImportError:
        raise ValueError(
            "loss curves need matplotlib: pip install matplotlib, or pip install 'unclip[dev]'"
        ) from None
    columns, rows = min(4, len(runs)), -(-len(runs) // 4)
    figure = Figure(figsize=(3.2 * columns, 2.6 * rows), layout="constrained")
    for place, (name, metrics) in enumerate(runs.items(), start=1):
        axes = figure.add_subplot(rows, columns, place)
        training, held_out = curve(metrics, "loss"), curve(metrics, "val_loss")
        steps, losses = zip(*training, strict=True)
        axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
        axes.plot(steps, smoothed(losses), color="tab:blue", label="training")
        if held_out:
            axes.plot(*zip(*held_out, strict=True), color="tab:orange", label="held out")
        axes.set(title=name, xlabel="updates", yscale="log")
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    figure.savefig(file, dpi=110, metadata={"Software": None})


def smoothed(values: Sequence[float]) -> list[float]:
    """The mean of the last twentieth of the values so far."""
    width = max(1, len(values) // 20)
    return [
        sum(part) / len(part)
        for i in range(len(values))
        if (part := values[max(0, i + 1 - width) : i + 1])
    ]


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing; write it with `unclip evaluate --json {file}`, or give --data"
        )
    return json.loads(file.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
