"""Measure where a model binds attributes to objects, and where it does not (unCLIP section 7).

    python -m unclip.data.shapes data/shapes --count 40000 --size 32 --axes colour attribution
    train/all.sh configs/binding
    python assets/build_binding.py --model runs/binding/model --out assets/binding.md

Scenes have two shapes of two colours: "a red star and a blue heart". Each has a swapped twin, with
the colours exchanged. It measures whether CLIP, prior and decoder each distinguish the two.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity

import unclip
from unclip.data.everyday import with_article
from unclip.data.shapes import Scene, draw, make_scene
from unclip.evaluation.metrics import mean_and_interval
from unclip.evaluation.report import markdown_table
from unclip.evaluation.shapes import find_shapes
from unclip.files import check_file, exit_on_error
from unclip.image_io import grid, to_pil
from unclip.pipelines.request import generators_from
from unclip.pipelines.unclip.pipeline import UnCLIPPipeline

COLUMNS = 8  # scenes in the figure
CELL = 96  # pixels
BATCH = 32

INTRODUCTION = """# Binding

At which stage does an unCLIP model lose which object has which attribute? The paper shows the
loss (section 7) and suspects the CLIP embedding. Here it is measured on {scenes} scenes of two
shapes in two colours, "a red star and a blue heart", with the {name} model of
[configs/binding](../configs/binding). The twin of a scene has the colours exchanged. Combinations
of colour and shape occur in training. [build_binding.py](build_binding.py) repeats this; all
intervals are 95 % bootstrap intervals.
"""
CHOICES = "Choices between a scene and its twin; chance is 50 %:"
IMAGES = """Decoded images, judged by a program that finds shapes and colours. "Bound" means exactly
the two objects of the caption, "exchanged" those of the twin:"""
FIGURE = "Columns are scenes; rows are the drawing and the images from"


def swap(scene: Scene) -> Scene:
    """Return the twin of a scene: the same places and shapes, with the colours exchanged."""
    first, second = scene.shapes
    shapes = replace(first, colour=second.colour), replace(second, colour=first.colour)
    caption = " and ".join(with_article(f"{s.colour} {s.shape}") for s in shapes)
    return replace(scene, shapes=shapes, caption=caption)


def make_scenes(count: int, seed: int) -> list[Scene]:
    """Draw scenes that, like their twins, have no combination that is held out."""
    rng, scenes = np.random.default_rng(seed), []
    while len(scenes) < count:
        scene = make_scene("attribution", rng)
        if not scene.held_out and not swap(scene).held_out:
            scenes.append(scene)
    return scenes


def looks(shapes: Sequence[Any]) -> list[tuple[str, str]]:
    return sorted((shape.shape, shape.colour) for shape in shapes)


class Study:
    """The scenes, their twins, and the outputs of the networks for both."""

    def __init__(self, pipe: UnCLIPPipeline, scenes: Sequence[Scene], seed: int) -> None:
        self.pipe, self.scenes, self.seed = pipe, scenes, seed
        self.twins = [swap(scene) for scene in scenes]
        self.image_emb, self.twin_emb = self._draw(scenes), self._draw(self.twins)  # (N, D)
        self.text = pipe.encode_text([scene.caption for scene in scenes])
        self.twin_text = pipe.encode_text([twin.caption for twin in self.twins])
        self.prior_emb = self._sample_prior()

    def _draw(self, scenes: Sequence[Scene]) -> Tensor:
        size = self.pipe.decoder_stage.size
        pixels = torch.from_numpy(np.stack([draw(scene.shapes, size) for scene in scenes]))
        return self.pipe.encode_image(pixels.permute(0, 3, 1, 2).float().div(127.5).sub(1))

    def _sample_prior(self) -> Tensor:
        generators = generators_from([self.seed + k for k in range(len(self.scenes))])
        return self.pipe.sample_prior(self.text, generators=generators)

    def choices(self) -> dict[str, Tensor]:
        """Return whether CLIP and the prior choose each scene over its twin, (N,) bool."""

        def nearer(emb: Tensor, own: Tensor, other: Tensor) -> Tensor:
            return cosine_similarity(emb, own) > cosine_similarity(emb, other)

        text, twin_text = self.text.emb, self.twin_text.emb
        return {
            "CLIP: the caption of the true image": nearer(self.image_emb, text, twin_text),
            "CLIP: the image of the caption": nearer(text, self.image_emb, self.twin_emb),
            "prior: nearer to the true image's embedding": nearer(
                self.prior_emb, self.image_emb, self.twin_emb
            ),
        }

    def conditions(self) -> dict[str, Tensor]:
        """Return the images (N, 3, S, S) decoded from each condition, by its name."""
        return {
            "the true image's embedding": self._decode(self.image_emb, False),
            "the text": self._decode(None, True),
            "the true image's embedding and the text": self._decode(self.image_emb, True),
            "the prior's embedding": self._decode(self.prior_emb, False),
            "the prior's embedding and the text": self._decode(self.prior_emb, True),
            "the twin's embedding and the text": self._decode(self.twin_emb, True),
        }

    def _decode(self, image_emb: Tensor | None, with_text: bool) -> Tensor:
        images = []
        for start in range(0, len(self.scenes), BATCH):
            rows = torch.arange(start, min(start + BATCH, len(self.scenes)))
            images.append(
                self.pipe.decode(
                    None if image_emb is None else image_emb[rows],
                    self.text[rows] if with_text else None,
                    generators=generators_from([self.seed + int(k) for k in rows]),
                )
            )
        return torch.cat(images)

    def judge(self, images: Sequence[np.ndarray]) -> dict[str, Tensor]:
        """Return whether images, uint8 (S, S, 3), show the scene or its twin, (N,) bool each."""
        found = [looks(find_shapes(image)) for image in images]
        return {
            name: torch.tensor([a == looks(s.shapes) for a, s in zip(found, scenes, strict=True)])
            for name, scenes in (("bound", self.scenes), ("exchanged", self.twins))
        }


def run(study: Study) -> tuple[dict[str, Any], list[list[Image.Image]]]:
    """Return the results as JSON types, and the rows of the figure."""
    size = study.pipe.decoder_stage.size
    drawn = [draw(scene.shapes, size) for scene in study.scenes]
    results: dict[str, Any] = {
        "choices": {
            name: mean_and_interval(hits, study.seed) for name, hits in study.choices().items()
        }
    }
    images = {name: to_pil(pixels) for name, pixels in study.conditions().items()}
    judged = {"drawings": study.judge(drawn)} | {
        name: study.judge([np.asarray(image) for image in own]) for name, own in images.items()
    }
    results["images"] = {
        name: {kind: mean_and_interval(hits, study.seed) for kind, hits in verdict.items()}
        for name, verdict in judged.items()
    }
    return results, [[Image.fromarray(image) for image in drawn], *images.values()]


def percent(value: Mapping[str, Any]) -> str:
    low, high = value["interval"]
    return f"{100 * value['mean']:.1f} % ({100 * low:.0f} to {100 * high:.0f})"


def page(results: Mapping[str, Any], figure: str) -> str:
    settings, images = results["settings"], results["images"]
    choices = [["choice", "right"]]
    choices += [[name, percent(value)] for name, value in results["choices"].items()]
    rows = [["decoded from", "bound", "exchanged"]]
    rows += [[name, *(percent(v[k]) for k in ("bound", "exchanged"))] for name, v in images.items()]
    names = ", ".join(name for name in images if name != "drawings")
    return "\n".join(
        [
            INTRODUCTION.format(**settings),
            f"{CHOICES}\n\n{markdown_table(choices)}\n",
            f"{IMAGES}\n\n{markdown_table(rows)}\n",
            f"{FIGURE} {names}:\n\n![Binding]({figure})\n",
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, metavar="NAME", help="a model of shapes")
    about = ".md file; .json and .webp of the same name are written next to it"
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help=about)
    parser.add_argument("--count", type=int, default=200, metavar="N", help="scenes (default: 200)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    with exit_on_error():
        build_page(args)


def build_page(args: argparse.Namespace) -> None:
    """Run the study, and write the page, its figure and its results."""
    if args.count < 1 or args.seed < 0:
        given = f"--count is {args.count} and --seed {args.seed}"
        raise ValueError(f"{given}; expected a count of at least 1 and a seed of at least 0")
    if args.out.suffix != ".md":
        raise ValueError(f"{args.out}: expected a file that ends in .md")
    check_file(args.out)
    pipe = unclip.load(args.model)
    if not isinstance(pipe, UnCLIPPipeline):
        raise ValueError(f"{args.model} is of kind {pipe.kind}; expected unclip")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    study = Study(pipe, make_scenes(args.count, args.seed), args.seed)
    results, rows = run(study)
    results["settings"] = {"name": pipe.name, "scenes": args.count, "seed": args.seed}
    cells = [image.resize((CELL, CELL)) for row in rows for image in row[:COLUMNS]]
    figure = args.out.with_suffix(".webp")
    grid(cells, min(COLUMNS, args.count)).save(figure, quality=90)
    args.out.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")
    args.out.write_text(page(results, figure.name), encoding="utf-8")


if __name__ == "__main__":
    main()
