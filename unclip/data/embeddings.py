"""Precomputed CLIP embeddings in clip-retrieval's layout: a reader, a writer, and a command that computes them.

img_emb/img_emb_0.npy  text_emb/text_emb_0.npy  metadata/metadata_0.parquet (column caption)

python -m unclip.data.embeddings DATA OUT --clip MODEL_FOLDER
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

if TYPE_CHECKING:
    from PIL import Image

    from unclip.clip import CLIP
    from unclip.data.samples import Dataset, Sample

# B batch, N rows, D embedding width

MAX_BROKEN = 0.01


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError("embeddings keep their captions in parquet: pip install pyarrow") from None
    return pyarrow.parquet


class EmbeddingDataset:
    """Rows of `folder`, part by part; the arrays are memory-mapped, captions are held in memory."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        numbers = _parts(self.folder)
        self._image = [_open(self.folder / f"img_emb/img_emb_{n}.npy") for n in numbers]
        has_text = (self.folder / "text_emb").is_dir()
        self._text = [_open(self.folder / f"text_emb/text_emb_{n}.npy") for n in numbers] if has_text else None
        columns = [_read_metadata(self.folder / f"metadata/metadata_{n}.parquet") for n in numbers]
        self.captions: list[str] = [text for part in columns for text in part["caption"]]
        self.keys: list[str] = [key for part in columns for key in part["key"]]
        self.weights = np.array([weight for part in columns for weight in part["weight"]], np.float64)
        for i, n in enumerate(numbers):
            rows = {"img_emb": len(self._image[i]), "metadata": len(columns[i]["caption"])}
            rows |= {"text_emb": len(self._text[i])} if self._text else {}
            if len(set(rows.values())) > 1:
                raise ValueError(f"{self.folder}: part {n} has unequal numbers of rows: {rows}")
        if len({array.shape[1] for array in self._image}) > 1:
            raise ValueError(f"{self.folder}: parts differ in width: {[array.shape[1] for array in self._image]}")
        self._ends = np.cumsum([len(array) for array in self._image])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def batch(self, indices: Sequence[int] | np.ndarray) -> dict[str, Any]:
        """Rows as {"image_emb": float (B, D), "text_emb": float (B, D) if there are any, "caption", "key"}."""
        batch: dict[str, Any] = {"image_emb": self._rows(self._image, indices)}
        if self._text is not None:
            batch["text_emb"] = self._rows(self._text, indices)
        batch["caption"] = [self.captions[i] for i in indices]
        batch["key"] = [self.keys[i] for i in indices]
        return batch

    def _rows(self, parts: list[np.ndarray], indices: Sequence[int] | np.ndarray) -> Tensor:
        numbers = np.searchsorted(self._ends, indices, side="right")
        rows = [parts[n][i - self._ends[n]] for n, i in zip(numbers, indices, strict=True)]  # negative: from the end
        return torch.from_numpy(np.stack(rows).astype(np.float32))


