"""The command `unclip evaluate-priors`; torch is imported when it runs."""

from __future__ import annotations

from argparse import ArgumentTypeError, Namespace
from pathlib import Path
from typing import Any

from unclip.cli.arguments import SAMPLING, add_arguments, sampling_options
from unclip.cli.common import (
    add_command,
    add_model,
    check_writable,
    load_model,
    whole_number,
    write_figures,
)


def add_priors_command(commands: Any) -> None:
    """Declares it on the subparsers of `unclip`."""
    about = (
        "compare priors of one model, and its decoder without any, on the same held-out captions"
    )
    parser = add_command(commands, evaluate_priors, about)
    add_model(parser)
    about = "another prior beside the model's own (repeat for more)"
    parser.add_argument(
        "--prior",
        dest="priors",
        type=_named,
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help=about,
    )
    about = "guidance of one of them (default: that of the model's options)"
    parser.add_argument(
        "--prior-guidance",
        dest="scales",
        type=_named,
        action="append",
        default=[],
        metavar="NAME=SCALE",
        help=about,
    )
    parser.add_argument(
        "--data", nargs="+", required=True, metavar="DATA", help="held-out pairs: tars, or a folder"
    )
    parser.add_argument(
        "--limit",
        type=whole_number,
        default=128,
        metavar="N",
        help="take so many of them (default: 128)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="of the first caption (default: 0)"
    )
    parser.add_argument(
        "--batch-size",
        type=whole_number,
        default=32,
        metavar="N",
        help="pictures at once (default: 32)",
    )
    add_arguments(parser, SAMPLING)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def evaluate_priors(args: Namespace) -> None:
    check_writable(args.json)
    guidance = {name: _scale(name, value) for name, value in args.scales}
    pipe = load_model(args)
    if pipe.kind != "unclip":
        raise ValueError(f"{pipe.name} is of kind {pipe.kind}, which has no prior")

    from unclip.evaluation.pairs import load_pairs
    from unclip.evaluation.priors import PriorComparison, table
    from unclip.pipelines import load_prior

    comparison = PriorComparison(
        pipe,
        {name: load_prior(folder) for name, folder in args.priors},
        load_pairs(args.data, pipe.decoder.config.image_size, args.limit, not args.quiet),
        guidance=guidance,
        options=sampling_options(pipe, args),
        seed=args.seed,
        batch_size=args.batch_size,
        progress=not args.quiet,
    )
    results = {**comparison.settings(), "rows": []}
    for row in comparison.rows():
        results["rows"].append(row)
        head, line, cells = table([row]).splitlines()
        print(cells if len(results["rows"]) > 1 else f"{head}\n{line}\n{cells}", flush=True)
        write_figures(results, args.json, tell=False)  # whoever stops it keeps the rows until there
    if args.json is not None:
        print(args.json)


def _named(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not (name and sign and value):
        raise ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    return name, value


def _scale(name: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"--prior-guidance {name}={value}: expected a number") from None
