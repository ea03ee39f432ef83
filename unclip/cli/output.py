"""Check where results go before any work is done, and write them there."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unclip.files import check_file, check_folder, check_image_folder, write_errors

if TYPE_CHECKING:
    from PIL import Image

    from unclip.types import GenerationResult


def check_output(args: Namespace, num_images: int, kinds: str = ".png, .jpg or .webp") -> None:
    """Raise a ValueError if this number of images cannot be written to --output.

    kinds: the files that the command can write, for the message.
    """
    path = args.output
    if path is None:
        return
    if not is_image(path):
        if str(path) == "-":
            raise ValueError("-o -: expected an image file (.png) or a folder, not standard output")
        if path.is_file():
            raise ValueError(f"{path} is a file; expected an image file (.png) or a folder")
        check_image_folder(path, kinds)
        return check_folder(path)
    if num_images > 1 and not args.grid:
        raise ValueError(f"{path} is one file for {num_images} images; give a folder, or --grid")
    check_file(path)


def is_image(path: Path) -> bool:
    from unclip.image_io import WRITTEN

    return path.suffix.lower() in WRITTEN


def write_images(
    images: Sequence[Image.Image],
    metadata: Sequence[dict[str, Any]],
    names: Sequence[str],
    args: Namespace,
) -> None:
    """Write images to --output: an image file, a folder of `names`, or one sheet with --grid."""
    from unclip.image_io import cell, grid, save_image

    target = args.output or Path()
    if args.grid:
        cells = images
        if metadata[0].get("operation") != "interpolate":  # its frames form one strip
            cells = [
                cell([image], image.size, caption_of(entry))
                for image, entry in zip(images, metadata, strict=True)
            ]
        sheet = grid(cells, columns_of(metadata))
        files = [(target if is_image(target) else target / "grid.png", sheet, list(metadata))]
    elif is_image(target):
        files = [(target, images[0], metadata[0])]
    else:
        paths = [target / f"{name}.png" for name in names]
        files = list(zip(paths, images, metadata, strict=True))
    for path, image, entry in files:
        save_image(image, path, entry)
        print_path(path, args)


def write_results(
    results: Iterable[GenerationResult], count: int, sources: Sequence[str], args: Namespace
) -> None:
    """Write `count` images to files that are named after their source and the command.

    Files that would have the same name are numbered.
    """
    names = [
        f"{name}-{args.run.__name__}" for name in sources for _ in range(count // len(sources))
    ]
    numbered = iter(
        name if names.count(name) == 1 else f"{name}-{names[:i].count(name)}"
        for i, name in enumerate(names)
    )

    def write(result: GenerationResult) -> None:
        some = list(islice(numbered, len(result)))
        write_images(result.images, result.metadata, some, args)

    write_as_they_come(results, write, args)


def write_as_they_come(
    results: Iterable[GenerationResult], write: Callable[[GenerationResult], None], args: Namespace
) -> None:
    """Write results as they come, or one sheet at the end with all results until then."""
    if not args.grid:
        for result in results:
            write(result)
        return
    kept: list[GenerationResult] = []
    try:
        for result in results:
            kept.append(result)
    finally:
        if kept:
            write(kept[0].cat(kept))


def caption_of(metadata: Mapping[str, Any]) -> str:
    """Return the caption of an image in a sheet: prompt or operation, and seed."""
    from unclip.pipelines.request import describe_prompt

    prompt, seed = metadata.get("prompt"), metadata.get("seed")
    operation = str(metadata.get("operation", "variation")).replace("_", " ")
    what = describe_prompt(prompt) if prompt else operation
    return what if seed is None else f"{what} ({seed})"


def columns_of(metadata: Sequence[Mapping[str, Any]]) -> int:
    """Return the columns of a sheet: one row for each prompt or source image, else a square.

    Interpolations and text diffs stay in one row.
    """
    keys = ("prompt", "image_emb", "sources", "picture")
    origins = [[entry.get(key) for key in keys] for entry in metadata]
    same = len(list(next(groupby(origins))[1]))
    if 1 < same < len(metadata) or metadata[0].get("operation") in ("interpolate", "text_diff"):
        return same
    return math.ceil(math.sqrt(len(metadata)))


def print_path(path: Path, args: Namespace) -> None:
    """Print the name of a file that was written, unless --quiet."""
    if not args.quiet:
        print(path)


def check_result(file: Path | None) -> None:
    """Raise a ValueError if a file of results cannot be written, or its folder does not exist."""
    if file is None:
        return
    if not file.parent.is_dir():
        raise ValueError(f"cannot write {file}: {file.parent} is not a directory")
    check_file(file)


def write_json(results: dict[str, Any], file: Path | None, show: bool = True) -> None:
    """Write results to `file`, if one is given, and print its name."""
    if file is not None:
        with write_errors(file):
            file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        if show:
            print(file)
