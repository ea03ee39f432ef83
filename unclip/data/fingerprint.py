"""A hash that tells whether two datasets, possibly at different places, have the same samples."""

from __future__ import annotations

import hashlib

import numpy as np

from unclip.data.precomputed import PrecomputedDataset
from unclip.data.samples import Dataset

SAMPLED = 64  # keys; a dataset may have hundreds of millions


def samples_hash(dataset: Dataset | PrecomputedDataset) -> str:
    """Hash the number of samples, their weights, and the keys of evenly spaced ones."""
    count = len(dataset)
    digest = hashlib.sha256(np.asarray(dataset.weights, np.float64).tobytes())
    for index in np.linspace(0, count - 1, min(count, SAMPLED)).astype(int).tolist():
        digest.update(f"\n{_key(dataset, index)}".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _key(dataset: Dataset | PrecomputedDataset, index: int) -> str:
    if isinstance(dataset, PrecomputedDataset):
        return dataset.keys[index]
    try:
        return dataset[index].key
    except (ValueError, OSError):  # broken: reported when it is used
        return ""
