"""Captioned pictures to evaluate on, with what their captions and metadata tell of style and concept."""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from unclip.data.precomputed import EmbeddingDataset
from unclip.data.loader import open_dataset
from unclip.data.samples import Dataset, Sample, resize_center_crop
from unclip.data.shards import ShardDataset

# N pictures, S their side

_CANONICAL = re.compile(r"(?P<concept>.+), (?P<style>\S+) emoji")


def canonical(concept: str, style: str) -> str:
    """The caption that names a picture of the emoji data in every evaluation."""
    return f"{concept}, {style} emoji"


@dataclass(frozen=True)
class Pair:
    """A picture's canonical caption and what is known of it."""

    key: str
    caption: str
    concept: str  # the caption without the style
    style: str | None  # from the metadata, or from a caption that ends in ", STYLE emoji"
    group: str | None
    toned: bool  # one of the skin-tone variants of a concept

    @classmethod
    def of(cls, sample: Sample) -> Pair:
        caption, meta = sample.captions[0], sample.meta
        told = _CANONICAL.fullmatch(caption)
        return cls(
            key=sample.key,
            caption=caption,
            concept=meta.get("annotation") or (told["concept"] if told else caption),
            style=meta.get("style") or (told["style"] if told else None),
            group=meta.get("group"),
            toned=bool(meta.get("tone")),
        )


@dataclass(frozen=True)
class Pairs:
    """N pairs; small pictures in memory, large ones read when they are asked for."""

    dataset: Dataset
    indices: list[int]  # of the pairs in the dataset
    entries: list[Pair]
    images: Tensor  # (N, 3, S, S) uint8
    broken: int = 0  # pictures that could not be read and were left out

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def captions(self) -> list[str]:
        return [pair.caption for pair in self.entries]

    @property
    def styles(self) -> list[str]:
        """Every style, sorted; empty if the data tells of none."""
        return sorted({pair.style for pair in self.entries if pair.style})

    def floats(self, rows: slice | Sequence[int] = slice(None)) -> Tensor:
        """The small pictures of some rows, (n, 3, S, S) in [-1, 1]."""
        return self.images[rows].float().div(127.5).sub(1)

    def picture(self, row: int, size: int) -> Image.Image:
        """A picture at `size` x `size` pixels, from its file."""
        return Image.fromarray(resize_center_crop(self.dataset[self.indices[row]].image, size))

    def spread(self, count: int) -> list[int]:
        """Rows of `count` pairs that differ: one of a concept, without skin tones, styles and groups evened out.

        Ties go to the earlier row, so nothing is picked by hand.
        """
        left, chosen = list(range(len(self))), []
        seen: Counter[tuple[str, str | None]] = Counter()

        def repeats(row: int) -> tuple[int, ...]:
            pair = self.entries[row]
            return (
                seen["concept", pair.concept],
                pair.toned,
                seen["style", pair.style],
                seen["group", pair.group],
            )

        while left and len(chosen) < count:
            chosen.append(min(left, key=repeats))
            left.remove(chosen[-1])
            pair = self.entries[chosen[-1]]
            seen.update([("concept", pair.concept), ("style", pair.style), ("group", pair.group)])
        return chosen


def load_pairs(
    source: str | Path | Sequence[str | Path],
    size: int,
    limit: int | None = None,
    progress: bool = True,
) -> Pairs:
    """The pairs of a dataset (anything that training takes, or several tars), pictures at `size` x `size` pixels.

    With `limit`, so many of them, evenly spaced. Broken ones are left out with a warning; ValueError if none is whole.
    """
    sources = [source] if isinstance(source, (str, Path)) else list(source)
    dataset = open_dataset(sources[0]) if len(sources) == 1 else ShardDataset(sources)
    if isinstance(dataset, EmbeddingDataset):
        raise ValueError(f"{sources[0]} holds embeddings; evaluation needs pictures")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; expected at least 1")
    count = min(limit or len(dataset), len(dataset))
    wanted = [number * len(dataset) // count for number in range(count)]

    def read(index: int) -> tuple[Pair, np.ndarray] | str:
        try:
            sample = dataset[index]
            return Pair.of(sample), resize_center_crop(sample.image, size)
        except (ValueError, OSError) as error:
            return str(error)

    with ThreadPoolExecutor(
        os.cpu_count()
    ) as pool:  # Pillow decodes and resizes without holding the interpreter
        name = Path(sources[0]).name
        found = list(
            tqdm(
                pool.map(read, wanted), f"reading {name}", count, disable=not progress, leave=False
            )
        )
    whole = [
        (index, *one) for index, one in zip(wanted, found, strict=True) if not isinstance(one, str)
    ]
    broken = [one for one in found if isinstance(one, str)]
    if not whole:
        raise ValueError(f"{sources[0]}: none of {count} pictures can be read, e.g. {broken[0]}")
    if broken:
        warnings.warn(f"{len(broken)} broken pictures left out, e.g. {broken[0]}", stacklevel=2)
    indices, entries, images = zip(*whole, strict=True)
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()  # (N, 3, S, S)
    return Pairs(dataset, list(indices), list(entries), pixels, len(broken))
