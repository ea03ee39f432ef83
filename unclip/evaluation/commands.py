"""The commands `unclip evaluate` and `unclip bench`; torch is imported when one of them runs."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unclip.checkpoints.catalogue import locate
from unclip.evaluation import PARTS

if TYPE_CHECKING:
    from unclip.evaluation.harness import Evaluation
    from unclip.types import UnCLIPOptions

MODEL = "emoji"
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def add_commands(commands: Any) -> None:
    """Declares both on the subparsers of `unclip`."""
    about = "measure what a model has learned, on pairs that it was not trained on"
    parser = commands.add_parser("evaluate", help=about, description=f"{about[0].upper()}{about[1:]}.")
    parser.set_defaults(run=evaluate)
    add_evaluation(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="write sheets of drawn pictures here")
    parser.add_argument("--prompts-file", type=Path, metavar="FILE", help="for the sheet of samples, one in each line")

    about = "measure how quick a model is and how much memory it takes"
    parser = commands.add_parser("bench", help=about, description=f"{about[0].upper()}{about[1:]}.")
    parser.set_defaults(run=bench)
    add_model(parser)
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="pictures in each warm call (default: 1)")
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="measurements of each kind (default: 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def add_model(parser: ArgumentParser) -> None:
    parser.add_argument("--model", default=MODEL, metavar="NAME", help=f"name, folder or Hub id (default: {MODEL})")
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda, mps (default: the fastest there is)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the networks (default: half precision on CUDA, else fp32)")


def add_evaluation(parser: ArgumentParser, data_required: bool = True) -> None:
    """Arguments of an evaluation; the model card takes them too."""
    add_model(parser)
    about = "held-out pairs: tars, or a folder"
    parser.add_argument("--data", nargs="+", required=data_required, metavar="DATA", help=about)
    parser.add_argument("--train-data", nargs="+", metavar="DATA", help="training pairs, for style and nearest ones")
    parser.add_argument("--limit", type=int, metavar="N", help="draw so many of the held-out pairs (default: all)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the first picture (default: 0)")
    parser.add_argument("--steps", type=int, metavar="N", help="sampling steps of the decoder")
    parser.add_argument("--decoder-guidance", type=float, metavar="SCALE", help="guidance of the decoder; 1 = none")
    parser.add_argument("--prior-steps", type=int, metavar="N", help="sampling steps of the prior")
    parser.add_argument("--prior-guidance", type=float, metavar="SCALE", help="guidance of the prior; 1 = none")
    parser.add_argument("--candidates", type=int, metavar="N", help="embeddings drawn; the best is decoded")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="pictures at once (default: 32)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def evaluate(args: Namespace) -> None:
    from unclip.evaluation import report

    _check_writable(args.json)
    prompts = _read_prompts(args.prompts_file)
    evaluation = make_evaluation(args)
    results = evaluation.run(args.parts)
    print(report.plain([report.HEAD, *report.rows(results)]))
    _write_json(results, args.json)
    if args.pictures is not None:
        from unclip.evaluation.sheets import PROMPTS, write_sheets

        for path in write_sheets(evaluation, args.pictures, prompts or PROMPTS):
            print(path)


def make_evaluation(args: Namespace) -> Evaluation:
    """The model and the data that the arguments name."""
    locate(args.model)  # a misspelt name is told before torch is imported
    import torch

    from unclip.evaluation.harness import Evaluation
    from unclip.evaluation.pairs import load_pairs
    from unclip.pipelines import load
    from unclip.pipelines.unclip import UnCLIPPipeline

    pipe = load(args.model, args.device, getattr(torch, DTYPES[args.dtype]) if args.dtype else None)
    if not isinstance(pipe, UnCLIPPipeline):
        raise ValueError(f"{args.model} is no unCLIP model, and only those can be evaluated")
    if args.batch_size < 1:
        raise ValueError(f"--batch-size is {args.batch_size}; expected at least 1")
    size = pipe.decoder.config.image_size
    held_out = load_pairs(args.data, size, args.limit, not args.quiet)
    train = load_pairs(args.train_data, size, None, not args.quiet) if args.train_data else None
    return Evaluation(
        pipe,
        held_out,
        train,
        options=_options(pipe.options, args),
        seed=args.seed,
        batch_size=args.batch_size,
        progress=not args.quiet,
    )


def bench(args: Namespace) -> None:
    from unclip.evaluation import bench as timing
    from unclip.evaluation import report

    _check_writable(args.json)
    locate(args.model)
    config = timing.BenchConfig(args.model, args.dtype, args.device, args.batch, args.repeat)
    results = timing.bench(config, not args.quiet)
    head = report.Row(f"{args.model}, median of {args.repeat}", "", "spread")
    print(timing.describe(results["machine"]))
    print(report.plain([head, *timing.rows(results)]))
    _write_json(results, args.json)


def _options(options: UnCLIPOptions, args: Namespace) -> UnCLIPOptions:
    """The model's own options, changed where the arguments say so."""

    def change(stage: Any, **values: Any) -> Any:
        return replace(stage, **{name: value for name, value in values.items() if value is not None})

    return change(
        options,
        prior=change(options.prior, steps=args.prior_steps, guidance=args.prior_guidance),
        decoder=change(options.decoder, steps=args.steps, guidance=args.decoder_guidance),
        prior_candidates=args.candidates,
    )


def _check_writable(file: Path | None) -> None:
    """Before hours of work: is there a folder that the file can go into?"""
    if file is not None and not file.parent.is_dir():
        raise ValueError(f"{file} cannot be written: there is no folder {file.parent}")


def _write_json(results: dict[str, Any], file: Path | None) -> None:
    if file is not None:
        file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        print(file)


def _read_prompts(file: Path | None) -> list[str]:
    if file is None:
        return []
    prompts = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{file} holds no prompt; expected one in each line")
    return prompts
