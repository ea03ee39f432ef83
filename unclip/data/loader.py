"""Batches that are a function of (seed, epoch, batch number), so that a run resumes exactly."""

# B batch, S image size, P processes

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Interval
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from unclip.config import NonNegativeInt, Positive, PositiveInt, ProperFraction, config
from unclip.data.augment import Augment, Example, apply_augment, crop
from unclip.data.fingerprint import samples_hash
from unclip.data.folder import FolderDataset
from unclip.data.hub import SCHEME, HubDataset
from unclip.data.mixture import Mixture
from unclip.data.order import BATCH, EpochOrder
from unclip.data.paths import WILDCARDS, is_foreign
from unclip.data.precomputed import CodeDataset, EmbeddingDataset, PrecomputedDataset
from unclip.data.remote import is_url
from unclip.data.samples import Dataset, count_left_out
from unclip.data.shards import ShardDataset
from unclip.data.text import MAX_WEIGHT, ColumnNames
from unclip.data.workers import load_in_workers, own_process_group
from unclip.image_io import fit

Batch = dict[str, Any]
Description = tuple[list[str], str, Mapping[str, Any]]  # captions, key, metadata


@config
class DataConfig:
    """Location of the data and the construction of batches."""

    # see `open_dataset`; a list of shards, or several sources with weights: {a: 2, b: 0.5}
    path: str | tuple[str, ...] | dict[str, Annotated[float, Interval(gt=0, le=MAX_WEIGHT)]]
    image_size: PositiveInt  # side: the shorter side is resized to it, the centre is cropped
    batch_size: PositiveInt  # per process
    captions: Literal["canonical", "any"] = "any"
    crop: PositiveInt | None = None  # side of a random crop, for upsamplers
    augment: Augment = field(default_factory=Augment)
    weighted: bool = True  # sample by weight; False: each once per epoch, as for validation
    cache: bool = False  # keep decoded images in memory, image_size^2 * 3 bytes each; no workers
    workers: NonNegativeInt = 0  # processes that decode images; batches do not depend on it
    seed: NonNegativeInt = 0
    max_broken: ProperFraction = 0.01  # loading stops above this fraction of broken samples
    columns: ColumnNames = field(default_factory=ColumnNames)  # names of columns and JSON keys
    # factor of precomputed image embeddings; null: 1 for the length of the CLIP's embeddings, else
    # measured (train/README.md)
    emb_scale: Positive | None = None

    def __post_init__(self) -> None:
        if self.crop is not None and self.crop > self.image_size:
            raise ValueError(f"crop is {self.crop}; expected at most image_size, {self.image_size}")


def open_dataset(
    path: str | Path | Sequence[str | Path] | Mapping[str, float],
    columns: ColumnNames | None = None,
    captions_needed: bool = True,
) -> Dataset | PrecomputedDataset:
    """Open a dataset by the content of its path, or several with weights.

    A path that exists is not read as a pattern. In a folder, tar shards take precedence over a
    table, and a table over images; images that are not used are counted in `left_out`. Images
    without a caption have the captions [""] if none are needed.

    tar shards            a folder, a file, a pattern, a URL that fsspec can open, or a list
    datasets              "datasets:NAME" or "datasets:NAME:SPLIT"
    captioned images      a folder, a .csv, a .tsv or a .jsonl
    precomputed data      a folder of embeddings or codes
    """
    if isinstance(path, Mapping):
        return _open_mixture(path, columns, captions_needed)
    if not isinstance(path, (str, Path)):
        if len(path) != 1:
            return ShardDataset(path, columns, captions_needed)
        (path,) = path
    place = Path(path)
    if str(path).startswith(SCHEME):
        return HubDataset(str(path), columns, captions_needed)
    exists = os.path.lexists(place)
    is_pattern = not exists and any(sign in str(path) for sign in WILDCARDS)
    if is_url(path) or place.suffix == ".tar" or is_pattern:
        return ShardDataset(path, columns, captions_needed)
    if not exists:
        expected = "tar shards, a folder with images and captions, a table, embeddings, or codes"
        raise FileNotFoundError(f"no data at {path}; expected {expected}")
    if (place / "img_emb").is_dir():
        return EmbeddingDataset(place, columns)
    if (place / "codes").is_dir():
        return CodeDataset(place, columns)
    if place.is_dir() and any(not is_foreign(tar.name) for tar in place.glob("*.tar")):
        return ShardDataset(place, columns, captions_needed)
    return FolderDataset(place, columns, captions_needed)


