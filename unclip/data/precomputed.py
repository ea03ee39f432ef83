"""Readers for precomputed embeddings and image codes: arrays in numbered parts, with captions.

img_emb/img_emb_0.npy  text_emb/text_emb_0.npy    embeddings (N, D), clip-retrieval's layout
layout/layout_0.npy                               small images (N, 3 * s * s), optional
codes/codes_0.npy  codes.json                     codes (N, h, w); the codec's vocabulary and grid
metadata/metadata_0.parquet                       columns caption, key, weight
"""

# B batch, N rows, D embedding width, h w grid of codes

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from unclip.data.samples import first_broken
from unclip.data.text import ColumnNames, caption_list, readable, sample_weight
from unclip.extras import import_extra
from unclip.files import open_regular, printable, read_json, shorten

CODES_FILE = "codes.json"
MAX_ROWS = 5_000_000  # of a part

Indices = Sequence[int] | np.ndarray


class PrecomputedDataset(ABC):
    """Rows of all parts of `folder`; arrays are memory-mapped, captions are held in memory."""

    array_names: tuple[str, ...]  # the first is required
    content: str  # for error messages, as is `array_format`
    array_format: str

    def __init__(self, folder: str | Path, columns: ColumnNames | None = None) -> None:
        self.folder = folder = Path(folder)
        first, *optional = self.array_names
        parts = _find_parts(self.folder, first, self.content)
        names = [first, *(name for name in optional if (self.folder / name).is_dir())]
        self._arrays = {name: [self._open(name, part) for part in parts] for name in names}
        self.broken: dict[str, str] = {}  # place -> reason
        self.left_out: Counter[str] = Counter()
        files = [folder / f"metadata/metadata_{part}.parquet" for part in parts]
        metadata = [_read_metadata(file, columns or ColumnNames(), self.broken) for file in files]
        for i, part in enumerate(parts):
            rows = {name: len(arrays[i]) for name, arrays in self._arrays.items()}
            rows["metadata"] = metadata[i].num_rows
            if len(set(rows.values())) > 1:
                raise ValueError(f"{self.folder}: part {part} has unequal numbers of rows: {rows}")
        for name, arrays in self._arrays.items():
            if len(shapes := {array.shape[1:] for array in arrays}) > 1:
                raise ValueError(f"{self.folder}: the parts of {name} differ in shape: {shapes}")
        self.shape: tuple[int, ...] = self._arrays[first][0].shape[1:]  # of a row
        self._ends = np.cumsum([len(array) for array in self._arrays[first]])
        starts = [0, *self._ends[:-1]]
        # The rows that are not broken, counted over all parts.
        self._valid = np.concatenate(
            [s + part.rows for s, part in zip(starts, metadata, strict=True)]
        )
        if not len(self._valid):
            raise ValueError(f"{self.folder}: no usable row ({first_broken(self.broken)})")
        self.captions: list[str] = [text for part in metadata for text in part.captions]
        self.keys: list[str] = [key for part in metadata for key in part.keys]
        self.weights = np.array([w for part in metadata for w in part.weights], np.float64)

    def __len__(self) -> int:
        return len(self._valid)

    @abstractmethod
    def batch(self, indices: Indices) -> dict[str, Any]:
        """Return rows as tensors (B, ...) by name, with "caption" and "key"."""

    @staticmethod
    @abstractmethod
    def _is_valid(array: np.ndarray) -> bool:
        """Return whether an array has the format that `array_format` describes."""

    def _texts(self, indices: Indices) -> dict[str, list[str]]:
        columns = {"caption": self.captions, "key": self.keys}
        return {name: [column[i] for i in indices] for name, column in columns.items()}

    def _rows(self, name: str, indices: Indices) -> np.ndarray:
        rows = self._valid[np.asarray(indices)]
        parts, numbers = self._arrays[name], np.searchsorted(self._ends, rows, side="right")
        # i - ends[n] is negative: it counts from the end of part n
        return np.stack([parts[n][i - self._ends[n]] for n, i in zip(numbers, rows, strict=True)])

    def _open(self, name: str, part: str) -> np.ndarray:
        path = self.folder / name / f"{name}_{part}.npy"
        try:
            open_regular(path).close()
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError:
            raise FileNotFoundError(f"{path} is missing: each part needs all its files") from None
        except Exception as error:  # a damaged header can raise anything
            raise ValueError(f"{path} is not a readable npy array ({printable(error)})") from None
        if not isinstance(array, np.ndarray):
            raise ValueError(f"{path} is not an npy array but an archive of arrays (npz)")
        if not self._is_valid(array):
            raise ValueError(f"{path}: {array.dtype} {array.shape}; expected {self.array_format}")
        return array


class EmbeddingDataset(PrecomputedDataset):
    """Captions with CLIP image embeddings and, optionally, text embeddings and small images."""

    array_names, content = ("img_emb", "text_emb", "layout"), "embeddings"
    array_format = "floating-point numbers (N, D)"

    def __init__(self, folder: str | Path, columns: ColumnNames | None = None) -> None:
        super().__init__(folder, columns)
        self.scales: dict[str, float] = {}  # factors of "image_emb" and "text_emb"

    @staticmethod
    def _is_valid(array: np.ndarray) -> bool:
        return array.ndim == 2 and array.dtype.kind == "f"

    def batch(self, indices: Indices) -> dict[str, Any]:
        """Return {"image_emb": (B, D), "caption", "key"} and the optional arrays that are stored.

        These are "text_emb" (B, D) and "layout" (B, 3 * s * s), s x s pixels in [-1, 1].
        """
        keys = {"img_emb": "image_emb", "text_emb": "text_emb", "layout": "layout"}
        rows = {keys[name]: self._rows(name, indices).astype(np.float32) for name in self._arrays}
        scales = self.scales
        tensors = {key: torch.from_numpy(rows[key] * scales.get(key, 1.0)) for key in rows}
        return {**tensors, **self._texts(indices)}


