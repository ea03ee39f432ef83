"""CLIP image embeddings of the training data, computed once, and statistics of them."""

# B batch, N pairs, D CLIP embedding width

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from unclip.clip import CLIP
from unclip.data.loader import Augment, DataConfig, Loader, open_data
from unclip.data.precomputed import EmbeddingDataset
from unclip.models.unclip.prior import EmbeddingStats

CHUNK = 64  # images per call of CLIP


class EmbeddedLoader:
    """A loader that adds precomputed CLIP embeddings, "image_emb" (B, D), to each batch.

    Images are embedded in the order of the dataset, not of the batches, so that a resumed run gets
    the same bits. Raises ValueError for augmented or cropped images and for duplicate keys.
    """

    def __init__(self, loader: Loader, clip: CLIP) -> None:
        if loader.config.augment != Augment() or loader.config.crop is not None:
            raise ValueError("images are augmented or cropped; set embed_once: false")
        self.loader, self.image_emb = loader, _embed_all(loader, clip)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.loader:
            image_emb = torch.stack([self.image_emb[key] for key in batch["key"]])
            yield {**batch, "image_emb": image_emb}

    def __len__(self) -> int:
        return len(self.loader)

    @property
    def broken(self) -> dict[int, str]:
        return self.loader.broken

    def samples_hash(self) -> str:
        return self.loader.samples_hash()

    def state_dict(self) -> dict[str, int]:
        return self.loader.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.loader.load_state_dict(state)


def open_loader(
    config: DataConfig, clip: CLIP, embed_once: bool, images_only: bool = False
) -> Loader | EmbeddedLoader:
    """Return a loader of captioned images or, unless `images_only`, of precomputed embeddings.

    With `embed_once`, images are embedded here. Raises ValueError for other data, and for
    embeddings of another width than CLIP's.
    """
    loader = open_data(config) if images_only else open_data(config, EmbeddingDataset)
    if not isinstance(loader.dataset, EmbeddingDataset):
        return EmbeddedLoader(loader, clip) if embed_once else loader
    if (width := loader.dataset.shape[0]) != clip.emb_dim:
        raise ValueError(f"{config.path} has embeddings of width {width}; CLIP's is {clip.emb_dim}")
    return loader


@torch.no_grad()
def _embed_all(loader: Loader, clip: CLIP) -> dict[str, Tensor]:
    """Return the CLIP embedding (D,) of each image, by key."""
    config = replace(loader.config, batch_size=1, weighted=False, captions="canonical", cache=False)
    singles, embeddings = Loader(config, loader.dataset, num_processes=1, process_index=0), {}
    batches = iter(tqdm(singles, desc=f"embedding {config.path}", leave=False))
    count = 0
    while chunk := list(islice(batches, CHUNK)):
        keys = [key for batch in chunk for key in batch["key"]]
        image_emb = clip.encode_image(torch.cat([batch["image"] for batch in chunk]))  # (B, D)
        embeddings.update(zip(keys, image_emb.float().cpu(), strict=True))
        count += len(keys)
    if count > len(embeddings) + len(singles.broken):  # a broken image repeats another one
        raise ValueError(f"{config.path}: several images have the same key; set embed_once: false")
    return embeddings


@torch.no_grad()
def embedding_pairs(
    clip: CLIP, loader: Loader | EmbeddedLoader, batches: int
) -> tuple[Tensor, Tensor]:
    """Return image and text embeddings (N, D) of the first `batches` batches, on the CPU.

    The loader's position does not change. Raises ValueError for an embedding that is not finite.
    """
    position, image_embs, text_embs = loader.state_dict(), [], []
    counter = tqdm(range(batches), desc="embedding statistics", leave=False)
    for batch, _ in zip(loader, counter, strict=False):
        computed = "image_emb" not in batch
        image_emb = clip.encode_image(batch["image"]) if computed else batch["image_emb"]
        image_embs.append(image_emb.float().cpu())
        for key, emb in zip(batch["key"], image_embs[-1], strict=True):
            if not emb.isfinite().all():
                raise ValueError(f"the image embedding of {key} is not finite; remove it")
        text_embs.append(clip.encode_text(batch["caption"]).emb.float().cpu())
    loader.load_state_dict(position)
    return torch.cat(image_embs), torch.cat(text_embs)


def measure_stats(
    network: EmbeddingStats, clip: CLIP, loader: Loader | EmbeddedLoader, batches: int
) -> None:
    """Set a network's mean and std of image embeddings from the first `batches` batches."""
    image_emb, _ = embedding_pairs(clip, loader, batches)
    network.set_stats(image_emb.mean(dim=0), image_emb.std(dim=0))
