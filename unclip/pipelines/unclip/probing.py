"""Looking into CLIP's latent space by drawing from it (unCLIP 4): principal components, typographic attacks."""

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
from unclip.data.samples import Dataset
from unclip.data.shards import ShardDataset
from unclip.embeddings import PCA, normalise
from unclip.image_io import cell, grid
from unclip.pipelines.base import ImageInput, check_prompts
from unclip.pipelines.unclip.bound_stage import fit, several
from unclip.pipelines.unclip.pipeline import UnCLIPPipeline
from unclip.types import GenerationResult, UnCLIPOptions

# N pictures, K classes, D CLIP embedding width

NO_LETTER = "\U0010ffff"  # that no font has
COMPONENTS = (20, 30, 40, 80, 120, 160, 200, 320)  # of the paper's figure 7


def read_embeddings(
    pipe: UnCLIPPipeline,
    source: str | Path | Sequence[str | Path],
    batch_size: int = 64,
    progress: bool = True,
) -> Tensor:
    """CLIP's embeddings (N, D) of all pictures of a dataset, of several tars, or precomputed ones."""
    sources = [source] if isinstance(source, (str, Path)) else list(source)
    dataset = open_dataset(sources[0]) if len(sources) == 1 else ShardDataset(sources)
    if isinstance(dataset, EmbeddingDataset):
        emb = dataset.batch(range(len(dataset)))["image_emb"]
        if emb.shape[1] != pipe.clip.emb_dim:
            raise ValueError(
                f"{sources[0]} holds embeddings of width {emb.shape[1]}; CLIP's are {pipe.clip.emb_dim}"
            )
        return emb
    starts = tqdm(range(0, len(dataset), batch_size), "CLIP", disable=not progress, leave=False)
    found = [
        pipe.encode_image(images).cpu()
        for start in starts
        if (images := _readable(dataset, start, batch_size))
    ]
    if not found:
        raise ValueError(f"{sources[0]}: none of {len(dataset)} pictures can be read")
    return torch.cat(found)


def _readable(dataset: Dataset, start: int, count: int) -> list[Image.Image]:
    images = []
    for index in range(start, min(start + count, len(dataset))):
        try:
            images.append(dataset[index].image)
        except (ValueError, OSError):  # a few broken pictures change no component
            continue
    return images


def shown_components(pca: PCA) -> list[int]:
    """The paper's numbers as far as the PCA has so many, and all that it has."""
    return sorted({k for k in COMPONENTS if k < len(pca)} | {len(pca)})


def draw_components(
    pipe: UnCLIPPipeline,
    images: ImageInput | Sequence[ImageInput],
    pca: PCA,
    components: Sequence[int] | None = None,
    *,
    seed: int = 0,
    options: UnCLIPOptions | None = None,
    progress: bool = True,
) -> list[GenerationResult]:
    """For each number of components, what they alone tell of the pictures; picture i always has the seed `seed` + i."""
    emb = pipe.encode_image(several(images)).cpu()
    drawn = {"seed": seed, "options": options, "progress": progress}
    return [
        pipe.variations(image_emb=pca.truncate(emb, k), **drawn)
        for k in components or shown_components(pca)
    ]


def components_figure(
    images: Sequence[Image.Image],
    components: Sequence[int],
    results: Sequence[GenerationResult],
    size: int = 96,
) -> Image.Image:
    """A row for each picture: drawn from few components to many, then the picture itself."""
    titles = [*map(str, components), "picture"]
    rows = [
        cell(
            [*(result.images[i] for result in results), fit(image, size)],
            size,
            "",
            titles if i == 0 else (),
        )
        for i, image in enumerate(images)
    ]
    sheet = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)), "white")
    for i, row in enumerate(rows):
        sheet.paste(row, (0, sum(above.height for above in rows[:i])))
    return sheet


def write_word(image: Image.Image, word: str) -> Image.Image:
    """The picture with a word on a white label across its middle: a typographic attack.

    ValueError if Pillow's font lacks a letter of it, which would be drawn as a box.
    """
    image = image.copy()
    width, height = image.size
    font = ImageFont.load_default(max(6, height // 5))
    if lacking := [
        letter for letter in dict.fromkeys(word) if _glyph(font, letter) == _glyph(font, NO_LETTER)
    ]:
        told = ", ".join(map(repr, lacking))
        raise ValueError(
            f"{word!r} cannot be written, as the font lacks {told}; expected English letters and signs"
        )
    font = ImageFont.load_default(
        max(6, min(height // 5, int(font.size * 0.85 * width / max(1, font.getlength(word)))))
    )
    left, top, right, bottom = font.getbbox(word, anchor="mm")
    pen, middle, gap = ImageDraw.Draw(image), (width / 2, height / 2), height / 40
    box = (left - gap, top - gap, right + gap, bottom + gap)
    pen.rectangle(
        [middle[i % 2] + edge for i, edge in enumerate(box)], fill="white", outline="grey"
    )
    pen.text(middle, word, fill="black", font=font, anchor="mm")
    return image


def _glyph(font: ImageFont.FreeTypeFont, letter: str) -> bytes:
    """What it looks like."""
    return bytes(font.getmask(letter))


def class_probabilities(pipe: UnCLIPPipeline, image_emb: Tensor, classes: Sequence[str]) -> Tensor:
    """(N, D) -> (N, K): CLIP's own zero-shot probabilities of captions."""
    if len(classes) < 2:
        raise ValueError(f"{len(classes)} class is given; probabilities need at least 2")
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
    """A picture without and with a word on it: probabilities of the classes, and variations beside them.

    Gives the figure, the metadata of its variations, and the probabilities (2, K).
    """
    (clean,) = several(image)
    pictures = [clean, write_word(clean, word)]
    emb = pipe.encode_image(pictures)
    probabilities = class_probabilities(pipe, emb, classes)
    drawn = pipe.variations(
        image_emb=emb, num_images=num_images, seed=seed, options=options, progress=progress
    )
    cells = []
    for i, picture in enumerate(pictures):
        order = probabilities[i].argsort(descending=True).tolist()
        told = ", ".join(f"{classes[k]} {probabilities[i, k]:.0%}" for k in order)
        shown = [fit(picture, size), *drawn.images[i * num_images : (i + 1) * num_images]]
        cells.append(
            cell(
                shown,
                size,
                told,
                ["with the word" if i else "picture", *["variation"] * num_images],
            )
        )
    return grid(cells, columns=1), drawn.metadata, probabilities
