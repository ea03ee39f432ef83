"""Precomputed image codes, for training a transformer on them; `train/encode.py` computes them.

codes/codes_0.npy (N, h, w)  metadata/metadata_0.parquet (column caption)  codes.json (the codec's vocabulary and grid)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from unclip.data.precomputed import (
    Indices,
    PartWriter,
    PrecomputedDataset,
    caption_rows,
    precompute,
)
from unclip.data.samples import square
from unclip.files import read_json

if TYPE_CHECKING:
    from PIL import Image

    from unclip.data.samples import Dataset, Sample
    from unclip.models.codecs.codec import ImageCodec

# B batch, N rows, h w grid of codes, S side of a picture

SETTINGS_FILE = "codes.json"


class CodeDataset(PrecomputedDataset):
    """Captions with their pictures' codes."""

    names, told, expected = ("codes",), "image codes", "unsigned whole numbers (N, h, w)"

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        if not (self.folder / SETTINGS_FILE).is_file():
            raise FileNotFoundError(
                f"{self.folder / SETTINGS_FILE} is missing; it tells the codec's vocabulary"
            )
        settings = read_json(self.folder / SETTINGS_FILE)
        self.vocab_size: int = settings.get("vocab_size")  # of the codec
        if type(self.vocab_size) is not int:
            raise ValueError(
                f"{self.folder / SETTINGS_FILE}: vocab_size is {self.vocab_size!r}; expected a number"
            )
        self.grid: tuple[int, int] = self.shape

    @staticmethod
    def _fits(array: np.ndarray) -> bool:
        return array.ndim == 3 and array.dtype.kind == "u"

    def batch(self, indices: Indices) -> dict[str, Any]:
        """Rows as {"codes": long (B, h, w), "caption", "key"}; ValueError for a code that the codec does not have."""
        codes = self._rows("codes", indices).astype(np.int64)
        if (most := codes.max(initial=0)) >= self.vocab_size:
            raise ValueError(
                f"{self.folder} holds a code {most}; vocab_size in {SETTINGS_FILE} is {self.vocab_size}"
            )
        return {"codes": torch.from_numpy(codes), **self._texts(indices)}


def encode(
    dataset: Dataset,
    codec: ImageCodec,
    out: str | Path,
    *,
    all_captions: bool = False,
    batch_size: int = 64,
    part_size: int = 10_000,
    source: Mapping[str, str] | None = None,
) -> dict[int, str]:
    """Encodes a dataset into `out`, a row for each sample with its canonical caption or one for each caption.

    `source` tells what is encoded with what. For the rest see `precompute`.
    """
    device, dtype = next(codec.parameters()).device, np.min_scalar_type(codec.vocab_size - 1)

    def compute(
        samples: list[Sample], images: list[Image.Image]
    ) -> tuple[dict[str, list[Any]], dict[str, np.ndarray]]:
        columns, repeats = caption_rows(samples, all_captions)
        pixels = np.stack([square(image, codec.image_size) for image in images])  # B S S 3
        pictures = (
            torch.from_numpy(pixels).permute(0, 3, 1, 2).to(device).float().div(127.5).sub(1)
        )  # B 3 S S
        codes = codec.encode(pictures).cpu().numpy().astype(dtype)  # B h w
        return columns, {"codes": codes.repeat(repeats, axis=0)}

    settings = {
        "vocab_size": codec.vocab_size,
        "grid": list(codec.grid),
        "captions": "all" if all_captions else "canonical",
        **(source or {}),
    }
    writer = PartWriter(out)
    return precompute(
        dataset,
        compute,
        writer,
        SETTINGS_FILE,
        settings,
        batch_size=batch_size,
        part_size=part_size,
    )
