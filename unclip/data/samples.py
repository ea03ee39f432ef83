"""The sample that every dataset returns: captions and an image that is decoded on access."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageOps

from unclip.image_io import open_image


@dataclass(frozen=True)
class Sample:
    """An encoded image with its captions and metadata."""

    key: str  # unique within the dataset
    captions: list[str]  # at least one; the canonical one first
    read: Callable[[], bytes] = field(repr=False)  # returns the encoded image
    weight: float = 1.0  # expected number of occurrences in an epoch
    meta: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def image(self) -> Image.Image:
        """Decode the image: see `decode`. Raises ValueError or OSError if it cannot be read."""
        return decode(self.read())


class Dataset(Protocol):
    """Random access to samples; `weights` (N,) float64 are known without reading any sample."""

    weights: np.ndarray

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """Raises ValueError or OSError if the caption or the image is missing."""
        ...


def decode(data: bytes) -> Image.Image:
    """Decode an image to upright RGB, transparency on white; ValueError if it is damaged."""
    return open_image(io.BytesIO(data))


def resize_center_crop(image: Image.Image, size: int) -> np.ndarray:
    """Resize the shorter side to `size` (Lanczos) and crop the center: uint8 (size, size, 3)."""
    return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS))


def caption_list(value: Any) -> list[str]:
    """Strip a caption or list of captions and drop empty ones; ValueError if none is left."""
    values = value if isinstance(value, list) else [value]
    captions = [text.strip() for text in values if isinstance(text, str) and text.strip()]
    if not captions:
        raise ValueError("no caption")
    return captions


def sample_weight(meta: Mapping[str, Any]) -> float:
    """Return `weight` from a sample's metadata (default 1); ValueError unless it is >= 0."""
    try:
        weight = float(meta.get("weight", 1.0))
    except (TypeError, ValueError):
        weight = -1.0
    if not 0 <= weight < float("inf"):
        raise ValueError(f"weight is {meta['weight']!r}; expected a number >= 0")
    return weight
