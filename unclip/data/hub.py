"""Captioned images of a `datasets` dataset: "datasets:NAME" or "datasets:NAME:SPLIT".

NAME is an id on the Hub, or a local folder that `datasets` can load.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from unclip.data.samples import Sample
from unclip.data.text import ColumnNames, caption_list
from unclip.extras import import_extra

SCHEME = "datasets:"
SAVED = "dataset_dict.json", "dataset_info.json"  # of `save_to_disk`
CAPTIONS = ("text", "caption", "captions", "prompt")


class HubDataset:
    """Rows of a map-style dataset: its image column, and the first column of CAPTIONS."""

    def __init__(
        self, source: str, columns: ColumnNames | None = None, captions_needed: bool = True
    ) -> None:
        rows, split = _load(source)
        if not len(rows):
            raise ValueError(f"{source} has no rows")
        self.broken: dict[str, str] = {}
        self.left_out: Counter[str] = Counter()
        kinds = {name: type(feature).__name__ for name, feature in rows.features.items()}
        names = columns or ColumnNames()
        images = [n for n, kind in kinds.items() if kind == "Image" and names.image in (None, n)]
        captions = [n for n in ([names.caption] if names.caption else CAPTIONS) if n in kinds]
        if len(images) != 1 or (captions_needed and not captions):
            found = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
            expected = f"an Image {names.image!r}" if names.image else "one Image"
            if captions_needed:
                expected += f" and {names.caption!r}" if names.caption else f", one of {CAPTIONS}"
            raise ValueError(f"{source} has the columns {found}; expected {expected}")
        self.image, self.caption = images[0], next(iter(captions), None)
        self.captions_needed = captions_needed
        images_only = _datasets().Image(decode=False)  # decoded by our own reader
        self.rows = rows.cast_column(self.image, images_only)
        self.split, self.weights = split, np.ones(len(rows), np.float64)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        row = self.rows[index]
        key = f"{self.split}-{index}"
        try:
            captions = caption_list(row.get(self.caption), self.captions_needed)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
        return Sample(key, captions, partial(_encoded, row[self.image]))


def _encoded(image: Mapping[str, Any] | None) -> bytes:
    """Return the bytes of an image that is stored in the row or in a file."""
    if image is None or (image["bytes"] is None and image["path"] is None):
        raise ValueError("no image")
    return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()


def _load(source: str) -> tuple[Any, str]:
    """Return the rows and the name of the split. Raises ValueError with a one-line message."""
    name, _, given = source.removeprefix(SCHEME).partition(":")
    if not name.strip():
        expected = "datasets:NAME or datasets:NAME:SPLIT"
        raise ValueError(f"{source!r} names no dataset; expected {expected}")
    datasets, split = _datasets(), given or "train"
    folder = Path(name)
    if (folder / SAVED[0]).is_file() and (folder / split).is_dir():
        folder, given = folder / split, ""  # the other splits are not read, and may be empty
    is_saved = any((folder / file).is_file() for file in SAVED)
    try:
        rows = (
            datasets.load_from_disk(folder)
            if is_saved
            else datasets.load_dataset(name, split=split)
        )
    except IndexError:  # no data file
        raise ValueError(f"{source} has no rows") from None
    except Exception as error:  # network, format and split errors of many types
        reason = " ".join(str(error).split())
        raise ValueError(f"{source}: {type(error).__name__}: {reason[:300]}") from None
    if not is_saved or not given and not isinstance(rows, Mapping):
        return rows, split
    splits = rows if isinstance(rows, Mapping) else {str(rows.split or "train"): rows}
    if not splits:
        raise ValueError(f"{source} has no splits; save a dataset with rows in it")
    if split not in splits:
        raise ValueError(f"{source}: there is no split {split}; expected {' or '.join(splits)}")
    return splits[split], split


def _datasets() -> Any:
    return import_extra("datasets", "remote", '"datasets:"')
