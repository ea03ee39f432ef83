"""Images of concepts that a style lacks, predicted from those of other styles.

python -m unclip.data.complete 'data/emoji_styles/train-*.tar' data/completed --styles noto blob

A dataset of several styles has most concepts in some of them only. A small U-Net learns to predict
the image of a concept in one style from its images in others, where there are both, and then
predicts the missing ones. They have the size of a layout: a layout prior that is also trained on
them does not have to combine concept and style for the first time when it generates.

Samples need "style" and "hexcode" in their metadata, as `unclip.data.emoji` writes them.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from PIL import Image

from unclip.data.colours import main_colour
from unclip.data.loader import open_dataset
from unclip.data.precompute import start
from unclip.data.precomputed import PrecomputedDataset
from unclip.data.samples import Dataset
from unclip.data.shards import ShardWriter
from unclip.data.style_translation import STEPS, Table, TranslatorTraining, predict, read_table
from unclip.files import check_new_folder, exit_on_error
from unclip.image_io import to_pil

SAVED_SIZE = 64  # side of the saved images
SETTINGS, STATE = "settings.json", "training.pt"  # files in the output folder until all is done


def complete(
    dataset: Dataset,
    out: str | Path,
    styles: Sequence[str] | None = None,
    *,
    steps: int = STEPS,
    seed: int = 0,
    progress: bool = True,
) -> int:
    """Write the missing images of some styles (default: all) as `out/train-*.tar`.

    Returns their number; resumes what was interrupted. Raises ValueError for unknown styles, other
    settings than those of the interrupted run, and if nothing is missing.
    """
    table = read_table(dataset, progress)
    if unknown := sorted({*(styles or ())} - {*table.styles}):
        raise ValueError(f"no style {unknown[0]!r}; expected some of {', '.join(table.styles)}")
    cells = table.missing(styles or table.styles)
    if not len(cells):
        raise ValueError("every concept exists in these styles; nothing is missing")
    settings = {
        "data": hashlib.sha256(table.images.numpy().tobytes()).hexdigest()[:16],
        "styles": sorted(styles or table.styles),
        "steps": steps,
        "seed": seed,
    }
    training = TranslatorTraining(table, steps, seed)
    folder = start(out, SETTINGS, settings).folder
    network = training.run(folder / STATE, progress)
    images = to_pil(F.interpolate(predict(table, network, cells, seed), SAVED_SIZE, mode="bicubic"))
    with ShardWriter(folder, "train") as writer:
        for (style, concept), image in zip(cells.tolist(), images, strict=True):
            file = io.BytesIO()
            image.save(file, "PNG")
            meta = _with_colour(_describe(table, style, concept), image)
            files = {"png": file.getvalue(), "json": meta}
            key = f"{table.styles[style]}-{table.concepts[concept]}"
            writer.write(key.replace(".", "_"), files)  # shards end a key at a dot
    (folder / STATE).unlink()
    (folder / SETTINGS).unlink()
    return len(cells)


def _describe(table: Table, style: int, concept: int) -> dict[str, Any]:
    """Return metadata like those of the concept in the style with the most captions."""
    found = [
        (len(sample.captions), -other, sample)
        for other in range(len(table.styles))
        if (sample := table.samples.get((other, concept)))
    ]
    sample = max(found, key=lambda entry: entry[:2])[2]
    old, new = sample.meta["style"], table.styles[style]
    captions = [caption.replace(old, new) for caption in sample.captions]
    return {**sample.meta, "captions": captions, "style": new}


def _with_colour(meta: dict[str, Any], image: Image.Image) -> dict[str, Any]:
    """Return metadata with the image's main colour, without captions that name the source's."""
    if meta.get("tone") is not None:  # the captions name the colour of the skin
        return meta
    old, new = meta.get("colour"), main_colour(np.asarray(image))
    if old is None or old == new or old in _words(meta["captions"][0]):
        return {**meta, "colour": new}
    captions = [caption for caption in meta["captions"] if old not in _words(caption)]
    return {**meta, "colour": new, "captions": captions}


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m unclip.data.complete",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data", metavar="DATA", help="tar shards (quote a pattern)")
    parser.add_argument("out", metavar="OUT", help="new folder for train-*.tar")
    about = "styles to complete (default: all)"
    parser.add_argument("--styles", nargs="+", metavar="STYLE", help=about)
    about = "updates of the U-Net (default: %(default)s, about half an hour of one core)"
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help=about)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    options = parser.parse_args(arguments)
    with exit_on_error("interrupted; the same command resumes"):
        out = Path(options.out)
        if not (out / SETTINGS).is_file():
            check_new_folder(out)
        if not 0 <= options.seed < 2**31:
            raise ValueError(f"--seed is {options.seed}; expected 0 to {2**31 - 1}")
        if options.steps < 1:
            raise ValueError(f"--steps is {options.steps}; expected 1 or more")
        dataset = open_dataset(options.data)
        if isinstance(dataset, PrecomputedDataset):
            raise ValueError(f"{options.data} contains precomputed data; expected images")
        count = complete(dataset, out, options.styles, steps=options.steps, seed=options.seed)
    print(f"{options.out}: {count} predicted images")


if __name__ == "__main__":
    main()
