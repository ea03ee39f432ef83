"""Several datasets of captioned images as one, each with a weight."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from unclip.data.samples import Dataset, Sample


class Mixture:
    """The samples of `datasets`, one after the other.

    A dataset's weight multiplies those of its samples: with weight 2, each occurs twice per epoch.
    """

    def __init__(self, datasets: Sequence[Dataset], weights: Sequence[float]) -> None:
        self.datasets = datasets
        scaled = [w * data.weights for data, w in zip(datasets, weights, strict=True)]
        self.weights = np.concatenate(scaled)
        self.broken = {place: why for data in datasets for place, why in data.broken.items()}
        self.left_out = sum((data.left_out for data in datasets), Counter[str]())
        self._ends = np.cumsum([len(dataset) for dataset in datasets])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Sample:
        number = int(np.searchsorted(self._ends, index, side="right"))
        dataset = self.datasets[number]
        sample = dataset[index - int(self._ends[number]) + len(dataset)]
        return replace(sample, key=f"{number}:{sample.key}")  # keys may occur in several datasets
