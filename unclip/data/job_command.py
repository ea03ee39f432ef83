"""The command line of `python -m unclip.data.embeddings` and train/encode.py."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from unclip.data.loader import open_dataset
from unclip.data.on_ray import precompute_on_ray
from unclip.data.parts import MANIFEST, PartWriter, SampleParts, ShardParts
from unclip.data.precompute import Load, find_device, precompute
from unclip.data.precomputed import PrecomputedDataset, import_parquet
from unclip.data.samples import Dataset
from unclip.data.text import ColumnNames, readable
from unclip.files import exit_on_error, read_json


def add_arguments(parser: ArgumentParser, content: str, part_size: int) -> None:
    """Add the arguments shared by the commands that precompute `content`."""
    add = parser.add_argument
    add("data", metavar="DATA", help="tar shards (quote a pattern), a folder of images, or a CSV")
    add("out", metavar="OUT", help=f"output folder for {content}")
    add("--all-captions", action="store_true", help="one row per caption, not only the first")
    add("--batch-size", type=int, default=64, help="images per batch (default: %(default)s)")
    add("--part-size", type=int, default=part_size, help="images per file (default: %(default)s)")
    add("--caption", metavar="NAME", help="column, or JSON key, that holds the captions")
    add("--image", metavar="NAME", help="column of a table that holds the file names")
    add("--device", help="default: cuda if available, else cpu")
    add("--tasks", type=int, metavar="N", help="processes that share the job; one part per shard")
    add("--task", type=int, default=0, metavar="I", help="number of this process, from 0")
    add("--verify", action="store_true", help="recompute parts whose files have changed")
    add("--ray", type=int, metavar="N", help="use N workers on a Ray cluster; one part per shard")


def source_settings(options: Namespace) -> dict[str, str | None]:
    """Return the settings that choose the images and captions."""
    return {"data": options.data, "image": options.image, "caption": options.caption}


def run_command(options: Namespace, load: Load, settings_file: str) -> None:
    """Open the data, compute the parts of this process or start Ray, and print a summary.

    Raises SystemExit with a one-line message on an error.
    """
    with exit_on_error("interrupted; rerun to resume after the last complete part"):
        import_parquet()
        for name in ("tasks", "ray"):
            if (number := getattr(options, name)) is not None and number < 1:
                raise ValueError(f"--{name} is {number}; expected at least 1")
        source = _open(options)
        if options.ray:
            broken = precompute_on_ray(options, load, settings_file)
        else:
            compute, settings = load(options, find_device(options))
            names = ("batch_size", "part_size", "task", "verify")
            sizes = {name: getattr(options, name) for name in names}
            tasks = options.tasks or 1
            broken = precompute(
                source, compute, options.out, settings_file, settings, tasks=tasks, **sizes
            )
    parts = source if isinstance(source, ShardParts) else SampleParts(source, options.part_size)
    writer, out = PartWriter(options.out), readable(options.out)
    if not (manifest := writer.folder / MANIFEST).is_file():
        done = sum(writer.has(part) for part in range(len(parts)))
        print(f"{out}: {done} of {len(parts)} parts; the other tasks have not finished")
    else:
        counts = read_json(manifest)
        print(f"{out}: {counts['rows']} rows, {counts['broken']} broken images skipped")
    for reason in broken.values():
        print(f"broken: {reason}")


def _open(options: Namespace) -> Dataset | ShardParts:
    columns = ColumnNames(options.image, options.caption)
    if options.tasks or options.ray:
        return ShardParts(options.data, columns)
    dataset = open_dataset(options.data, columns)
    if isinstance(dataset, PrecomputedDataset):
        raise ValueError(f"{options.data} already contains {dataset.content}; expected images")
    return dataset
