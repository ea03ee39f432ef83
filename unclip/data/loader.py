"""Batches whose content depends on (seed, epoch, number) only, so that a run resumes exactly where it stopped."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from unclip.data.codes import CodeDataset
from unclip.data.embeddings import EmbeddingDataset
from unclip.data.folder import FolderDataset
from unclip.data.order import BATCH, EpochOrder
from unclip.data.precomputed import PrecomputedDataset
from unclip.data.samples import Dataset, square
from unclip.data.shards import ShardDataset

# B batch, S image size, P processes

Batch = dict[str, Any]
Example = tuple[np.ndarray, list[str], str]  # picture, uint8 (S, S, 3); captions; key


@dataclass(frozen=True)
class Augment:
    """Random placement on the white ground, in fractions of the picture; never a flip: pictures may hold writing."""

    shift: float = 0.0  # at most so far in x and in y, by whole pixels
    scale: float = 0.0  # smaller or larger by at most this much

    def __post_init__(self) -> None:
        for name in ("shift", "scale"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"augment.{name} is {getattr(self, name)}; expected a fraction in [0, 1)"
                )


@dataclass(frozen=True)
class DataConfig:
    """Where the data is and how batches are made of it."""

    path: str  # anything that `open_dataset` takes
    image_size: int  # pixels a side; the shorter side is resized to it, the middle kept
    batch_size: int  # of one process
    captions: Literal["canonical", "any"] = "any"
    crop: int | None = None  # side of a random crop, for upsamplers
    augment: Augment = field(default_factory=Augment)
    weighted: bool = (
        True  # draw by the samples' weights; False: each once an epoch, as for validation
    )
    cache: bool = (
        False  # keep decoded pictures in memory, image_size**2 * 3 bytes each; starts no workers
    )
    workers: int = 0  # processes that decode pictures; the batches are the same with any number
    seed: int = 0
    max_broken: float = 0.01  # fraction of broken pictures above which loading stops

    def __post_init__(self) -> None:
        for name, low in (("image_size", 1), ("batch_size", 1), ("workers", 0), ("seed", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least {low}")
        if self.crop is not None and not 1 <= self.crop <= self.image_size:
            raise ValueError(f"crop is {self.crop}; expected 1 to image_size = {self.image_size}")
        if not 0 <= self.max_broken < 1:
            raise ValueError(f"max_broken is {self.max_broken}; expected a fraction in [0, 1)")


def open_dataset(path: str | Path) -> Dataset | PrecomputedDataset:
    """Tar shards (folder, file or pattern), pictures (folder, .csv or .jsonl), or a folder of embeddings or codes."""
    place = Path(path)
    if place.suffix == ".tar" or any(sign in str(path) for sign in "*?{"):
        return ShardDataset(path)
    if not place.exists():
        raise FileNotFoundError(
            f"no data at {path}; expected tar shards, a folder with pictures and captions, a CSV, embeddings, or codes"
        )
    if (place / "img_emb").is_dir():
        return EmbeddingDataset(place)
    if (place / "codes").is_dir():
        return CodeDataset(place)
    if next(place.glob("*.tar"), None):
        return ShardDataset(place)
    return FolderDataset(place)


def open_data(config: DataConfig, *precomputed: type[PrecomputedDataset]) -> Loader:
    """A loader of captioned pictures, or of precomputed data of these kinds; ValueError if the data is of another."""
    loader = Loader(config)
    if isinstance(loader.dataset, PrecomputedDataset) and not isinstance(
        loader.dataset, precomputed
    ):
        expected = " or ".join(["pictures", *(kind.told for kind in precomputed)])
        raise ValueError(f"{config.path} holds {loader.dataset.told}; expected {expected}")
    return loader


class Loader:
    """Batches {"image": float (B, 3, S, S) in [-1, 1], "caption": B strings, "key": B strings}.

    Of embeddings, {"image_emb": float (B, D), "text_emb": float (B, D), "caption", "key"}; of codes, {"codes": long
    (B, h, w), "caption", "key"}; ValueError if these are to be augmented or cropped.

    Iterating gives the rest of the current epoch; the next iteration gives the next one. A last, smaller batch is
    dropped unless it is the only one. With P processes, batch n of each is every P-th sample of what one process would
    get as batch n with batch_size * P. Broken pictures are replaced by the next one in the order, reported once, and
    collected in `broken` (index -> name and reason); ValueError when they are more than `max_broken` of the pictures
    seen, which count as 1,000 or the whole dataset at first.
    """

    def __init__(
        self,
        config: DataConfig,
        dataset: Dataset | PrecomputedDataset | None = None,
        num_processes: int | None = None,
        process_index: int | None = None,
    ) -> None:
        self.config = config
        self.dataset = open_dataset(config.path) if dataset is None else dataset
        self.num_processes = (
            int(os.environ.get("WORLD_SIZE", 1)) if num_processes is None else num_processes
        )
        self.process_index = (
            int(os.environ.get("RANK", 0)) if process_index is None else process_index
        )
        weights = self.dataset.weights if config.weighted else np.ones(len(self.dataset))
        self._order = EpochOrder(weights, config.seed)
        self.epoch, self.batch = 0, 0  # of the batch handed out next
        self.broken: dict[int, str] = {}
        self._tried = 0
        if len(self._order) < self.num_processes:
            raise ValueError(
                f"{config.path}: {len(self._order)} samples an epoch for {self.num_processes} processes"
            )
        self._pictures = None
        if not isinstance(self.dataset, PrecomputedDataset):
            self._pictures = PictureReader(self.dataset, config.image_size, config.cache)
        elif config.augment != Augment() or config.crop is not None:
            told = self.dataset.told
            raise ValueError(
                f"{config.path} holds {told}, which can't be augmented or cropped; read pictures instead"
            )

    def __len__(self) -> int:
        """Batches of an epoch."""
        return max(1, len(self._order) // (self.config.batch_size * self.num_processes))

    def __iter__(self) -> Iterator[Batch]:
        epoch = self.epoch
        for batch, tried, broken in self._stream(epoch, self.batch):
            self._report(batch, tried, broken)
            self.batch += 1
            if self.batch == len(self):
                self.epoch, self.batch = epoch + 1, 0
            yield batch

    def captions(self) -> Iterator[str]:
        """All captions of all samples (of each its canonical one, if the config says so); broken samples have none."""
        if isinstance(self.dataset, PrecomputedDataset):
            yield from self.dataset.captions
            return
        for index in range(len(self.dataset)):
            try:
                found = self.dataset[index].captions
            except (ValueError, OSError):
                continue
            yield from found[:1] if self.config.captions == "canonical" else found

    def state_dict(self) -> dict[str, int]:
        """The place of the next batch: those that workers hold ready do not count."""
        return {"epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes to a place that `state_dict` gave; takes effect at the next `iter`."""
        if not 0 <= state["batch"] < len(self):
            raise ValueError(
                f"{self.config.path}: no batch {state['batch']} in {len(self)}; the data has changed"
            )
        self.epoch, self.batch = state["epoch"], state["batch"]

    def _stream(self, epoch: int, first: int) -> Iterator[tuple[Batch, int, dict[int, str]]]:
        if self.config.workers == 0 or self.config.cache or self._pictures is None:
            return (self._make(epoch, number) for number in range(first, len(self)))
        return iter(
            DataLoader(
                _Epoch(self, epoch),
                sampler=range(first, len(self)),
                batch_size=None,
                num_workers=self.config.workers,
                worker_init_fn=_own_process_group,
                generator=torch.Generator(),  # DataLoader draws a seed: not from the training's generator
            )
        )

    def _make(self, epoch: int, number: int) -> tuple[Batch, int, dict[int, str]]:
        """A batch, {} if too much is broken; how many samples were tried for it; which are broken, and why."""
        config, order, step = self.config, self._order(epoch), self.num_processes
        first, total = number * config.batch_size * step, len(order) // step * step
        positions = range(
            first + self.process_index, min(first + config.batch_size * step, total), step
        )
        if self._pictures is None:
            return self.dataset.batch(order[positions]), len(positions), {}

        rng = np.random.default_rng([BATCH, config.seed, epoch, number])
        draws = rng.random((config.batch_size * step, 6))[self.process_index :: step][
            : len(positions)
        ]  # (B, 6)
        examples, broken = [], {}
        for position in positions:
            example = self._first_whole(order, position, broken)
            if example is None:
                return {}, len(broken), broken
            examples.append(example)
        pictures, said, augmented = [], [], config.augment != Augment()
        for (picture, captions, _), draw in zip(examples, draws, strict=True):
            if augmented:
                picture = place(picture, config.augment, draw[1:4])
            if config.crop is not None:
                picture = crop(picture, config.crop, draw[4:6])
            pictures.append(picture)
            said.append(captions[int(draw[0] * len(captions)) if config.captions == "any" else 0])
        # Scaled in NumPy, on one thread: under a training, torch would wait for the threads that it keeps busy.
        images = (
            np.stack(pictures).transpose(0, 3, 1, 2).astype(np.float32, order="C")
        )  # (B, 3, S, S)
        images /= 127.5
        images -= 1
        batch = {
            "image": torch.from_numpy(images),
            "caption": said,
            "key": [key for *_, key in examples],
        }
        return batch, len(positions) + len(broken), broken

    def _first_whole(
        self, order: np.ndarray, position: int, broken: dict[int, str]
    ) -> Example | None:
        """The first picture from `position` on that can be read; None if too many before it are `broken`."""
        for offset in range(len(order)):
            index = int(order[(position + offset) % len(order)])
            try:
                return self._pictures[index]
            except (ValueError, OSError) as error:
                broken[index] = str(error)
            if len(broken) > self.config.max_broken * len(self.dataset):
                break
        return None

    def _report(self, batch: Batch, tried: int, broken: dict[int, str]) -> None:
        """Keeps count; warns of each broken picture once; ValueError over `max_broken`."""
        self._tried += tried
        for index, reason in broken.items():
            if index not in self.broken:
                self.broken[index] = reason
                warnings.warn(f"broken picture left out: {reason}", stacklevel=3)
        judged = min(max(self._tried, 1000), len(self.dataset))
        if len(self.broken) > self.config.max_broken * judged or not batch:
            some = "; ".join(list(self.broken.values())[:3])
            raise ValueError(
                f"{self.config.path}: {len(self.broken)} broken pictures, more than max_broken = "
                f"{self.config.max_broken:.1%} of {judged}: {some}"
            )


