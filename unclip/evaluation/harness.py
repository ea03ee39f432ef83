"""The evaluation of a model on pairs that it was never trained on: what is asked of every kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from unclip import __version__
from unclip.config import to_dict
from unclip.evaluation import PARTS
from unclip.evaluation.drawing import Drawer, Drawn, no_cut_warnings
from unclip.evaluation.metrics import diversity, nearest_by_cosine, nearest_by_pixels, recall
from unclip.evaluation.pairs import Pairs
from unclip.evaluation.style import train_classifier
from unclip.pipelines.base import redraw

# N held-out pairs, M training pairs, D CLIP embedding width, s side of the pictures that are measured

DIVERSITY_PROMPTS, DIVERSITY_SEEDS = 8, 4


class Evaluation(ABC):
    """One model and its data; what several parts need is computed once, when first asked for.

    Pictures are measured at the size s at which `drawer` first has them: CLIP and the style classifier see no more
    pixels than that.
    """

    def __init__(
        self,
        drawer: Drawer,
        held_out: Pairs,
        train: Pairs | None = None,
        *,
        beside: Drawer | None = None,
        seed: int = 0,
    ) -> None:
        """beside: another model, to draw the same captions at the same size; the same CLIP looks at them."""
        pipe = drawer.pipe
        if len(held_out) < 2:
            raise ValueError("only one held-out pair; an evaluation compares at least 2")
        if pipe.clip is None:
            raise ValueError(f"{pipe.name} has no CLIP, which tells what its pictures show")
        if beside is not None and beside.size != drawer.size:
            raise ValueError(
                f"{beside.pipe.name} draws {beside.size} pixels and {pipe.name} {drawer.size}; pictures of different "
                "sizes can't be compared"
            )
        self.pipe, self.drawer, self.beside = pipe, drawer, beside
        self.held_out, self.train, self.seed = held_out, train, seed
        self.results: dict[str, Any] = {}  # of the last `run`

    def run(
        self,
        parts: Sequence[str] | None = None,
        keep: Callable[[dict[str, Any]], None] = lambda results: None,
    ) -> dict[str, Any]:
        """Results of some parts or all, as JSON types; those that need training pairs only if there are any.

        keep: is given all results so far after each part, which may have taken minutes.
        """
        known = PARTS[self.pipe.kind]
        if unknown := [part for part in parts or () if part not in known]:
            raise ValueError(f"unknown part {unknown[0]!r}; expected some of {', '.join(known)}")
        networks = {"clip": self.pipe.clip, **self.pipe.networks()}
        results: dict[str, Any] = {
            "model": self.pipe.name,
            "version": __version__,
            "parameters": {
                name: sum(p.numel() for p in network.parameters())
                for name, network in networks.items()
            },
            "options": to_dict(self.drawer.options),
            "seed": self.seed,
            "held_out": {"pairs": len(self.held_out), "broken": self.held_out.broken},
        }
        if self.train is not None:
            results["train"] = {"pairs": len(self.train), "broken": self.train.broken}
        if self.beside is not None:
            results["beside"] = self.beside.pipe.name
        for part in known:
            if parts is None or part in parts:
                results |= self._measure(part)
                keep(results)
        self.results = results
        return results

    @abstractmethod
    def _measure(self, part: str) -> dict[str, Any]:
        """The figures of one of the parts, by name; none if the model has no such stage."""

    def _pictures(self) -> dict[str, Any]:
        found = {"recall": self.recall(), "diversity": self.diversity()}
        if self.train is not None:
            found["nearest"] = self.nearest(self.train)
            if len(self.train.styles) > 1:
                found["style"] = self.style(self.train)
        return found

    @cached_property
    def text_emb(self) -> Tensor:
        """CLIP's embeddings of the held-out captions (N, D)."""
        return self.drawer.encode_text(self.held_out.captions).emb.cpu()

    @cached_property
    def true_emb(self) -> Tensor:
        """CLIP's embeddings of the held-out pictures (N, D)."""
        return self.drawer.embed(self.held_out.images)

    @cached_property
    def drawn(self) -> Drawn:
        """A picture of each held-out caption."""
        return self.drawer.draw(self.held_out.captions, self.seed)

    @cached_property
    def drawn_emb(self) -> Tensor:
        """CLIP's embeddings of the drawn pictures (N, D)."""
        return self.drawer.embed(self.drawn.images)

    @cached_property
    def drawn_beside(self) -> Drawn:
        """What the other model draws, from the same seeds."""
        assert self.beside is not None
        return self.beside.draw(self.held_out.captions, self.seed)

    @cached_property
    def embeddings(self) -> dict[str, Tensor]:
        """CLIP's embeddings of what is compared: of pictures that are drawn, beside and true, (N, D) each."""
        beside = (
            {} if self.beside is None else {"beside": self.drawer.embed(self.drawn_beside.images)}
        )
        return {"drawn": self.drawn_emb, **beside, "true": self.true_emb}

    @cached_property
    def train_emb(self) -> Tensor:
        """CLIP's embeddings of the training pictures (M, D)."""
        assert self.train is not None
        return self.drawer.embed(self.train.images)

    @cached_property
    def nearest_to_drawn(self) -> dict[str, tuple[Tensor, Tensor]]:
        """By "clip" and by "pixels": rows (N,) of the training pairs nearest to the drawn ones, and distances (N,)."""
        assert self.train is not None
        return {
            "clip": nearest_by_cosine(self.drawn_emb, self.train_emb),
            "pixels": nearest_by_pixels(self.drawn.images, self.train.images),
        }

    def recall(self) -> dict[str, Any]:
        """Is the caption found from its picture, among all held-out captions? Also from the true pictures."""
        entries = self.held_out.entries
        everything = list(range(len(entries)))
        plain = [row for row in everything if not entries[row].toned]
        groups = {"all": (everything, everything)}  # rows of the pictures, rows of the captions
        for style in self.held_out.styles:
            groups[style] = ([row for row in everything if entries[row].style == style], everything)
        if 0 < len(plain) < len(entries):
            groups["without skin tones"] = (plain, plain)
        return {
            "groups": {name: self._recall(*rows) for name, rows in groups.items()},
            "caption_cosine": {
                of: F.cosine_similarity(self.text_emb, emb).mean().item()
                for of, emb in self.embeddings.items()
            },
        }

    def _recall(self, pictures: list[int], captions: list[int]) -> dict[str, Any]:
        candidates, right = self._among(captions, pictures)
        return {
            "pictures": len(pictures),
            "captions": len(candidates),
            **{of: recall(emb[pictures], candidates, right) for of, emb in self.embeddings.items()},
        }

    def _among(self, captions: Sequence[int], pictures: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Embeddings of the different captions of some rows, and which of them is right for each of some others."""
        row_of = {
            self.held_out.captions[row]: row for row in captions
        }  # a caption that two share is right for both
        position = {caption: i for i, caption in enumerate(row_of)}
        right = torch.tensor([position[self.held_out.captions[row]] for row in pictures])
        return self.text_emb[list(row_of.values())], right

    def diversity(self) -> dict[str, Any]:
        """How far apart in CLIP's space pictures of one prompt are, and pictures of different prompts."""
        rows = self.held_out.spread(DIVERSITY_PROMPTS)
        prompts = [self.held_out.captions[row] for row in rows for _ in range(DIVERSITY_SEEDS)]
        emb = self.drawer.embed(self.drawer.draw(prompts, self.seed).images).unflatten(
            0, (len(rows), DIVERSITY_SEEDS)
        )
        return {
            "prompts": len(rows),
            "seeds": DIVERSITY_SEEDS,
            "of_one_prompt": diversity(emb),
            "of_different_prompts": diversity(emb.transpose(0, 1)),
        }

    def nearest(self, train: Pairs) -> dict[str, Any]:
        """How near drawn pictures are to training pictures, and how near the true held-out ones are: is it copied?"""
        truth = self.held_out.floats()
        nearest = {
            "drawn": self.nearest_to_drawn,
            "true": {
                "clip": nearest_by_cosine(self.true_emb, self.train_emb),
                "pixels": nearest_by_pixels(truth, train.images),
            },
        }

        def same_concept(rows: Tensor) -> float:
            pairs = zip(self.held_out.entries, rows.tolist(), strict=True)
            return float(
                np.mean([pair.concept == train.entries[row].concept for pair, row in pairs])
            )

        results: dict[str, Any] = {
            kind: {
                "median_distance": {
                    of: found[kind][1].median().item() for of, found in nearest.items()
                },
                "same_concept": {of: same_concept(found[kind][0]) for of, found in nearest.items()},
            }
            for kind in ("clip", "pixels")
        }
        to_truth = (self.drawn.images - truth).square().mean(dim=(1, 2, 3)).sqrt()  # (N,)
        return {
            **results,
            "nearer_to_truth": _fraction(to_truth < self.nearest_to_drawn["pixels"][1]),
        }

    def style(self, train: Pairs) -> dict[str, Any]:
        """Is the style drawn that was asked for? Told by a classifier of the true training pictures.

        Styles may share designs, so the classifier errs on true pictures too: the figures are also given for the
        pairs whose true picture it is right about.
        """
        classifier = train_classifier(train, self.seed, progress=self.drawer.progress)
        rows = [
            row for row, pair in enumerate(self.held_out.entries) if pair.style in classifier.styles
        ]
        styles = [self.held_out.entries[row].style for row in rows]
        right = {"drawn": classifier.right(self.drawn.images[rows], styles)}
        if self.beside is not None:
            right["beside"] = classifier.right(self.drawn_beside.images[rows], styles)
        right["true"] = true = classifier.right(self.held_out.floats(rows), styles)
        of_style = {
            style: torch.tensor([other == style for other in styles])
            for style in sorted(set(styles))
        }
        groups = {
            "all": torch.ones_like(true),
            **of_style,
            "where the true picture is told right": true,
        }
        return {
            name: {
                "pictures": int(chosen.sum()),
                **{of: _fraction(told[chosen]) for of, told in right.items()},
            }
            for name, chosen in groups.items()
            if chosen.any()
        }

    def repeatable(self) -> dict[str, Any]:
        """Is a seed's picture the same again, alone as in a batch, and redrawn from its metadata?"""
        prompts = self.held_out.captions[:3]
        draw = partial(self.pipe, options=self.drawer.options, progress=False)
        with no_cut_warnings():
            batch, again = draw(prompts, seed=self.seed), draw(prompts, seed=self.seed)
            alone = [
                draw(prompt, seed=seed) for prompt, seed in zip(prompts, batch.seeds, strict=True)
            ]
            redrawn = redraw(self.pipe, alone[0].metadata[0], progress=False)
        differences = [
            (_pixels(one.images[0]) - _pixels(picture)).abs().max().item()
            for one, picture in zip(alone, batch.images, strict=True)
        ]
        return {
            "same_seed_same_bytes": all(
                one.tobytes() == other.tobytes()
                for one, other in zip(batch.images, again.images, strict=True)
            ),
            "batch_and_alone_differ_by": int(max(differences)),  # of 255
            "redrawn_same_bytes": redrawn.images[0].tobytes() == alone[0].images[0].tobytes(),
        }


def _fraction(which: Tensor) -> float:
    return which.float().mean().item()


def _pixels(picture: Image.Image) -> Tensor:
    """(3, S, S) float in [0, 255]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()
