"""Sheets of pictures for a model card: drawn ones beside the truth, with their captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from unclip.evaluation.codec import reconstructions
from unclip.evaluation.dalle_harness import DalleEvaluation
from unclip.evaluation.harness import Evaluation
from unclip.evaluation.pairs import Pairs, canonical
from unclip.image_io import cell, grid, save_png
from unclip.pipelines.base import to_pil

PROMPTS = (  # for the README: what one would try first, and things that no picture of the data shows
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
SHOWN = 8  # pairs on each sheet but the samples'
REBUILT = 12  # pictures above their reconstructions


def held_out_sheet(evaluation: Evaluation, size: int = 96) -> Image.Image:
    """Held-out concepts in every style, drawn beside the truth; the style that was never trained on is marked."""
    pairs, rows = evaluation.held_out, evaluation.held_out.spread(SHOWN)
    if not pairs.styles:
        return _drawn_and_true(evaluation, rows, size)
    truth = {
        (pair.concept, pair.style): (source, row)
        for source in (pairs, evaluation.train)
        if source is not None
        for row, pair in enumerate(source.entries)
    }
    concepts = [pairs.entries[row].concept for row in rows]
    wanted = [(concept, style) for concept in concepts for style in pairs.styles]
    drawn = evaluation.drawer.draw([canonical(*one) for one in wanted], evaluation.seed)
    pictures = dict(zip(wanted, evaluation.drawer.enlarge(drawn), strict=True))
    cells = []
    for concept in concepts:
        shown: list[Image.Image | None] = []
        titles: list[str] = []
        for style in pairs.styles:
            source, row = truth.get((concept, style), (None, 0))
            shown += [
                pictures[concept, style],
                None if source is None else source.picture(row, size),
            ]
            titles += [
                style,
                "HELD OUT"
                if source is pairs
                else "no such picture"
                if source is None
                else "trained on",
            ]
        cells.append(cell(shown, size, concept, titles))
    return grid(cells, columns=1)


def failures_sheet(evaluation: Evaluation, size: int = 96) -> Image.Image:
    """The drawn pictures that CLIP finds least like their captions, beside the truth."""
    import torch.nn.functional as F

    cosine = F.cosine_similarity(evaluation.text_emb, evaluation.drawn_emb)  # (N,)
    return _drawn_and_true(evaluation, cosine.argsort()[:SHOWN].tolist(), size)


def nearest_sheet(evaluation: Evaluation, train: Pairs, size: int = 96) -> Image.Image:
    """The drawn pictures that are nearest to a training picture by pixels, beside that one and the truth."""
    pixels, distance = evaluation.nearest_to_drawn["pixels"]
    plain = [row for row, pair in enumerate(evaluation.held_out.entries) if not pair.toned]
    rows = sorted(plain, key=lambda row: distance[row].item())[:SHOWN]
    by_clip, _ = evaluation.nearest_to_drawn["clip"]
    cells = []
    for row, picture in zip(rows, evaluation.drawer.enlarge(evaluation.drawn, rows), strict=True):
        truth = evaluation.held_out.picture(row, size)
        copies = [train.picture(int(found[row]), size) for found in (pixels, by_clip)]
        caption = (
            f"{evaluation.held_out.captions[row]}; nearest: {train.captions[int(pixels[row])]}"
        )
        cells.append(
            cell(
                [picture, truth, *copies],
                size,
                caption,
                ["drawn", "true", "nearest", "... to CLIP"],
            )
        )
    return grid(cells, columns=2, gap=12)


def samples_sheet(
    evaluation: Evaluation, prompts: Sequence[str] = PROMPTS, size: int = 160
) -> Image.Image:
    """A picture of each prompt, from the seeds `seed`, `seed` + 1, ...; and another model's beside it."""
    drawers = [drawer for drawer in (evaluation.drawer, evaluation.beside) if drawer is not None]
    titles = [drawer.pipe.name for drawer in drawers] if len(drawers) > 1 else []
    columns = [drawer.enlarge(drawer.draw(prompts, evaluation.seed)) for drawer in drawers]
    cells = [
        cell(pictures, size, prompt, titles)
        for *pictures, prompt in zip(*columns, prompts, strict=True)
    ]
    return grid(cells, columns=4 // len(drawers), gap=8)


def candidates_sheet(evaluation: DalleEvaluation, size: int = 96) -> Image.Image:
    """The best of more and more candidates, as CLIP finds."""
    chosen = evaluation.chosen
    pictures = [to_pil(images) for images in chosen.first.values()]
    titles = [f"best of {n}" for n in chosen.first]
    captions = [evaluation.held_out.captions[row] for row in chosen.rows]
    cells = [
        cell(best, size, caption, titles)
        for *best, caption in zip(*pictures, captions, strict=True)
    ]
    return grid(cells, columns=2, gap=12)


def codec_sheet(evaluation: DalleEvaluation) -> Image.Image:
    """Held-out pictures above what their codes hold of them."""
    rows = evaluation.held_out.spread(REBUILT)
    return reconstructions(evaluation.pipe.codec, evaluation.held_out.images[rows])


def write_sheets(
    evaluation: Evaluation, folder: str | Path, prompts: Sequence[str] = PROMPTS
) -> list[Path]:
    """heldout.png, failures.png, samples.png; if there are training pairs, nearest.png; returns their paths.

    Of a DALL-E also codec.png, and candidates.png if the candidates were measured.
    """
    sheets = {
        "heldout": held_out_sheet(evaluation),
        "failures": failures_sheet(evaluation),
        "samples": samples_sheet(evaluation, prompts),
    }
    if evaluation.train is not None:
        sheets["nearest"] = nearest_sheet(evaluation, evaluation.train)
    if isinstance(evaluation, DalleEvaluation):
        sheets["codec"] = codec_sheet(evaluation)
        if "candidates" in evaluation.results:
            sheets["candidates"] = candidates_sheet(evaluation)
    paths = {Path(folder) / f"{name}.png": sheet for name, sheet in sheets.items()}
    for path, sheet in paths.items():
        save_png(sheet, path)
    return list(paths)


def _drawn_and_true(evaluation: Evaluation, rows: Sequence[int], size: int) -> Image.Image:
    pictures = evaluation.drawer.enlarge(evaluation.drawn, rows)
    cells = [
        cell(
            [picture, evaluation.held_out.picture(row, size)],
            size,
            evaluation.held_out.captions[row],
            ["drawn", "true"],
        )
        for row, picture in zip(rows, pictures, strict=True)
    ]
    return grid(cells, columns=4, gap=12)