class CodeDataset(PrecomputedDataset):
    """Captions with image codes; `vocab_size` and `grid` are the codec's."""

    array_names, content = ("codes",), "image codes"
    array_format = "unsigned integers (N, h, w)"

    def __init__(self, folder: str | Path, columns: ColumnNames | None = None) -> None:
        super().__init__(folder, columns)
        file = self.folder / CODES_FILE
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing; it states the codec's vocabulary size")
        vocab_size = read_json(file).get("vocab_size")
        if type(vocab_size) is not int:
            raise ValueError(f"{file}: vocab_size is {vocab_size!r}; expected an integer")
        self.vocab_size: int = vocab_size
        height, width = self.shape
        self.grid: tuple[int, int] = (height, width)

    @staticmethod
    def _is_valid(array: np.ndarray) -> bool:
        return array.ndim == 3 and array.dtype.kind == "u"

    def batch(self, indices: Indices) -> dict[str, Any]:
        """Return {"codes": long (B, h, w), "caption", "key"}.

        Raises ValueError if codes are out of range.
        """
        codes = self._rows("codes", indices).astype(np.int64)
        if (largest := codes.max(initial=0)) >= self.vocab_size:
            limit = f"vocab_size in {CODES_FILE} is {self.vocab_size}"
            raise ValueError(f"{self.folder} contains the code {largest}; {limit}")
        return {"codes": torch.from_numpy(codes), **self._texts(indices)}


def import_parquet() -> Any:
    """Import pyarrow.parquet. Raises ValueError if it is not installed."""
    return import_extra("pyarrow.parquet", "data", "precomputed data")


def _find_parts(folder: Path, name: str, content: str) -> list[str]:
    """Return the part numbers as spelled in the file names (0 or 0000, ...), in order."""
    files = (folder / name).glob("*.npy")
    names = [re.fullmatch(rf"{name}_(\d+)\.npy", path.name) for path in files]
    parts = sorted((match[1] for match in names if match), key=int)
    if not parts:
        raise FileNotFoundError(f"no {content} in {folder}; expected {name}/{name}_0.npy")
    return parts


class _Metadata(NamedTuple):
    """The rows of a part that are not broken."""

    num_rows: int  # with the broken ones
    rows: np.ndarray
    captions: list[str]
    keys: list[str]
    weights: list[float]


def _read_metadata(path: Path, names: ColumnNames, broken: dict[str, str]) -> _Metadata:
    """Read a part's metadata; add the rows without a usable caption or weight to `broken`."""
    caption, weight = names.caption or "caption", names.weight or "weight"
    parquet = import_parquet()
    try:
        with open_regular(path) as file:
            metadata = parquet.read_metadata(file)
            schema, count = metadata.schema.to_arrow_schema(), metadata.num_rows
            found, texts = schema.names, [x.name for x in schema if str(x.type) == "string"]
            if count > MAX_ROWS:
                raise ValueError(f"{count:,} rows; expected at most {MAX_ROWS:,}")
            opened = parquet.ParquetFile(file, metadata=metadata, read_dictionary=texts)
            table = opened.read([name for name in (caption, "key", weight) if name in found])
        columns = {name: _to_python(table[name]) for name in table.column_names}
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: each part needs all its files") from None
    except Exception as error:  # Arrow has exceptions of many types
        raise ValueError(f"{path} is not a readable parquet file ({printable(error)})") from None
    if caption not in columns:
        fault = f"no column {caption!r}, only {shorten(found)}"
        raise ValueError(f"{path}: {fault} (set data.columns.caption)")
    part = path.stem.removeprefix("metadata_")
    columns = {"key": [f"{part}-{row}" for row in range(count)], weight: [1.0] * count} | columns
    valid = _Metadata(count, np.empty(0, np.int64), [], [], [])
    rows = []
    for row, text in enumerate(columns[caption]):
        try:
            caption_list(text)
            if isinstance(text, list):
                raise ValueError(f"the caption is {shorten(text)}; expected a string")
            valid.weights.append(sample_weight({weight: columns[weight][row]}, weight))
            valid.captions.append(text)
            valid.keys.append(readable(str(columns["key"][row])))
            rows.append(row)
        except ValueError as error:
            broken[f"{path}: row {row}"] = str(error)
    return valid._replace(rows=np.array(rows, np.int64))


def _to_python(column: Any) -> list[Any]:
    """Convert a column to a list; equal strings of a dictionary column share one object."""
    values = []
    for chunk in column.chunks:
        if str(chunk.type).startswith("dictionary"):
            texts = _strings(chunk.dictionary)
            values += [None if i is None else texts[i] for i in chunk.indices.to_pylist()]
        else:
            values += _strings(chunk)
    return values


def _strings(array: Any) -> list[Any]:
    """Convert an array; strings that are not UTF-8 get surrogates, so they are invalid captions."""
    try:
        return array.to_pylist()
    except UnicodeDecodeError:
        values = array.cast("binary").to_pylist()
        return [v if v is None else v.decode("utf-8", "surrogateescape") for v in values]