class EmbeddingWriter:
    """Writes parts of `folder`; a part counts as written once its metadata, the last of its files, is there."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        for kind in ("img_emb", "text_emb", "metadata"):
            (self.folder / kind).mkdir(parents=True, exist_ok=True)

    def has(self, number: int) -> bool:
        """Whether part `number` is complete."""
        return (self.folder / f"metadata/metadata_{number}.parquet").is_file()

    def write(self, number: int, image_emb: Tensor, text_emb: Tensor, columns: Mapping[str, Sequence[Any]]) -> None:
        """One part: embeddings (N, D), and columns of N values, among them `caption`."""
        parquet = _parquet()
        import pyarrow

        for kind, emb in (("img_emb", image_emb), ("text_emb", text_emb)):
            path = self.folder / kind / f"{kind}_{number}.npy"
            with open(path.with_suffix(".part"), "wb") as file:
                np.save(file, emb.detach().float().cpu().numpy(), allow_pickle=False)
            path.with_suffix(".part").replace(path)
        path = self.folder / "metadata" / f"metadata_{number}.parquet"
        parquet.write_table(pyarrow.table({name: list(values) for name, values in columns.items()}), f"{path}.part")
        Path(f"{path}.part").replace(path)


def _parts(folder: Path) -> list[str]:
    """Numbers of the parts as they are spelt (0, 1, ... or 0000, 0001, ...), in order."""
    names = [re.fullmatch(r"img_emb_(\d+)\.npy", path.name) for path in (folder / "img_emb").glob("*.npy")]
    numbers = sorted((match[1] for match in names if match), key=int)
    if not numbers:
        raise FileNotFoundError(f"no embeddings in {folder}; expected img_emb/img_emb_0.npy and its metadata")
    return numbers


def _open(path: Path) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: each part needs all its files") from None
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path}: no readable npy array ({error})") from None
    if array.ndim != 2 or array.dtype.kind != "f":
        raise ValueError(f"{path}: expected floating-point numbers (N, D), got {array.dtype} {array.shape}")
    return array


def _read_metadata(path: Path) -> dict[str, list[Any]]:
    parquet = _parquet()
    try:
        table = parquet.read_table(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: each part needs all its files") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no readable parquet file ({error})") from None
    if "caption" not in table.column_names:
        raise ValueError(f"{path}: no column 'caption', only {table.column_names}")
    if nulls := table["caption"].null_count:
        raise ValueError(f"{path}: {nulls} of {table.num_rows} captions are null")
    number, rows = path.stem.removeprefix("metadata_"), table.num_rows
    columns = {name: table[name].to_pylist() for name in ("caption", "key", "weight") if name in table.column_names}
    return {"key": [f"{number}-{row}" for row in range(rows)], "weight": [1.0] * rows} | columns


def embed(
    dataset: Dataset,
    clip: CLIP,
    out: str | Path,
    *,
    all_captions: bool = False,
    batch_size: int = 64,
    part_size: int = 10_000,
    source: Mapping[str, str] | None = None,
) -> dict[int, str]:
    """Embeds a dataset into `out`; parts of `part_size` samples that are there already are left as they are.

    A row for each sample with its canonical caption, or one for each caption, which then share the sample's weight.
    `source`, what is embedded with what, is written down: when a stopped run goes on, it must be the same. Returns the
    broken samples, index -> reason; ValueError if they are over 1 %.
    """
    writer = EmbeddingWriter(out)
    captions = "all" if all_captions else "canonical"
    settings = {"samples": len(dataset), "part_size": part_size, "captions": captions, **(source or {})}
    _keep_settings(writer.folder / "embeddings.json", settings)
    broken: dict[int, str] = {}
    with tqdm(total=len(dataset), unit=" pictures") as bar:
        for number, first in enumerate(range(0, len(dataset), part_size)):
            part = range(first, min(first + part_size, len(dataset)))
            if writer.has(number):
                bar.update(len(part))
                continue
            batches = []
            for start in range(first, part.stop, batch_size):
                indices = range(start, min(start + batch_size, part.stop))
                batches.append(_embed_batch(dataset, indices, clip, all_captions, broken))
                bar.update(len(indices))
            rows = [row for batch, _, _ in batches for row in batch]
            if rows:
                columns = {name: [row[name] for row in rows] for name in rows[0]}
                image_emb, text_emb = (torch.cat(embs) for embs in list(zip(*batches, strict=True))[1:])
                writer.write(number, image_emb, text_emb, columns)
    return broken


@torch.inference_mode()
def _embed_batch(
    dataset: Dataset, indices: Sequence[int], clip: CLIP, all_captions: bool, broken: dict[int, str]
) -> tuple[list[dict[str, Any]], Tensor, Tensor]:
    """Metadata of N rows, image embeddings (N, D) and text embeddings (N, D)."""
    samples, images = _readable(dataset, indices, broken)
    if not samples:
        return [], torch.empty(0, clip.emb_dim), torch.empty(0, clip.emb_dim)
    used = [sample.captions if all_captions else sample.captions[:1] for sample in samples]
    rows = [
        {"caption": text, "key": sample.key, "weight": sample.weight / len(captions)}
        for sample, captions in zip(samples, used, strict=True)
        for text in captions
    ]
    repeats = torch.tensor([len(captions) for captions in used])
    image_emb = clip.encode_image(images).float().cpu().repeat_interleave(repeats, dim=0)  # (N, D)
    texts = [row["caption"] for row in rows]
    chunks = [texts[start : start + len(indices)] for start in range(0, len(texts), len(indices))]
    text_emb = torch.cat([clip.encode_text(chunk).emb.float().cpu() for chunk in chunks])  # (N, D)
    return rows, image_emb, text_emb


def _readable(
    dataset: Dataset, indices: Sequence[int], broken: dict[int, str]
) -> tuple[list[Sample], list[Image.Image]]:
    """The samples that can be read, with their pictures; adds the others to `broken`."""
    samples, images = [], []
    for index in indices:
        try:
            sample = dataset[index]
            images.append(sample.image)
            samples.append(sample)
        except (ValueError, OSError) as error:
            broken[index] = str(error)
    if len(broken) > MAX_BROKEN * min(max(indices[-1] + 1, 1000), len(dataset)):
        raise ValueError(f"{len(broken)} broken samples, over {MAX_BROKEN:.0%}, e.g. {next(iter(broken.values()))}")
    return samples, images


def _keep_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Writes them down, or raises ValueError if others are there."""
    if not path.is_file():
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        return
    earlier = json.loads(path.read_text(encoding="utf-8"))
    if differing := [name for name in settings if settings[name] != earlier.get(name)]:
        told = ", ".join(f"{name} {earlier.get(name)!r}, now {settings[name]!r}" for name in differing)
        raise ValueError(f"{path.parent} was begun with {told}; choose another folder or the same settings")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m unclip.data.embeddings", description="Computes CLIP embeddings; started again, it goes on."
    )
    parser.add_argument("data", metavar="DATA", help="tar shards, a folder with pictures and captions, or a CSV")
    parser.add_argument("out", metavar="OUT", help="folder for img_emb, text_emb and metadata")
    parser.add_argument("--clip", required=True, metavar="MODEL_FOLDER", help="a saved CLIP")
    parser.add_argument("--all-captions", action="store_true", help="a row for each caption, not the first only")
    parser.add_argument("--batch-size", type=int, default=64, help="pictures at once (default: %(default)s)")
    parser.add_argument("--part-size", type=int, default=10_000, help="pictures in a file (default: %(default)s)")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    options = parser.parse_args(arguments)
    from unclip.clip import CLIP  # takes seconds to import
    from unclip.data.loader import open_dataset  # which reads what this writes

    try:
        _parquet()
        dataset = open_dataset(options.data)
        if isinstance(dataset, EmbeddingDataset):
            raise ValueError(f"{options.data} holds embeddings already; expected pictures")
        clip = CLIP.from_pretrained(options.clip)
        broken = embed(
            dataset,
            clip.to(options.device or ("cuda" if torch.cuda.is_available() else "cpu")),
            options.out,
            all_captions=options.all_captions,
            batch_size=options.batch_size,
            part_size=options.part_size,
            source={"data": options.data, "clip": options.clip},
        )
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on from the last complete part") from None
    print(f"{options.out}: {len(EmbeddingDataset(options.out))} rows, {len(broken)} broken pictures left out")
    for reason in broken.values():
        print(f"broken: {reason}")


if __name__ == "__main__":
    main()
