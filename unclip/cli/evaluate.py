"""The commands `unclip evaluate`, `unclip bench` and `unclip drift`; torch is imported when one of them runs."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unclip.checkpoints.folders import locate
from unclip.cli.arguments import PRIOR, SAMPLING, add_arguments, sampling_options
from unclip.cli.common import (
    add_command,
    add_model,
    check_writable,
    load_model,
    load_named,
    read_prompts,
    whole_number,
    write_figures,
)
from unclip.evaluation import CODE_STAGES, PARTS, STAGES
from unclip.files import read_json
from unclip.pipelines.presets import PRESETS

if TYPE_CHECKING:
    from unclip.evaluation.bench import BenchConfig
    from unclip.evaluation.bench.turns import Comparison
    from unclip.evaluation.harness import Evaluation

AGAINST = ("diffusers", "diffusers-compiled", "dalle-pytorch", "plain")


def add_commands(commands: Any) -> None:
    """Declares them on the subparsers of `unclip`."""
    parser = add_command(
        commands, evaluate, "measure what a model has learned, on pairs that it was not trained on"
    )
    add_evaluation(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    parser.add_argument(
        "--pictures", type=Path, metavar="FOLDER", help="write sheets of drawn pictures here"
    )
    parser.add_argument(
        "--prompts-file",
        type=Path,
        metavar="FILE",
        help="for the sheet of samples, one in each line",
    )

    parser = add_command(
        commands, bench, "measure how quick a model is and how much memory it takes"
    )
    add_model(parser)
    parser.add_argument("--against", choices=AGAINST, help="take turns with its networks")
    parser.add_argument(
        "--batch",
        type=whole_number,
        default=1,
        metavar="N",
        help="pictures in each warm call (default: 1)",
    )
    parser.add_argument(
        "--repeat",
        type=whole_number,
        metavar="N",
        help="measurements of each kind (default: 5; --against: 3)",
    )
    about = (
        f"some of {','.join(STAGES)}; of a DALL-E some of {','.join(CODE_STAGES)} (default: all)"
    )
    parser.add_argument("--stages", type=_stages, metavar="A,B", help=about)
    about = "also time N pictures with and without CLIP choosing the best of them"
    parser.add_argument("--candidates", type=whole_number, metavar="N", help=about)
    about = "compose each stage from two of its steps (default for karlo-random)"
    parser.add_argument("--steps-only", action="store_true", help=about)
    about = (
        "all steps and whole pictures, where a few steps are the default (karlo-random, --against)"
    )
    parser.add_argument("--whole", action="store_true", help=about)
    parser.add_argument("--preset", choices=PRESETS, help="options by name")
    parser.add_argument("--compile", action="store_true", help="as unclip.compile does")
    parser.add_argument("--quantize", choices=("int8",), help="the weights")
    parser.add_argument(
        "--offload", action="store_true", help="keep one network in memory at a time"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")

    parser = add_command(
        commands, drift, "measure how far faster options stray from the exact result"
    )
    add_model(parser)
    parser.add_argument(
        "--data", nargs="+", required=True, metavar="DATA", help="captions: tars, or a folder"
    )
    parser.add_argument(
        "--limit",
        type=whole_number,
        default=128,
        metavar="N",
        help="draw so many pictures (default: 128)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="of the first picture (default: 0)"
    )
    parser.add_argument(
        "--batch-size",
        type=whole_number,
        default=16,
        metavar="N",
        help="pictures at once (default: 16)",
    )
    about = "keep all figures here, row by row: started again, it goes on where it stopped"
    parser.add_argument("--json", type=Path, metavar="FILE", help=about)
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def _stages(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def add_evaluation(parser: ArgumentParser, data_required: bool = True) -> None:
    """Arguments of an evaluation; the model card takes them too."""
    add_model(parser)
    about = "held-out pairs: tars, or a folder"
    parser.add_argument("--data", nargs="+", required=data_required, metavar="DATA", help=about)
    parser.add_argument(
        "--train-data", nargs="+", metavar="DATA", help="training pairs, for style and nearest ones"
    )
    parser.add_argument(
        "--limit",
        type=whole_number,
        metavar="N",
        help="draw so many of the held-out pairs (default: all)",
    )
    about = "another model, drawn of the same captions for comparison"
    parser.add_argument("--beside", metavar="NAME", help=about)
    known = dict.fromkeys(part for parts in PARTS.values() for part in parts)
    parser.add_argument(
        "--parts", nargs="+", choices=known, metavar="PART", help=f"some of {', '.join(known)}"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="of the first picture (default: 0)"
    )
    add_arguments(parser, SAMPLING, PRIOR)
    parser.add_argument(
        "--batch-size",
        type=whole_number,
        default=32,
        metavar="N",
        help="pictures at once (default: 32)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def evaluate(args: Namespace) -> None:
    from unclip.evaluation import report
    from unclip.evaluation.sheets import PROMPTS, write_sheets

    check_writable(args.json)
    prompts = read_prompts(args.prompts_file)
    evaluation = make_evaluation(args)
    results = evaluation.run(
        args.parts, keep=lambda results: write_figures(results, args.json, tell=False)
    )
    print(report.plain([report.HEAD, *report.rows(results)]))
    write_figures(results, args.json)
    if args.pictures is not None:
        for path in write_sheets(evaluation, args.pictures, prompts or PROMPTS):
            print(path)


def make_evaluation(args: Namespace) -> Evaluation:
    """The model and the data that the arguments name."""
    pipe = load_model(args)
    beside = None if args.beside is None else load_named(args.beside, args.device, args.dtype)

    from unclip.evaluation.dalle_harness import DalleEvaluation
    from unclip.evaluation.drawing import DalleDrawer, UnCLIPDrawer
    from unclip.evaluation.pairs import load_pairs
    from unclip.evaluation.unclip_harness import UnCLIPEvaluation

    drawers = {"unclip": UnCLIPDrawer, "dalle": DalleDrawer}
    for other in (pipe, beside):
        if other is not None and other.kind not in drawers:
            raise ValueError(
                f"{other.name} is of kind {other.kind}; only unCLIP models and DALL-Es can be evaluated"
            )
    drawing = {"batch_size": args.batch_size, "progress": not args.quiet}
    drawer = drawers[pipe.kind](pipe, sampling_options(pipe, args), **drawing)
    held_out = load_pairs(args.data, drawer.size, args.limit, not args.quiet)
    train = (
        load_pairs(args.train_data, drawer.size, None, not args.quiet) if args.train_data else None
    )
    evaluation = {"unclip": UnCLIPEvaluation, "dalle": DalleEvaluation}[pipe.kind]
    beside = beside and drawers[beside.kind](beside, **drawing)
    return evaluation(drawer, held_out, train, beside=beside, seed=args.seed)


def bench(args: Namespace) -> None:
    from unclip.evaluation.bench import KARLO, RANDOM, BenchConfig

    check_writable(args.json)
    if args.model not in RANDOM:
        locate(args.model)
    if args.repeat is None:
        args.repeat = 3 if args.against else 5
    if args.steps_only and args.whole:
        raise ValueError("--steps-only and --whole exclude each other")
    if args.model in KARLO and not (args.against or args.whole or args.preset):
        args.steps_only = True  # all of them take minutes on a CPU
    config = BenchConfig(**{field.name: getattr(args, field.name) for field in fields(BenchConfig)})
    (_bench_against if args.against else _bench_alone)(config, args)


def _bench_alone(config: BenchConfig, args: Namespace) -> None:
    from unclip.evaluation import bench as timing
    from unclip.evaluation import report
    from unclip.evaluation.bench import tables

    results = timing.bench(config, not args.quiet)
    print(tables.describe(results["machine"]))
    print(tables.describe_peak(results["machine_peak"], results["machine"]["dtype"]))
    head = report.Row(f"{config.model}, median of {config.repeat}", "", "lowest to highest")
    print(report.plain([head, *tables.rows(results)]))
    if config.model == "karlo-random" and (
        claim := tables.memory_claim(results)
    ):  # a small one is all PyTorch
        print(claim)
    for line in tables.other_claims(results):
        print(line)
    print(f"\n{tables.stage_table(results)}")
    write_figures(results, args.json)


def _bench_against(config: BenchConfig, args: Namespace) -> None:
    from unclip.evaluation.bench import tables

    if config.preset or config.quantize or config.offload or config.candidates:
        raise ValueError(
            "--against measures the exact options and the preset 'fast', of unchanged networks"
        )
    against, rows = _rows_against(config, args)
    from unclip.evaluation.bench.memory import PeakMemory
    from unclip.evaluation.bench.stages import where
    from unclip.evaluation.bench.turns import begin

    results = begin(config, against)
    memory = PeakMemory(where(config)[0])
    print(tables.describe(results["machine"]))
    print(tables.describe_peak(results["machine_peak"], results["machine"]["dtype"]))
    try:
        for row in rows:
            results["rows"].append(row.plain())
            print(tables.comparison(results["rows"][-1]), flush=True)
            write_figures(
                results, args.json, tell=False
            )  # whoever stops it keeps the rows until there
    finally:
        if results["rows"]:
            results["peak_memory"] = memory.highest
            print(f"\n{tables.comparison_table(results)}")
            write_figures(results, args.json)


def _rows_against(config: BenchConfig, args: Namespace) -> tuple[str, Iterator[Comparison]]:
    if not args.against.startswith("diffusers"):
        from unclip.evaluation.bench import compare_codes

        return compare_codes.compare(config, args.against, not args.quiet)
    try:
        from unclip.evaluation.bench import compare
    except ImportError as error:
        raise ValueError(
            f"this diffusers cannot be compared with ({error}); version 0.42 can"
        ) from None
    return compare.compare(config, args.against == "diffusers-compiled", args.whole, not args.quiet)


def drift(args: Namespace) -> None:
    check_writable(args.json)
    pipe = load_model(args)
    if pipe.kind != "unclip":
        raise ValueError(f"{args.model} is no unCLIP model, and only those have faster options")
    from unclip.config import to_dict
    from unclip.evaluation.drift import Drift, line, table
    from unclip.evaluation.pairs import load_pairs
    from unclip.pipelines import load

    pairs = load_pairs(args.data, pipe.decoder.config.image_size, args.limit, not args.quiet)
    measured = Drift(
        pipe,
        pairs.captions,
        lambda dtype: load(args.model, args.device, dtype),
        seed=args.seed,
        batch_size=args.batch_size,
        progress=not args.quiet,
    )
    settings = {
        "model": args.model,
        "seed": args.seed,
        "pictures": len(pairs),
        "options": to_dict(pipe.options),
    }
    results = {
        **settings,
        "machine": {"device": str(pipe.device), "dtype": str(pipe.dtype)},
        "rows": [],
    }
    if args.json and args.json.is_file():
        before = read_json(args.json)
        if any(before.get(name) != value for name, value in results.items() if name != "rows"):
            raise ValueError(f"{args.json} holds figures of other settings; give another file")
        results = before
    try:
        for row in measured.rows(done=[row["name"] for row in results["rows"]]):
            results["rows"].append(row)
            print("  ".join(line(row)), flush=True)
            write_figures(
                results, args.json, tell=False
            )  # whoever stops it keeps the rows until there
    finally:
        if results["rows"]:
            print(f"\n{table(results['rows'])}")
            write_figures(results, args.json)
