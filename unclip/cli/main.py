"""The command `unclip`: draws from text or from a picture, and tells what models and pictures hold."""

from __future__ import annotations

import argparse
import sys
import warnings
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unclip import __version__
from unclip.cli.arguments import (
    FROM_PICTURE,
    FROM_TEXT,
    RERANKING,
    SAMPLING,
    add_arguments,
    given,
    sampling_options,
)
from unclip.cli.bench import add_bench
from unclip.cli.common import (
    DEFAULT_MODEL,
    DTYPES,
    Drawing,
    Outlet,
    add_command,
    add_model,
    add_output,
    add_placement,
    check_output,
    columns_of,
    load_model,
    read_prompts,
    slug,
    whole_number,
    write,
)
from unclip.cli.evaluate import add_commands as add_evaluations
from unclip.cli.manipulate import add_commands as add_manipulations
from unclip.pipelines.memory import enable_memory_reuse

# torch and the models are imported by the commands that draw: `unclip --help` must answer at once.
if TYPE_CHECKING:
    from PIL import Image

    from unclip.pipelines.base import TextToImage

BATCH_SIZE = 16
LAYOUTS = ("unclip", "diffusers")
MODEL_ENDINGS = (".pt", ".pth", ".ckpt")
COMPLETING_MODEL = "emoji-dalle1"  # unless --model says otherwise
Drawn = list[tuple["Image.Image", dict[str, Any]]]  # pictures with their metadata


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. 0 = done, 2 = bad input (told in one line on stderr), 130 = interrupted."""
    out, err = (
        stream and Outlet(stream) for stream in (sys.stdout, sys.stderr)
    )  # None where a shell closed it
    enable_memory_reuse()
    with warnings.catch_warnings(), redirect_stdout(out), redirect_stderr(err):
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        try:
            args = _parser().parse_args(argv)
            args.run(args)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ValueError(f"{message} ({self.prog} --help tells more)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="unclip",
        description="Text to image by CLIP latents (DALL-E 2, unCLIP), or by image codes (DALL-E 1).",
    )
    parser.add_argument("--version", action="version", version=f"unclip {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    drawing = (_add_generate, _add_variations, _add_complete, add_manipulations)
    for add in (
        *drawing,
        _add_info,
        _add_models,
        _add_convert,
        add_evaluations,
        add_bench,
    ):
        add(commands)
    return parser


# Each command is a function, with an `_add_` that declares its arguments.


def _add_generate(commands: Any) -> None:
    parser = add_command(commands, generate, "draw pictures of prompts")
    parser.add_argument("prompts", nargs="*", metavar="PROMPT")
    parser.add_argument(
        "--prompts-file", type=Path, metavar="FILE", help="more prompts, one in each line"
    )
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="PNG",
        help="draw again what a PNG of unclip shows",
    )
    _add_drawing(parser)
    parser.set_defaults(model=None)  # with --from, that of the picture
    add_arguments(parser, SAMPLING, FROM_TEXT, RERANKING)


def generate(args: Namespace) -> None:
    if args.source is not None:
        return _redraw(args)
    prompts = [*args.prompts, *read_prompts(args.prompts_file)]
    if not prompts:
        raise ValueError("no prompt; give at least one, or --prompts-file, or --from a picture")
    if args.mix is not None:
        prompts = [_mixture(prompts, args.mix)]
    count = len(prompts) * args.num_images
    check_output(args, count)
    args.model = args.model or DEFAULT_MODEL
    pipe = load_model(args)
    options = sampling_options(pipe, args)
    for rows, drawing in _drawings(args, len(prompts)):
        result = pipe(
            prompts[rows],
            **_told(negative_prompt=args.negative, num_candidates=args.candidates),
            **drawing,
            options=options,
            batch_size=BATCH_SIZE,
            progress=not args.quiet,
        )
        _write(list(zip(result.images, result.metadata, strict=True)), args)


def _drawings(args: Namespace, num_prompts: int = 1) -> Iterator[tuple[slice, dict[str, int]]]:
    """Some prompts at a time, with num_images and seed of their call: what is drawn is written before the next call.

    So whoever interrupts a long list keeps its beginning. A grid needs all pictures at once, a choice all candidates.
    """
    from unclip.pipelines.base import seeds_from, split_batches

    candidates = getattr(args, "candidates", None)
    each = candidates or args.num_images
    at_once = BATCH_SIZE if candidates is None else max(BATCH_SIZE, each)
    seeds = seeds_from(args.seed, num_prompts * each)
    for rows, n in split_batches(num_prompts, each, len(seeds) if args.grid else at_once):
        yield rows, {"num_images": args.num_images if candidates else n, "seed": seeds[0]}
        seeds = seeds[n * len(range(num_prompts)[rows]) :]


def _told(**arguments: Any) -> dict[str, Any]:
    """Those that are given: other kinds of models don't know them."""
    return {name: value for name, value in arguments.items() if value is not None}


