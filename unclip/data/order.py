"""Which samples an epoch holds, and in which order."""

from __future__ import annotations

import numpy as np

ORDER, BATCH = (
    1,
    2,
)  # first word of the seeds: tells the random streams of an epoch and of its batches apart
UNIT = 1 << 20  # of weight


class EpochOrder:
    """Indices of an epoch's samples, a function of (seed, epoch).

    A sample of weight w comes floor(w) or ceil(w) times, w times on average: shuffled, the weights are laid end to end
    on a line and every whole number on it, shifted by one random offset, picks the sample it falls on (systematic
    sampling). So every epoch has the same length, the floor of the weights' sum.
    """

    def __init__(self, weights: np.ndarray, seed: int) -> None:
        # Integers, as a sum must not depend on the order; rounded up, so that five fifths are not short of one.
        self._units = np.ceil(weights * UNIT).astype(np.int64)
        self._seed = seed
        self._latest: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return int(self._units.sum() // UNIT)

    def __call__(self, epoch: int) -> np.ndarray:
        """Indices of the samples (len(self),)."""
        if self._latest is None or self._latest[0] != epoch:
            rng = np.random.default_rng([ORDER, self._seed, epoch])
            shuffled = rng.permutation(len(self._units))
            ends = np.cumsum(self._units[shuffled]) + rng.integers(UNIT)
            counts = np.diff(ends // UNIT, prepend=0)
            self._latest = epoch, rng.permutation(np.repeat(shuffled, counts))[: len(self)]
        return self._latest[1]