def _open_mixture(
    sources: Mapping[str, float], columns: ColumnNames | None, captions_needed: bool
) -> Mixture:
    datasets = []
    for path in sources:
        dataset = open_dataset(path, columns, captions_needed)
        if isinstance(dataset, PrecomputedDataset):
            raise ValueError(
                f"{path} contains {dataset.content}, which cannot be mixed; use images"
            )
        datasets.append(dataset)
    if not datasets:
        raise ValueError("path is empty; expected at least one source")
    return Mixture(datasets, list(sources.values()))


def open_data(
    config: DataConfig, *precomputed: type[PrecomputedDataset], captions_needed: bool = True
) -> Loader:
    """Return a loader of captioned images, or of one of the given types of precomputed data.

    Without `captions_needed`, images without a caption have the caption "". Raises ValueError for
    precomputed data of another type.
    """
    loader = Loader(config, captions_needed=captions_needed)
    dataset = loader.dataset
    if isinstance(dataset, PrecomputedDataset) and not isinstance(dataset, precomputed):
        expected = " or ".join(["images", *(kind.content for kind in precomputed)])
        raise ValueError(f"{config.path} contains {dataset.content}; expected {expected}")
    return loader


class Loader:
    """An iterable of batches that can be saved and resumed at any batch.

    images      {"image": float (B, 3, S, S) in [-1, 1], "caption": B strings, "key": B strings}
    embeddings  {"image_emb": float (B, D), "caption", "key"}, and if they are stored
                "text_emb": float (B, D) and "layout": float (B, 3 * s * s)
    codes       {"codes": long (B, h, w), "caption", "key"}

    Iterating returns the rest of the current epoch; the next iteration starts the next epoch. A
    last, smaller batch is dropped unless it is the only one. With P processes, batch n of a process
    is every P-th sample of the batch n that one process would get with batch_size * P. The
    exception is `augment.compose`, which puts two images of one process together.

    Samples that the dataset left out when it was opened are reported at the start. An image that
    cannot be read is replaced by the next one in the order and reported once. Both are collected in
    `broken`: index, or place in the data -> name and reason. Raises ValueError if the broken ones
    exceed `max_broken` of those read so far (at least 1,000, or the whole dataset), and for
    precomputed data that is to be augmented or cropped.
    """

    def __init__(
        self,
        config: DataConfig,
        dataset: Dataset | PrecomputedDataset | None = None,
        num_processes: int | None = None,
        process_index: int | None = None,
        captions_needed: bool = True,
    ) -> None:
        if num_processes is None:
            num_processes = int(os.environ.get("WORLD_SIZE", 1))
        if process_index is None:
            process_index = int(os.environ.get("RANK", 0))
        self.config, self.num_processes, self.process_index = config, num_processes, process_index
        self.dataset = (
            open_dataset(config.path, config.columns, captions_needed)
            if dataset is None
            else dataset
        )
        weights = self.dataset.weights if config.weighted else np.ones(len(self.dataset))
        self._order = EpochOrder(weights, config.seed)
        self.epoch, self.batch = 0, 0  # of the next batch
        self.broken: dict[int | str, str] = {}
        self._num_read, self._max_broken = 0, config.max_broken
        if dataset is None:
            self._report_left_out()
        if len(self._order) < num_processes:
            count = f"{len(self._order)} samples per epoch"
            raise ValueError(f"{config.path}: {count} for {num_processes} processes")
        if isinstance(self.dataset, PrecomputedDataset):
            if config.augment != Augment() or config.crop is not None:
                fault = f"{self.dataset.content}, which cannot be augmented or cropped"
                raise ValueError(f"{config.path} contains {fault}; use images")
        else:
            self._images = ImageReader(self.dataset, config.image_size, config.cache)

    def __len__(self) -> int:
        """Number of batches per epoch."""
        return max(1, len(self._order) // (self.config.batch_size * self.num_processes))

    @property
    def samples_per_step(self) -> int:
        """Number of samples of a batch, over all processes."""
        total = len(self._order) // self.num_processes * self.num_processes
        return min(self.config.batch_size * self.num_processes, total)

    def __iter__(self) -> Iterator[Batch]:
        epoch = self.epoch
        for batch, num_read, broken in self._stream(epoch, self.batch):
            self._report(batch, num_read, broken)
            self.batch += 1
            if self.batch == len(self):
                self.epoch, self.batch = epoch + 1, 0
            yield batch

    def captions(self, limit: int | None = None) -> Iterator[str]:
        """Iterate over the captions of all samples, or the canonical ones, as the config says.

        Broken samples are skipped. limit: read only that many samples, evenly spaced.
        """
        count = min(limit or len(self.dataset), len(self.dataset))
        indices = (number * len(self.dataset) // count for number in range(count))
        if isinstance(self.dataset, PrecomputedDataset):
            yield from (self.dataset.captions[index] for index in indices)
            return
        for index in indices:
            try:
                captions = self.dataset[index].captions
            except (ValueError, OSError):
                continue
            yield from captions[:1] if self.config.captions == "canonical" else captions

    def samples_hash(self) -> str:
        """Return a hash of the samples that does not depend on where they are stored."""
        return samples_hash(self.dataset)

    def state_dict(self) -> dict[str, int]:
        """Return the position of the next batch; batches prefetched by workers do not count."""
        return {"epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Move to the position `state`. Takes effect at the next `iter`."""
        if not 0 <= state["batch"] < len(self):
            position = f"position is batch {state['batch']}, but an epoch has {len(self)} batches"
            raise ValueError(f"{self.config.path}: {position}; the data has changed")
        self.epoch, self.batch = state["epoch"], state["batch"]

    def _stream(self, epoch: int, first: int) -> Iterator[tuple[Batch, int, dict[int, str]]]:
        precomputed = isinstance(self.dataset, PrecomputedDataset)
        if self.config.workers == 0 or self.config.cache or precomputed:
            return (self._make(epoch, number) for number in range(first, len(self)))
        return load_in_workers(
            DataLoader(
                _Epoch(self, epoch),
                sampler=range(first, len(self)),
                batch_size=None,
                num_workers=self.config.workers,
                worker_init_fn=own_process_group,
                generator=torch.Generator(),  # for DataLoader's seed, not from the global generator
            )
        )

    def _make(self, epoch: int, number: int) -> tuple[Batch, int, dict[int, str]]:
        """Return a batch ({} if too many images are broken), images read, and broken images."""
        config, order, step = self.config, self._order(epoch), self.num_processes
        first, end = number * config.batch_size * step, len(order) // step * step
        last = min(first + config.batch_size * step, end)
        positions = range(first + self.process_index, last, step)
        if isinstance(self.dataset, PrecomputedDataset):
            return self.dataset.batch(order[positions]), len(positions), {}

        examples, broken = [], {}
        for position in positions:
            example = self._read_first(order, position, broken)
            if example is None:
                return {}, len(broken), broken
            examples.append(example)
        rng = np.random.default_rng([BATCH, config.seed, epoch, number])
        draws = rng.random((config.batch_size * step, 6))[self.process_index :: step]
        return self._collate(examples, draws), len(positions) + len(broken), broken

    def _collate(self, examples: Sequence[Example], draws: np.ndarray) -> Batch:
        """Augment, crop and stack; draws (at least B, 6) are uniform in [0, 1)."""
        config, images, texts = self.config, [], []
        others = [*examples[1:], *examples[:1]]
        for (image, captions, _, meta), other, draw in zip(examples, others, draws, strict=False):
            text = captions[int(draw[0] * len(captions)) if config.captions == "any" else 0]
            image, text = apply_augment(config.augment, image, text, meta, other, draw)
            if config.crop is not None:
                image = crop(image, config.crop, draw[4:6])
            images.append(image)
            texts.append(text)
        # In NumPy, on one thread: torch would wait for threads that a training keeps busy.
        pixels = np.stack(images).transpose(0, 3, 1, 2).astype(np.float32, order="C")
        pixels /= 127.5
        pixels -= 1  # (B, 3, S, S)
        keys = [key for _, _, key, _ in examples]
        return {"image": torch.from_numpy(pixels), "caption": texts, "key": keys}

    def _read_first(
        self, order: np.ndarray, position: int, broken: dict[int, str]
    ) -> Example | None:
        """Return the first readable image from `position` on; None if too many are broken."""
        for offset in range(len(order)):
            index = int(order[(position + offset) % len(order)])
            try:
                return self._images[index]
            except (ValueError, OSError) as error:
                broken[index] = str(error)
            if len(broken) > self._max_broken * len(self.dataset):
                break
        return None

    def _report_left_out(self) -> None:
        """Report what is left out. Raises ValueError if too many samples are broken."""
        dataset, config = self.dataset, self.config
        if dataset.broken:
            self.broken |= {place: f"{place}: {why}" for place, why in dataset.broken.items()}
            total = len(dataset) + len(self.broken)
            count = f"{len(self.broken)} of {total} samples are broken and left out"
            examples = "; ".join(list(self.broken.values())[:3])
            if len(self.broken) > config.max_broken * total:
                limit = f"more than max_broken = {config.max_broken:.1%}"
                raise ValueError(f"{config.path}: {count}, {limit}: {examples}")
            self._max_broken -= len(self.broken) / total
            if self.process_index == 0:
                warnings.warn(f"{config.path}: {count}: {examples}", stacklevel=4)
        if left_out := count_left_out(dataset.left_out):
            if self.process_index == 0:
                warnings.warn(f"{config.path}: left out {left_out}", stacklevel=4)

    def _report(self, batch: Batch, num_read: int, broken: dict[int, str]) -> None:
        """Warn of each broken image once. Raises ValueError above `max_broken`."""
        self._num_read += num_read
        for index, reason in broken.items():
            if index not in self.broken:
                self.broken[index] = reason
                warnings.warn(f"skipped a broken image: {reason}", stacklevel=3)
        total = min(max(self._num_read, 1000), len(self.dataset))
        found = {index: why for index, why in self.broken.items() if isinstance(index, int)}
        if len(found) > self._max_broken * total or not batch:
            examples = "; ".join(list(found.values())[:3])
            limit = f"more than max_broken = {self.config.max_broken:.1%} of {total}"
            count = f"{len(found)} broken images"
            raise ValueError(f"{self.config.path}: {count}, {limit}: {examples}")


class _Epoch(TorchDataset):
    """The batches of an epoch by number."""

    def __init__(self, loader: Loader, epoch: int) -> None:
        self.loader, self.epoch = loader, epoch

    def __len__(self) -> int:
        return len(self.loader)

    def __getitem__(self, number: int) -> tuple[Batch, int, dict[int, str]]:
        return self.loader._make(self.epoch, number)


class ImageReader:
    """Images of a dataset, resized and cropped to `size`; with `cache`, each is decoded once."""

    def __init__(self, dataset: Dataset, size: int, cache: bool) -> None:
        self.dataset, self.size, self.cache = dataset, size, cache
        if cache:
            self._pixels = _allocate((len(dataset), size, size, 3))
            self._descriptions: list[Description | None] = [None] * len(dataset)

    def __getitem__(self, index: int) -> Example:
        """Return an example. Raises ValueError or OSError that names the sample if it is broken."""
        if self.cache and (description := self._descriptions[index]) is not None:
            return self._pixels[index], *description
        sample = self.dataset[index]
        pixels = np.asarray(fit(sample.image, self.size))
        if self.cache:
            self._pixels[index] = pixels
            self._descriptions[index] = sample.captions, sample.key, sample.meta
        return pixels, sample.captions, sample.key, sample.meta


def _allocate(shape: tuple[int, ...]) -> np.ndarray:
    """Return an uninitialised uint8 array. Raises ValueError if it exceeds the machine's memory."""
    needed = math.prod(shape)
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not available on every system
        memory = needed
    if needed > memory:
        sizes = f"{needed / 2**30:.1f} GiB, the machine has {memory / 2**30:.1f} GiB of memory"
        raise ValueError(f"caching needs {sizes}; set cache: false")
    return np.empty(shape, np.uint8)
