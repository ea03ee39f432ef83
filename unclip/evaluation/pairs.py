"""Captioned images to evaluate on, with the concept, style and group that their metadata names."""

# N images, S image size

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from unclip.data.augment import can_recolour
from unclip.data.loader import open_dataset
from unclip.data.precomputed import PrecomputedDataset
from unclip.data.samples import Dataset, Sample, count_left_out
from unclip.embeddings import caption_targets
from unclip.image_io import fit, from_uint8

_CANONICAL = re.compile(r"(?P<concept>.+), (?P<style>\S+) emoji")


def canonical_caption(concept: str, style: str) -> str:
    """Return the caption of an emoji that every evaluation uses."""
    return f"{concept}, {style} emoji"


@dataclass(frozen=True)
class Pair:
    """The canonical caption of an image and its metadata."""

    key: str
    caption: str
    concept: str  # the caption without the style
    style: str | None  # from the metadata, or from a caption that ends in ", STYLE emoji"
    group: str | None
    toned: bool  # a skin-tone variant of its concept
    colour: str | None = None  # the main colour, if the image makes sense in another one
    scene: Mapping[str, Any] | None = None  # of images that unclip.data.shapes wrote

    @classmethod
    def from_sample(cls, sample: Sample) -> Pair:
        caption, meta = sample.captions[0], sample.meta
        parsed = _CANONICAL.fullmatch(caption)
        return cls(
            key=sample.key,
            caption=caption,
            concept=meta.get("annotation") or (parsed["concept"] if parsed else caption),
            style=meta.get("style") or (parsed["style"] if parsed else None),
            group=meta.get("group"),
            toned=bool(meta.get("tone")),
            colour=meta["colour"] if can_recolour(meta) else None,
            scene=meta.get("scene"),
        )


@dataclass(frozen=True)
class Pairs:
    """N pairs. Small images are kept in memory; larger versions are read from the dataset."""

    dataset: Dataset
    indices: list[int]  # of the pairs in the dataset
    entries: list[Pair]
    images: Tensor  # (N, 3, S, S) uint8
    broken: int = 0  # images that could not be read

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def captions(self) -> list[str]:
        return [pair.caption for pair in self.entries]

    @property
    def styles(self) -> list[str]:
        """All styles, sorted; empty if no pair has one."""
        return sorted({pair.style for pair in self.entries if pair.style})

    def check_captions(self) -> None:
        """Raise ValueError unless there are two different captions, which evaluations compare."""
        if len(set(self.captions)) < 2:
            only = f"the only held-out caption is {self.captions[0]!r}"
            raise ValueError(f"{only}; expected at least two different captions")

    def floats(self, rows: slice | Sequence[int] | Tensor = slice(None)) -> Tensor:
        """Return the images of some rows as (n, 3, S, S) in [-1, 1]."""
        return from_uint8(self.images[rows])

    def image(self, row: int, size: int) -> Image.Image:
        """Read an image from the dataset at `size` x `size` pixels."""
        return fit(self.dataset[self.indices[row]].image, size)

    def spread(self, count: int) -> list[int]:
        """Select `count` diverse rows: new concepts first, then untoned, then rare styles, groups.

        Ties go to the earlier row, so the selection is deterministic. A caption is selected once.
        """
        remaining, selected = caption_targets(self.captions)[0], []
        counts: Counter[tuple[str, str | None]] = Counter()

        def repetition(row: int) -> tuple[int, ...]:
            pair = self.entries[row]
            style, group = counts["style", pair.style], counts["group", pair.group]
            return counts["concept", pair.concept], pair.toned, style, group

        while remaining and len(selected) < count:
            selected.append(min(remaining, key=repetition))
            remaining.remove(selected[-1])
            pair = self.entries[selected[-1]]
            counts.update([("concept", pair.concept), ("style", pair.style), ("group", pair.group)])
        return selected


def load_pairs(
    source: str | Path | Sequence[str | Path],
    size: int,
    limit: int | None = None,
    progress: bool = True,
    captions_needed: bool = True,
) -> Pairs:
    """Read a dataset (any that training accepts, or several tars), resized to `size` x `size`.

    `limit` selects that many evenly spaced pairs. Without `captions_needed`, images without a
    caption have the caption "". Unreadable images are skipped with a warning; raises ValueError if
    none can be read.
    """
    sources = [source] if isinstance(source, (str, Path)) else list(source)
    dataset = open_dataset(sources, captions_needed=captions_needed)
    if isinstance(dataset, PrecomputedDataset):
        raise ValueError(f"{sources[0]} contains precomputed data; evaluation needs images")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; expected at least 1")
    count = min(limit or len(dataset), len(dataset))
    indices = [number * len(dataset) // count for number in range(count)]

    def read(index: int) -> tuple[int, Pair, np.ndarray] | str:
        try:
            sample = dataset[index]
            return index, Pair.from_sample(sample), np.asarray(fit(sample.image, size))
        except (ValueError, OSError) as error:
            return str(error)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow releases the GIL
        name = f"reading {Path(sources[0]).name}"
        bar = tqdm(pool.map(read, indices), name, count, disable=not progress, leave=False)
        results = list(bar)
    loaded = [result for result in results if not isinstance(result, str)]
    errors = [result for result in results if isinstance(result, str)]
    if not loaded:
        raise ValueError(f"{sources[0]}: none of {count} images can be read, e.g. {errors[0]}")
    errors += [f"{place}: {why}" for place, why in dataset.broken.items()]
    if left_out := count_left_out(dataset.left_out):
        warnings.warn(f"{sources[0]}: left out {left_out}", stacklevel=2)
    if errors:
        warnings.warn(f"skipped {len(errors)} unreadable images, e.g. {errors[0]}", stacklevel=2)
    indices, entries, images = zip(*loaded, strict=True)
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()  # (N, 3, S, S)
    return Pairs(dataset, list(indices), list(entries), pixels, len(errors))