def _own_process_group(worker: int) -> None:
    """Ctrl-C reaches a whole process group; the training process alone must hear it, and still get its last batch."""
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()


class _Epoch:
    """The batches of one epoch by number, for DataLoader."""

    def __init__(self, loader: Loader, epoch: int) -> None:
        self.loader, self.epoch = loader, epoch

    def __len__(self) -> int:
        return len(self.loader)

    def __getitem__(self, number: int) -> tuple[Batch, int, dict[int, str]]:
        return self.loader._make(self.epoch, number)


class PictureReader:
    """Pictures of a dataset at one size; with `cache`, each is read and decoded once."""

    def __init__(self, dataset: Dataset, size: int, cache: bool) -> None:
        self.dataset, self.size = dataset, size
        self._texts: list[tuple[list[str], str] | None] | None = (
            [None] * len(dataset) if cache else None
        )
        self._cache = _allocate((len(dataset), size, size, 3)) if cache else None

    def __getitem__(self, index: int) -> Example:
        """ValueError or OSError, with the sample's name, if it is broken."""
        if self._texts is not None and (texts := self._texts[index]) is not None:
            return self._cache[index], *texts
        sample = self.dataset[index]
        try:
            picture = square(sample.image, self.size)
        except ValueError as error:
            raise ValueError(f"{sample.key}: {error}") from None
        if self._texts is not None:
            self._cache[index] = picture
            self._texts[index] = sample.captions, sample.key
        return picture, sample.captions, sample.key


