"""Tensors of a checkpoint: safetensors files that hold whole tensors, or the rows of a process.

model.safetensors          whole tensors
model-00001.safetensors    rows of process 1; the metadata "first_row" is JSON, {name: number}
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from unclip.training.sharding import first_row, local
from unclip.weights import TensorFile, write_safetensors

FIRST_ROW = "first_row"


def write_rows(tensors: Mapping[str, tuple[Tensor, int]], file: Path) -> None:
    """Write tensors with the number of their first row; shared storage is written once per name."""
    written, storages, first = {}, set(), {}
    for name, (tensor, row) in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        written[name] = tensor.clone() if memory in storages else tensor
        storages.add(memory)
        if row:
            first[name] = row
    write_safetensors(written, file, {FIRST_ROW: json.dumps(first)} if first else None)


class SavedTensors(Mapping[str, Tensor]):
    """The tensors `kind` ("model", "ema", ...) of a checkpoint; errors: see TensorFile."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.source = folder / f"{kind}.safetensors"
        files = sorted(folder.glob(f"{kind}-*.safetensors")) or [self.source]
        self._parts: dict[str, list[tuple[int, TensorFile]]] = {}
        for file in map(TensorFile, files):
            first = json.loads(file.metadata.get(FIRST_ROW, "{}"))
            for name in file:
                self._parts.setdefault(name, []).append((first.get(name, 0), file))
        for parts in self._parts.values():
            parts.sort(key=lambda part: part[0])
        self.shapes = {name: self._shape(name) for name in self._parts}

    def _shape(self, name: str) -> tuple[int, ...]:
        row, file = self._parts[name][-1]
        shape = file.shapes[name]
        return (row + shape[0], *shape[1:]) if shape else ()

    def __getitem__(self, name: str) -> Tensor:
        parts = [file[name] for _, file in self._parts[name]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def rows(self, name: str, like: Tensor) -> Tensor:
        """Return the rows that this process holds of `like`; ValueError for another shape."""
        if self.shapes[name] != tuple(like.shape):
            raise ValueError(
                f"{self.source}: {name} is {self.shapes[name]}, expected {tuple(like.shape)}"
            )
        own = local(like)
        if own.shape == like.shape:
            return self[name]
        start, stop = first_row(like), first_row(like) + len(own)
        found = [
            file.rows(name, max(start - first, 0), stop - first)
            for first, file in self._parts[name]
            if first < stop and first + file.shapes[name][0] > start
        ]
        return torch.cat(found) if found else torch.empty_like(own)
