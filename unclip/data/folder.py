"""A folder of images with captions in text files, JSON files or a table."""

from __future__ import annotations

import os
import posixpath
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unclip.data.paths import list_files
from unclip.data.samples import (
    EXTENSIONS,
    Sample,
    count_left_out,
    describe,
    first_broken,
    is_image,
    json_weight,
)
from unclip.data.tables import TABLES, read_columns, read_rows
from unclip.data.text import (
    MAX_JSON,
    ColumnNames,
    caption_list,
    first_of,
    readable,
    sample_weight,
)
from unclip.files import shorten

LAYOUTS = (
    "captions in name.txt or name.json for each name.png, or metadata.jsonl, a CSV or a TSV with "
    "the columns file_name and text (columns of other names: data.columns)"
)


def _read_image(path: Path) -> bytes:
    """Read a file, but neither a pipe nor a device, which may block or never end."""
    if path.exists() and not path.is_file():
        raise ValueError("a folder, a pipe or a device; expected a file")
    return path.read_bytes()


class _Row(NamedTuple):
    file_name: str
    captions: list[str] | None  # None: in a file of the same name
    weight: float
    meta: Mapping[str, Any]


class FolderDataset:
    """Images of a folder and their captions, sorted by name.

    `source` is the folder, or a .jsonl, .csv or .tsv file in it. The captions are a column of the
    table, else the lines of a text file or the caption in a JSON file next to each image. Broken
    samples are left out and named in `broken`; other files, and images that the table of a folder
    does not list, are counted in `left_out`. Images without a caption are broken, or have the
    captions [""] if none are needed.
    """

    def __init__(
        self, source: str | Path, columns: ColumnNames | None = None, captions_needed: bool = True
    ) -> None:
        source, self._columns = Path(source), columns or ColumnNames()
        self._captions_needed = captions_needed
        usual = ("text", "caption", "captions")
        self._image = self._columns.image or "file_name"  # names of columns
        self._captions = (self._columns.caption,) if self._columns.caption else usual
        self._expected_columns = f"{self._image} and {' or '.join(self._captions)}"
        self.broken: dict[str, str] = {}  # place -> reason
        self.left_out: Counter[str] = Counter()  # reason -> number of files
        self._sidecars: dict[str, dict[str, str]] = {}  # name without suffix -> kind -> file
        self.folder = source.parent if source.is_file() else source
        self._rows = self._read_table(source) if source.is_file() else self._read_folder()
        if not self._rows:
            found = f"{source}: no usable sample"
            reasons = first_broken(self.broken)
            raise ValueError(f"{found} ({reasons})" if reasons else f"{found}; expected {LAYOUTS}")
        self.weights = np.array([row.weight for row in self._rows], np.float64)
        names = {row.file_name for row in self._rows}  # a table may list an image twice
        stems = Counter(os.path.splitext(name)[0] for name in names)
        self._shared = {stem for stem, count in stems.items() if count > 1}  # a.png, a.jpg

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        row = self._rows[index]
        path, stem = self.folder / row.file_name, os.path.splitext(row.file_name)[0]
        key = readable(row.file_name if stem in self._shared else stem)
        where, captions, meta = readable(str(path)), row.captions, row.meta
        if captions is None:
            try:
                captions, meta = self._describe(stem)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
        return Sample(key, captions, partial(_read_image, path), row.weight, meta, where)

    def _describe(self, stem: str) -> tuple[list[str], Mapping[str, Any]]:
        """Return the captions and metadata in the files next to an image."""
        names = self._sidecars.get(stem, {})
        files = {kind: self._read(name) for kind, name in names.items()}
        return describe(files, self._columns, self._captions_needed)

    def _read(self, file_name: str) -> bytes:
        with open(self.folder / file_name, "rb") as file:
            return file.read(MAX_JSON + 1)  # `describe` refuses more

    def _read_folder(self) -> list[_Row]:
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder} is not a directory")
        files, links = list_files(self.folder)
        images, others = [], []
        for name in files:
            if is_image(name):
                images.append(name)
                continue
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in (".txt", ".json"):
                self._sidecars.setdefault(stem, {})[suffix[1:].lower()] = name
            else:
                others.append(name)
        captioned = any(os.path.splitext(name)[0] in self._sidecars for name in images)
        if table := self._find_table(others, captioned):
            return self._read_table(self.folder / table, images)
        self.left_out.update(["broken links and devices"] * len(links))
        for name in others:
            suffix = os.path.splitext(name)[1].lower()
            self.left_out[f"{suffix} files" if suffix else "files without suffix"] += 1
        if not images or (self._captions_needed and not captioned):
            found = f"{self.folder}: {len(images)} images"
            expected = f"images ({', '.join(EXTENSIONS)})"
            if self._captions_needed:
                found, expected = f"{found}, no captions", LAYOUTS
            if left_out := count_left_out(self.left_out):
                found += f" ({left_out})"
            raise ValueError(f"{found}; expected {expected}")
        return self._list_images(images)

    def _find_table(self, names: list[str], captioned: bool) -> str | None:
        """Return the name of the folder's table.

        If the images have captions, or need none, a CSV or TSV without the expected columns has
        another purpose: it is moved from `names` to `left_out`.
        """
        tables = [
            name
            for name in names
            if "/" not in name and os.path.splitext(name)[1].lower() in TABLES[1:]
        ]
        if captioned or not self._captions_needed:
            for name in tables[:]:
                columns = {*read_columns(self.folder / name)}
                if self._image not in columns or columns.isdisjoint(self._captions):
                    tables.remove(name)
                    names.remove(name)
                    self.left_out[f"tables without the columns {self._expected_columns}"] += 1
        if "metadata.jsonl" in names:
            return "metadata.jsonl"
        if len(tables) > 1:
            count = f"{len(tables)} CSV or TSV files"
            raise ValueError(f"{self.folder} has {count}; give one, e.g. {self.folder / tables[0]}")
        return tables[0] if tables else None

    def _read_table(self, table: Path, images: Iterable[str] = ()) -> list[_Row]:
        """Return the rows of a table; count the others of `images` in `left_out`."""
        if table.suffix.lower() not in TABLES:
            raise ValueError(f"{table} is not a table ({', '.join(TABLES)}); expected {LAYOUTS}")
        weight = self._columns.weight or ("weight" if table.suffix.lower() == ".jsonl" else None)
        rows, unlisted, folder = [], {*images}, f"{self.folder.absolute()}/"
        for line, entry in read_rows(table):
            try:
                if isinstance(entry, ValueError):
                    raise entry
                captioned = any(name in entry for name in self._captions)
                if self._image not in entry or (self._captions_needed and not captioned):
                    expected = f"expected {self._expected_columns}"
                    found = f"the columns are {shorten(list(entry))}; {expected} (set data.columns)"
                    raise ValueError(found)
                file_name = self._file_name(entry[self._image])
                unlisted.discard(posixpath.normpath(file_name).removeprefix(folder))
                captions = caption_list(first_of(entry, self._captions), self._captions_needed)
                rows.append(_Row(file_name, captions, sample_weight(entry, weight), entry))
            except ValueError as error:
                self.broken[f"{readable(str(table))}: line {line}"] = str(error)
        if not rows and not self.broken:
            raise ValueError(f"{table} is empty; expected {LAYOUTS}")
        if unlisted:
            self.left_out[f"images that {readable(table.name)} does not list"] = len(unlisted)
        return rows

    def _file_name(self, value: Any) -> str:
        """Return the path of an image in a table."""
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{self._image} is {shorten(value)}; expected the name of a file")
        if "\\" in value and not os.path.lexists(self.folder / value):
            return value.replace("\\", "/")  # written on Windows
        return value

    def _list_images(self, images: list[str]) -> list[_Row]:
        rows, stems = [], [os.path.splitext(name)[0] for name in images]
        for name, stem in zip(images, stems, strict=True):
            try:
                if self._captions_needed and stem not in self._sidecars:
                    raise ValueError("no caption")
                rows.append(_Row(name, None, self._weight(stem), {}))
            except ValueError as error:
                self.broken[readable(str(self.folder / name))] = str(error)
        unused = self._sidecars.keys() - set(stems)
        self.left_out.update(["captions without image"] * len(unused))
        return rows

    def _weight(self, stem: str) -> float:
        """Return the weight in the JSON file of an image, or 1 without one."""
        file_name = self._sidecars.get(stem, {}).get("json")
        return json_weight(self._read(file_name), self._columns) if file_name else 1.0
