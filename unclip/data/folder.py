"""A folder of images with captions in text files, metadata.jsonl or a CSV."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unclip.data.samples import Sample, caption_list, sample_weight

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
LAYOUTS = (
    "a caption in name.txt for each name.png, or metadata.jsonl with file_name and text, "
    "or a CSV with the columns file_name and text"
)


class FolderDataset:
    """Images of a folder and their captions, sorted by name.

    `source` is the folder, or a .jsonl or .csv file in it. The column `text` may also be named
    `caption`, and may be a list in JSON. A row may contain a `weight`.
    """

    def __init__(self, source: str | Path) -> None:
        source = Path(source)
        table = source if source.is_file() else _find_table(source)
        self.folder = table.parent if table else source
        self._rows = _read_table(table) if table else _list_images(source)
        self.weights = np.array([row["weight"] for row in self._rows], np.float64)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        row = self._rows[index]
        path = self.folder / row["file_name"]
        try:
            text = row["text"] or path.with_suffix(".txt").read_text(encoding="utf-8-sig")
            captions = caption_list(text)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        key = Path(row["file_name"]).with_suffix("").as_posix()
        return Sample(key, captions, path.read_bytes, row["weight"], row["meta"])


def _find_table(folder: Path) -> Path | None:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a directory")
    if (folder / "metadata.jsonl").is_file():
        return folder / "metadata.jsonl"
    tables = sorted(folder.glob("*.csv"))
    if len(tables) > 1:
        raise ValueError(f"{folder} has {len(tables)} CSV files; give one, e.g. {tables[0]}")
    return tables[0] if tables else None


def _list_images(folder: Path) -> list[dict[str, Any]]:
    """Return a row for each image in `folder`; captions are read from text files on access."""
    images = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    missing = [path for path in images if not path.with_suffix(".txt").is_file()]
    if len(missing) == len(images):
        raise ValueError(f"{folder}: {len(images)} images, no captions; expected {LAYOUTS}")
    if missing:
        count = f"{len(missing)} of {len(images)} images"
        raise ValueError(f"{count} have no caption, e.g. {missing[0]}; expected {LAYOUTS}")
    return [
        {"file_name": path.relative_to(folder).as_posix(), "text": None, "weight": 1.0, "meta": {}}
        for path in images
    ]


def _read_table(table: Path) -> list[dict[str, Any]]:
    if table.suffix.lower() not in (".jsonl", ".csv"):
        raise ValueError(f"{table}: expected {LAYOUTS}")
    rows = []
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            if table.suffix.lower() == ".csv":
                entries: Any = csv.DictReader(file)
            else:
                entries = (json.loads(line) for line in file if line.strip())
            for number, entry in enumerate(entries, start=1):
                rows.append(_parse_row(entry, f"{table}: entry {number}"))
    except (json.JSONDecodeError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{table}: entry {len(rows) + 1}: {error}") from None
    if not rows:
        raise ValueError(f"{table} is empty; expected {LAYOUTS}")
    return rows


def _parse_row(entry: Any, where: str) -> dict[str, Any]:
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where}: expected an object with file_name and text, got {entry!r}")
    file_name, text = entry.get("file_name"), entry.get("text") or entry.get("caption")
    if not file_name or not text:
        found = sorted(map(str, entry))
        raise ValueError(f"{where}: file_name or text (or caption) is missing; found {found}")
    if not isinstance(file_name, str):
        raise ValueError(f"{where}: file_name is {file_name!r}; expected a string")
    try:
        weight = sample_weight(entry)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return {"file_name": file_name, "text": text, "weight": weight, "meta": entry}
