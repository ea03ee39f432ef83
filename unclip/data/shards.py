"""WebDataset tar shards on local disk: a writer and a reader with random access.

A sample is a sequence of consecutive members with the same name up to the first dot of the base
name: `fox.png`, `fox.txt`, `fox.json`. Nothing is ever unpickled.
"""

from __future__ import annotations

import io
import json
import math
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from unclip.data.paths import expand, expand_braces, is_foreign
from unclip.data.remote import find_urls, is_url, local_copies, remove_copy
from unclip.data.samples import (
    EXTENSIONS,
    Sample,
    count_left_out,
    describe,
    first_broken,
    is_image,
    json_weight,
)
from unclip.data.tars import EndMark, Loss, Member, read_members
from unclip.data.text import MAX_JSON, ColumnNames, readable


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
        # Lone surrogates become escapes, as in JSON.
        data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
        member = tarfile.TarInfo(f"{key}.{extension}")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))


class ShardDataset:
    """Samples of local tar shards, in file order. No file stays open, so workers can share it.

    `source` is a folder, a tar, a pattern (`train-*.tar`, `train-{00000..00009}.tar`), or a list of
    these. The captions are `captions` (a list) or `caption` in the JSON member, else the lines of
    the txt member. The JSON may contain a `weight`.

    Samples that lost a member to a damaged header are left out and named in `broken`; other
    members, and images of a folder that are not in a tar, are counted in `left_out`. Samples
    without a caption are broken, or have the captions [""] if none are needed.
    """

    def __init__(
        self,
        source: str | Path | Sequence[str | Path],
        columns: ColumnNames | None = None,
        captions_needed: bool = True,
    ) -> None:
        sources = [source] if isinstance(source, (str, Path)) else source
        self.columns, self.captions_needed = columns or ColumnNames(), captions_needed
        self.shards = [shard for one in sources for shard in find_shards(one)]
        self.broken: dict[str, str] = {}  # place -> reason
        self.left_out: Counter[str] = Counter()  # kind -> number of members or files
        if images := sum(map(_count_images, sources)):
            self.left_out["images outside the tar shards, which take precedence"] = images
        # number of the shard, key, kind ("image", "txt", "json"): member
        self._index: list[tuple[int, str, dict[str, Member]]] = []
        self._usual: tuple[str, ...] = ()  # extensions of a sample
        weights, unreadable = [], []
        for number, shard in enumerate(self.shards):
            try:
                for key, members, weight in self._read_index(shard):
                    self._index.append((number, key, members))
                    weights.append(weight)
            except (ValueError, OSError) as error:
                is_removed = isinstance(error, ValueError) and remove_copy(shard)
                advice = "(removed from the cache: the next run downloads it again)"
                unreadable.append(f"{error} {advice}" if is_removed else str(error))
        if unreadable:
            count = f"{len(unreadable)} of {len(self.shards)} shards cannot be read"
            raise ValueError(f"{count}: {'; '.join(unreadable[:3])}")
        self.weights = np.array(weights, np.float64)
        if not self._index:
            reasons = filter(None, (first_broken(self.broken), count_left_out(self.left_out)))
            found = f"no usable sample in {len(self.shards)} shards"
            found += f" ({why})" if (why := "; ".join(reasons)) else ""
            expected = f"images ({', '.join(EXTENSIONS)}) with a .txt or .json of the same name"
            raise ValueError(f"{source}: {found}; expected {expected}")

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Sample:
        number, key, members = self._index[index]
        shard = self.shards[number]
        where = f"{readable(str(shard))}: {key}"
        files = {kind: _read(shard, members[kind]) for kind in members if kind != "image"}
        try:
            captions, meta = describe(files, self.columns, self.captions_needed)
            weight = json_weight(files.get("json", b""), self.columns)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        image = partial(_read, shard, members["image"], None)
        return Sample(key, captions, image, weight, meta, where)

    def _read_index(self, shard: Path) -> Iterator[tuple[str, dict[str, Member], float]]:
        """Yield key, members and weight of each sample; fill `broken` and `left_out`."""
        name = readable(str(shard))
        for groups in self._archives(read_members(shard), name):
            usual = self._usual = _usual_members(groups, self._usual)
            for group, following in zip(groups, [*groups[1:], _Group("")], strict=True):
                if group.members:
                    try:
                        if members := self._select(group, usual):
                            weight = 1.0
                            if "json" in members:
                                weight = json_weight(_read(shard, members["json"]), self.columns)
                            yield group.key, members, weight
                    except ValueError as error:
                        place = f"{name}: {group.key}"
                        if place in self.broken:  # the same key in another archive of this file
                            first = next(iter(group.members.values()))
                            place += f" (byte {first.offset:,})"
                        self.broken[place] = f"{error}{_damage(group)}"
                for loss, number in _lost_samples(group, following, usual):
                    place = f"{name}: byte {loss.offset:,}"
                    self.broken[f"{place}, sample {number}"] = "lost: its headers are damaged"

    def _archives(
        self, items: Iterable[Member | Loss | EndMark], shard: str
    ) -> Iterator[list[_Group]]:
        """Yield the members of each archive by key, after a group without members."""
        groups, losses = [_Group("")], []
        for item in items:
            if isinstance(item, EndMark):
                groups[-1].after = losses
                yield groups
                groups, losses = [_Group("")], []
            elif isinstance(item, Loss):
                losses.append(item)
                if not item.count:
                    self.left_out[
                        f"regions without a member (byte {item.offset:,} of {shard})"
                    ] += 1
            elif is_foreign(item.name) or not PurePosixPath(item.name).name:
                continue
            elif item.size < 0:
                self.left_out["links, sparse files and devices"] += 1
            else:
                key, extension = _split_name(item.name)
                group = groups[-1]
                if key == group.key and extension not in group.members:
                    group.inside += losses
                else:
                    group.after = losses
                    group = _Group(key, before=losses)
                    groups.append(group)
                group.members[extension] = item
                losses = []
        groups[-1].after = losses
        yield groups

    def _select(self, group: _Group, usual: Sequence[str]) -> dict[str, Member] | None:
        """Return the image and the captions of a sample; None if it has no image.

        Raises ValueError if a needed caption is missing or the image was lost to damage.
        """
        ranks = {
            name: (name.count("."), EXTENSIONS.index(kind))
            for name in group.members
            if (kind := _kind(name)) in EXTENSIONS
        }
        if not ranks:
            if _damage(group) and any(_kind(name) in EXTENSIONS for name in usual):
                raise ValueError("no image")
            names = ", ".join(f".{name}" for name in sorted(group.members))
            self.left_out[f"samples without an image, only {names}"] += 1
            return None
        image = min(ranks, key=lambda name: ranks[name])
        selected = {"image": group.members[image]}
        prefix = image[: len(image) - len(_kind(image))]  # "seg." of fox.seg.png
        for kind in ("txt", "json"):
            for name in (kind, f"{prefix}{kind}"):
                if name in group.members:
                    selected[kind] = group.members[name]
        if self.captions_needed and len(selected) == 1:
            raise ValueError("no caption")
        others = set(group.members) - {image, "txt", "json", f"{prefix}txt", f"{prefix}json"}
        for name in others:
            further = "images besides the first of a sample" if name in ranks else "members"
            self.left_out[f".{name} {further}"] += 1
        if _damage(group) and set(usual) - set(group.members):
            self.left_out[f"members lost from samples that are usable{_damage(group)}"] += 1
        return selected


