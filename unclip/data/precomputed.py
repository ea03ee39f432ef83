"""What was computed of a data set once, to be read in every epoch: arrays in numbered parts, and their captions.

img_emb/img_emb_0.npy  metadata/metadata_0.parquet (columns caption, key, weight)
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from unclip.data.samples import sample_weight

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

    from PIL import Image

    from unclip.data.samples import Dataset, Sample

# N rows

MAX_BROKEN = 0.01

Indices = Sequence[int] | np.ndarray
# The samples of a batch and their pictures -> columns of N values each, and arrays of N rows each, by name.
Compute = Callable[
    ["list[Sample]", "list[Image.Image]"], tuple[dict[str, list[Any]], dict[str, np.ndarray]]
]


def parquet() -> Any:
    """pyarrow's reader and writer; ValueError if it isn't installed."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            "precomputed data keeps its captions in parquet: pip install pyarrow"
        ) from None
    return pyarrow.parquet


class PrecomputedDataset(ABC):
    """Rows of `folder`, part by part; the arrays are memory-mapped, captions are held in memory."""

    names: tuple[str, ...]  # of the arrays; the first is always there
    told: str  # what they are, for errors
    expected: str  # dtype and shape of the arrays, for errors

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        numbers = _parts(self.folder, self.names[0], self.told)
        there = [
            name for name in self.names if name == self.names[0] or (self.folder / name).is_dir()
        ]
        self._arrays = {name: [self._open(name, number) for number in numbers] for name in there}
        columns = [
            _read_metadata(self.folder / f"metadata/metadata_{number}.parquet")
            for number in numbers
        ]
        self.captions: list[str] = [text for part in columns for text in part["caption"]]
        self.keys: list[str] = [key for part in columns for key in part["key"]]
        self.weights = np.array(
            [weight for part in columns for weight in part["weight"]], np.float64
        )
        for i, number in enumerate(numbers):
            rows = {name: len(parts[i]) for name, parts in self._arrays.items()}
            rows["metadata"] = len(columns[i]["caption"])
            if len(set(rows.values())) > 1:
                raise ValueError(
                    f"{self.folder}: part {number} has unequal numbers of rows: {rows}"
                )
        first = self._arrays[self.names[0]]
        if len({array.shape[1:] for array in first}) > 1:
            raise ValueError(
                f"{self.folder}: parts differ in shape: {[array.shape[1:] for array in first]}"
            )
        self._ends = np.cumsum([len(array) for array in first])

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a row of the first array."""
        return self._arrays[self.names[0]][0].shape[1:]

    @abstractmethod
    def batch(self, indices: Indices) -> dict[str, Any]:
        """Rows as tensors (B, ...) by name, with "caption" and "key"."""

    @staticmethod
    @abstractmethod
    def _fits(array: np.ndarray) -> bool:
        """Whether an array is what `expected` says."""

    def _texts(self, indices: Indices) -> dict[str, list[str]]:
        return {
            "caption": [self.captions[i] for i in indices],
            "key": [self.keys[i] for i in indices],
        }

    def _rows(self, name: str, indices: Indices) -> np.ndarray:
        parts, numbers = self._arrays[name], np.searchsorted(self._ends, indices, side="right")
        rows = [
            parts[n][i - self._ends[n]] for n, i in zip(numbers, indices, strict=True)
        ]  # negative: from the end
        return np.stack(rows)

    def _open(self, name: str, number: str) -> np.ndarray:
        path = self.folder / name / f"{name}_{number}.npy"
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError:
            raise FileNotFoundError(f"{path} is missing: each part needs all its files") from None
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(f"{path}: no readable npy array ({error})") from None
        if not self._fits(array):
            raise ValueError(f"{path}: expected {self.expected}, got {array.dtype} {array.shape}")
        return array


class PartWriter:
    """Writes parts of `folder`; a part counts as written once its metadata, the last of its files, is there."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def has(self, number: int) -> bool:
        """Whether part `number` is complete."""
        return (self.folder / f"metadata/metadata_{number}.parquet").is_file()

    def write_part(
        self, number: int, arrays: Mapping[str, np.ndarray], columns: Mapping[str, Sequence[Any]]
    ) -> None:
        """One part: arrays of N rows by name, and columns of N values, among them `caption`."""
        writer = parquet()
        import pyarrow

        for name, array in arrays.items():
            path = self.folder / name / f"{name}_{number}.npy"
            path.parent.mkdir(exist_ok=True)
            with open(path.with_suffix(".part"), "wb") as file:
                np.save(file, array, allow_pickle=False)
            path.with_suffix(".part").replace(path)
        path = self.folder / "metadata" / f"metadata_{number}.parquet"
        path.parent.mkdir(exist_ok=True)
        writer.write_table(
            pyarrow.table({name: list(values) for name, values in columns.items()}), f"{path}.part"
        )
        Path(f"{path}.part").replace(path)


