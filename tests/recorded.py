"""Recorded outputs of other implementations, in tests/golden; weights are regenerated from names.

A recording has the shapes of a network's tensors, by original name, and samples of its output.
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
KEPT = 24  # numbers kept of an output


def recording(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text())


def numbers(name: str, shape: Sequence[int], scale: float = 1.0) -> Tensor:
    """Normal noise, seeded by its name; NumPy guarantees that this stream stays the same."""
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape))
    return torch.from_numpy(values).float() * scale


def weights(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Return a state dict of these shapes, scaled so that outputs depend on inputs."""
    return {name: _weight(name, shape) for name, shape in shapes.items()}


def _weight(name: str, shape: Sequence[int]) -> Tensor:
    if len(shape) > 1:
        return numbers(name, shape, float(np.prod(shape[1:])) ** -0.5)
    return numbers(name, shape, 0.2) + (
        1.0 if name.endswith("weight") else 0.0
    )  # gains of norms are near 1


def sampled(output: Tensor) -> list[float]:
    """Return evenly spaced numbers of an output."""
    flat = output.detach().double().flatten()
    return flat[torch.linspace(0, len(flat) - 1, KEPT).long()].tolist()
