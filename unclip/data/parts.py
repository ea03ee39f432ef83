"""The parts of precomputed data: their samples, their files, and a manifest with hashes.

img_emb/img_emb_3.npy, ..., metadata/metadata_3.parquet    the files of part 3
parts/part_3.json                                          its rows, hashes and broken samples
manifest.json                                              all parts, once they are complete
"""

# N rows

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unclip.config import save_json
from unclip.data.precomputed import import_parquet
from unclip.data.remote import is_url
from unclip.data.samples import Dataset
from unclip.data.shards import ShardDataset, find_shards, shard_urls
from unclip.data.text import ColumnNames
from unclip.files import check_folder, read_json, sha256

MANIFEST = "manifest.json"
ABANDONED = 3600.0  # seconds: the age of temporary files that no process is writing any more


class SampleParts:
    """Parts of `size` samples of a dataset."""

    def __init__(self, dataset: Dataset, size: int) -> None:
        self.dataset, self.size = dataset, size
        self.samples = len(dataset)
        self.settings = {"samples": self.samples, "part_size": size}

    def __len__(self) -> int:
        return -(-self.samples // self.size)

    def open(self, number: int) -> tuple[Dataset, range]:
        """Return a dataset and the indices of the samples of a part."""
        first = number * self.size
        return self.dataset, range(first, min(first + self.size, self.samples))


class ShardParts:
    """A part for each tar shard, which is opened alone: for many machines and billions of rows."""

    samples = None  # unknown before all shards are read

    def __init__(
        self, source: str, columns: ColumnNames | None = None, captions_needed: bool = True
    ) -> None:
        self.columns, self.captions_needed = columns, captions_needed
        # Remote shards are downloaded by the process that opens them.
        self.shards = shard_urls(source) if is_url(source) else find_shards(source)
        if not self.shards:
            raise FileNotFoundError(f"no shards at {source}")
        self.settings = {"shards": len(self.shards)}

    def __len__(self) -> int:
        return len(self.shards)

    def open(self, number: int) -> tuple[Dataset, range]:
        """Return a dataset and the indices of the samples of a part."""
        dataset = ShardDataset(self.shards[number], self.columns, self.captions_needed)
        return dataset, range(len(dataset))


Parts = SampleParts | ShardParts


class PartWriter:
    """Write parts of `folder`. The record is written last: it marks a part as complete."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        check_folder(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def has(self, part: int) -> bool:
        """Return whether a part is complete."""
        return self._record(part).is_file()

    def is_whole(self, part: int) -> bool:
        """Return whether the files of a complete part have the recorded hashes."""
        files = self._read_record(part)["files"]
        paths = {self.folder / name: hash_ for name, hash_ in files.items()}
        return all(path.is_file() and sha256(path) == hash_ for path, hash_ in paths.items())

    def write_part(
        self,
        part: int,
        arrays: Mapping[str, np.ndarray],
        columns: Mapping[str, Sequence[Any]],
        broken: Mapping[int | str, str] | None = None,
    ) -> None:
        """Write arrays of N rows and columns of N values, including `caption`.

        broken: reason for each sample without rows, by index or place. Without columns there are
        no files.
        """
        parquet = import_parquet()
        import pyarrow

        files: list[Path] = []
        for name, array in arrays.items():
            files.append(path := self._file(name, f"{part}.npy"))
            with open(path.with_suffix(".part"), "wb") as file:
                try:
                    np.save(file, array, allow_pickle=False)
                except OSError as error:  # numpy names neither the file nor a full disk
                    raise OSError(f"cannot write {path}: {error}; is the disk full?") from None
            path.with_suffix(".part").replace(path)
        if columns:
            files.append(path := self._file("metadata", f"{part}.parquet"))
            table = pyarrow.table({name: list(values) for name, values in columns.items()})
            with open(f"{path}.part", "wb") as file:  # pyarrow's own names must be UTF-8
                parquet.write_table(table, file)
            Path(f"{path}.part").replace(path)
        record = {
            "rows": len(columns.get("caption", ())),
            "files": {path.relative_to(self.folder).as_posix(): sha256(path) for path in files},
            "broken": {str(index): reason for index, reason in (broken or {}).items()},
        }
        save_json(record, self._record(part))

    def write_manifest(self, parts: int) -> None:
        """Write the manifest if all parts are complete."""
        if not all(self.has(part) for part in range(parts)):
            return
        for temporary in self.folder.glob("**/.*.tmp"):
            with contextlib.suppress(FileNotFoundError):  # another task has completed it
                if time.time() - temporary.stat().st_mtime > ABANDONED:  # by a killed process
                    temporary.unlink()
        records = [self._read_record(part) for part in range(parts)]
        manifest = {
            "parts": parts,
            "rows": sum(record["rows"] for record in records),
            "broken": sum(len(record["broken"]) for record in records),
            "files": {name: hash_ for one in records for name, hash_ in one["files"].items()},
        }
        save_json(manifest, self.folder / MANIFEST)

    def _read_record(self, part: int) -> dict[str, Any]:
        record = read_json(self._record(part))
        if not {"rows", "files", "broken"} <= record.keys():
            raise ValueError(f"{self._record(part)} is damaged; delete it and run again")
        return record

    def _record(self, part: int) -> Path:
        return self.folder / "parts" / f"part_{part}.json"

    def _file(self, name: str, end: str) -> Path:
        path = self.folder / name / f"{name}_{end}"
        path.parent.mkdir(exist_ok=True)
        return path
