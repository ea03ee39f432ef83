"""WebDataset tar shards on local disk: a writer and a reader with random access.

A sample is a sequence of consecutive members with the same name up to the first dot of the base
name: `fox.png`, `fox.txt`, `fox.json`.
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

from unclip.data.remote import find_urls, is_url, local_copies
from unclip.data.samples import Sample, caption_list, sample_weight

IMAGES = ("png", "jpg", "jpeg", "webp")
EXTENSIONS = (*IMAGES, "txt", "json")  # other members are ignored; nothing is ever unpickled


class ShardWriter:
    """Write samples to `folder/PREFIX-00000.tar`, `PREFIX-00001.tar`, ..., deterministically."""

    def __init__(self, folder: str | Path, prefix: str, samples_per_shard: int = 1000) -> None:
        self.folder, self.prefix, self.samples_per_shard = Path(folder), prefix, samples_per_shard
        self.count = 0
        self._tar: tarfile.TarFile | None = None

    def write(self, key: str, files: Mapping[str, bytes | str | dict[str, Any]]) -> None:
        """Add a sample; `files` maps an extension to bytes, text, or a dict written as JSON."""
        if not key or "." in key:
            raise ValueError(f"sample key is {key!r}; expected a name without dots")
        if self.count % self.samples_per_shard == 0:
            self.close()
            number = self.count // self.samples_per_shard
            self._tar = tarfile.open(self.folder / f"{self.prefix}-{number:05d}.tar", "w")
        assert self._tar is not None
        add_members(self._tar, key, files)
        self.count += 1

    def close(self) -> None:
        """Finish the current shard."""
        if self._tar is not None:
            self._tar.close()
            self._tar = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def add_members(
    tar: tarfile.TarFile, key: str, files: Mapping[str, bytes | str | dict[str, Any]]
) -> None:
    """Add the files of a sample, without a date; see `ShardWriter.write`."""
    for extension, content in files.items():
        if isinstance(content, dict):
            content = json.dumps(content, ensure_ascii=False)
        data = content.encode() if isinstance(content, str) else content
        member = tarfile.TarInfo(f"{key}.{extension}")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))


class _Member(NamedTuple):
    offset: int
    size: int


class ShardDataset:
    """Samples of local tar shards, in file order. No file stays open, so workers can share it.

    `source` is a folder, a tar, a pattern (`train-*.tar`, `train-{00000..00009}.tar`), or a list of
    these. The captions are `captions` (a list) or `caption` in the JSON member, else the txt
    member. The JSON may contain a `weight`.
    """

    def __init__(self, source: str | Path | Sequence[str | Path]) -> None:
        sources = [source] if isinstance(source, (str, Path)) else source
        self.shards = [shard for one in sources for shard in find_shards(one)]
        self._index: list[tuple[int, str, dict[str, _Member]]] = []  # shard, key, extension: member
        weights: list[float] = []
        for number, shard in enumerate(self.shards):
            for key, members, weight in _read_index(shard):
                self._index.append((number, key, members))
                weights.append(weight)
        self.weights = np.array(weights, np.float64)
        if not self._index:
            count = f"{len(self.shards)} shards"
            raise ValueError(f"{source}: no image ({', '.join(IMAGES)}) in {count}")
        if not any("txt" in members or "json" in members for _, _, members in self._index):
            raise ValueError(f"{source}: no captions; expected a .txt or .json for each image")

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Sample:
        number, key, members = self._index[index]
        shard = self.shards[number]
        try:
            meta = json.loads(_read(shard, members["json"])) if "json" in members else {}
            text = meta.get("captions") or meta.get("caption") if isinstance(meta, dict) else None
            if not text and "txt" in members:
                text = _read(shard, members["txt"]).decode("utf-8-sig")
            captions, weight = caption_list(text), sample_weight(meta)
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{shard}: {key}: {error}") from None
        image = next(members[extension] for extension in IMAGES if extension in members)
        return Sample(key, captions, partial(_read, shard, image), weight, meta)


def find_shards(source: str | Path) -> list[Path]:
    """Return the sorted tar files of a folder, file, pattern or URL; remote ones are downloaded.

    Raises FileNotFoundError if there are none, or if a shard of a numbered range is missing.
    """
    folder = Path(source)
    if is_url(source):
        found = local_copies(shard_urls(source))
    elif folder.is_dir():
        found = sorted(folder.glob("*.tar"))
        held_out = [path for path in found if path.name.startswith("heldout")]
        if 0 < len(held_out) < len(found):
            choice = f"select some of them, e.g. {source}/train-*.tar"
            raise ValueError(f"{source} contains heldout-*.tar and other shards; {choice}")
    elif folder.is_file():
        found = [folder]
    else:
        patterns = _expand_range(str(source))
        found = [Path(path) for pattern in patterns for path in sorted(glob.glob(pattern))]
        if found and (missing := [pattern for pattern in patterns if not glob.glob(pattern)]):
            raise FileNotFoundError(f"{source}: {len(missing)} missing shards, e.g. {missing[0]}")
    if not found:
        raise FileNotFoundError(f"no shards at {source}; expected a folder or pattern of tars")
    return found


def shard_urls(source: str | Path) -> list[str]:
    """Return the URLs of the shards of a remote folder, file or pattern."""
    return [url for pattern in _expand_range(str(source)) for url in find_urls(pattern)]


def _expand_range(pattern: str) -> list[str]:
    """Expand "a-{000..002}.tar" to three names."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not match:
        return [pattern]
    first, last = match.groups()
    head, tail, digits = pattern[: match.start()], pattern[match.end() :], len(first)
    return [f"{head}{n:0{digits}d}{tail}" for n in range(int(first), int(last) + 1)]


def _read(shard: Path, member: _Member) -> bytes:
    with open(shard, "rb") as file:
        file.seek(member.offset)
        return file.read(member.size)


def _read_index(shard: Path) -> list[tuple[str, dict[str, _Member], float]]:
    """Return key, members and weight of each sample that contains an image."""
    samples: list[tuple[str, dict[str, _Member], float]] = []
    key, members, weight = "", {}, 1.0
    try:
        with tarfile.open(shard, "r:") as tar:
            for info in tar:
                head, _, base = info.name.rpartition("/")
                stem, _, extension = base.partition(".")
                if not stem:  # a hidden file, such as macOS adds for each member
                    continue
                name = f"{head}/{stem}" if head else stem
                if name != key:
                    samples.append((key, members, weight))
                    key, members, weight = name, {}, 1.0
                extension = extension.lower()
                if not info.isreg() or extension not in EXTENSIONS:
                    continue
                members[extension] = _Member(info.offset_data, info.size)
                if extension == "json":
                    reader = tar.extractfile(info)
                    assert reader is not None  # a regular file
                    weight = _json_weight(reader.read())
            end = _read(shard, _Member(tar.offset, tarfile.BLOCKSIZE))
            if end != tarfile.NUL * tarfile.BLOCKSIZE:
                raise tarfile.ReadError(f"damaged or truncated at byte {tar.offset:,}")
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"{shard} is not a readable, uncompressed tar ({error})") from None
    samples.append((key, members, weight))
    return [sample for sample in samples if any(extension in sample[1] for extension in IMAGES)]


def _json_weight(text: bytes) -> float:
    """Return the weight in a sample's JSON; 1 if it is damaged, which reading it reports."""
    try:
        return sample_weight(json.loads(text)) if b'"weight"' in text else 1.0
    except (ValueError, AttributeError):
        return 1.0