@dataclass
class _Group:
    """Consecutive members of one sample, and the damage before, between and after them."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)  # by extension
    before: list[Loss] = field(default_factory=list)
    inside: list[Loss] = field(default_factory=list)
    after: list[Loss] = field(default_factory=list)


def _damage(group: _Group) -> str:
    """Describe the damage next to the members of a group: "" if there is none."""
    losses = [loss for loss in (*group.before, *group.inside, *group.after) if loss.count]
    return f" (damaged header at byte {losses[0].offset:,})" if losses else ""


def _usual_members(groups: Sequence[_Group], earlier: tuple[str, ...]) -> tuple[str, ...]:
    """Return the most frequent extensions of the undamaged samples of an archive, in order.

    earlier: the extensions of the previous archive, used if every sample is next to damage.
    """
    patterns = Counter(tuple(group.members) for group in groups if not _damage(group))
    if any(patterns):
        return max(patterns, key=lambda pattern: patterns[pattern] * bool(pattern))
    longest = max((tuple(group.members) for group in groups), key=len)
    return earlier if set(longest) <= set(earlier) else longest


def _lost_samples(
    group: _Group, following: _Group, usual: Sequence[str]
) -> Iterator[tuple[Loss, int]]:
    """Yield (loss, number) for each sample between two groups that lost all its members.

    Lost members are first attributed to the usual members that the two groups lack.
    """
    lost = sum(loss.count for loss in group.after)
    present = [usual.index(name) for name in group.members if name in usual]
    lost -= len(usual) - 1 - max(present) if present else 0
    present = [usual.index(name) for name in following.members if name in usual]
    lost -= min(present) if present else 0
    for number in range(1, math.ceil(max(0, lost) / max(1, len(usual))) + 1):
        yield group.after[0], number


def _split_name(name: str) -> tuple[str, str]:
    """Split "a/fox.seg.PNG" into the key "a/fox" and the extension "seg.png"."""
    path = PurePosixPath(name)
    stem, _, extension = path.name.partition(".")
    return readable(path.with_name(stem).as_posix()), extension.lower()


def _kind(extension: str) -> str:
    """Return the last part of an extension."""
    return extension.rpartition(".")[2]


def find_shards(source: str | Path) -> list[Path]:
    """Return the sorted tar files of a folder, file, pattern or URL; remote ones are downloaded.

    Raises FileNotFoundError if there are none, or if a shard of a numbered range is missing.
    """
    folder = Path(source)
    if is_url(source):
        found = local_copies(shard_urls(source))
    elif folder.is_dir():
        found = [path for path in sorted(folder.glob("*.tar")) if not is_foreign(path.name)]
        held_out = [path for path in found if path.name.startswith("heldout")]
        if 0 < len(held_out) < len(found):
            choice = f"select some of them, e.g. {source}/train-*.tar"
            raise ValueError(f"{source} contains heldout-*.tar and other shards; {choice}")
    else:
        found = expand(str(source))
    if not found:
        raise FileNotFoundError(f"no shards at {source}; expected a folder or pattern of tars")
    return found


def _count_images(source: str | Path) -> int:
    """Count the image files below `source`, if it is a folder."""
    count = 0
    for _, folders, files in os.walk(source):  # skips folders that cannot be read
        folders[:] = [name for name in folders if not is_foreign(name)]
        count += sum(is_image(name) and not is_foreign(name) for name in files)
    return count


def shard_urls(source: str | Path) -> list[str]:
    """Return the URLs of the shards of a remote folder, file or pattern."""
    return [url for pattern in expand_braces(str(source)) for url in find_urls(pattern)]


def _read(shard: Path, member: Member, limit: int | None = MAX_JSON + 1) -> bytes:
    """Read a member, at most `limit` bytes of it."""
    with open(shard, "rb") as file:
        file.seek(member.offset)
        return file.read(member.size if limit is None else min(member.size, limit))
