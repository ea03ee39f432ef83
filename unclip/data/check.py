"""Report of what a data source contains and what is left out.

python -m unclip.data.check DATA --decode
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from tqdm import tqdm

from unclip.data.loader import open_dataset
from unclip.data.precomputed import PrecomputedDataset
from unclip.data.samples import count_left_out
from unclip.data.text import ColumnNames, readable
from unclip.files import exit_on_error


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m unclip.data.check",
        description="Print what a data source contains, broken samples, and what is left out.",
    )
    add = parser.add_argument
    add("data", metavar="DATA", nargs="+", help="as data.path in training, or several shards")
    add("--image", metavar="NAME", help="column of a table that holds the file names")
    add("--caption", metavar="NAME", help="column, or JSON key, that holds the captions")
    add("--decode", action="store_true", help="read each caption and image")
    options = parser.parse_args(arguments)
    with exit_on_error():
        _check(options)


def _check(options: argparse.Namespace) -> None:
    dataset = open_dataset(options.data, ColumnNames(options.image, options.caption))
    broken = [f"{place}: {why}" for place, why in dataset.broken.items()]
    total, captions = len(dataset), 0
    if options.decode and not isinstance(dataset, PrecomputedDataset):
        for index in tqdm(range(total), unit=" images", leave=False):
            try:
                sample = dataset[index]
                sample.image  # noqa: B018
                captions += len(sample.captions)
            except (ValueError, OSError) as error:
                broken.append(str(error))
                total -= 1
    counts = f"{total} samples" + (f" with {captions} captions" if captions else "")
    print(f"{readable(', '.join(options.data))}: {counts}, {len(broken)} broken")
    if left_out := count_left_out(dataset.left_out):
        print(f"left out: {left_out}")
    for reason in broken:
        print(f"broken: {reason}")


if __name__ == "__main__":
    main()
