"""CLIP's embeddings of the training data: all at once before the training, and what can be learned from them."""

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
from unclip.data.embeddings import EmbeddingDataset
from unclip.data.loader import Augment, DataConfig, Loader, open_data
from unclip.models.unclip.embedding_stats import EmbeddingStats

AT_ONCE = 64  # pictures


class EmbeddedLoader:
    """A loader whose pictures CLIP has embedded already: batches hold "image_emb" (B, D) too.

    They are embedded in the order of the data set, not when they first come: a resumed run gets the same bits.
    ValueError if augmentation makes another picture of each every time, or two have the same key.
    """

    def __init__(self, loader: Loader, clip: CLIP) -> None:
        if loader.config.augment != Augment() or loader.config.crop is not None:
            raise ValueError(
                "pictures that are augmented or cropped cannot be embedded once for all"
            )
        self.loader, self.image_emb = loader, _embed_all(loader, clip)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.loader:
            image_emb = torch.stack([self.image_emb[key] for key in batch["key"]])
            yield {**batch, "image_emb": image_emb}

    def __len__(self) -> int:
        return len(self.loader)

    @property
    def broken(self) -> dict[int, str]:
        """As `Loader.broken`."""
        return self.loader.broken

    def state_dict(self) -> dict[str, int]:
        return self.loader.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.loader.load_state_dict(state)


def open_loader(
    config: DataConfig, clip: CLIP, embed_once: bool, pictures_only: bool = False
) -> Loader | EmbeddedLoader:
    """A loader of captioned pictures, or of embeddings where these will do; embed_once: pictures are embedded now.

    ValueError for other data, and for embeddings of another width than CLIP's.
    """
    loader = open_data(config) if pictures_only else open_data(config, EmbeddingDataset)
    if not isinstance(loader.dataset, EmbeddingDataset):
        return EmbeddedLoader(loader, clip) if embed_once else loader
    if (width := loader.dataset.shape[0]) != clip.emb_dim:
        raise ValueError(
            f"{config.path} holds embeddings of {width} numbers; expected {clip.emb_dim}, as CLIP's have"
        )
    return loader


@torch.no_grad()
def _embed_all(loader: Loader, clip: CLIP) -> dict[str, Tensor]:
    """CLIP's embedding (D,) of each picture, by its key."""
    config = replace(loader.config, batch_size=1, weighted=False, captions="canonical", cache=False)
    pictures, found = Loader(config, loader.dataset, num_processes=1, process_index=0), {}
    batches = iter(tqdm(pictures, desc=f"embedding {config.path}", leave=False))
    keys: list[str] = []
    while some := list(islice(batches, AT_ONCE)):
        keys += [key for batch in some for key in batch["key"]]
        image_emb = clip.encode_image(torch.cat([batch["image"] for batch in some]))  # (B, D)
        found.update(zip(keys[-len(some) :], image_emb.float().cpu(), strict=True))
    if len(keys) > len(found) + len(pictures.broken):  # another stands in for a broken one
        raise ValueError(
            f"{config.path}: several pictures have the same key; embed at each step instead"
        )
    return found


@torch.no_grad()
def embedding_pairs(
    clip: CLIP, loader: Loader | EmbeddedLoader, batches: int
) -> tuple[Tensor, Tensor]:
    """CLIP's embeddings (N, D) of pictures and of their captions, of the first `batches` batches, on the CPU.

    ValueError for no batch, and for an embedding that is not finite.
    """
    if batches < 1:
        raise ValueError(f"stats_batches is {batches}; expected at least 1")
    state, image_embs, text_embs = loader.state_dict(), [], []
    for batch, _ in zip(
        loader, tqdm(range(batches), desc="embedding statistics", leave=False), strict=False
    ):
        image_emb = (
            batch["image_emb"] if "image_emb" in batch else clip.encode_image(batch["image"])
        )
        image_embs.append(image_emb.float().cpu())
        if wrong := [
            key
            for key, emb in zip(batch["key"], image_embs[-1], strict=True)
            if not emb.isfinite().all()
        ]:
            raise ValueError(
                f"the image embedding of {wrong[0]} is not finite; leave it out, or embed it again"
            )
        text_embs.append(clip.encode_text(batch["caption"]).emb.float().cpu())
    loader.load_state_dict(state)
    return torch.cat(image_embs), torch.cat(text_embs)


def measure_stats(
    network: EmbeddingStats, clip: CLIP, loader: Loader | EmbeddedLoader, batches: int
) -> None:
    """Tells a network the mean and standard deviation of the image embeddings of the first `batches` batches."""
    image_emb, _ = embedding_pairs(clip, loader, batches)
    network.set_stats(image_emb.mean(dim=0), image_emb.std(dim=0))
