"""Build the gallery: manipulations of embeddings, each with the commands that made its figures.

    python assets/build_gallery.py --out assets/gallery.md
    python assets/build_gallery.py --out assets/gallery.md --data data/emoji/heldout-*.tar \
        --train-data data/emoji/train-*.tar

The commands run as printed, in a temporary folder. With --data the manipulations are evaluated,
too, into manipulation.json next to the figures; parts in that file are not evaluated again.
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

from gallery_figures import FIGURES, Figure
from PIL import Image, ImageSequence

import unclip
from unclip.checkpoints.folders import CONFIG_FILE, locate, read_model_json
from unclip.cli.main import main as run_unclip
from unclip.evaluation.report import HEAD, manipulation_rows, markdown_table
from unclip.files import exit_on_error, read_json
from unclip.image_io import identify

DEFAULT_MODEL = "emoji"
MAX_WIDTH, MAX_HEIGHT = 900, 400  # of a figure, in pixels
ANIMATION_SIZE = 160
TRAIN_DATA = "data/emoji/train-*.tar"  # in the commands; replaced by --train-data
RESULTS = "manipulation.json"

INTRODUCTION = """# Gallery

Manipulations of embeddings with the {name} model. `python assets/build_gallery.py` builds this
page by running the commands below. Each PNG that they write contains all that is needed to generate
it again (`unclip generate --from FILE`); the figures here are reduced copies.
"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    about = ".md file; the figures go into a folder of the same name"
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help=about)
    about = f"bundled name or folder (default: {DEFAULT_MODEL})"
    parser.add_argument("--model", default=DEFAULT_MODEL, metavar="NAME", help=about)
    about = "held-out pairs, for the table of results"
    parser.add_argument("--data", nargs="+", metavar="DATA", help=about)
    about = "data that the PCA is fitted on"
    parser.add_argument("--train-data", nargs="+", metavar="DATA", help=about)
    about = "held-out pairs (default: 32)"
    parser.add_argument("--limit", type=int, default=32, metavar="N", help=about)
    names = [figure.name for figure in FIGURES]
    about = f"build only these figures: {', '.join(names)}"
    parser.add_argument("--only", nargs="*", choices=names, metavar="NAME", help=about)
    parser.add_argument("--quiet", action="store_true", help="show no commands or progress bars")
    args = parser.parse_args(argv)
    with exit_on_error():
        build_gallery(args)


def build_gallery(args: argparse.Namespace) -> None:
    """Build the figures, evaluate if there is data, and write the page."""
    out: Path = args.out
    if out.suffix != ".md":
        raise ValueError(f"{out}: expected a file that ends in .md")
    model_folder, folder = locate(args.model), out.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    available = {
        "": True,
        "training data": bool(args.train_data),
        "inpainter": has_inpainter(model_folder),
    }
    with tempfile.TemporaryDirectory() as work:
        for figure in FIGURES:
            # The other figures start from the images of "sources".
            wanted = args.only is None or figure.name in (*args.only, "sources")
            if wanted and available[figure.needs]:
                run(figure, Path(work), args)
                for name in figure.outputs:
                    shrink(Path(work, name), folder / webp_name(name))
    if args.data:
        evaluate(folder / RESULTS, args)
    out.write_text(page(read_model_json(model_folder)["name"], folder), encoding="utf-8")


def has_inpainter(model: Path) -> bool:
    """Return whether a model folder has a decoder that was trained to inpaint."""
    configs = [model / name / CONFIG_FILE for name in ("inpainter", "decoder")]
    return any(read_json(file).get("inpaints", False) for file in configs if file.is_file())


def run(figure: Figure, folder: Path, args: argparse.Namespace) -> None:
    """Run the commands of a figure in a folder."""
    model = str(Path(args.model).resolve()) if Path(args.model).is_dir() else args.model
    data = [str(Path(name).resolve()) for name in args.train_data or ()]
    paths = [str(Path(unclip.__file__).parents[1]), os.environ.get("PYTHONPATH")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    for command in figure.commands:
        if not args.quiet:
            print(command, flush=True)
        if command.startswith("unclip "):
            arguments: list[str] = []
            for word in shlex.split(command)[1:]:
                arguments += data if word == TRAIN_DATA else [word]
            python = ["-m", "unclip", *arguments, "--model", model, "--quiet"]
        else:
            python = ["-c", command.replace(f'load("{DEFAULT_MODEL}")', f"load({model!r})")]
        done = subprocess.run(
            [sys.executable, *python],
            cwd=folder,
            env=environment,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [""]
            raise ValueError(f"`{command}` failed with code {done.returncode}: {lines[-1]}")


def webp_name(name: str) -> str:
    """Return the name of the figure for a file that a command writes."""
    return f"{Path(name).stem}{'-moving' if name.endswith('.gif') else ''}.webp"


def shrink(source: Path, target: Path) -> None:
    """Write a small WebP of an image or an animation."""
    with source.open("rb") as file:
        image = identify(file)
        if source.suffix == ".gif":
            size = (ANIMATION_SIZE, ANIMATION_SIZE)
            frames = [frame.convert("RGB").resize(size) for frame in ImageSequence.Iterator(image)]
            frames[0].save(
                target,
                save_all=True,
                append_images=frames[1:],
                duration=image.info.get("duration", 100),
                loop=0,
                quality=80,
            )
            return
        small = image.convert("RGB")
        small.thumbnail((MAX_WIDTH, MAX_HEIGHT), Image.Resampling.LANCZOS)
        small.save(target, quality=85)


def evaluate(file: Path, args: argparse.Namespace) -> None:
    """Run `unclip evaluate-manipulations` into a file."""
    arguments = ["--model", args.model, "--data", *args.data, "--limit", str(args.limit)]
    if args.train_data:
        arguments += ["--train-data", *args.train_data]
    if args.quiet:
        arguments.append("--quiet")
    if code := run_unclip(["evaluate-manipulations", *arguments, "--json", str(file)]):
        sys.exit(code)


def page(name: str, folder: Path) -> str:
    """Return the Markdown of all figures in a folder, and of the results if they exist."""
    parts = [INTRODUCTION.format(name=name)]
    for figure in FIGURES:
        files = [folder / webp_name(file) for file in figure.outputs]
        if all(file.is_file() for file in files):
            images = "\n\n".join(f"![{figure.title}]({folder.name}/{file.name})" for file in files)
            blocks = code_blocks(figure.commands)
            parts.append(f"## {figure.title}\n\n{figure.about}\n\n{blocks}\n\n{images}\n")
    if (folder / RESULTS).is_file():
        results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        parts.append(results_section(results))
    return "\n".join(parts)


def code_blocks(commands: Sequence[str]) -> str:
    """Return fenced blocks; successive shell commands share one."""
    blocks = []
    for is_shell, group in groupby(commands, lambda command: command.startswith("unclip ")):
        if is_shell:
            blocks.append("```sh\n" + "\n".join(group) + "\n```")
        else:
            blocks += [f"```python\n{code}\n```" for code in group]
    return "\n\n".join(blocks)


def results_section(results: dict[str, Any]) -> str:
    table = markdown_table([HEAD, *manipulation_rows(results)])
    about = (
        f"On {results['settings']['pairs']} held-out pairs, at the decoder's image size unless "
        "noted, by `unclip evaluate-manipulations`:"
    )
    return f"## Measurements\n\n{about}\n\n{table}\n"


if __name__ == "__main__":
    main()
