"""Outputs that other implementations gave once, kept in tests/golden: their weights are made anew from their names.

A recording tells the shapes of a network's tensors as its own code names them, and a sample of what it answered.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "golden"
KEPT = 24  # numbers of an output


def recording(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text())


def numbers(name: str, shape: Sequence[int], scale: float = 1.0) -> Tensor:
    """Normal noise that is told by its name; NumPy keeps this stream as it is for good."""
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape))
    return torch.from_numpy(values).float() * scale


def weights(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """A state dict of those shapes, of such sizes that what goes in makes a difference to what comes out."""
    return {name: _weight(name, shape) for name, shape in shapes.items()}


def _weight(name: str, shape: Sequence[int]) -> Tensor:
    if len(shape) > 1:
        return numbers(name, shape, float(np.prod(shape[1:])) ** -0.5)
    return numbers(name, shape, 0.2) + (
        1.0 if name.endswith("weight") else 0.0
    )  # a norm's gain is about 1


def sampled(output: Tensor) -> list[float]:
    """A few of its numbers, from everywhere in it."""
    flat = output.detach().double().flatten()
    return flat[torch.linspace(0, len(flat) - 1, KEPT).long()].tolist()
