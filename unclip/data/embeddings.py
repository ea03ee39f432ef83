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

from unclip.data.precomputed import Indices, PartWriter, PrecomputedDataset, caption_rows, parquet, precompute

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
        return {**{name: torch.from_numpy(array) for name, array in rows.items()}, **self._texts(indices)}


class EmbeddingWriter(PartWriter):
    """Writes parts in clip-retrieval's layout."""

    def write(self, number: int, image_emb: Tensor, text_emb: Tensor, columns: Mapping[str, Sequence[Any]]) -> None:
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
    def compute(samples: list[Sample], images: list[Image.Image]) -> tuple[dict[str, list[Any]], dict[str, np.ndarray]]:
        columns, repeats = caption_rows(samples, all_captions)
        texts = columns["caption"]
        image_emb = clip.encode_image(images).repeat_interleave(torch.tensor(repeats, device=clip.device), dim=0)  # N D
        chunks = [texts[start : start + len(samples)] for start in range(0, len(texts), len(samples))]
        return columns, _arrays(image_emb, torch.cat([clip.encode_text(chunk).emb for chunk in chunks]))

    settings = {"captions": "all" if all_captions else "canonical", **(source or {})}
    writer = EmbeddingWriter(out)
    return precompute(dataset, compute, writer, "embeddings.json", settings, batch_size=batch_size, part_size=part_size)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m unclip.data.embeddings", description="Computes CLIP embeddings; started again, it goes on."
    )
    parser.add_argument("data", metavar="DATA", help="tar shards, a folder with pictures and captions, or a CSV")
    parser.add_argument("out", metavar="OUT", help="folder for img_emb, text_emb and metadata")
    parser.add_argument("--clip", required=True, metavar="MODEL_FOLDER", help="a saved CLIP")
    parser.add_argument("--all-captions", action="store_true", help="a row for each caption, not the first only")
    parser.add_argument("--batch-size", type=int, default=64, help="pictures at once (default: %(default)s)")
    parser.add_argument("--part-size", type=int, default=10_000, help="pictures in a file (default: %(default)s)")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    options = parser.parse_args(arguments)
    from unclip.clip import CLIP  # takes seconds to import
    from unclip.data.loader import open_dataset  # which reads what this writes

    try:
        parquet()
        dataset = open_dataset(options.data)
        if isinstance(dataset, PrecomputedDataset):
            raise ValueError(f"{options.data} holds {dataset.told} already; expected pictures")
        clip = CLIP.from_pretrained(options.clip)
        broken = embed(
            dataset,
            clip.to(options.device or ("cuda" if torch.cuda.is_available() else "cpu")),
            options.out,
            all_captions=options.all_captions,
            batch_size=options.batch_size,
            part_size=options.part_size,
            source={"data": options.data, "clip": options.clip},
        )
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on from the last complete part") from None
    print(f"{options.out}: {len(EmbeddingDataset(options.out))} rows, {len(broken)} broken pictures left out")
    for reason in broken.values():
        print(f"broken: {reason}")


if __name__ == "__main__":
    main()
