"""The command `unclip`: draws from text or from a picture, and tells what models and pictures hold."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unclip import __version__
from unclip.evaluation.commands import add_commands

# torch and the models are imported by the commands that draw: `unclip --help` must answer at once.
if TYPE_CHECKING:
    from PIL import Image

    from unclip.pipelines.base import TextToImage
    from unclip.types import UnCLIPOptions

DEFAULT_MODEL = "emoji"
BATCH_SIZE = 16
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
SAMPLERS = ("ancestral", "ddim", "dpm++", "unipc")
Drawn = list[tuple["Image.Image", dict[str, Any]]]  # pictures with their metadata


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. 0 = done, 2 = bad input (told in one line on stderr), 130 = interrupted."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        try:
            args = _parser().parse_args(argv)
            args.run(args)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:  # the reader of a pipe has gone; Python must not complain when it flushes at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ValueError(f"{message} ({self.prog} --help tells more)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="unclip", description="Text to image by CLIP latents (DALL-E 2, unCLIP).")
    parser.add_argument("--version", action="version", version=f"unclip {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add in (_add_generate, _add_variations, _add_info, _add_models, add_commands):
        add(commands)
    return parser


def _command(commands: Any, run: Callable[[Namespace], None], about: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(run.__name__, help=about, description=f"{about[0].upper()}{about[1:]}.")
    parser.set_defaults(run=run)
    return parser


# Each command is a function, with an `_add_` that declares its arguments.


def _add_generate(commands: Any) -> None:
    parser = _command(commands, generate, "draw pictures of prompts")
    parser.add_argument("prompts", nargs="*", metavar="PROMPT")
    parser.add_argument("--prompts-file", type=Path, metavar="FILE", help="more prompts, one in each line")
    parser.add_argument("--from", dest="source", type=Path, metavar="PNG", help="draw again what a PNG of unclip shows")
    _add_drawing(parser)
    parser.add_argument("--prior-steps", type=int, metavar="N", help="sampling steps of the prior")
    parser.add_argument("--prior-guidance", type=float, metavar="SCALE", help="guidance of the prior; 1 = none")
    parser.add_argument("--candidates", type=int, metavar="N", help="embeddings drawn; the best is decoded")


def generate(args: Namespace) -> None:
    if args.source is not None:
        return _redraw(args)
    prompts = [*args.prompts, *_read_prompts(args.prompts_file)]
    if not prompts:
        raise ValueError("no prompt; give at least one, or --prompts-file, or --from a picture")
    count = len(prompts) * args.num_images
    _check_output(args, count)
    pipe = _load(args, args.model or DEFAULT_MODEL, args.dtype)

    from unclip.pipelines.base import seeds_from

    # Written as they are drawn, so that whoever interrupts a long list keeps its beginning; a grid needs them all.
    at_once = len(prompts) if args.grid else max(1, BATCH_SIZE // args.num_images)
    seeds, options = seeds_from(args.seed, count), _options(pipe, args)
    for i in range(0, len(prompts), at_once):
        result = pipe(
            prompts[i : i + at_once],
            num_images=args.num_images,
            seed=seeds[i * args.num_images],
            options=options,
            batch_size=BATCH_SIZE,
            progress=not args.quiet,
        )
        _write(list(zip(result.images, result.metadata, strict=True)), args)


def _redraw(args: Namespace) -> None:
    from unclip.pictures import read_metadata

    said = ("seed", "steps", "guidance", "sampler", "upsampler_steps", "prior_steps", "prior_guidance", "candidates")
    asked = [name for name in said if vars(args)[name] is not None]
    if args.prompts or args.prompts_file or args.num_images > 1 or asked:
        raise ValueError(
            "--from draws what the picture says; prompts, seed and sampling options cannot be given with it"
        )
    entries = read_metadata(args.source)
    args.grid = args.grid or len(entries) > 1
    _check_output(args, len(entries))
    stored = {long: short for short, long in DTYPES.items()}.get(entries[0].get("dtype"))
    pipe = _load(args, args.model or entries[0].get("model", DEFAULT_MODEL), args.dtype or stored)

    from unclip.pipelines.base import redraw

    results = [redraw(pipe, entry, progress=not args.quiet) for entry in entries]
    _write([(result.images[0], result.metadata[0]) for result in results], args)


def _add_variations(commands: Any) -> None:
    parser = _command(commands, variations, "draw pictures that mean what a picture means")
    parser.add_argument("image", type=Path, metavar="IMAGE")
    _add_drawing(parser)


def variations(args: Namespace) -> None:
    from unclip.pictures import open_picture

    image = open_picture(args.image)
    _check_output(args, args.num_images)
    pipe = _load(args, args.model or DEFAULT_MODEL, args.dtype)
    result = pipe.variations(
        image, num_images=args.num_images, seed=args.seed, options=_options(pipe, args), progress=not args.quiet
    )
    _write(list(zip(result.images, result.metadata, strict=True)), args, name=args.image.stem)


def _add_info(commands: Any) -> None:
    parser = _command(commands, info, "tell what a model holds, or how a picture was drawn")
    parser.add_argument("target", metavar="MODEL|PNG")


def info(args: Namespace) -> None:
    if Path(args.target).is_file():
        _picture_info(Path(args.target))
    else:
        _model_info(args.target)


def _picture_info(path: Path) -> None:
    import shlex

    from unclip.pictures import read_metadata

    for entry in read_metadata(path):
        told = {key: value for key, value in entry.items() if key not in ("options", "image_emb")}
        if "image_emb" in entry:
            told["drawn from"] = "a CLIP image embedding, which the picture holds"
        for key, value in {**told, **entry.get("options", {})}.items():
            print(f"{key}: {_one_line(value)}")
        print()
    print(f"draw it again: unclip generate --from {shlex.quote(str(path))} -o again.png")


def _model_info(name: str) -> None:
    from unclip.checkpoints.catalogue import OPTIONS_FILE, describe, locate, read_json, read_model_json

    folder = locate(name)
    model, components = read_model_json(folder), describe(folder)
    print(f"{model['name']}: {model['kind']} in {folder}")
    print(f"licence: {model['licence'] or 'not told'}\n")
    for part in components:
        print(_size_line(part.name, part.parameters, part.size), " + ".join(part.dtypes))
    print(_size_line("all", sum(part.parameters for part in components), sum(part.size for part in components)))
    print("\ndefault options:")
    for key, value in read_json(folder / OPTIONS_FILE).items():
        print(f"  {key}: {_one_line(value)}")


def _one_line(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_one_line(item)}" for key, item in value.items() if item is not None)
    return "; ".join(map(_one_line, value)) if isinstance(value, list) else str(value)


def _size_line(name: str, parameters: int, size: int) -> str:
    return f"{name:<12}{parameters / 1e6:10.2f} M parameters{size / 1e6:10.2f} MB "


def _add_models(commands: Any) -> None:
    _command(commands, models, "list the bundled models")


def models(args: Namespace) -> None:
    from unclip.checkpoints.catalogue import bundled_models, describe, read_model_json

    for name, folder in bundled_models().items():
        size = sum(part.size for part in describe(folder))
        print(f"{name}  {size / 1e6:.0f} MB  {read_model_json(folder)['licence']}")


def _add_drawing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="NAME", help=f"bundled name, folder or Hub id (default: {DEFAULT_MODEL})")
    parser.add_argument("-n", "--num-images", type=_count, default=1, metavar="N", help="pictures of each (default: 1)")
    parser.add_argument(
        "--seed", type=int, metavar="S", help="of the first picture, the next has S + 1 (default: random)"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="sampling steps of the decoder")
    parser.add_argument("--guidance", type=float, metavar="SCALE", help="guidance of the decoder; 1 = none")
    parser.add_argument("--sampler", choices=SAMPLERS, help="sampler of the decoder")
    parser.add_argument("--upsampler-steps", type=int, metavar="N", help="sampling steps of each upsampler")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="PATH", help="a .png file, or a folder (default: this one)"
    )
    parser.add_argument("--grid", action="store_true", help="write one sheet with all pictures")
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, mps (default: the fastest there is)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the networks (default: half precision on CUDA, else fp32)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no file names")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _read_prompts(file: Path | None) -> list[str]:
    if file is None:
        return []
    try:
        prompts = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not UTF-8 text; expected one prompt in each line") from None
    if not prompts:
        raise ValueError(f"{file} holds no prompt; expected one in each line")
    return prompts


def _load(args: Namespace, model: str, dtype: str | None) -> TextToImage:
    from unclip.pipelines import load

    if dtype is None:
        return load(model, args.device)  # which tells a misspelt name before torch is imported

    import torch

    return load(model, args.device, getattr(torch, DTYPES[dtype]))


def _options(pipe: TextToImage, args: Namespace) -> UnCLIPOptions:
    """The model's own options, changed where the command line says so."""

    def change(options: Any, **values: Any) -> Any:
        return replace(options, **{name: value for name, value in values.items() if value is not None})

    options = change(
        pipe.options,
        decoder=change(pipe.options.decoder, steps=args.steps, guidance=args.guidance, sampler=args.sampler),
        upsamplers=tuple(change(stage, steps=args.upsampler_steps) for stage in pipe.options.upsamplers),
    )
    if args.run is not generate:
        return options
    prior = change(options.prior, steps=args.prior_steps, guidance=args.prior_guidance)
    return change(options, prior=prior, prior_candidates=args.candidates)


