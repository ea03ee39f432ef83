"""The order of samples in an epoch, as a function of the seed and the epoch."""

from __future__ import annotations

import numpy as np

# First word of a seed: separates the streams of epochs, batches and images.
ORDER, BATCH, RECOLOUR, COMPOSE = 1, 2, 3, 4
UNIT = 1 << 20  # fixed-point unit of a weight


class EpochOrder:
    """Sample indices of an epoch, drawn by systematic sampling from (seed, epoch).

    A sample of weight w occurs floor(w) or ceil(w) times, and w times on average. Every epoch has
    the same length: the floor of the sum of the weights.
    """

    def __init__(self, weights: np.ndarray, seed: int) -> None:
        # Integers, so that sums do not depend on the order; rounded up, so that 5 x 1/5 reaches 1.
        self._units = np.ceil(weights * UNIT).astype(np.int64)
        self._length = int(self._units.sum() // UNIT)  # which every batch asks for
        self._seed = seed
        self._latest: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self._length

    def __call__(self, epoch: int) -> np.ndarray:
        """Return the sample indices (len(self),) of an epoch."""
        if self._latest is None or self._latest[0] != epoch:
            rng = np.random.default_rng([ORDER, self._seed, epoch])
            shuffled = rng.permutation(len(self._units))
            # Lay the weights end to end on a line with a random offset; each integer on the line
            # selects the sample whose interval contains it.
            ends = np.cumsum(self._units[shuffled]) + rng.integers(UNIT)
            counts = np.diff(ends // UNIT, prepend=0)
            self._latest = epoch, rng.permutation(np.repeat(shuffled, counts))[: len(self)]
        return self._latest[1]