def _mixture(prompts: Sequence[str], weights: Sequence[float]) -> dict[str, float]:
    if len(prompts) != len(weights):
        raise ValueError(
            f"--mix gives {len(weights)} weights for {len(prompts)} prompts; expected one for each"
        )
    mixture = dict.fromkeys(prompts, 0.0)
    for prompt, weight in zip(prompts, weights, strict=True):
        mixture[prompt] += weight
    return mixture


def _redraw(args: Namespace) -> None:
    from unclip.image_io import read_metadata

    if (
        args.prompts
        or args.prompts_file
        or args.num_images > 1
        or args.seed is not None
        or given(args)
    ):
        raise ValueError(
            "--from draws what the picture says; prompts, seed and sampling options cannot be given with it"
        )
    entries = read_metadata(args.source)
    args.grid = args.grid or len(entries) > 1
    check_output(args, len(entries))
    stored = {long: short for short, long in DTYPES.items()}.get(entries[0].get("dtype"))
    args.prior, args.quantize = (
        entries[0].get("prior_model"),
        args.quantize or entries[0].get("quantized"),
    )
    args.model = args.model or entries[0].get("model") or DEFAULT_MODEL
    pipe = load_model(args, stored)

    from unclip.pipelines.base import redraw

    latents: dict[str, Any] = {}  # of pictures that several entries were made of
    results = [redraw(pipe, entry, progress=not args.quiet, latents=latents) for entry in entries]
    _write([(result.images[0], result.metadata[0]) for result in results], args)


def _add_variations(commands: Any) -> None:
    parser = add_command(commands, variations, "draw pictures that mean what a picture means")
    parser.add_argument("image", type=Path, metavar="IMAGE")
    _add_drawing(parser)
    add_arguments(parser, SAMPLING, FROM_PICTURE)
    _add_fit(parser)


def variations(args: Namespace) -> None:
    from unclip.image_io import open_image

    image = open_image(args.image)
    check_output(args, args.num_images)
    pipe = load_model(args)
    image, options = _fitted(image, pipe, args), sampling_options(pipe, args)
    for _, drawing in _drawings(args):
        told = _told(prompt=args.prompt, keep=args.keep)
        result = pipe.variations(image, **told, **drawing, options=options, progress=not args.quiet)
        _write(list(zip(result.images, result.metadata, strict=True)), args, name=args.image.stem)


def _add_complete(commands: Any) -> None:
    parser = add_command(
        commands, complete, "draw the rest of a picture whose beginning is given (DALL-E)"
    )
    parser.add_argument("image", type=Path, metavar="IMAGE")
    parser.add_argument(
        "caption", nargs="?", metavar="PROMPT", help="what it is to show (default: nothing said)"
    )
    _add_drawing(parser, COMPLETING_MODEL)
    about = "how much of the picture stays, from the top, in [0, 1) (default: 0.4375)"
    parser.add_argument("--keep", type=float, metavar="X", help=about)
    add_arguments(parser, SAMPLING, RERANKING)
    _add_fit(parser)


def complete(args: Namespace) -> None:
    from unclip.image_io import open_image

    image = open_image(args.image)
    check_output(args, args.num_images)
    pipe = load_model(args)
    if not hasattr(pipe, "complete"):
        raise ValueError(
            f"{pipe.name} is of kind {pipe.kind}, which completes no pictures; give a DALL-E as --model"
        )
    image, options = _fitted(image, pipe, args), sampling_options(pipe, args)
    for _, drawing in _drawings(args):
        told = _told(keep=args.keep, num_candidates=args.candidates)
        result = pipe.complete(
            image, args.caption, **told, **drawing, options=options, progress=not args.quiet
        )
        _write(list(zip(result.images, result.metadata, strict=True)), args, name=args.image.stem)


def _add_fit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--fit",
        action="store_true",
        help="DALL-E: take the picture's middle square, at the right size",
    )


def _fitted(image: Image.Image, pipe: TextToImage, args: Namespace) -> Image.Image:
    if not args.fit or pipe.kind != "dalle":  # others take any size
        return image

    from unclip.pipelines.unclip.bound_stage import fit

    return fit(image, pipe.codec.image_size)


def _add_info(commands: Any) -> None:
    parser = add_command(commands, info, "tell what a model holds, or how a picture was drawn")
    about = "bundled name, folder, checkpoint file (.pt, .pth, .ckpt) or Hub id; or a picture of unclip's"
    parser.add_argument("target", metavar="MODEL|PNG", help=about)


