"""Probes of CLIP's latent space (unCLIP 4): principal components and typographic attacks."""

# N images, K classes, D CLIP embedding width

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from unclip.data.loader import open_dataset
from unclip.data.precomputed import EmbeddingDataset
from unclip.embeddings import PCA, normalise
from unclip.image_io import cell, fit, grid
from unclip.pipelines.request import ImageInput, Images, check_prompts, open_images
from unclip.pipelines.unclip.pipeline import UnCLIPPipeline
from unclip.types import GenerationResult, UnCLIPOptions

UNDEFINED = "\U0010ffff"  # a character that no font has
COMPONENTS = (20, 30, 40, 80, 120, 160, 200, 320)  # of the paper's figure 7


def read_embeddings(
    pipe: UnCLIPPipeline,
    source: str | Path | Sequence[str | Path],
    batch_size: int = 64,
    progress: bool = True,
) -> Tensor:
    """Return the CLIP embeddings (N, D) of a dataset, of several tars, or precomputed ones.

    ValueError for fewer than two, of which there is no PCA.
    """
    sources = [source] if isinstance(source, (str, Path)) else list(source)
    dataset = open_dataset(sources)
    if isinstance(dataset, EmbeddingDataset):
        emb = dataset.batch(range(len(dataset)))["image_emb"]
        if emb.shape[1] != pipe.clip.emb_dim:
            given, expected = emb.shape[1], pipe.clip.emb_dim
            raise ValueError(f"{sources[0]} has embeddings of width {given}; expected {expected}")
        return emb
    starts = tqdm(range(0, len(dataset), batch_size), "CLIP", disable=not progress, leave=False)
    embs = [
        pipe.encode_image(images).cpu()
        for start in starts
        if (images := _readable(dataset, start, batch_size))
    ]
    if (count := sum(map(len, embs))) < 2:
        raise ValueError(f"{sources[0]}: {count} of {len(dataset)} images can be read; expected 2")
    return torch.cat(embs)


def _readable(dataset: Any, start: int, count: int) -> list[Image.Image]:
    images = []
    for index in range(start, min(start + count, len(dataset))):
        try:
            images.append(dataset[index].image)
        except (ValueError, OSError):  # a few broken images do not change the components
            continue
    return images


def shown_components(pca: PCA) -> list[int]:
    """Return the paper's numbers of components below that of the PCA, and that of the PCA."""
    return sorted({k for k in COMPONENTS if k < len(pca)} | {len(pca)})


def draw_components(
    pipe: UnCLIPPipeline,
    images: Images,
    pca: PCA,
    components: Sequence[int] | None = None,
    *,
    seed: int = 0,
    options: UnCLIPOptions | None = None,
    progress: bool = True,
) -> list[GenerationResult]:
    """Generate images from the first k components, for each k; image i has the seed `seed` + i."""
    emb = pipe.encode_image(open_images(images)).cpu()
    return [
        pipe.variations(
            image_emb=pca.truncate(emb, k), seed=seed, options=options, progress=progress
        )
        for k in components or shown_components(pca)
    ]


def components_figure(
    images: Sequence[Image.Image],
    components: Sequence[int],
    results: Sequence[GenerationResult],
    size: int = 96,
) -> Image.Image:
    """Draw a row for each image: from few components to many, then the image itself."""
    titles = [*map(str, components), "image"]
    rows = []
    for i, image in enumerate(images):
        row = [*(result.images[i] for result in results), fit(image, size)]
        rows.append(cell(row, size, "", titles if i == 0 else ()))
    sheet = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)), "white")
    for i, row in enumerate(rows):
        sheet.paste(row, (0, sum(above.height for above in rows[:i])))
    return sheet


def write_word(image: Image.Image, word: str) -> Image.Image:
    """Write a word on a white label across the middle of an image: a typographic attack.

    ValueError if Pillow's font lacks a letter of it.
    """
    image = image.copy()
    width, height = image.size
    font = ImageFont.load_default(max(6, height // 5))
    undefined = _glyph(font, UNDEFINED)
    if lacking := [one for one in dict.fromkeys(word) if _glyph(font, one) == undefined]:
        letters = ", ".join(map(repr, lacking))
        raise ValueError(f"the font has no {letters} of {word!r}; expected English letters")
    scale = 0.85 * width / max(1, font.getlength(word))
    font = ImageFont.load_default(max(6, min(height // 5, int(_size(font) * scale))))
    left, top, right, bottom = font.getbbox(word, anchor="mm")
    pen, centre, gap = ImageDraw.Draw(image), (width / 2, height / 2), height / 40
    box = (left - gap, top - gap, right + gap, bottom + gap)
    edges = [centre[i % 2] + edge for i, edge in enumerate(box)]
    pen.rectangle(edges, fill="white", outline="grey")
    pen.text(centre, word, fill="black", font=font, anchor="mm")
    return image


def _size(font: Any) -> float:
    return font.size


def _glyph(font: Any, letter: str) -> bytes:
    return bytes(font.getmask(letter))


def class_probabilities(pipe: UnCLIPPipeline, image_emb: Tensor, classes: Sequence[str]) -> Tensor:
    """Return CLIP's zero-shot probabilities of captions: (N, D) -> (N, K)."""
    if len(classes) < 2:
        raise ValueError(f"got {len(classes)} class; expected at least 2")
    text_emb = pipe.encode_text(check_prompts(list(classes))).emb
    cosines = normalise(image_emb.to(text_emb)) @ normalise(text_emb).T
    return (pipe.clip.logit_scale.float().exp() * cosines).softmax(dim=1).cpu()


def typographic_attack(
    pipe: UnCLIPPipeline,
    image: ImageInput,
    word: str,
    classes: Sequence[str],
    *,
    num_images: int = 3,
    seed: int = 0,
    options: UnCLIPOptions | None = None,
    size: int = 128,
    progress: bool = True,
) -> tuple[Image.Image, list[dict[str, Any]], Tensor]:
    """Compare class probabilities and variations of an image without and with a word on it.

    Returns the figure, the metadata of its variations, and the probabilities (2, K).
    """
    (clean,) = open_images(image)
    images = [clean, write_word(clean, word)]
    emb = pipe.encode_image(images)
    probabilities = class_probabilities(pipe, emb, classes)
    result = pipe.variations(
        image_emb=emb, num_images=num_images, seed=seed, options=options, progress=progress
    )
    cells = []
    for i, (name, one) in enumerate(zip(("image", "with the word"), images, strict=True)):
        order = probabilities[i].argsort(descending=True).tolist()
        caption = ", ".join(f"{classes[k]} {probabilities[i, k]:.0%}" for k in order)
        shown = [fit(one, size), *result.images[i * num_images : (i + 1) * num_images]]
        cells.append(cell(shown, size, caption, [name, *["variation"] * num_images]))
    return grid(cells, columns=1), result.metadata, probabilities