def _allocate(shape: tuple[int, ...]) -> np.ndarray:
    """An uninitialised uint8 array; ValueError if the machine's memory can't hold it."""
    needed = math.prod(shape)
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not every system tells
        memory = needed
    if needed > memory:
        have = f"{memory / 2**30:.1f} GiB of memory"
        raise ValueError(
            f"caching needs {needed / 2**30:.1f} GiB, the machine has {have}; set cache: false"
        )
    return np.empty(shape, np.uint8)


def place(picture: np.ndarray, augment: Augment, draws: np.ndarray) -> np.ndarray:
    """Scaled about the middle and shifted on white: uint8 (S, S, 3), draws (3,) in [0, 1) for scale, x and y."""
    size = len(picture)
    scale, x, y = 2 * draws - 1
    side = round(size * (1 + augment.scale * scale))
    corner = [(size - side) // 2 + round(augment.shift * size * offset) for offset in (x, y)]
    image = Image.fromarray(picture)
    placed = Image.new("RGB", (size, size), "white")
    placed.paste(
        image if side == size else image.resize((side, side), Image.Resampling.LANCZOS), corner
    )
    return np.asarray(placed)


def crop(picture: np.ndarray, size: int, draws: np.ndarray) -> np.ndarray:
    """A square of the picture: (S, S, 3), draws (2,) in [0, 1) -> (size, size, 3)."""
    top, left = (draws * (len(picture) - size + 1)).astype(int)
    return picture[top : top + size, left : left + size]
