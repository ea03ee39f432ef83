"""A folder of images with captions in text files, JSON files or a table."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unclip.data.paths import is_foreign, list_files
from unclip.data.samples import EXTENSIONS, Sample, count_left_out, describe, json_weight
from unclip.data.tables import TABLES, read_rows
from unclip.data.text import (
    MAX_JSON,
    ColumnNames,
    caption_list,
    first_of,
    quote,
    readable,
    sample_weight,
)

LAYOUTS = (
    "captions in name.txt or name.json for each name.png, or metadata.jsonl, a CSV or a TSV with "
    "the columns file_name and text (columns of other names: data.columns)"
)


class _Row(NamedTuple):
    file_name: str
    captions: list[str] | None  # None: in a file of the same name
    weight: float
    meta: Mapping[str, Any]


class FolderDataset:
    """Images of a folder and their captions, sorted by name.

    `source` is the folder, or a .jsonl, .csv or .tsv file in it. The captions are a column of the
    table, else the lines of a text file or the caption in a JSON file next to each image. Broken
    samples are left out and named in `broken`; other files are counted in `left_out`.
    """

    def __init__(self, source: str | Path, columns: ColumnNames | None = None) -> None:
        source, self._columns = Path(source), columns or ColumnNames()
        self.broken: dict[str, str] = {}  # place -> reason
        self.left_out: Counter[str] = Counter()  # reason -> number of files
        table = source if source.is_file() else _find_table(source)
        self.folder = table.parent if table else source
        self._sidecars: dict[str, dict[str, str]] = {}  # name without suffix -> kind -> file
        self._rows = self._read_table(table) if table else self._list_images(source)
        if not self._rows:
            found = f"{table or source}: no usable sample"
            reasons = "; ".join(f"{place}: {why}" for place, why in list(self.broken.items())[:3])
            raise ValueError(f"{found} ({reasons})" if reasons else f"{found}; expected {LAYOUTS}")
        self.weights = np.array([row.weight for row in self._rows], np.float64)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        row = self._rows[index]
        path = self.folder / row.file_name
        stem = os.path.splitext(row.file_name)[0]
        captions, meta = row.captions, row.meta
        if captions is None:
            try:
                captions, meta = self._describe(stem)
            except ValueError as error:
                raise ValueError(f"{readable(str(path))}: {error}") from None
        where = readable(str(path))
        return Sample(readable(stem), captions, path.read_bytes, row.weight, meta, where)

    def _describe(self, stem: str) -> tuple[list[str], Mapping[str, Any]]:
        """Return the captions and metadata in the files next to an image."""
        files = self._sidecars[stem]
        return describe({kind: self._read(name) for kind, name in files.items()}, self._columns)

    def _read(self, file_name: str) -> bytes:
        with open(self.folder / file_name, "rb") as file:
            return file.read(MAX_JSON + 1)  # `describe` refuses more

    def _read_table(self, table: Path) -> list[_Row]:
        if table.suffix.lower() not in TABLES:
            raise ValueError(f"{table} is not a table ({', '.join(TABLES)}); expected {LAYOUTS}")
        is_json, image = table.suffix.lower() == ".jsonl", self._columns.image or "file_name"
        usual = ("text", "caption", "captions")
        captions = (self._columns.caption,) if self._columns.caption else usual
        weight = self._columns.weight or ("weight" if is_json else None)
        rows = []
        for line, entry in read_rows(table):
            try:
                if isinstance(entry, ValueError):
                    raise entry
                if image not in entry or not any(name in entry for name in captions):
                    expected = f"expected {image} and {' or '.join(captions)}"
                    found = f"the columns are {quote(list(entry))}; {expected} (set data.columns)"
                    raise ValueError(found)
                rows.append(self._parse_row(entry, image, captions, weight))
            except ValueError as error:
                self.broken[f"{readable(str(table))}: line {line}"] = str(error)
        if not rows and not self.broken:
            raise ValueError(f"{table} is empty; expected {LAYOUTS}")
        return rows

    def _parse_row(
        self, entry: Mapping[str, Any], image: str, captions: tuple[str, ...], weight: str | None
    ) -> _Row:
        file_name = entry[image]
        if not isinstance(file_name, str) or not file_name.strip():
            raise ValueError(f"{image} is {quote(file_name)}; expected the name of a file")
        if "\\" in file_name and not os.path.lexists(self.folder / file_name):
            file_name = file_name.replace("\\", "/")  # written on Windows
        texts = caption_list(first_of(entry, captions))
        return _Row(file_name, texts, sample_weight(entry, weight), entry)

    def _list_images(self, folder: Path) -> list[_Row]:
        files, others = list_files(folder)
        self.left_out.update(["broken links and devices"] * len(others))
        images = []
        for name in files:
            stem, suffix = os.path.splitext(name)
            if suffix[1:].lower() in EXTENSIONS:
                images.append(name)
            elif suffix.lower() in (".txt", ".json"):
                self._sidecars.setdefault(stem, {})[suffix[1:].lower()] = name
            else:
                self.left_out[f"{suffix.lower()} files" if suffix else "files without suffix"] += 1
        stems = [os.path.splitext(name)[0] for name in images]
        if not any(stem in self._sidecars for stem in stems):
            count = f"{len(images)} images, no captions"
            if left_out := count_left_out(self.left_out):
                count += f" ({left_out})"
            raise ValueError(f"{folder}: {count}; expected {LAYOUTS}")
        rows = []
        for name, stem in zip(images, stems, strict=True):
            try:
                if stem not in self._sidecars:
                    raise ValueError("no caption")
                rows.append(_Row(name, None, self._weight(stem), {}))
            except ValueError as error:
                self.broken[readable(str(folder / name))] = str(error)
        unused = self._sidecars.keys() - set(stems)
        self.left_out.update(["captions without image"] * len(unused))
        return rows

    def _weight(self, stem: str) -> float:
        """Return the weight in the JSON file of an image, or 1 without one."""
        file_name = self._sidecars[stem].get("json")
        return json_weight(self._read(file_name), self._columns) if file_name else 1.0


def _find_table(folder: Path) -> Path | None:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a directory")
    if (folder / "metadata.jsonl").is_file():
        return folder / "metadata.jsonl"
    found = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in TABLES[1:]]
    tables = [path for path in found if not is_foreign(path.name)]
    if len(tables) > 1:
        raise ValueError(f"{folder} has {len(tables)} CSV or TSV files; give one, e.g. {tables[0]}")
    return tables[0] if tables else None
