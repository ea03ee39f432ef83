"""Saved statistics of the features of a reference set, for the Fréchet distance."""

# F features

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unclip.files import open_regular, printable, sha256, shorten
from unclip.weights import read_tensors

NAMES = (("mean", "covariance"), ("mu", "sigma"))  # of the arrays; the last are those of FID files


@dataclass(frozen=True)
class Statistics:
    """Mean (F,) and covariance (F, F) of the features of images, in float64."""

    file: str
    sha256: str  # of the file
    mean: Tensor
    covariance: Tensor
    images: int | None = None  # None: the file does not say


def load_statistics(file: str | Path) -> Statistics:
    """Read a .npz or .safetensors file with "mean" and "covariance", or "mu" and "sigma".

    "num_images" is optional. Pickles are not executed. Raises FileNotFoundError or ValueError.
    """
    path = Path(file)
    arrays: Mapping[str, Any] = read_tensors(path) if path.suffix == ".safetensors" else _npz(path)
    found = next((names for names in NAMES if all(name in arrays for name in names)), None)
    if found is None:
        known = " or ".join(" and ".join(names) for names in NAMES)
        raise ValueError(f"{file} has {', '.join(arrays) or 'no arrays'}; expected {known}")
    mean, covariance = (_numbers(arrays[name], f"{file}: {name}") for name in found)
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        given = f"{file} has shapes {tuple(mean.shape)} and {tuple(covariance.shape)}"
        raise ValueError(f"{given}; expected (F,) and (F, F) for F features")
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise ValueError(f"{file} has values that are not finite; save the statistics again")
    images = None
    if "num_images" in arrays:
        count = _numbers(arrays["num_images"], f"{file}: num_images")
        if count.numel() != 1 or not 0 < count < torch.inf:
            raise ValueError(f"{file}: num_images is {shorten(count.tolist())}; expected a number")
        images = int(count)
    return Statistics(str(file), sha256(path), mean, covariance, images)


def _numbers(values: Any, where: str) -> Tensor:
    try:
        numbers = torch.as_tensor(values)
    except TypeError:
        raise ValueError(f"{where} has values of type {values.dtype}; expected numbers") from None
    if numbers.is_complex():
        raise ValueError(f"{where} is complex; expected real numbers")
    return numbers.double()


def _npz(path: Path) -> dict[str, np.ndarray]:
    with open_regular(path) as file:
        try:
            with np.load(file, allow_pickle=False) as arrays:
                return dict(arrays)
        except Exception as error:  # numpy, zipfile and zlib raise many types
            raise ValueError(f"{path} is not a .npz file of numbers ({printable(error)})") from None
