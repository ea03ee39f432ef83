"""Precomputed CLIP embeddings in clip-retrieval's layout: a reader, a writer, and a command that computes them.

img_emb/img_emb_0.npy  text_emb/text_emb_0.npy  metadata/metadata_0.parquet (column caption)

python -m unclip.data.embeddings DATA OUT --clip MODEL_FOLDER
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# B batch, N rows, D embedding width


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
        import pyarrow

        parquet = _parquet()
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
    number, rows = path.stem.removeprefix("metadata_"), table.num_rows
    columns = {name: table[name].to_pylist() for name in ("caption", "key", "weight") if name in table.column_names}
    return {"key": [f"{number}-{row}" for row in range(rows)], "weight": [1.0] * rows} | columns
