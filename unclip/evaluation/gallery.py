"""The gallery: what can be done with embeddings, each figure with the lines that made it, and what was measured.

    python -m unclip.evaluation.gallery --out assets/gallery.md
    python -m unclip.evaluation.gallery --out assets/gallery.md --data data/emoji/heldout-*.tar \
        --train-data data/emoji/train-*.tar

Lines are run as they are printed, in a folder of their own. With --data it is measured too, into manipulation.json
beside the figures; what that file holds already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image, ImageSequence

import unclip
from unclip.checkpoints.folders import CONFIG_FILE, locate, read_model_json
from unclip.cli.common import DEFAULT_MODEL
from unclip.evaluation import manipulation
from unclip.evaluation.figures import FIGURES, Figure
from unclip.evaluation.report import Row, markdown
from unclip.files import read_json

WIDEST, HIGHEST = 900, 400  # pixels of a figure
MOVING = 160  # of one that moves
DATA = "data/emoji/train-*.tar"  # in the lines, for --train-data
RESULTS = "manipulation.json"

INTRODUCTION = """# Gallery

What can be done with embeddings beside drawing from text, on the {name} model. Made by
`python -m unclip.evaluation.gallery`, which runs the lines below as they stand. Each PNG that they write holds all it
takes to draw it again (`unclip generate --from FILE`); the figures here are reduced copies.
"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m unclip.evaluation.gallery",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help=".md; figures go into a folder beside it",
    )
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        metavar="NAME",
        help=f"bundled name or folder (default: {DEFAULT_MODEL})",
    )
    parser.add_argument(
        "--data", nargs="+", metavar="DATA", help="held-out pairs, for the table of figures"
    )
    parser.add_argument("--train-data", nargs="+", metavar="DATA", help="that the PCA is fitted on")
    parser.add_argument(
        "--limit", type=int, default=32, metavar="N", help="held-out pairs (default: 32)"
    )
    names = [figure.name for figure in FIGURES]
    parser.add_argument(
        "--only", nargs="*", choices=names, metavar="NAME", help=f"draw these: {', '.join(names)}"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args(argv)
    try:
        make_gallery(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def make_gallery(args: argparse.Namespace) -> None:
    """Draws the figures, measures if there is data, and writes the page with all figures that lie beside it."""
    out: Path = args.out
    if out.suffix != ".md":
        raise ValueError(
            f"{out}: the gallery is a page of Markdown; expected a file that ends in .md"
        )
    model = read_model_json(locate(args.model))
    folder = out.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    there = {
        "": True,
        "training data": bool(args.train_data),
        "inpainter": inpaints(locate(args.model)),
    }
    figures = [figure for figure in FIGURES if there[figure.needs]]
    with tempfile.TemporaryDirectory() as place:
        for figure in figures:
            if args.only is None or figure.name in (
                *args.only,
                "sources",
            ):  # of which the others are made
                run(figure, Path(place), args)
                for name in figure.shows:
                    shrink(Path(place, name), folder / shown(name))
    if args.data:
        measure(folder / RESULTS, args)
    out.write_text(page(model["name"], folder), encoding="utf-8")


def inpaints(model: Path) -> bool:
    """Whether a decoder in a model's folder was trained to inpaint."""
    decoders = [model / name / CONFIG_FILE for name in ("inpainter", "decoder")]
    return any(read_json(file).get("inpaints", False) for file in decoders if file.is_file())


def run(figure: Figure, place: Path, args: argparse.Namespace) -> None:
    """Runs the lines of a figure in the folder `place`."""
    model = str(Path(args.model).resolve()) if Path(args.model).is_dir() else args.model
    data = [str(Path(name).resolve()) for name in args.train_data or ()]
    search = os.pathsep.join(
        filter(None, [str(Path(unclip.__file__).parents[1]), os.environ.get("PYTHONPATH")])
    )
    for line in figure.lines:
        if not args.quiet:
            print(line, flush=True)
        if line.startswith("unclip "):
            words = [
                word
                for words in shlex.split(line)[1:]
                for word in (data if words == DATA else [words])
            ]
            command = ["-m", "unclip", *words, "--model", model, "--quiet"]
        else:
            command = ["-c", line.replace(f'load("{DEFAULT_MODEL}")', f"load({model!r})")]
        environment = {**os.environ, "PYTHONPATH": search}
        done = subprocess.run(
            [sys.executable, *command],
            cwd=place,
            env=environment,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        if done.returncode:
            told = done.stderr.strip().splitlines() or [""]
            raise ValueError(f"`{line}` ended with {done.returncode}: {told[-1]}")


def shown(name: str) -> str:
    """The file of a figure, for the file that a line writes."""
    return f"{Path(name).stem}{'-moving' if name.endswith('.gif') else ''}.webp"


def shrink(source: Path, target: Path) -> None:
    """A small WebP of a picture or an animation."""
    with Image.open(source) as image:
        if getattr(image, "is_animated", False):
            frames = [
                frame.convert("RGB").resize((MOVING, MOVING))
                for frame in ImageSequence.Iterator(image)
            ]
            pace = image.info.get("duration", 100)
            frames[0].save(
                target, save_all=True, append_images=frames[1:], duration=pace, loop=0, quality=80
            )
            return
        image = image.convert("RGB")
        image.thumbnail((WIDEST, HIGHEST), Image.Resampling.LANCZOS)
        image.save(target, quality=85)


def measure(file: Path, args: argparse.Namespace) -> None:
    """What manipulations are worth on held-out pairs; see `unclip.evaluation.manipulation`."""
    words = [
        "--model",
        args.model,
        "--data",
        *args.data,
        "--limit",
        str(args.limit),
        "--json",
        str(file),
    ]
    words += ["--train-data", *args.train_data] if args.train_data else []
    manipulation.measure(
        manipulation.parser().parse_args([*words, "--quiet"] if args.quiet else words)
    )


def page(name: str, folder: Path) -> str:
    """The Markdown of all figures that lie in the folder, and of what was measured if that does."""
    parts = [INTRODUCTION.format(name=name)]
    for figure in FIGURES:
        files = [folder / shown(file) for file in figure.shows]
        if all(file.is_file() for file in files):
            pictures = "\n\n".join(
                f"![{figure.title}]({folder.name}/{file.name})" for file in files
            )
            parts.append(
                f"## {figure.title}\n\n{figure.about}\n\n{code(figure.lines)}\n\n{pictures}\n"
            )
    if (folder / RESULTS).is_file():
        parts.append(measured(json.loads((folder / RESULTS).read_text(encoding="utf-8"))))
    return "\n".join(parts)


def code(lines: Sequence[str]) -> str:
    """Fenced blocks; lines of the shell that follow one another share one."""
    blocks = []
    for is_shell, group in groupby(lines, lambda line: line.startswith("unclip ")):
        some = list(group)
        blocks += (
            ["```sh\n" + "\n".join(some) + "\n```"]
            if is_shell
            else [f"```python\n{one}\n```" for one in some]
        )
    return "\n\n".join(blocks)


def measured(results: dict[str, Any]) -> str:
    table = [Row("figure", "model", "beside it"), *manipulation.rows(results)]
    pairs = results["settings"]["pairs"]
    about = f"On {pairs} held-out pairs, at the decoder's size unless told, by `python -m unclip.evaluation.manipulation`:"
    return f"## What was measured\n\n{about}\n\n{markdown(table)}\n"


if __name__ == "__main__":
    main()
