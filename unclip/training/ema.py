"""Exponential moving average of the trained weights, used for validation, previews and export."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from unclip.training.sharding import local
from unclip.training.tensors import SavedTensors
from unclip.weights import fit_error


class EMA:
    """fp32 averages of a model's trained parameters, starting at its current weights.

    Buffers and frozen parameters are the model's own. The decay warms up over the first updates.
    Each process of a sharded model averages its own rows.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        assert 0 <= decay < 1
        self.decay = decay
        self.updates = 0
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._names = [name for name, _ in named]
        self._params = [p for _, p in named]
        self._averages = [local(p.detach()).float().clone() for p in self._params]
        self._numbers = {id(p): i for i, p in enumerate(self._params)}

    @torch.no_grad()
    def update(self) -> None:
        """Apply average += (1 - decay) * (weights - average)."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        weights = [local(p.detach()).float() for p in self._params]
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
            self._averages, weights, 1 - decay
        )
        self.updates += 1

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Exchange the values of the weights and their averages inside `with`."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def average_of(self, tensor: Tensor) -> Tensor:
        """Return the local rows of a parameter's average, or of any other tensor unchanged."""
        number = self._numbers.get(id(tensor))
        own = local(tensor.detach())
        return own if number is None else self._averages[number].to(own.dtype)

    def load(self, saved: SavedTensors, updates: int) -> None:
        """Restore saved averages, given by parameter name; ValueError for another shape."""
        if missing := [name for name in self._names if name not in saved]:
            raise fit_error(saved.source, missing, [], [])
        for name, p, average in zip(self._names, self._params, self._averages, strict=True):
            average.copy_(saved.rows(name, p))
        self.updates = updates

    @torch.no_grad()
    def _swap(self) -> None:
        for p, average in zip(self._params, self._averages, strict=True):
            weights = local(p.detach())  # shared with FSDP, which does not notice a new p.data
            own = weights.float().clone()
            weights.copy_(average)
            average.copy_(own)
