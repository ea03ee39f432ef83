"""What commands have in common: their arguments, the model they load, where their pictures and figures go."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

# torch and the models are imported by the commands that draw: `unclip --help` must answer at once.
if TYPE_CHECKING:
    from PIL import Image

    from unclip.pipelines.base import TextToImage

DEFAULT_MODEL = "emoji"
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


class Drawing(NamedTuple):
    """A picture to be written."""

    name: str  # of its file, without the ending
    picture: Image.Image
    metadata: Any


class Outlet:
    """Standard output or error that is written at once, whatever its encoding lacks, whether it is read or not.

    If the reader of a pipe goes away, the rest is told to nobody, and no picture is lost. A full disk is an OSError.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        if getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError as error:
            os.dup2(
                os.open(os.devnull, os.O_WRONLY), self._stream.fileno()
            )  # for what Python flushes when it exits
            if not isinstance(error, BrokenPipeError):
                raise OSError(f"standard output cannot be written: {error.strerror}") from None
        return len(text)


def add_command(
    commands: Any, run: Callable[[Namespace], None], about: str, example: str = ""
) -> ArgumentParser:
    """The parser of a command that is named as its function is."""
    parser = commands.add_parser(
        run.__name__.replace("_", "-"),
        help=about,
        description=f"{about[0].upper()}{about[1:]}.",
        epilog=example and f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def add_model(parser: ArgumentParser, default: str = DEFAULT_MODEL) -> None:
    about = f"bundled name, folder, checkpoint file or Hub id (default: {default})"
    parser.add_argument("--model", default=default, metavar="NAME", help=about)
    parser.add_argument(
        "--device", metavar="DEVICE", help="cpu, cuda, cuda:1, mps (default: the fastest there is)"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of the networks (default: half precision on CUDA, else fp32)",
    )


def add_placement(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--offload", action="store_true", help="keep one network in memory at a time"
    )
    parser.add_argument(
        "--compile", action="store_true", help="prepare the networks first, for many pictures"
    )
    about = (
        "round the weights, for half of bf16's memory; the pictures are no longer quite the same"
    )
    parser.add_argument("--quantize", choices=("int8",), help=about)


def add_output(
    parser: ArgumentParser, about: str = "a .png file, or a folder (default: this one)"
) -> None:
    parser.add_argument("-o", "--output", type=Path, metavar="PATH", help=about)
    parser.add_argument("--grid", action="store_true", help="write one sheet with all pictures")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no file names")


def whole_number(text: str) -> int:
    """The type of an argument that is a number of things."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def share(text: str) -> float:
    """The type of an argument from 0 to 1."""
    try:
        if 0.0 <= (value := float(text)) <= 1.0:
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")


def load_model(args: Namespace, dtype: str | None = None) -> TextToImage:
    """The model of --model in --dtype, or else `dtype`; with the prior of --prior, if it is given.

    Offloaded, compiled and quantized where the command has these arguments and they are given.
    """
    offload, compiled, quantize = (
        getattr(args, name, None) for name in ("offload", "compile", "quantize")
    )
    if offload and compiled:
        raise ValueError(
            "--offload and --compile do not go together: compiled networks must stay where they are"
        )
    pipe = load_named(
        args.model, args.device, args.dtype or dtype, offload=bool(offload and not quantize)
    )
    give_prior(pipe, args)
    if quantize:
        pipe.quantize(quantize)
    if compiled:
        from unclip.pipelines.compilation import compile

        compile(pipe)
    if offload:
        pipe.offload()
    return pipe


def load_named(
    name: str, device: str | None, dtype: str | None, *, offload: bool = False
) -> TextToImage:
    """`unclip.load`, by what --device and --dtype say."""
    from unclip.pipelines import load

    if dtype is None:  # a misspelt name is told before torch is imported
        return load(name, device, offload=offload)

    import torch

    return load(name, device, getattr(torch, DTYPES[dtype]), offload=offload)


def give_prior(pipe: TextToImage, args: Namespace) -> None:
    """Puts the prior of --prior, if it is given, in place of the model's own."""
    if getattr(args, "prior", None) is None:
        return
    if pipe.kind != "unclip":
        raise ValueError(f"{pipe.name} is of kind {pipe.kind}, which has no prior")

    from unclip.pipelines import load_prior

    pipe.prior = load_prior(args.prior)


def read_prompts(file: Path | None) -> list[str]:
    """Of a text file, with a byte order mark or without, those in its lines; none if no file is given."""
    if file is None:
        return []
    try:
        prompts = [
            line.strip()
            for line in file.read_text(encoding="utf-8-sig").splitlines()
            if line.strip()
        ]
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not UTF-8 text; expected one prompt in each line") from None
    if not prompts:
        raise ValueError(f"{file} holds no prompt; expected one in each line")
    return prompts


def check_output(args: Namespace, number: int) -> None:
    """Before anything is drawn: can so many pictures go where --output says?"""
    path = args.output
    if path is None:
        return
    if path.suffix.lower() in (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".mp4"):
        raise ValueError(
            f"{path}: pictures are written as .png, which can hold how they were drawn"
        )
    if is_png(path):
        if number > 1 and not args.grid:
            raise ValueError(
                f"{path} is one file, but {number} pictures will be drawn; give a folder, or --grid"
            )
        check_file(path)
    elif path.is_file():
        raise ValueError(f"{path} is a file that is no .png; expected a .png or a folder")
    _check_parents(path)


def check_file(path: Path) -> None:
    """Before hours of work: ValueError if a folder is in the file's place, or a file in that of a folder above it."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; expected a file name")
    _check_parents(path)


def _check_parents(path: Path) -> None:
    for parent in path.parents:
        if parent.exists() and not parent.is_dir():
            raise ValueError(f"cannot write {path}: {parent} is no folder")


def is_png(path: Path) -> bool:
    return path.suffix.lower() == ".png"


def write(drawings: Sequence[Drawing], args: Namespace, columns: int) -> None:
    """Writes pictures where --output says; as a sheet of so many columns under --grid."""
    from unclip.image_io import grid, save_png

    target = args.output or Path()
    if args.grid:
        sheet = grid([one.picture for one in drawings], columns)
        files = [
            (
                target if is_png(target) else target / "grid.png",
                sheet,
                [one.metadata for one in drawings],
            )
        ]
    elif is_png(target):
        files = [(target, drawings[0].picture, drawings[0].metadata)]
    else:
        files = [(target / f"{one.name}.png", one.picture, one.metadata) for one in drawings]
    for path, picture, metadata in files:
        save_png(picture, path, metadata)
        if not args.quiet:
            print(path)


def columns_of(entries: Sequence[dict[str, Any]]) -> int:
    """Of a sheet, by its metadata: a row for each prompt or picture. One of each, or many of one, make a square; a path
    stays a row."""
    origins = [
        [entry.get(name) for name in ("prompt", "image_emb", "sources", "picture")]
        for entry in entries
    ]
    same = len(list(next(groupby(origins))[1]))
    if 1 < same < len(entries) or entries[0].get("operation") in ("interpolate", "text_diff"):
        return same
    return math.ceil(math.sqrt(len(entries)))


def slug(text: str) -> str:
    """A file name of at most 60 characters, in any script, and 180 bytes: most file systems take 255."""
    name = re.sub(r"[\W_]+", "-", text.lower()).strip("-")[:60]
    return name.encode()[:180].decode(errors="ignore").rstrip("-") or "picture"


def check_writable(file: Path | None) -> None:
    """Before hours of work: is there a folder that the file can go into?"""
    if file is not None and not file.parent.is_dir():
        raise ValueError(f"{file} cannot be written: there is no folder {file.parent}")


def write_figures(results: dict[str, Any], file: Path | None, tell: bool = True) -> None:
    """Writes them as JSON, if there is a file, and tells its name."""
    if file is not None:
        file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        if tell:
            print(file)
