"""WebDataset tar shards on local disk: a writer, and a reader with random access.

One sample is a run of members whose names agree up to the first dot of the base name: `fox.png`, `fox.txt`, `fox.json`.
"""

from __future__ import annotations

import glob
import io
import json
import re
import tarfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unclip.data.samples import Sample, caption_list, sample_weight

PICTURES = ("png", "jpg", "jpeg", "webp")
READ = (
    *PICTURES,
    "txt",
    "json",
)  # every other kind of member is left alone; nothing is ever unpickled


class ShardWriter:
    """Writes samples to `folder/PREFIX-00000.tar`, `PREFIX-00001.tar`, ...; the same samples give the same bytes."""

    def __init__(self, folder: str | Path, prefix: str, samples_per_shard: int = 1000) -> None:
        self.folder, self.prefix, self.samples_per_shard = Path(folder), prefix, samples_per_shard
        self.count = 0
        self._tar: tarfile.TarFile | None = None

    def write(self, key: str, files: Mapping[str, bytes | str | dict[str, Any]]) -> None:
        """Adds one sample. `files`: extension -> bytes, text, or a dict that becomes JSON."""
        if not key or "." in key:
            raise ValueError(
                f"sample key {key!r}; expected a name without dots: the extension starts at the first dot"
            )
        if self.count % self.samples_per_shard == 0:
            self.close()
            self._tar = tarfile.open(
                self.folder / f"{self.prefix}-{self.count // self.samples_per_shard:05d}.tar", "w"
            )
        assert self._tar is not None
        for extension, content in files.items():
            if isinstance(content, dict):
                content = json.dumps(content, ensure_ascii=False)
            data = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(f"{key}.{extension}")
            member.size = len(data)
            self._tar.addfile(member, io.BytesIO(data))
        self.count += 1

    def close(self) -> None:
        """Finishes the shard being written."""
        if self._tar is not None:
            self._tar.close()
            self._tar = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _Member(NamedTuple):
    offset: int
    size: int


class ShardDataset:
    """The samples of local tar shards, in the order of the files; no file stays open, so workers can share it.

    `source`: a folder, a tar, a pattern (`train-*.tar`, `train-{00000..00009}.tar`), or a list of these. The caption
    comes from the JSON's `captions` (a list) or `caption`, else from the txt; the JSON may hold a `weight`.
    """

    def __init__(self, source: str | Path | Sequence[str | Path]) -> None:
        sources = [source] if isinstance(source, (str, Path)) else source
        self.shards = [shard for one in sources for shard in find_shards(one)]
        self._index: list[
            tuple[int, str, dict[str, _Member]]
        ] = []  # shard, key, extension -> member
        weights: list[float] = []
        for number, shard in enumerate(self.shards):
            for key, members, weight in _read_index(shard):
                self._index.append((number, key, members))
                weights.append(weight)
        self.weights = np.array(weights, np.float64)
        if not self._index:
            raise ValueError(
                f"{source}: no picture ({', '.join(PICTURES)}) in {len(self.shards)} shards"
            )
        if not any("txt" in members or "json" in members for _, _, members in self._index):
            raise ValueError(
                f"{source}: no captions; expected a .txt or .json member beside each picture"
            )

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Sample:
        number, key, members = self._index[index]
        shard = self.shards[number]
        try:
            meta = json.loads(_read(shard, members["json"])) if "json" in members else {}
            said = meta.get("captions") or meta.get("caption") if isinstance(meta, dict) else None
            if not said and "txt" in members:
                said = _read(shard, members["txt"]).decode("utf-8-sig")
            captions, weight = caption_list(said), sample_weight(meta)
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{shard}: {key}: {error}") from None
        picture = next(members[extension] for extension in PICTURES if extension in members)
        return Sample(key, captions, partial(_read, shard, picture), weight, meta)


def find_shards(source: str | Path) -> list[Path]:
    """The tar files that a folder, file or pattern names, sorted.

    FileNotFoundError if there is none, or not each that a range names.
    """
    folder = Path(source)
    if folder.is_dir():
        found = sorted(folder.glob("*.tar"))
        held_out = [path for path in found if path.name.startswith("heldout")]
        if 0 < len(held_out) < len(found):
            raise ValueError(
                f"{source} holds heldout-*.tar beside others; name those you want: {source}/train-*.tar"
            )
    elif folder.is_file():
        found = [folder]
    else:
        patterns = _expand_range(str(source))
        found = [Path(path) for pattern in patterns for path in sorted(glob.glob(pattern))]
        if found and (missing := [pattern for pattern in patterns if not glob.glob(pattern)]):
            raise FileNotFoundError(
                f"{source} names {len(missing)} shards that are missing, e.g. {missing[0]}"
            )
    if not found:
        raise FileNotFoundError(
            f"no shards at {source}; expected a folder with *.tar, a tar, or a pattern of tars"
        )
    return found


def _expand_range(pattern: str) -> list[str]:
    """ "a-{000..002}.tar" -> three names."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not match:
        return [pattern]
    first, last = match.groups()
    return [
        pattern[: match.start()] + f"{number:0{len(first)}d}" + pattern[match.end() :]
        for number in range(int(first), int(last) + 1)
    ]


def _read(shard: Path, member: _Member) -> bytes:
    with open(shard, "rb") as file:
        file.seek(member.offset)
        return file.read(member.size)


def _read_index(shard: Path) -> list[tuple[str, dict[str, _Member], float]]:
    """Key, members and weight of each sample of a shard that has a picture."""
    samples: list[tuple[str, dict[str, _Member], float]] = []
    key, members, weight = "", {}, 1.0
    try:
        with tarfile.open(shard, "r:") as tar:
            for info in tar:
                head, _, base = info.name.rpartition("/")
                stem, _, extension = base.partition(".")
                if not stem:  # a hidden file, such as macOS keeps beside each
                    continue
                name = f"{head}/{stem}" if head else stem
                if name != key:
                    samples.append((key, members, weight))
                    key, members, weight = name, {}, 1.0
                extension = extension.lower()
                if not info.isreg() or extension not in READ:
                    continue
                members[extension] = _Member(info.offset_data, info.size)
                if extension == "json":
                    weight = _weight_in(tar.extractfile(info).read())
            if (
                _read(shard, _Member(tar.offset, tarfile.BLOCKSIZE))
                != tarfile.NUL * tarfile.BLOCKSIZE
            ):
                raise tarfile.ReadError(
                    f"it is damaged at byte {tar.offset:,}, or ends there without an end mark"
                )
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"{shard}: no readable, uncompressed tar ({error})") from None
    samples.append((key, members, weight))
    return [sample for sample in samples if any(extension in sample[1] for extension in PICTURES)]


def _weight_in(text: bytes) -> float:
    """The weight in a sample's JSON; 1 if the JSON is damaged, which is reported when the sample is read."""
    try:
        return sample_weight(json.loads(text)) if b'"weight"' in text else 1.0
    except (ValueError, AttributeError):
        return 1.0
