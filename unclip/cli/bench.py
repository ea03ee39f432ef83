"""`unclip bench`: the speed and the memory of a model."""

from __future__ import annotations

from argparse import SUPPRESS, ArgumentTypeError, Namespace
from dataclasses import fields
from pathlib import Path
from typing import Any

from unclip.checkpoints.folders import locate
from unclip.cli import arguments as flags
from unclip.cli.output import check_json, write_json
from unclip.evaluation import STAGES
from unclip.pipelines.presets import PRESETS

COMPARISONS = {
    "diffusers": "compare_diffusers.py",
    "diffusers-compiled": "compare_diffusers.py --compile-reference",
    "dalle-pytorch": "compare_dalle.py --reference dalle-pytorch",
    "plain": "compare_dalle.py --reference plain",
}


def add_commands(commands: Any) -> None:
    parser = flags.add_command(commands, bench, "measure the speed and the memory of a model")
    flags.add_model(parser)
    parser.add_argument("--against", type=_moved, choices=COMPARISONS, help=SUPPRESS)
    about = "number of images in each warm call (default: 1)"
    parser.add_argument("--batch", default=1, help=about, **flags.COUNT)
    about = "number of measurements of each kind (default: 5)"
    parser.add_argument("--repeat", default=5, help=about, **flags.COUNT)
    unclip, dalle = (",".join(STAGES[kind]) for kind in ("unclip", "dalle"))
    about = f"some of {unclip}, or for a DALL-E of {dalle} (default: all)"
    parser.add_argument("--stages", type=lambda x: tuple(x.split(",")), metavar="A,B", help=about)
    about = "also time N images with and without reranking by CLIP"
    parser.add_argument("--candidates", help=about, **flags.COUNT)
    extent = parser.add_mutually_exclusive_group()
    about = "extrapolate each stage from two of its steps (default for karlo-random)"
    extent.add_argument("--steps-only", action="store_true", help=about)
    about = "run all steps and whole calls, also for karlo-random"
    extent.add_argument("--whole", action="store_true", help=about)
    parser.add_argument("--preset", choices=PRESETS, help="sampling options by name")
    flags.add_runtime(parser)
    about = "write the results to this file"
    parser.add_argument("--json", type=Path, metavar="FILE", help=about)
    flags.add_quiet(parser)


def _moved(name: str) -> str:
    if name in COMPARISONS:
        script = f"tests/benchmarks/{COMPARISONS[name]}"
        raise ArgumentTypeError(f"the comparison with {name} has moved; run python {script}")
    return name


def bench(args: Namespace) -> None:
    from unclip.evaluation import bench as benchmark
    from unclip.evaluation.bench import tables
    from unclip.evaluation.report import Row, plain_table

    check_json(args.json)
    if args.model not in benchmark.RANDOM_MODELS:
        locate(args.model)  # an unknown name is reported before torch is imported
    if args.model in benchmark.KARLO and not (args.whole or args.preset):
        args.steps_only = True  # all steps take minutes on a CPU
    args.dtype = args.dtype and flags.DTYPES[args.dtype]
    names = [field.name for field in fields(benchmark.BenchConfig)]
    config = benchmark.BenchConfig(**{name: getattr(args, name) for name in names})
    results = benchmark.bench(config, not args.quiet)
    print(tables.describe_machine(results["machine"]))
    print(tables.describe_peak(results["machine_peak"], results["machine"]["dtype"]))
    head = Row(f"{config.model}, median of {config.repeat}", "", "lowest to highest")
    print(plain_table([head, *tables.bench_rows(results)]))
    bound = tables.memory_bound(results)
    if config.model == "karlo-random" and bound:  # a small model is mostly PyTorch itself
        print(bound)
    for line in tables.token_and_reranking_lines(results):
        print(line)
    print(f"\n{tables.stage_table(results)}")
    write_json(results, args.json)
