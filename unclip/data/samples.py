"""What every dataset gives: captioned pictures, decoded only when asked for."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageOps

from unclip.image_io import open_image

# Formats that Pillow decodes by itself; others (EPS) would start programs.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")


@dataclass(frozen=True)
class Sample:
    """A picture, not yet decoded, and what can be said about it."""

    key: str  # unique name in its dataset
    captions: list[str]  # at least one; the canonical one first
    read: Callable[[], bytes] = field(repr=False)  # gives the encoded picture
    weight: float = 1.0  # how often it is drawn in an epoch, on average
    meta: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def image(self) -> Image.Image:
        """The picture, upright, RGB, on white where transparent. Raises ValueError or OSError if it is broken."""
        return decode(self.read())


class Dataset(Protocol):
    """Random access to samples; `weights` (N,) float64 are known without reading them."""

    weights: np.ndarray

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """Raises ValueError or OSError for a sample without caption or picture."""
        ...


def decode(data: bytes) -> Image.Image:
    """An encoded picture of any mode as upright RGB on white; ValueError if it is broken."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        image.load()
    except Image.UnidentifiedImageError:
        raise ValueError(f"no {', '.join(FORMATS)} picture") from None
    except Exception as error:  # Pillow's decoders raise many kinds on damaged files
        raise ValueError(f"damaged picture: {error}") from None
    return open_image(image)


def square(image: Image.Image, size: int) -> np.ndarray:
    """Shorter side resized to `size` (Lanczos, antialiased), centre cropped: uint8 (size, size, 3)."""
    return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS))


def caption_list(value: Any) -> list[str]:
    """One caption or a list of them -> non-empty captions, stripped; ValueError if there is none."""
    values = value if isinstance(value, list) else [value]
    captions = [text.strip() for text in values if isinstance(text, str) and text.strip()]
    if not captions:
        raise ValueError("no caption")
    return captions


def sample_weight(meta: Mapping[str, Any]) -> float:
    """`weight` of a sample's metadata, 1 if it has none; ValueError unless it is a number >= 0."""
    try:
        weight = float(meta.get("weight", 1.0))
    except (TypeError, ValueError):
        weight = -1.0
    if not 0 <= weight < float("inf"):
        raise ValueError(f"weight is {meta['weight']!r}; expected a number >= 0")
    return weight
