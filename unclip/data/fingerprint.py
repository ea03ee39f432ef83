"""A hash by which datasets at different places are compared: equal for the same samples."""

from __future__ import annotations

import hashlib

import numpy as np

from unclip.data.precomputed import PrecomputedDataset
from unclip.data.samples import Dataset

SAMPLED = 64  # samples that are read; a dataset may have hundreds of millions


def samples_hash(dataset: Dataset | PrecomputedDataset) -> str:
    """Hash the number of samples, their weights, and evenly spaced keys; then these captions.

    The second half is needed because keys are often numbers: "train-0", "000". Images are hashed
    only if there are no captions, so that resized copies are the same samples. The first half alone
    is the hash of checkpoints of older versions.
    """
    count = len(dataset)
    keys = hashlib.sha256(np.asarray(dataset.weights, np.float64).tobytes())
    contents = hashlib.sha256()
    for index in np.linspace(0, count - 1, min(count, SAMPLED)).astype(int).tolist():
        key, content = _describe(dataset, index)
        keys.update(f"\n{key}".encode("utf-8", "surrogateescape"))
        contents.update(hashlib.sha256(content).digest())
    return keys.hexdigest() + contents.hexdigest()


def _describe(dataset: Dataset | PrecomputedDataset, index: int) -> tuple[str, bytes]:
    """Return the key and the captions of a sample, or its image if it has no caption."""
    if isinstance(dataset, PrecomputedDataset):
        return dataset.keys[index], dataset.captions[index].encode()
    try:
        sample = dataset[index]
    except (ValueError, OSError):  # broken: reported when it is used
        return "", b""
    try:
        return sample.key, "\n".join(sample.captions).encode() or sample.read()
    except (ValueError, OSError):
        return sample.key, b""
