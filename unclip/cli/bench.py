"""`unclip bench`: the speed and the memory of a model."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from unclip.checkpoints.folders import locate
from unclip.cli import arguments as flags
from unclip.cli.output import check_result, write_json
from unclip.evaluation import STAGES
from unclip.pipelines.presets import PRESETS

# Flags with --data, and their defaults.
LOADER = {"image_size": 64, "batch_size": 64, "workers": (0, 1, 2), "batches": 50, "step": 0.0}


def add_commands(commands: Any) -> None:
    about = "measure the speed and the memory of a model, or the speed of a data loader"
    parser = flags.add_command(commands, bench, about)
    flags.add_model(parser)
    parser.set_defaults(model=None)  # to notice --model with --data
    about = "number of images per warm call (default: 1)"
    parser.add_argument("--batch", help=about, **flags.COUNT)
    about = "number of measurements of each kind (default: 5)"
    parser.add_argument("--repeat", help=about, **flags.COUNT)
    unclip, dalle = (",".join(STAGES[kind]) for kind in ("unclip", "dalle"))
    about = f"some of {unclip}, or for a DALL-E of {dalle} (default: all)"
    parser.add_argument("--stages", type=lambda x: tuple(x.split(",")), metavar="A,B", help=about)
    about = "also time N images with and without reranking by CLIP"
    parser.add_argument("--num-candidates", help=about, **flags.COUNT)
    flags.add_renamed(parser, "--candidates", "--num-candidates", **flags.COUNT)
    extent = parser.add_mutually_exclusive_group()
    about = "extrapolate each stage from two of its steps (default for karlo-random)"
    extent.add_argument("--steps-only", action="store_true", help=about)
    about = "run all steps and whole calls, also for karlo-random"
    extent.add_argument("--whole", action="store_true", help=about)
    parser.add_argument("--preset", choices=PRESETS, help="named sampling options")
    flags.add_sampling(parser)
    flags.add_runtime(parser)
    about = "write the results to this file"
    parser.add_argument("--json", type=Path, metavar="FILE", help=about)
    flags.add_quiet(parser)
    about = "measure a data loader instead; PATH as data.path in a training config"
    data = parser.add_argument_group("data")
    data.add_argument("--data", metavar="PATH", help=about)
    about = "side of the images (default: 64)"
    data.add_argument("--image-size", help=about, **flags.COUNT)
    about = "images per batch (default: 64)"
    data.add_argument("--batch-size", help=about, **flags.COUNT)
    about = "numbers of worker processes to compare (default: 0,1,2)"
    data.add_argument("--workers", type=_numbers, metavar="A,B", help=about)
    about = "batches to load (default: 50)"
    data.add_argument("--batches", help=about, **flags.COUNT)
    about = "seconds per training step, during which workers load (default: 0)"
    data.add_argument("--step", type=flags.number, metavar="X", help=about)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(flags.at_least(0)(part) for part in text.split(","))


def _refuse(names: Iterable[str], args: Namespace, reason: str) -> None:
    """Raise a ValueError if one of these flags is given."""
    for name in names:
        if getattr(args, name):
            raise ValueError(f"--{name.replace('_', '-')} {reason}")


def bench(args: Namespace) -> None:
    from unclip.evaluation import bench as benchmark
    from unclip.evaluation.bench import tables
    from unclip.evaluation.report import Row, plain_table

    names = [field.name for field in fields(benchmark.BenchConfig)]
    if args.data is not None:
        reason = "cannot be given with --data, which measures a data loader"
        _refuse((*names, "whole"), args, reason)
        return _bench_data(args)
    _refuse(LOADER, args, "is for a data loader; give --data PATH with it")
    args.model = args.model or flags.DEFAULT_MODEL
    check_result(args.json)
    if args.model not in benchmark.RANDOM_MODELS:
        locate(args.model)  # an unknown name is reported before torch is imported
    if args.model in benchmark.KARLO and not (args.whole or args.preset):
        args.steps_only = True  # all steps take minutes on a CPU
    args.dtype = flags.DTYPES.get(args.dtype, args.dtype)
    given = {name: value for name in names if (value := getattr(args, name))}
    config = benchmark.BenchConfig(**{**given, "set": tuple(args.set or ())})
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


def _bench_data(args: Namespace) -> None:
    from dataclasses import asdict

    from unclip.data.bench import measure
    from unclip.data.loader import DataConfig

    check_result(args.json)
    for name, default in LOADER.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    config = DataConfig(args.data, args.image_size, args.batch_size)
    results = []
    print(f"{'workers':>7}  {'images/s':>9}  {'per worker':>10}  {'wait per step':>13}")
    for workers in args.workers:
        speed = measure(config, workers, args.batches, args.step)
        each = speed.images_per_second / max(1, workers)
        wait = f"{1000 * speed.wait:.1f} ms"
        print(f"{workers:>7}  {speed.images_per_second:>9.0f}  {each:>10.0f}  {wait:>13}")
        results.append(asdict(speed))
    write_json({"data": args.data, "step": args.step, "loader": results}, args.json)
