"""The sample that every dataset returns: captions and an image that is decoded on access."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

import numpy as np
from PIL import Image

from unclip.data.text import (
    MAX_TEXT,
    ColumnNames,
    caption_list,
    check_content,
    decode_text,
    first_of,
    parse_bounded,
    sample_weight,
)
from unclip.files import shorten
from unclip.image_io import FORMATS, open_image

SUFFIXES = {
    "PNG": ("png",),
    "JPEG": ("jpg", "jpeg", "jpe", "jfif"),
    "WEBP": ("webp",),
    "BMP": ("bmp",),
    "GIF": ("gif",),
    "TIFF": ("tif", "tiff"),
    "AVIF": ("avif",),
}
EXTENSIONS = tuple(suffix for name in FORMATS for suffix in SUFFIXES[name])
_DOTTED = tuple(f".{suffix}" for suffix in EXTENSIONS)


@dataclass(frozen=True)
class Sample:
    """An encoded image with its captions and metadata."""

    key: str  # name of the image, without its suffix if it is the only one; shards may repeat it
    captions: list[str]  # the canonical one first; [""] if there is none and none is needed
    read: Callable[[], bytes] = field(repr=False)  # returns the encoded image
    weight: float = 1.0  # expected number of occurrences in an epoch
    meta: Mapping[str, Any] = field(default_factory=dict, repr=False)
    where: str = ""  # the file, and the key in a shard, for messages

    @property
    def image(self) -> Image.Image:
        """Decode the image: see `decode`. Raises ValueError or OSError if it cannot be read."""
        try:
            return decode(self.read())
        except ValueError as error:
            raise ValueError(f"{self.where or self.key}: {error}") from None


class Dataset(Protocol):
    """Random access to samples. Samples that cannot be used are left out when it is opened."""

    weights: np.ndarray  # (N,) float64, known without reading any sample
    broken: dict[str, str]  # samples that were left out: place -> reason
    left_out: Counter[str]  # other files that were left out: kind -> number

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """Return a sample. Raises ValueError or OSError if its caption or image is missing."""
        ...


def decode(data: bytes) -> Image.Image:
    """Decode an image to upright RGB on white. Raises ValueError if it is damaged."""
    check_content(data)
    return open_image(io.BytesIO(data))


def is_image(name: str) -> bool:
    """Return whether a file has the suffix of a supported image format."""
    return name.lower().endswith(_DOTTED)


def describe(
    files: Mapping[str, bytes], columns: ColumnNames, captions_needed: bool = True
) -> tuple[list[str], Mapping[str, Any]]:
    """Return the captions and metadata in the "json" and "txt" files of a sample.

    Captions are those of the JSON, else the lines of the text. If there are none: [""], or a
    ValueError if they are needed.
    """
    meta = parse_bounded(files["json"]) if "json" in files else {}
    if not isinstance(meta, dict):
        raise ValueError(f"the JSON is {shorten(meta)}; expected an object")
    value = first_of(meta, (columns.caption,) if columns.caption else ("captions", "caption"))
    if not value and not columns.caption and "txt" in files:
        if len(files["txt"]) > MAX_TEXT:
            raise ValueError(f"a caption file of more than {MAX_TEXT:,} bytes")
        value = decode_text(files["txt"]).splitlines()
    return caption_list(value, captions_needed), meta


def json_weight(data: bytes, columns: ColumnNames) -> float:
    """Return the weight in a sample's JSON, or 1 if there is none.

    Damaged JSON also gives 1: the error is raised when the sample is read. Raises ValueError if the
    weight is not a number in the expected range.
    """
    name = columns.weight or "weight"
    if name.encode() not in data:  # most have none: parsing would take most of the time
        return 1.0
    try:
        meta = parse_bounded(data)
    except ValueError:
        return 1.0
    return sample_weight(meta, name) if isinstance(meta, dict) else 1.0


def first_broken(broken: Mapping[str, str]) -> str:
    """Describe at most three broken samples: "a.png: no caption; b.png: no caption"."""
    return "; ".join(f"{place}: {why}" for place, why in islice(broken.items(), 3))


def count_left_out(left_out: Mapping[str, int]) -> str:
    """Describe files that are not samples: "2 .svg files, 1 captions without image"."""
    return ", ".join(f"{count} {kind}" for kind, count in left_out.items() if count)
