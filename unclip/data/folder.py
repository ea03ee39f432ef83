"""A folder of pictures with captions beside them."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unclip.data.samples import Sample, caption_list, sample_weight

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
WAYS = (
    "a caption in name.txt beside each name.png, or metadata.jsonl with file_name and text, "
    "or a CSV with the columns file_name and text"
)


class FolderDataset:
    """Pictures whose captions are in metadata.jsonl, in a CSV, or in text files of the same name; sorted by name.

    `source`: the folder, or a .jsonl or .csv in it. `text` may also be called `caption`, and in JSON be a list; a row
    may hold a `weight`.
    """

    def __init__(self, source: str | Path) -> None:
        source = Path(source)
        table = source if source.is_file() else _find_table(source)
        self.folder = table.parent if table else source
        self._rows = _read_table(table) if table else _beside(source)
        self.weights = np.array([row["weight"] for row in self._rows], np.float64)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        row = self._rows[index]
        path = self.folder / row["file_name"]
        try:
            captions = caption_list(
                row["text"] or path.with_suffix(".txt").read_text(encoding="utf-8-sig")
            )
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        key = Path(row["file_name"]).with_suffix("").as_posix()
        return Sample(key, captions, path.read_bytes, row["weight"], row["meta"])


def _find_table(folder: Path) -> Path | None:
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder at {folder}")
    if (folder / "metadata.jsonl").is_file():
        return folder / "metadata.jsonl"
    tables = sorted(folder.glob("*.csv"))
    if len(tables) > 1:
        raise ValueError(
            f"{folder} holds {len(tables)} CSVs; give the path of the one you want, e.g. {tables[0]}"
        )
    return tables[0] if tables else None


def _beside(folder: Path) -> list[dict[str, Any]]:
    """A row for each picture under `folder`; the caption is read from its text file later."""
    pictures = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    without = [path for path in pictures if not path.with_suffix(".txt").is_file()]
    if len(without) == len(pictures):
        raise ValueError(f"{folder}: {len(pictures)} pictures, no captions; expected {WAYS}")
    if without:
        some = f"{len(without)} of {len(pictures)} pictures have no caption, e.g. {without[0]}"
        raise ValueError(f"{some}; expected {WAYS}")
    return [
        {"file_name": path.relative_to(folder).as_posix(), "text": None, "weight": 1.0, "meta": {}}
        for path in pictures
    ]


def _read_table(table: Path) -> list[dict[str, Any]]:
    if table.suffix.lower() not in (".jsonl", ".csv"):
        raise ValueError(f"{table}: expected {WAYS}")
    rows = []
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            if table.suffix.lower() == ".csv":
                entries: Any = csv.DictReader(file)
            else:
                entries = (json.loads(line) for line in file if line.strip())
            for number, entry in enumerate(entries, start=1):
                rows.append(_row(entry, f"{table}: entry {number}"))
    except (json.JSONDecodeError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{table}: entry {len(rows) + 1}: {error}") from None
    if not rows:
        raise ValueError(f"{table} is empty; expected {WAYS}")
    return rows


def _row(entry: Any, place: str) -> dict[str, Any]:
    if not isinstance(entry, Mapping):
        raise ValueError(f"{place}: expected an object with file_name and text, got {entry!r}")
    text = entry.get("text") or entry.get("caption")
    if not entry.get("file_name") or not text:
        raise ValueError(
            f"{place}: file_name or text (or caption) is missing or empty; it has {sorted(map(str, entry))}"
        )
    if not isinstance(entry["file_name"], str):
        raise ValueError(f"{place}: file_name is {entry['file_name']!r}; expected a string")
    try:
        weight = sample_weight(entry)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    return {"file_name": entry["file_name"], "text": text, "weight": weight, "meta": entry}