def precompute(
    dataset: Dataset,
    compute: Compute,
    writer: PartWriter,
    settings_file: str,
    settings: Mapping[str, Any],
    *,
    batch_size: int,
    part_size: int,
) -> dict[int, str]:
    """Computes parts of `part_size` samples; those that are there already are left as they are.

    `settings`, what is computed from what, are written down: when a stopped run goes on, they must be the same. Returns
    the broken samples, index -> reason; ValueError if they are over 1 %, or a size is less than 1.
    """
    for name, size in (("batch_size", batch_size), ("part_size", part_size)):
        if size < 1:
            raise ValueError(f"{name} is {size}; expected at least 1")
    settings = {"samples": len(dataset), "part_size": part_size, **settings}
    _keep_settings(writer.folder / settings_file, settings)
    broken: dict[int, str] = {}
    with tqdm(total=len(dataset), unit=" pictures") as bar:
        for number, first in enumerate(range(0, len(dataset), part_size)):
            part = range(first, min(first + part_size, len(dataset)))
            if writer.has(number):
                bar.update(len(part))
                continue
            batches = []
            for start in range(first, part.stop, batch_size):
                indices = range(start, min(start + batch_size, part.stop))
                samples, images = _readable(dataset, indices, broken)
                if samples:
                    batches.append(compute(samples, images))
                bar.update(len(indices))
            if batches:
                columns, arrays = ([batch[i] for batch in batches] for i in range(2))
                writer.write_part(
                    number,
                    {name: np.concatenate([array[name] for array in arrays]) for name in arrays[0]},
                    {
                        name: [value for column in columns for value in column[name]]
                        for name in columns[0]
                    },
                )
    return broken


def add_arguments(parser: ArgumentParser, out: str, part_size: int) -> None:
    """Of a command that precomputes; out: what its folder is for."""
    parser.add_argument(
        "data",
        metavar="DATA",
        help="tar shards (a pattern in quotes), a folder of pictures, or a CSV",
    )
    parser.add_argument("out", metavar="OUT", help=f"folder for {out}")
    parser.add_argument(
        "--all-captions", action="store_true", help="a row for each caption, not the first only"
    )
    parser.add_argument(
        "--batch-size", type=int, default=64, help="pictures at once (default: %(default)s)"
    )
    parser.add_argument(
        "--part-size", type=int, default=part_size, help="pictures in a file (default: %(default)s)"
    )
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")


