"""Computation of embeddings or codes over a dataset, part by part, so that it can be resumed."""

# N rows

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from unclip.data.loader import open_dataset
from unclip.data.precomputed import PrecomputedDataset, import_parquet
from unclip.data.samples import Dataset, Sample

MAX_BROKEN = 0.01

Columns = dict[str, list[Any]]  # name -> N values
Arrays = dict[str, np.ndarray]  # name -> N rows
# of a batch of samples and their images
Compute = Callable[[list[Sample], list[Image.Image]], tuple[Columns, Arrays]]


class PartWriter:
    """Write parts of `folder`. The metadata is written last: it marks a part as complete."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def has(self, part: int) -> bool:
        """Return whether a part is complete."""
        return (self.folder / f"metadata/metadata_{part}.parquet").is_file()

    def write_part(
        self, part: int, arrays: Mapping[str, np.ndarray], columns: Mapping[str, Sequence[Any]]
    ) -> None:
        """Write arrays of N rows and columns of N values, including `caption`."""
        parquet = import_parquet()
        import pyarrow

        for name, array in arrays.items():
            path = self.folder / name / f"{name}_{part}.npy"
            path.parent.mkdir(exist_ok=True)
            with open(path.with_suffix(".part"), "wb") as file:
                np.save(file, array, allow_pickle=False)
            path.with_suffix(".part").replace(path)
        path = self.folder / "metadata" / f"metadata_{part}.parquet"
        path.parent.mkdir(exist_ok=True)
        table = pyarrow.table({name: list(values) for name, values in columns.items()})
        parquet.write_table(table, f"{path}.part")
        Path(f"{path}.part").replace(path)


def precompute(
    dataset: Dataset,
    compute: Compute,
    out: str | Path,
    settings_file: str,
    settings: Mapping[str, Any],
    *,
    batch_size: int,
    part_size: int,
) -> dict[int, str]:
    """Compute parts of `part_size` samples in `out`, skip complete ones, return broken samples.

    `settings` are stored in `settings_file`; a resumed computation must use the same ones. Broken
    samples are returned as index -> reason. Raises ValueError if they exceed 1 %.
    """
    for name, size in (("batch_size", batch_size), ("part_size", part_size)):
        if size < 1:
            raise ValueError(f"{name} is {size}; expected at least 1")
    writer = PartWriter(out)
    settings = {"samples": len(dataset), "part_size": part_size, **settings}
    _check_settings(writer.folder / settings_file, settings)
    broken: dict[int, str] = {}
    with tqdm(total=len(dataset), unit=" images") as bar:
        for part, first in enumerate(range(0, len(dataset), part_size)):
            stop = min(first + part_size, len(dataset))
            if writer.has(part):
                bar.update(stop - first)
                continue
            batches = []
            for start in range(first, stop, batch_size):
                indices = range(start, min(start + batch_size, stop))
                samples, images = _read_samples(dataset, indices, broken)
                if samples:
                    batches.append(compute(samples, images))
                bar.update(len(indices))
            if batches:
                columns, arrays = zip(*batches, strict=True)
                writer.write_part(
                    part,
                    {name: np.concatenate([rows[name] for rows in arrays]) for name in arrays[0]},
                    {name: [x for rows in columns for x in rows[name]] for name in columns[0]},
                )
    return broken


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


def add_arguments(parser: ArgumentParser, content: str, part_size: int) -> None:
    """Add the arguments shared by the commands that precompute `content`."""
    add = parser.add_argument
    add("data", metavar="DATA", help="tar shards (quote a pattern), a folder of images, or a CSV")
    add("out", metavar="OUT", help=f"output folder for {content}")
    add("--all-captions", action="store_true", help="one row per caption, not only the first")
    add("--batch-size", type=int, default=64, help="images per batch (default: %(default)s)")
    add("--part-size", type=int, default=part_size, help="images per file (default: %(default)s)")
    add("--device", help="default: cuda if available, else cpu")


def run_command(
    options: Namespace,
    compute: Callable[..., dict[int, str]],
    dataset_class: type[PrecomputedDataset],
) -> None:
    """Open the data, call `compute(dataset, device, out, ...)` and print a summary.

    Raises SystemExit with a one-line message on an error.
    """
    sizes = {name: getattr(options, name) for name in ("all_captions", "batch_size", "part_size")}
    try:
        import_parquet()
        dataset = open_dataset(options.data)
        if isinstance(dataset, PrecomputedDataset):
            raise ValueError(f"{options.data} already contains {dataset.content}; expected images")
        device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError):  # AssertionError: torch was built without CUDA
            raise ValueError(
                f"the device {device!r} is not available; expected cpu, or cuda on a CUDA machine"
            ) from None
        broken = compute(dataset, device, options.out, **sizes)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("interrupted; rerun to resume after the last complete part") from None
    rows = len(dataset_class(options.out))
    print(f"{options.out}: {rows} rows, {len(broken)} broken images skipped")
    for reason in broken.values():
        print(f"broken: {reason}")


def _read_samples(
    dataset: Dataset, indices: Sequence[int], broken: dict[int, str]
) -> tuple[list[Sample], list[Image.Image]]:
    """Return the readable samples and their images; add the others to `broken`."""
    samples, images = [], []
    for index in indices:
        try:
            sample = dataset[index]
            images.append(sample.image)
            samples.append(sample)
        except (ValueError, OSError) as error:
            broken[index] = str(error)
    if len(broken) > MAX_BROKEN * min(max(indices[-1] + 1, 1000), len(dataset)):
        example = next(iter(broken.values()))
        raise ValueError(f"{len(broken)} broken samples, over {MAX_BROKEN:.0%}, e.g. {example}")
    return samples, images


def _check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Store the settings; ValueError if the folder was started with other ones."""
    if not path.is_file():
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        return
    earlier = json.loads(path.read_text(encoding="utf-8"))
    if different := [name for name in settings if settings[name] != earlier.get(name)]:
        changes = (f"{name} {earlier.get(name)!r}, now {settings[name]!r}" for name in different)
        raise ValueError(f"{path.parent} was started with {', '.join(changes)}; use another folder")
