"""Computation of image codes of a dataset, for training DALL-E's transformer: train/encode.py."""

# B batch, S image size, N rows, h w grid of codes

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unclip.data.precompute import Arrays, Columns, Compute, caption_rows, precompute
from unclip.data.precomputed import CODES_FILE
from unclip.data.samples import Dataset, Sample
from unclip.image_io import fit, to_tensor
from unclip.models.codecs.codec import ImageCodec


def encode(
    dataset: Dataset,
    codec: ImageCodec,
    out: str | Path,
    *,
    all_captions: bool = False,
    batch_size: int = 64,
    part_size: int = 10_000,
    source: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Encode a dataset into the folder `out`: see `precompute` for resuming and broken samples.

    A sample has one row for its canonical caption, or with `all_captions` one for each caption.
    `source` (paths of the data and the codec) is stored with the settings.
    """
    settings = {**code_settings(codec, all_captions), **(source or {})}
    compute = encoder(codec, all_captions)
    return precompute(
        dataset, compute, out, CODES_FILE, settings, batch_size=batch_size, part_size=part_size
    )


def encoder(codec: ImageCodec, all_captions: bool) -> Compute:
    """Return the computation of a batch's codes."""
    device, dtype = next(codec.parameters()).device, np.min_scalar_type(codec.vocab_size - 1)

    def compute(samples: list[Sample], images: list[Image.Image]) -> tuple[Columns, Arrays]:
        columns, repeats = caption_rows(samples, all_captions)
        batch = to_tensor([fit(image, codec.image_size) for image in images])
        codes = codec.encode(batch.to(device)).cpu().numpy().astype(dtype)  # (B, h, w)
        return columns, {"codes": codes.repeat(repeats, axis=0)}  # (N, h, w)

    return compute


def code_settings(codec: ImageCodec, all_captions: bool) -> dict[str, Any]:
    """Return the settings of codes, which readers need too."""
    return {
        "vocab_size": codec.vocab_size,
        "grid": list(codec.grid),
        "captions": "all" if all_captions else "canonical",
    }
