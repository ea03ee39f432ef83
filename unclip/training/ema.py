"""Exponential moving average of the trained weights, used for validation, previews and export."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class EMA:
    """fp32 averages of a model's trained parameters, starting at its current weights.

    Buffers and frozen parameters are the model's own. The decay warms up over the first updates.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        assert 0 <= decay < 1
        self.decay = decay
        self.updates = 0
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._names = [name for name, _ in named]
        self._params = [p for _, p in named]
        self._averages = [p.detach().float().clone() for p in self._params]

    @torch.no_grad()
    def update(self) -> None:
        """Apply average += (1 - decay) * (weights - average)."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        weights = [p.detach().float() for p in self._params]
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
            self._averages, weights, 1 - decay
        )
        self.updates += 1

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Give the model the averaged weights inside `with`, by exchanging pointers."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def load(self, tensors: dict[str, Tensor], updates: int) -> None:
        """Restore saved averages, given by parameter name."""
        for name, average in zip(self._names, self._averages, strict=True):
            average.copy_(tensors[name])
        self.updates = updates

    def _swap(self) -> None:
        for i, p in enumerate(self._params):
            own = p.data
            p.data = self._averages[i].to(own.dtype)
            self._averages[i] = own.float()
