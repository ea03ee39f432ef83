"""The command `unclip`: draw from text or from a picture, and tell what models and pictures hold."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__

# torch and the models are imported by the commands that draw: `unclip --help` must answer at once.
if TYPE_CHECKING:
    import torch

    from .pipelines.base import TextToImage
    from .types import GenerationResult, UnCLIPOptions

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
SAMPLERS = ("ancestral", "ddim", "dpm++", "unipc")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; 0 = done, 2 = bad input (one line on stderr), 130 = interrupted."""
    warnings.showwarning = _show_warning
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `unclip info emoji | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="unclip", description="Text to image by CLIP latents (DALL-E 2, unCLIP).")
    parser.add_argument("--version", action="version", version=f"unclip {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add in (add_generate, add_variations, add_info, add_models):
        add(commands)
    return parser


# -- commands: each `add_` declares one and sets the function that runs it


def add_generate(commands: Any) -> None:
    parser = _command(commands, "generate", generate, "draw pictures of prompts")
    parser.add_argument("prompts", nargs="*", metavar="PROMPT")
    parser.add_argument("--prompts-file", type=Path, metavar="FILE", help="more prompts, one in each line; - for stdin")
    parser.add_argument("--from", dest="source", type=Path, metavar="PNG", help="draw a picture of unclip again")
    _add_drawing(parser)
    parser.add_argument("--prior-steps", type=int, metavar="N", help="steps of the prior")
    parser.add_argument("--prior-guidance", type=float, metavar="SCALE", help="guidance of the prior; 1 = none")
    parser.add_argument("--candidates", type=int, metavar="N", help="embeddings drawn, of which the best is decoded")


def generate(args: argparse.Namespace) -> None:
    if args.source is not None:
        return _redraw(args)
    prompts = [*args.prompts, *_read_prompts(args.prompts_file)]
    if not prompts:
        raise ValueError("no prompt; give at least one, or --prompts-file, or --from a picture")
    output = Output(args.output, args.grid, len(prompts) * args.num_images, columns=args.num_images)
    pipe = _load(args, args.model)
    result = pipe(prompts, options=_options(pipe, args), **_how(args))
    output.write(result, args.quiet)


def _redraw(args: argparse.Namespace) -> None:
    from .pictures import read_metadata

    if args.prompts or args.prompts_file:
        raise ValueError("give prompts or --from, not both")
    entries = read_metadata(args.source)
    output = Output(args.output, args.grid or len(entries) > 1, len(entries), columns=_columns(entries))
    results = []
    for entry in entries:
        dtype = args.dtype or {long: short for short, long in DTYPES.items()}.get(entry.get("dtype"))
        pipe = _load(argparse.Namespace(**{**vars(args), "dtype": dtype}), args.model or entry.get("model"))
        from .pipelines.base import redraw

        results.append(redraw(pipe, entry, progress=not args.quiet))
    output.write(results, args.quiet)
