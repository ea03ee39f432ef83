"""Computation of CLIP embeddings of a dataset, stored in clip-retrieval's layout.

python -m unclip.data.embeddings DATA OUT --clip MODEL_FOLDER
"""

# N rows, D embedding width

from __future__ import annotations

import argparse
import hashlib
import itertools
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unclip.clip import CLIP
from unclip.data import augment
from unclip.data.job_command import add_arguments, run_command, source_settings
from unclip.data.precompute import (
    Arrays,
    Columns,
    Compute,
    caption_rows,
    precompute,
)
from unclip.data.samples import Dataset, Sample
from unclip.image_io import small_images
from unclip.tokenizer import TruncationCount

SETTINGS_FILE = "embeddings.json"
MAX_LAYOUT = 256  # pixels


def embed(
    dataset: Dataset,
    clip: CLIP,
    out: str | Path,
    *,
    all_captions: bool = False,
    layout: int | None = None,
    recolour: int = 0,
    batch_size: int = 64,
    part_size: int = 10_000,
    source: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Embed a dataset into the folder `out`: see `precompute` for resuming and broken samples.

    A sample has one row for its canonical caption, or with `all_captions` one for each caption.
    layout: side of the images that are stored too, for a `LayoutPrior`. recolour: number of copies
    in other colours, see `recoloured`. `source` (paths of the data and CLIP) is stored with the
    settings.
    """
    settings = {**_settings(all_captions, layout, recolour), **(source or {})}
    compute = embedder(clip, all_captions, layout, recolour)
    return precompute(
        dataset, compute, out, SETTINGS_FILE, settings, batch_size=batch_size, part_size=part_size
    )


def embedder(
    clip: CLIP, all_captions: bool, layout: int | None = None, recolour: int = 0
) -> Compute:
    """Return the computation of a batch's embeddings, and of its layouts if their side is given."""
    count = TruncationCount()

    @torch.inference_mode()
    def compute(samples: list[Sample], images: list[Image.Image]) -> tuple[Columns, Arrays]:
        copies = [recoloured(*pair, recolour) for pair in zip(samples, images, strict=True)]
        samples, images = map(list, zip(*itertools.chain(*copies), strict=True))
        columns, repeats = caption_rows(samples, all_captions)
        texts = columns["caption"]
        image_emb = _to_numpy(clip.encode_image(images)).repeat(repeats, axis=0)  # (N, D)
        with count.counting(len(texts)):
            text_emb = clip.encode_captions(texts).emb  # (N, D)
        arrays = {"img_emb": image_emb, "text_emb": _to_numpy(text_emb)}
        if layout is not None:
            small = small_images(images, layout).flatten(1)
            arrays["layout"] = small.half().numpy().repeat(repeats, axis=0)
        return columns, arrays

    weakref.finalize(compute, count.report)  # once, when all is done
    return compute


def recoloured(sample: Sample, image: Image.Image, copies: int) -> list[tuple[Sample, Image.Image]]:
    """Return a sample and up to `copies` of it in other colours, which their captions name.

    The copies together have half of the weight. The result depends on the sample's key alone.
    """
    if not copies:
        return [(sample, image)]
    found = augment.recolour_to_all(np.asarray(image), sample.captions, sample.meta)
    rng = np.random.default_rng([*hashlib.sha256(sample.key.encode()).digest()[:8]])
    found = [found[k] for k in rng.permutation(len(found))[:copies]]
    own = sample.weight / 2 if found else sample.weight
    others = [
        (replace(sample, captions=captions, weight=own / len(found)), Image.fromarray(copy))
        for copy, captions in found
    ]
    return [(replace(sample, weight=own), image), *others]


def _settings(all_captions: bool, layout: int | None, recolour: int) -> dict[str, Any]:
    captions = "all" if all_captions else "canonical"
    return {"captions": captions, "layout": layout, "recolour": recolour or None}


def _to_numpy(emb: Tensor) -> np.ndarray:
    return emb.detach().float().cpu().numpy()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m unclip.data.embeddings",
        description="Compute CLIP embeddings of captioned images. Rerun to resume.",
    )
    add_arguments(parser, "img_emb, text_emb and metadata", part_size=10_000)
    parser.add_argument("--clip", required=True, metavar="MODEL_FOLDER", help="a saved CLIP")
    about = "also store images of SIZE x SIZE pixels, for train/layout_prior.py"
    parser.add_argument("--layout", type=int, metavar="SIZE", help=about)
    about = "also embed each image in COPIES other colours, of which there are 7 at most"
    parser.add_argument("--recolour", type=int, default=0, metavar="COPIES", help=about)
    options = parser.parse_args(arguments)
    if options.recolour < 0:
        parser.error(f"--recolour is {options.recolour}; expected a number of copies, 0 or more")
    if options.layout is not None and not 1 <= options.layout <= MAX_LAYOUT:
        parser.error(f"--layout is {options.layout}; expected 1 to {MAX_LAYOUT} pixels")
    run_command(options, load_embedder, SETTINGS_FILE)


def load_embedder(options: argparse.Namespace, device: str) -> tuple[Compute, dict[str, Any]]:
    """Load --clip; return its computation and the settings of the command line."""
    clip = CLIP.from_pretrained(options.clip).to(device)
    chosen = options.all_captions, options.layout, options.recolour
    settings = _settings(*chosen) | source_settings(options) | {"clip": options.clip}
    return embedder(clip, *chosen), settings


if __name__ == "__main__":
    main()
