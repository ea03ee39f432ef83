"""CLIP image embeddings of the training data, computed once, and statistics of them."""

# B batch, N pairs, D CLIP embedding width

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from unclip.clip import CLIP
from unclip.data.loader import Augment, DataConfig, Loader, open_data
from unclip.data.precomputed import EmbeddingDataset, PrecomputedDataset
from unclip.data.samples import Dataset
from unclip.models.unclip.layout_prior import LayoutPrior, layouts
from unclip.models.unclip.prior import EmbeddingStats
from unclip.training.initialization import report_long_captions
from unclip.training.launch import Run

CHUNK = 64  # images per call of CLIP
TOLERANCE = 0.02  # relative difference of lengths that is ignored
SAME_CLIP = 0.98  # least cosine of stored text embeddings to CLIP's own, whose precision may differ


class EmbeddedLoader:
    """A loader that adds precomputed CLIP embeddings, "image_emb" (B, D), to each batch.

    Images are embedded in the order of the dataset, not of the batches, so that a resumed run
    computes the same bits. Raises ValueError for augmented or cropped images and duplicate keys.
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
    def dataset(self) -> Dataset | PrecomputedDataset:
        return self.loader.dataset

    @property
    def broken(self) -> dict[int | str, str]:
        return self.loader.broken

    def samples_hash(self) -> str:
        return self.loader.samples_hash()

    def state_dict(self) -> dict[str, int]:
        return self.loader.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.loader.load_state_dict(state)


def open_loader(
    config: DataConfig, clip: CLIP, embed_once: bool, reads_captions: bool = True
) -> Loader | EmbeddedLoader:
    """Return a loader of captioned images or of precomputed embeddings.

    With `embed_once`, images are embedded here. Captions that are too long for CLIP are reported
    only to a network that reads captions. Raises ValueError for other data, and for
    embeddings of another width than CLIP's.
    """
    loader = open_data(config, EmbeddingDataset)
    if reads_captions:
        report_long_captions(clip.tokenizer, loader)
    if not isinstance(loader.dataset, EmbeddingDataset):
        return EmbeddedLoader(loader, clip) if embed_once else loader
    if (width := loader.dataset.shape[0]) != clip.emb_dim:
        raise ValueError(f"{config.path} has embeddings of width {width}; CLIP's is {clip.emb_dim}")
    scales = embedding_scales(loader.dataset, clip, config.emb_scale)
    loader.dataset.scales = scales
    if set(scales.values()) - {1.0} and loader.process_index == 0:
        factors = ", ".join(f"{name} by {scale:.4g}" for name, scale in scales.items())
        reason = "to get the length of this CLIP's own (data.emb_scale sets another factor)"
        warnings.warn(f"{config.path}: multiplying {factors}, {reason}", stacklevel=2)
    return loader


def open_loaders(
    run: Run[Any], clip: CLIP, reads_captions: bool = True
) -> tuple[Loader | EmbeddedLoader, Loader | EmbeddedLoader | None]:
    """Return the loaders of a run's `data` and `val_data`; see `open_loader`.

    Its config says whether to `embed_once`; a dry run embeds only the images that it needs.
    """
    config, embed_once = run.config, run.config.embed_once and not run.dry_run
    loader = open_loader(config.data, clip, embed_once, reads_captions)
    if config.val_data is None:
        return loader, None
    return loader, open_loader(config.val_data, clip, embed_once, reads_captions)


@torch.no_grad()
def embedding_scales(
    dataset: EmbeddingDataset, clip: CLIP, image_scale: float | None = None
) -> dict[str, float]:
    """Return the factors that give stored embeddings the length of CLIP's own.

    Image embeddings that were normalised, as clip-retrieval does, get the root mean square length
    of those of drawn images; others get the factor of the text embeddings, if that is one number.
    Raises ValueError if the stored text embeddings are not those that CLIP computes from the
    captions.
    """
    rows = np.linspace(0, len(dataset) - 1, min(len(dataset), CHUNK)).astype(int)
    stored = dataset.batch(rows)
    advice = "compute them with this CLIP (python -m unclip.data.embeddings)"
    is_unit = bool(((stored["image_emb"].norm(dim=1) - 1).abs() < 0.01).all())
    scales = {"image_emb": image_scale or 1.0}
    if "text_emb" in stored:
        text_emb = clip.encode_text(stored["caption"]).emb.float().cpu()
        cosine = F.cosine_similarity(text_emb, stored["text_emb"]).median().item()
        if not cosine > SAME_CLIP:
            fault = f"their cosine to those of the captions is {cosine:.2f}; expected 1"
            raise ValueError(
                f"{dataset.folder} has text embeddings of another CLIP: {fault}; {advice}"
            )
        ratios = text_emb.norm(dim=1) / stored["text_emb"].norm(dim=1)
        ratio = ratios.median().item()
        if abs(ratio - 1) < TOLERANCE:
            return {**scales, "text_emb": 1.0}
        scales["text_emb"] = ratio
        if not is_unit and not image_scale:
            if ratios.std(correction=0).item() > TOLERANCE * ratio:
                fault = f"has embeddings of another length than CLIP's, about 1/{ratio:.3g}"
                raise ValueError(f"{dataset.folder} {fault}; {advice}, or set data.emb_scale")
            scales["image_emb"] = ratio
    if is_unit and not image_scale:
        if clip.model.visual is None:
            fault = (
                "has embeddings of length 1, and this CLIP has no image tower to measure its own"
            )
            raise ValueError(f"{dataset.folder} {fault}; set data.emb_scale")
        drawn = clip.encode_image([draw_noise(seed) for seed in range(CHUNK)]).float().cpu()
        length = drawn.norm(dim=1).square().mean().sqrt().item()
        scales["image_emb"] = length if abs(length - 1) > TOLERANCE else 1.0
    return scales


def data_notes(loader: Loader | EmbeddedLoader) -> dict[str, Any]:
    """Return notes about the data for a saved prior: the factors of stored embeddings."""
    dataset = loader.dataset
    scales = dataset.scales if isinstance(dataset, EmbeddingDataset) else {}
    return {"embedding_scales": scales} if set(scales.values()) - {1.0} else {}


def draw_noise(seed: int, size: int = 64) -> Image.Image:
    """Draw an image whose detail falls off with its frequency, as in photographs."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((size, size, 3))
    for cells in (2, 4, 8, 16, 32):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        pixels += np.asarray(noise.resize((size, size), Image.Resampling.BICUBIC)) / cells
    pixels -= pixels.min()
    return Image.fromarray((pixels * 255 / pixels.max()).astype(np.uint8))


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
        text_embs.append(clip.encode_captions(batch["caption"]).emb.float().cpu())
    loader.load_state_dict(position)
    return torch.cat(image_embs), torch.cat(text_embs)


def measure_stats(
    network: EmbeddingStats, clip: CLIP, loader: Loader | EmbeddedLoader, batches: int
) -> None:
    """Set a network's mean and std of image embeddings from the first `batches` batches."""
    image_emb, _ = embedding_pairs(clip, loader, batches)
    if len(image_emb) < 2 or (image_emb == image_emb[0]).all():
        fault = f"{len(image_emb)} image embeddings, all equal"
        raise ValueError(f"{fault}; expected at least two different images")
    network.set_stats(image_emb.mean(dim=0), image_emb.std(dim=0))


def measure_components(network: LayoutPrior, loader: Loader | EmbeddedLoader, batches: int) -> None:
    """Set the principal components of layouts from the first `batches` batches.

    The loader's position does not change.
    """
    position = loader.state_dict()
    found = [layouts(batch, network.config.size) for batch in islice(loader, batches)]
    loader.load_state_dict(position)
    network.fit_components(torch.cat(found))
