"""Make tar shards of small images from large ones: decoding large JPEGs dominates a training.

python -m unclip.data.resize "data/large/train-*.tar" data/train64 --size 64
"""

from __future__ import annotations

import argparse
import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from unclip.data.parts import ShardParts
from unclip.data.precompute import start
from unclip.data.samples import Dataset
from unclip.data.shards import add_members
from unclip.files import exit_on_error
from unclip.image_io import fit

MAX_BROKEN = 0.01
SETTINGS_FILE = "resize.json"


def resize_shard(
    dataset: Dataset, indices: range, out: Path, size: int, options: Mapping[str, Any]
) -> dict[str, str]:
    """Write the samples to the tar `out`, which appears when it is complete.

    Images are resized and cropped as in training; captions, weight and metadata stay. options:
    arguments of `Image.save`. Returns the reasons for samples that cannot be read, by key.
    """
    broken, part = {}, out.with_suffix(".part")
    with tarfile.open(part, "w") as tar:
        for index in indices:
            key = str(index)
            try:
                sample = dataset[index]
                key = sample.key
                pixels = np.asarray(fit(sample.image, size))
            except (ValueError, OSError) as error:
                broken[key] = str(error)
                continue
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, **options)
            meta = {**sample.meta, "captions": sample.captions, "weight": sample.weight}
            extension = options["format"].lower()
            add_members(tar, key, {extension: file.getvalue(), "json": meta})
    part.replace(out)
    return broken


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m unclip.data.resize",
        description="Write tar shards with images of one size. Rerun to resume.",
    )
    add = parser.add_argument
    add("data", metavar="DATA", help="tar shards: a folder, a pattern or a URL")
    add("out", metavar="OUT", type=Path, help="output folder; shards keep their names")
    add("--size", type=int, required=True, metavar="N", help="side of the images")
    add("--format", choices=("png", "jpeg", "webp"), default="png", help="default: %(default)s")
    add("--quality", type=int, default=95, metavar="N", help="of jpeg and webp (default: 95)")
    add("--tasks", type=int, default=1, metavar="N", help="processes that share the shards")
    add("--task", type=int, default=0, metavar="I", help="number of this process, from 0")
    options = parser.parse_args(arguments)
    with exit_on_error("interrupted; rerun to resume after the last complete shard"):
        _run(options)


def _run(options: argparse.Namespace) -> None:
    if options.size < 1 or not 0 <= options.task < options.tasks:
        raise ValueError(
            f"size {options.size}, task {options.task} of {options.tasks}; "
            "expected a size of at least 1, and a task from 0 to tasks - 1"
        )
    if not 1 <= options.quality <= 100:
        raise ValueError(f"--quality is {options.quality}; expected 1 to 100")
    parts = ShardParts(options.data, captions_needed=False)
    names = [Path(str(shard).partition("?")[0]).name for shard in parts.shards]
    if len(set(names)) < len(names):
        raise ValueError(f"{options.data}: several shards share a name; resize each folder alone")
    save = {"format": options.format.upper()}
    if options.format != "png":
        save["quality"] = options.quality
    start(options.out, SETTINGS_FILE, {"size": options.size, **save})
    broken, images = {}, 0
    for number in tqdm(range(options.task, len(parts), options.tasks), unit=" shards"):
        out = options.out / names[number]
        if not out.exists():
            dataset, indices = parts.open(number)
            broken |= dataset.broken
            broken |= resize_shard(dataset, indices, out, options.size, save)
            images += len(indices)
    if len(broken) > MAX_BROKEN * max(images, 1000):
        example = next(iter(broken.items()))
        raise ValueError(f"{len(broken)} broken samples, e.g. {example[0]}: {example[1]}")
    print(f"{options.out}: {images} images in this run, {len(broken)} broken images skipped")


if __name__ == "__main__":
    main()
