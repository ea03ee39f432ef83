"""Sheets of generated images with their captions, next to the true images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch.nn.functional as F
from PIL import Image

from unclip.evaluation.base import Evaluation
from unclip.evaluation.codec import reconstructions
from unclip.evaluation.dalle import DalleEvaluation
from unclip.evaluation.pairs import Pairs, canonical_caption
from unclip.image_io import cell, grid, save_png, to_pil

PROMPTS = (  # typical first prompts, and combinations that no training image shows
    "a red apple",
    "a rocket in noto style",
    "a smiling cat, blob emoji",
    "an octopus in twemoji style",
    "a yellow flower",
    "a birthday cake in blob style",
    "a sad face with tears",
    "a green heart",
    "a sailboat in noto style",
    "a blue apple",
    "a purple car in twemoji style",
    "a house with a tree",
)
SHOWN = 8  # pairs on each sheet except the samples'
RECONSTRUCTED = 12  # images above their reconstructions


def held_out_sheet(evaluation: Evaluation, size: int = 96) -> Image.Image:
    """Show held-out concepts in every style, generated and true; the held-out style is marked."""
    pairs, rows = evaluation.held_out, evaluation.held_out.spread(SHOWN)
    if not pairs.styles:
        return _generated_and_true(evaluation, rows, size)
    true_images = {
        (pair.concept, pair.style): (source, row)
        for source in (pairs, evaluation.train)
        if source is not None
        for row, pair in enumerate(source.entries)
    }
    concepts = [pairs.entries[row].concept for row in rows]
    shown = [(concept, style) for concept in concepts for style in pairs.styles]
    captions = [canonical_caption(concept, style) for concept, style in shown]
    samples = evaluation.generator.generate(captions, evaluation.seed)
    generated = dict(zip(shown, evaluation.generator.upsample(samples), strict=True))
    cells = []
    for concept in concepts:
        images: list[Image.Image | None] = []
        titles: list[str] = []
        for style in pairs.styles:
            source, row = true_images.get((concept, style), (None, 0))
            images.append(generated[concept, style])
            images.append(None if source is None else source.image(row, size))
            label = "no such image" if source is None else "trained on"
            titles += [style, "HELD OUT" if source is pairs else label]
        cells.append(cell(images, size, concept, titles))
    return grid(cells, columns=1)


def failures_sheet(evaluation: Evaluation, size: int = 96) -> Image.Image:
    """Show the images with the lowest CLIP cosine to their captions, and the true ones."""
    cosine = F.cosine_similarity(evaluation.text_emb, evaluation.generated_emb)  # (N,)
    return _generated_and_true(evaluation, cosine.argsort()[:SHOWN].tolist(), size)


def nearest_sheet(evaluation: Evaluation, train: Pairs, size: int = 96) -> Image.Image:
    """Show the images nearest to a training image by pixels, with that image and the true one."""
    held_out, (by_pixels, distance) = evaluation.held_out, evaluation.nearest_to_generated["pixels"]
    untoned = [row for row, pair in enumerate(held_out.entries) if not pair.toned]
    rows = sorted(untoned, key=lambda row: distance[row].item())[:SHOWN]
    by_clip, _ = evaluation.nearest_to_generated["clip"]
    titles = ["generated", "true", "nearest", "... to CLIP"]
    cells = []
    images = evaluation.generator.upsample(evaluation.samples, rows)
    for row, image in zip(rows, images, strict=True):
        nearest = [train.image(int(found[row]), size) for found in (by_pixels, by_clip)]
        caption = f"{held_out.captions[row]}; nearest: {train.captions[int(by_pixels[row])]}"
        cells.append(cell([image, held_out.image(row, size), *nearest], size, caption, titles))
    return grid(cells, columns=2, gap=12)


def samples_sheet(
    evaluation: Evaluation, prompts: Sequence[str] = PROMPTS, size: int = 160
) -> Image.Image:
    """Show an image of each prompt, from seeds `seed`, `seed` + 1, ..., and the baseline's."""
    generators = [evaluation.generator]
    if evaluation.baseline is not None:
        generators.append(evaluation.baseline)
    titles = [generator.pipe.name for generator in generators] if len(generators) > 1 else []
    columns = [
        generator.upsample(generator.generate(prompts, evaluation.seed)) for generator in generators
    ]
    cells = [
        cell(images, size, prompt, titles)
        for *images, prompt in zip(*columns, prompts, strict=True)
    ]
    return grid(cells, columns=4 // len(generators), gap=8)


def candidates_sheet(evaluation: DalleEvaluation, size: int = 96) -> Image.Image:
    """Show the image that CLIP scores highest among each number of candidates."""
    best = evaluation.best
    columns = [to_pil(images) for images in best.images.values()]
    titles = [f"best of {n}" for n in best.images]
    captions = [evaluation.held_out.captions[row] for row in best.rows]
    cells = [
        cell(images, size, caption, titles)
        for *images, caption in zip(*columns, captions, strict=True)
    ]
    return grid(cells, columns=2, gap=12)


def write_sheets(
    evaluation: Evaluation, folder: str | Path, prompts: Sequence[str] = PROMPTS
) -> list[Path]:
    """Write the sheets into a folder and return their paths.

    heldout.png, failures.png and samples.png always; nearest.png with training pairs; for a DALL-E
    codec.png, and candidates.png if the candidates were evaluated.
    """
    sheets = {
        "heldout": held_out_sheet(evaluation),
        "failures": failures_sheet(evaluation),
        "samples": samples_sheet(evaluation, prompts),
    }
    if evaluation.train is not None:
        sheets["nearest"] = nearest_sheet(evaluation, evaluation.train)
    if isinstance(evaluation, DalleEvaluation):
        rows = evaluation.held_out.spread(RECONSTRUCTED)
        evaluation.pipe.runtime.use(evaluation.pipe.codec)
        sheets["codec"] = reconstructions(evaluation.pipe.codec, evaluation.held_out.images[rows])
        if "candidates" in evaluation.results:
            sheets["candidates"] = candidates_sheet(evaluation)
    paths = {Path(folder) / f"{name}.png": sheet for name, sheet in sheets.items()}
    for path, sheet in paths.items():
        save_png(sheet, path)
    return list(paths)


def _generated_and_true(evaluation: Evaluation, rows: Sequence[int], size: int) -> Image.Image:
    images = evaluation.generator.upsample(evaluation.samples, rows)
    cells = [
        cell(
            [image, evaluation.held_out.image(row, size)],
            size,
            evaluation.held_out.captions[row],
            ["generated", "true"],
        )
        for row, image in zip(rows, images, strict=True)
    ]
    return grid(cells, columns=4, gap=12)