def info(args: Namespace) -> None:
    path = Path(args.target)
    if path.is_file() and path.suffix.lower() not in MODEL_ENDINGS:
        _picture_info(path)
    else:
        _model_info(args.target)


def _picture_info(path: Path) -> None:
    import shlex

    from unclip.image_io import lacks_image, read_metadata

    entries = read_metadata(path)
    for entry in entries:
        held = {
            "image_emb": "a CLIP image embedding",
            "sources": "latents",
            "picture": "another picture",
        }
        told = {key: value for key, value in entry.items() if key not in ("options", "mask", *held)}
        for key in held.keys() & entry.keys():
            holds = "does not hold" if lacks_image(entry) else "holds"
            told["drawn from"] = f"{held[key]}, which the picture {holds}"
        for key, value in {**told, **entry.get("options", {})}.items():
            print(f"{key}: {_one_line(value)}")
        print()
    if any(map(lacks_image, entries)):
        print("it cannot be drawn again: what it was drawn from was too large for its metadata")
    else:
        print(f"draw it again: unclip generate --from {shlex.quote(str(path))} -o again.png")


def _model_info(name: str) -> None:
    from unclip.checkpoints.folders import FORMAT_NAME, locate
    from unclip.checkpoints.summary import summary

    folder = locate(name)
    model = summary(folder)
    print(
        f"{model.name}: {model.kind} in {folder}{'' if model.format == FORMAT_NAME else f' (format: {model.format})'}"
    )
    print(f"licence: {model.licence or 'not told'}\n")
    for part in model.components:
        lent = f", from {part.shared_from}" if part.shared_from else ""
        print(_size_line(part.name, part.parameters, part.size), " + ".join(part.dtypes) + lent)
    parameters, size = (
        sum(getattr(part, of) for part in model.components) for of in ("parameters", "size")
    )
    print(_size_line("all", parameters, size))
    if model.options:
        print("\ndefault options:")
    for key, value in model.options.items():
        print(f"  {key}: {_one_line(value)}")


def _one_line(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(
            f"{key} {_one_line(item)}" for key, item in value.items() if item is not None
        )
    return "; ".join(map(_one_line, value)) if isinstance(value, list) else str(value)


def _size_line(name: str, parameters: int, size: int) -> str:
    return f"{name:<16}{parameters / 1e6:10.2f} M parameters{size / 1e6:10.2f} MB "


def _add_models(commands: Any) -> None:
    add_command(commands, models, "list the bundled models")


def models(args: Namespace) -> None:
    from unclip.checkpoints.folders import bundled_models, read_model_json
    from unclip.checkpoints.summary import describe

    for name, folder in bundled_models().items():
        size = sum(part.size for part in describe(folder) if part.shared_from is None)
        print(f"{name}  {size / 1e6:.0f} MB  {read_model_json(folder)['licence']}")


def _add_convert(commands: Any) -> None:
    parser = add_command(commands, convert, "write a model in another layout")
    parser.add_argument(
        "source", metavar="MODEL", help="bundled name, folder, checkpoint file or Hub id"
    )
    parser.add_argument("output", type=Path, metavar="FOLDER")
    layout = "our own layout (default), or diffusers' unCLIP pipelines'"
    parser.add_argument("--to", choices=LAYOUTS, default=LAYOUTS[0], help=layout)
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the weights (default: as they are stored)"
    )


def convert(args: Namespace) -> None:
    from unclip.checkpoints.folders import locate

    source = locate(args.source)  # a misspelt name is told before torch is imported

    import torch

    from unclip.checkpoints.convert import convert

    convert(source, args.output, args.to, args.dtype and getattr(torch, DTYPES[args.dtype]))
    print(args.output)


def _add_drawing(parser: argparse.ArgumentParser, model: str = DEFAULT_MODEL) -> None:
    add_model(parser, model)
    add_placement(parser)
    parser.add_argument(
        "-n",
        "--num-images",
        type=whole_number,
        default=1,
        metavar="N",
        help="pictures of each (default: 1)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        metavar="S",
        help="of the first picture, the next has S + 1 (default: random)",
    )
    add_output(parser)


def _write(drawn: Drawn, args: Namespace, name: str = "") -> None:
    drawings = []
    for i, (picture, metadata) in enumerate(drawn):
        seed = metadata["seed"] if metadata["seed"] is not None else i
        drawings.append(
            Drawing(f"{slug(_in_words(metadata.get('prompt')) or name)}-{seed}", picture, metadata)
        )
    write(drawings, args, columns_of([metadata for _, metadata in drawn]))


def _in_words(prompt: str | dict[str, float] | None) -> str:
    return prompt if isinstance(prompt, str) else " and ".join(prompt or ())