def _check_output(args: Namespace, count: int) -> None:
    """Before anything is drawn: can `count` pictures go where --output says?"""
    path = args.output
    if path is None:
        return
    if path.suffix.lower() in (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"):
        raise ValueError(f"{path}: pictures are written as .png, which can hold how they were drawn")
    if _is_png(path):
        if count > 1 and not args.grid:
            raise ValueError(f"{path} is one file, but {count} pictures will be drawn; give a folder, or --grid")
        if path.is_dir():
            raise ValueError(f"{path} is a folder; expected a file name")
    elif path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file that is no .png; expected a .png or a folder")


def _is_png(path: Path) -> bool:
    return path.suffix.lower() == ".png"


def _write(drawn: Drawn, args: Namespace, name: str = "") -> None:
    from unclip.pictures import grid, save_png

    folder = args.output or Path()
    if args.grid:
        sheet = grid([picture for picture, _ in drawn], _columns(drawn))
        files = [(folder if _is_png(folder) else folder / "grid.png", sheet, [metadata for _, metadata in drawn])]
    elif _is_png(folder):
        files = [(folder, *drawn[0])]
    else:
        files = [(folder / f"{_slug(m.get('prompt') or name)}-{m['seed']}.png", p, m) for p, m in drawn]
    for path, picture, metadata in files:
        save_png(picture, path, metadata)
        if not args.quiet:
            print(path)


def _columns(drawn: Drawn) -> int:
    """A row for each prompt; of a single one, a square."""
    origins = [metadata.get("prompt") or metadata.get("image_emb") for _, metadata in drawn]
    same = len(list(next(groupby(origins))[1]))
    return same if same < len(drawn) else math.ceil(math.sqrt(len(drawn)))


def _slug(text: str) -> str:
    """A file name of at most 60 characters, in any script."""
    return re.sub(r"[\W_]+", "-", text.lower()).strip("-")[:60].rstrip("-") or "picture"
