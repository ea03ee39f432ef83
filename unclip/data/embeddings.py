"""Computation of CLIP embeddings of a dataset, stored in clip-retrieval's layout.

python -m unclip.data.embeddings DATA OUT --clip MODEL_FOLDER
"""

# N rows, D embedding width

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unclip.clip import CLIP
from unclip.data.precompute import (
    Arrays,
    Columns,
    PartWriter,
    add_arguments,
    caption_rows,
    precompute,
    run_command,
)
from unclip.data.precomputed import EmbeddingDataset
from unclip.data.samples import Dataset, Sample


class EmbeddingWriter(PartWriter):
    """Write parts in clip-retrieval's layout."""

    def write(
        self, part: int, image_emb: Tensor, text_emb: Tensor, columns: Mapping[str, Sequence[Any]]
    ) -> None:
        """Write embeddings (N, D) and columns of N values, including `caption`."""
        arrays = {"img_emb": _to_numpy(image_emb), "text_emb": _to_numpy(text_emb)}
        self.write_part(part, arrays, columns)


def embed(
    dataset: Dataset,
    clip: CLIP,
    out: str | Path,
    *,
    all_captions: bool = False,
    batch_size: int = 64,
    part_size: int = 10_000,
    source: Mapping[str, str] | None = None,
) -> dict[int, str]:
    """Embed a dataset into the folder `out`: see `precompute` for resuming and broken samples.

    A sample has one row for its canonical caption, or with `all_captions` one for each caption.
    `source` (paths of the data and CLIP) is stored with the settings.
    """

    @torch.inference_mode()
    def compute(samples: list[Sample], images: list[Image.Image]) -> tuple[Columns, Arrays]:
        columns, repeats = caption_rows(samples, all_captions)
        texts, step = columns["caption"], len(samples)
        chunks = [texts[start : start + step] for start in range(0, len(texts), step)]
        image_emb = _to_numpy(clip.encode_image(images)).repeat(repeats, axis=0)  # (N, D)
        text_emb = torch.cat([clip.encode_text(chunk).emb for chunk in chunks])  # (N, D)
        return columns, {"img_emb": image_emb, "text_emb": _to_numpy(text_emb)}

    settings = {"captions": "all" if all_captions else "canonical", **(source or {})}
    sizes = {"batch_size": batch_size, "part_size": part_size}
    return precompute(dataset, compute, out, "embeddings.json", settings, **sizes)


def _to_numpy(emb: Tensor) -> np.ndarray:
    return emb.detach().float().cpu().numpy()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m unclip.data.embeddings",
        description="Compute CLIP embeddings of captioned images. Rerun to resume.",
    )
    add_arguments(parser, "img_emb, text_emb and metadata", part_size=10_000)
    parser.add_argument("--clip", required=True, metavar="MODEL_FOLDER", help="a saved CLIP")
    options = parser.parse_args(arguments)

    def compute(dataset: Dataset, device: str, out: str, **sizes: Any) -> dict[int, str]:
        clip = CLIP.from_pretrained(options.clip).to(device)
        source = {"data": options.data, "clip": options.clip}
        return embed(dataset, clip, out, source=source, **sizes)

    run_command(options, compute, EmbeddingDataset)


if __name__ == "__main__":
    main()
