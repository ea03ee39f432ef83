"""Computation of embeddings or codes of a dataset, part by part: resumable, on many machines.

A part is a function of its samples and the settings. A job may be killed at any moment: started
again, it computes the parts without a record, and its files are the same, byte for byte.
"""

# N rows

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from unclip.config import save_json
from unclip.data.parts import Parts, PartWriter, SampleParts, ShardParts
from unclip.data.samples import Dataset, Sample
from unclip.files import read_json

MAX_BROKEN = 0.01

Columns = dict[str, list[Any]]  # name -> N values
Arrays = dict[str, np.ndarray]  # name -> N rows
# Computes the columns and arrays of a batch of samples and their images.
Compute = Callable[[list[Sample], list[Image.Image]], tuple[Columns, Arrays]]
# Returns the computation and its settings for the command line and a device.
Load = Callable[[Namespace, str], tuple[Compute, dict[str, Any]]]


@dataclass
class Job:
    """Computation of parts; `broken` collects the reasons for samples without rows."""

    parts: Parts
    compute: Compute
    writer: PartWriter
    batch_size: int
    broken: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)  # broken when they were opened
    num_read: int = 0

    def run(self, part: int, advance: Callable[[int], Any] | None = None) -> None:
        """Compute a part. Raises ValueError if more than 1 % of all samples read are broken.

        advance: called with the number of samples after each batch.
        """
        dataset, indices = self.parts.open(part)
        left_out = self._check_left_out(dataset) if part == 0 or self.parts.samples is None else {}
        batches, broken = [], {}
        for start in range(0, len(indices), self.batch_size):
            chosen = indices[start : start + self.batch_size]
            samples, images = self._read(dataset, chosen, broken, part)
            if samples:
                batches.append(self.compute(samples, images))
            if advance:
                advance(len(chosen))
        columns, arrays = zip(*batches, strict=True) if batches else ([{}], [{}])
        self.writer.write_part(
            part,
            {name: np.concatenate([rows[name] for rows in arrays]) for name in arrays[0]},
            {name: [x for rows in columns for x in rows[name]] for name in columns[0]},
            {**broken, **left_out},
        )

    def _check_left_out(self, dataset: Dataset) -> dict[str, str]:
        """Return the samples that were broken when opened. Raises ValueError if too many were."""
        self.left_out |= {place: f"{place}: {why}" for place, why in dataset.broken.items()}
        total = self.parts.samples or max(1000, self.num_read + len(dataset))
        _check_broken(self.left_out, total + len(self.left_out))
        return {place: self.left_out[place] for place in dataset.broken}

    def _read(
        self, dataset: Dataset, indices: Sequence[int], broken: dict[int, str], part: int
    ) -> tuple[list[Sample], list[Image.Image]]:
        """Return the readable samples and their images; add the others to `broken`."""
        samples, images = [], []
        for index in indices:
            try:
                sample = dataset[index]
                images.append(sample.image)
                samples.append(sample)
            except (ValueError, OSError) as error:
                broken[index] = self.broken[f"{part}:{index}"] = str(error)
        self.num_read += len(indices)
        _check_broken(self.broken, max(self.num_read, min(1000, self.parts.samples or 1000)))
        return samples, images


def _check_broken(broken: Mapping[str, str], total: int) -> None:
    """Raise ValueError if more than 1 % of `total` samples are broken: place -> reason."""
    if len(broken) > MAX_BROKEN * total:
        example = next(iter(broken.values()))
        raise ValueError(f"{len(broken)} broken samples, over {MAX_BROKEN:.0%}, e.g. {example}")


def precompute(
    source: Dataset | ShardParts,
    compute: Compute,
    out: str | Path,
    settings_file: str,
    settings: Mapping[str, Any],
    *,
    batch_size: int,
    part_size: int,
    task: int = 0,
    tasks: int = 1,
    verify: bool = False,
) -> dict[str, str]:
    """Compute the incomplete parts of a task in `out`; return the reasons for broken samples.

    The parts are `part_size` samples each, or shards; those of `task` are every `tasks`-th.
    `settings` are stored in `settings_file`; a resumed computation must use the same ones. verify:
    recompute complete parts whose files have other hashes. The last task to finish writes the
    manifest. Raises ValueError if more than 1 % of the samples are broken.
    """
    for name, size in (("batch_size", batch_size), ("part_size", part_size), ("tasks", tasks)):
        if size < 1:
            raise ValueError(f"{name} is {size}; expected at least 1")
    if not 0 <= task < tasks:
        raise ValueError(f"task is {task}; expected 0 to {tasks - 1} for {tasks} tasks")
    parts = source if isinstance(source, ShardParts) else SampleParts(source, part_size)
    writer = start(out, settings_file, {**parts.settings, **settings})
    job = Job(parts, compute, writer, batch_size)
    numbers = [n for n in range(task, len(parts), tasks) if not complete(writer, n, verify)]
    total = sum(len(parts.open(n)[1]) for n in numbers) if parts.samples else None
    with tqdm(total=total, unit=" images") as bar:
        for number in numbers:
            job.run(number, bar.update)
    writer.write_manifest(len(parts))
    return {**job.left_out, **job.broken}


def start(out: str | Path, settings_file: str, settings: Mapping[str, Any]) -> PartWriter:
    """Store the settings in a new folder. Raises ValueError if it was started with other ones."""
    writer = PartWriter(out)
    path = writer.folder / settings_file
    if not path.is_file():
        save_json(settings, path)
        return writer
    earlier = read_json(path)
    if different := [name for name in settings if settings[name] != earlier.get(name)]:
        changes = (f"{name} {earlier.get(name)!r}, now {settings[name]!r}" for name in different)
        raise ValueError(f"{out} was started with {', '.join(changes)}; use another folder")
    return writer


def complete(writer: PartWriter, part: int, verify: bool) -> bool:
    """Return whether a part is complete; with `verify`, its files are hashed."""
    return writer.has(part) and not (verify and not writer.is_whole(part))


def caption_rows(samples: Sequence[Sample], all_captions: bool) -> tuple[Columns, list[int]]:
    """Return the columns caption, key and weight, and the number of rows of each sample.

    A sample has one row for its canonical caption, or with `all_captions` one for each caption.
    The rows of a sample share its weight.
    """
    columns: Columns = {"caption": [], "key": [], "weight": []}
    repeats = []
    for sample in samples:
        captions = sample.captions if all_captions else sample.captions[:1]
        repeats.append(len(captions))
        columns["caption"] += captions
        columns["key"] += [sample.key] * len(captions)
        columns["weight"] += [sample.weight / len(captions)] * len(captions)
    return columns, repeats


def find_device(options: Namespace) -> str:
    """Return --device, or the default. Raises ValueError if it is not available."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):  # AssertionError: torch was built without CUDA
        raise ValueError(
            f"the device {device!r} is not available; expected cpu, or cuda on a CUDA machine"
        ) from None
    return device
