"""Precomputed CLIP embeddings in clip-retrieval's layout: a reader, a writer, and a command that computes them.

img_emb/img_emb_0.npy  text_emb/text_emb_0.npy  metadata/metadata_0.parquet (column caption)

python -m unclip.data.embeddings DATA OUT --clip MODEL_FOLDER
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from unclip.data.precomputed import (
    Indices,
    PartWriter,
    PrecomputedDataset,
    add_arguments,
    caption_rows,
    precompute,
    run_command,
)

if TYPE_CHECKING:
    from PIL import Image

    from unclip.clip import CLIP
    from unclip.data.samples import Dataset, Sample

# B batch, N rows, D embedding width


class EmbeddingDataset(PrecomputedDataset):
    """Captions with their pictures' embeddings, and their own if there are any."""

    names, told, expected = ("img_emb", "text_emb"), "embeddings", "floating-point numbers (N, D)"

    @staticmethod
    def _fits(array: np.ndarray) -> bool:
        return array.ndim == 2 and array.dtype.kind == "f"

    def batch(self, indices: Indices) -> dict[str, Any]:
        """Rows as {"image_emb": float (B, D), "text_emb": float (B, D) if there are any, "caption", "key"}."""
        told = {"img_emb": "image_emb", "text_emb": "text_emb"}
        rows = {told[name]: self._rows(name, indices).astype(np.float32) for name in self._arrays}
        return {
            **{name: torch.from_numpy(array) for name, array in rows.items()},
            **self._texts(indices),
        }


class EmbeddingWriter(PartWriter):
    """Writes parts in clip-retrieval's layout."""

    def write(
        self, number: int, image_emb: Tensor, text_emb: Tensor, columns: Mapping[str, Sequence[Any]]
    ) -> None:
        """One part: embeddings (N, D), and columns of N values, among them `caption`."""
        self.write_part(number, _arrays(image_emb, text_emb), columns)


def _arrays(image_emb: Tensor, text_emb: Tensor) -> dict[str, np.ndarray]:
    return {
        "img_emb": image_emb.detach().float().cpu().numpy(),
        "text_emb": text_emb.detach().float().cpu().numpy(),
    }


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
    """Embeds a dataset into `out`, a row for each sample with its canonical caption or one for each caption.

    `source` tells what is embedded with what. For the rest see `precompute`.
    """

    @torch.inference_mode()
    def compute(
        samples: list[Sample], images: list[Image.Image]
    ) -> tuple[dict[str, list[Any]], dict[str, np.ndarray]]:
        columns, repeats = caption_rows(samples, all_captions)
        texts = columns["caption"]
        image_emb = clip.encode_image(images).repeat_interleave(
            torch.tensor(repeats, device=clip.device), dim=0
        )  # N D
        chunks = [
            texts[start : start + len(samples)] for start in range(0, len(texts), len(samples))
        ]
        return columns, _arrays(
            image_emb, torch.cat([clip.encode_text(chunk).emb for chunk in chunks])
        )

    settings = {"captions": "all" if all_captions else "canonical", **(source or {})}
    writer = EmbeddingWriter(out)
    return precompute(
        dataset,
        compute,
        writer,
        "embeddings.json",
        settings,
        batch_size=batch_size,
        part_size=part_size,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m unclip.data.embeddings",
        description="Computes CLIP embeddings; started again, it goes on.",
    )
    add_arguments(parser, "img_emb, text_emb and metadata", part_size=10_000)
    parser.add_argument("--clip", required=True, metavar="MODEL_FOLDER", help="a saved CLIP")
    options = parser.parse_args(arguments)
    from unclip.clip import CLIP  # takes seconds to import

    def compute(dataset: Dataset, device: str, out: str, **how: Any) -> dict[int, str]:
        source = {"data": options.data, "clip": options.clip}
        return embed(
            dataset, CLIP.from_pretrained(options.clip).to(device), out, source=source, **how
        )

    run_command(options, compute, EmbeddingDataset)


if __name__ == "__main__":
    main()