def run_command(
    options: Namespace, compute: Callable[..., dict[int, str]], kind: type[PrecomputedDataset]
) -> None:
    """Opens the data, and tells in the end what is in `out`; SystemExit with one line if something is wrong.

    compute: as `unclip.data.embeddings.embed`, but the device takes the place of the network.
    """
    import torch

    from unclip.data.loader import open_dataset  # which reads what this writes

    how = {name: getattr(options, name) for name in ("all_captions", "batch_size", "part_size")}
    try:
        parquet()
        dataset = open_dataset(options.data)
        if isinstance(dataset, PrecomputedDataset):
            raise ValueError(f"{options.data} holds {dataset.told} already; expected pictures")
        device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError):  # the latter where torch was built without CUDA
            raise ValueError(
                f"there is no device {device!r} here; expected cpu, or cuda where there is one"
            ) from None
        broken = compute(dataset, device, options.out, **how)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on from the last complete part") from None
    print(f"{options.out}: {len(kind(options.out))} rows, {len(broken)} broken pictures left out")
    for reason in broken.values():
        print(f"broken: {reason}")


def caption_rows(
    samples: Sequence[Sample], all_captions: bool
) -> tuple[dict[str, list[Any]], list[int]]:
    """Columns of a row for each sample with its canonical caption, or of one for each caption, and rows per sample.

    Rows of one sample share its weight.
    """
    columns: dict[str, list[Any]] = {"caption": [], "key": [], "weight": []}
    repeats = []
    for sample in samples:
        captions = sample.captions if all_captions else sample.captions[:1]
        repeats.append(len(captions))
        columns["caption"] += captions
        columns["key"] += [sample.key] * len(captions)
        columns["weight"] += [sample.weight / len(captions)] * len(captions)
    return columns, repeats


def _parts(folder: Path, name: str, told: str) -> list[str]:
    """Numbers of the parts as they are spelt (0, 1, ... or 0000, 0001, ...), in order."""
    names = [
        re.fullmatch(rf"{name}_(\d+)\.npy", path.name) for path in (folder / name).glob("*.npy")
    ]
    numbers = sorted((match[1] for match in names if match), key=int)
    if not numbers:
        raise FileNotFoundError(
            f"no {told} in {folder}; expected {name}/{name}_0.npy and its metadata"
        )
    return numbers


def _read_metadata(path: Path) -> dict[str, list[Any]]:
    reader = parquet()
    try:
        table = reader.read_table(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: each part needs all its files") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no readable parquet file ({error})") from None
    if "caption" not in table.column_names:
        raise ValueError(f"{path}: no column 'caption', only {table.column_names}")
    number, rows = path.stem.removeprefix("metadata_"), table.num_rows
    columns = {
        name: table[name].to_pylist()
        for name in ("caption", "key", "weight")
        if name in table.column_names
    }
    columns = {"key": [f"{number}-{row}" for row in range(rows)], "weight": [1.0] * rows} | columns
    if wrong := [text for text in columns["caption"] if not isinstance(text, str)]:
        raise ValueError(
            f"{path}: {len(wrong)} of {rows} captions are no strings, e.g. {wrong[0]!r}"
        )
    try:
        columns["weight"] = [sample_weight({"weight": weight}) for weight in columns["weight"]]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return columns


def _readable(
    dataset: Dataset, indices: Sequence[int], broken: dict[int, str]
) -> tuple[list[Sample], list[Image.Image]]:
    """The samples that can be read, with their pictures; adds the others to `broken`."""
    samples, images = [], []
    for index in indices:
        try:
            sample = dataset[index]
            images.append(sample.image)
            samples.append(sample)
        except (ValueError, OSError) as error:
            broken[index] = str(error)
    if len(broken) > MAX_BROKEN * min(max(indices[-1] + 1, 1000), len(dataset)):
        raise ValueError(
            f"{len(broken)} broken samples, over {MAX_BROKEN:.0%}, e.g. {next(iter(broken.values()))}"
        )
    return samples, images


def _keep_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Writes them down, or raises ValueError if others are there."""
    if not path.is_file():
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        return
    earlier = json.loads(path.read_text(encoding="utf-8"))
    if differing := [name for name in settings if settings[name] != earlier.get(name)]:
        told = ", ".join(
            f"{name} {earlier.get(name)!r}, now {settings[name]!r}" for name in differing
        )
        raise ValueError(
            f"{path.parent} was begun with {told}; choose another folder or the same settings"
        )
