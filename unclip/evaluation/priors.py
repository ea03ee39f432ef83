"""Priors of one CLIP and decoder on the same held-out captions (unCLIP 5.1, `unclip evaluate-priors`)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from unclip import __version__
from unclip.config import to_dict
from unclip.evaluation.drawing import Imagined, UnCLIPDrawer
from unclip.evaluation.metrics import agreement, diversity, recall
from unclip.evaluation.pairs import Pairs
from unclip.evaluation.report import markdown
from unclip.pipelines.base import generators_from
from unclip.pipelines.unclip.pipeline import UnCLIPPipeline
from unclip.types import UnCLIPOptions

# N held-out pairs, D CLIP embedding width

PROMPTS, SEEDS = 32, 8  # that the diversity is measured over
TIMED = 5  # single embeddings, after one to warm up
WITHOUT = ("caption's own embedding", "caption alone")  # unCLIP 5.1's decoders without a prior
TRUTH = "true embedding"  # what the decoder makes of the best that a prior could give


class PriorComparison:
    """Each prior draws the embedding of caption k from the seed `seed` + k; one decoder draws the pictures."""

    def __init__(
        self,
        pipe: UnCLIPPipeline,
        priors: Mapping[str, nn.Module],
        held_out: Pairs,
        *,
        guidance: Mapping[str, float] | None = None,
        options: UnCLIPOptions | None = None,
        seed: int = 0,
        batch_size: int = 32,
        progress: bool = True,
    ) -> None:
        """priors: by name, beside the model's own. guidance: of some of them; the others have that of the options."""
        if len(held_out) < 2:
            raise ValueError("only one held-out pair; a comparison needs at least 2")
        self.pipe, self.held_out, self.seed = pipe, held_out, seed
        own = {} if pipe.prior is None else {_kind(pipe.prior): pipe.prior}
        if taken := sorted(priors.keys() & {*own, *WITHOUT, TRUTH}):
            raise ValueError(
                f"a prior is named {taken[0]!r}, as another row is; give it another name"
            )
        self.priors = {**own, **priors}
        self.guidance = dict(guidance or {})
        if unknown := sorted(self.guidance.keys() - self.priors.keys()):
            raise ValueError(
                f"guidance of {unknown[0]!r}, which is no prior here; there are {', '.join(self.priors)}"
            )
        options = options or pipe.options
        self.options, self.batch_size, self.progress = options, batch_size, progress
        self.drawer = self._drawer(options)
        text = self.drawer.encode_text(held_out.captions)
        self.text, self.text_emb = text, text.emb.cpu()
        self.true_emb = self.drawer.embed(held_out.images)

    def settings(self) -> dict[str, Any]:
        """What the figures hold for, as JSON types."""
        return {
            "model": self.pipe.name,
            "version": __version__,
            "options": to_dict(self.options),
            "seed": self.seed,
            "pairs": len(self.held_out),
            "device": str(self.pipe.device),
            "threads": torch.get_num_threads(),
        }

    def rows(self) -> Iterator[dict[str, Any]]:
        """Of each prior, then of the decoder without one, then with the true embeddings: name and figures."""
        own = self.pipe.prior
        try:
            for name, prior in self.priors.items():
                self.pipe.prior = prior
                yield self._with_prior(name, prior)
        finally:
            if own is not None:
                self.pipe.prior = own
        generators = generators_from(range(self.seed, self.seed + len(self.held_out)))
        if self.pipe.prior is not None:
            emb = self.pipe.as_image(self.text_emb.to(self.pipe.device)).cpu()
            yield {"name": WITHOUT[0], **self._of_embeddings(emb), **self._decoded(emb, generators)}
        yield {"name": WITHOUT[1], **self._decoded(None, generators)}
        yield {
            "name": TRUTH,
            **self._of_embeddings(self.true_emb),
            **self._decoded(self.true_emb, generators),
        }

    def _with_prior(self, name: str, prior: nn.Module) -> dict[str, Any]:
        guidance = self.guidance.get(name, self.options.prior.guidance)
        options = replace(self.options, prior=replace(self.options.prior, guidance=guidance))
        drawer = self._drawer(options)
        imagined = drawer.imagine(self.held_out.captions, self.seed)
        return {
            "name": name,
            "type": type(prior).__name__,
            "parameters": sum(p.numel() for p in prior.parameters()),
            "guidance": guidance,
            **self._of_embeddings(imagined.image_emb),
            **self._decoded(imagined.image_emb, imagined.generators),
            "cosine_of_seeds": self._cosine_of_seeds(drawer),
            "milliseconds": self._milliseconds(drawer),
        }

    def _of_embeddings(self, emb: Tensor) -> dict[str, float]:
        found = agreement(emb, self.true_emb)
        return {"cosine": found["matching"], "gap": found["gap"]}

    def _decoded(self, emb: Tensor | None, generators: list[torch.Generator]) -> dict[str, float]:
        """Is the caption found from its picture, among all captions? One that two share is right for both."""
        drawn = self.drawer.decode(Imagined(self.held_out.captions, self.text, emb, generators))
        rows = {caption: row for row, caption in enumerate(self.held_out.captions)}
        places = {caption: place for place, caption in enumerate(rows)}
        right = torch.tensor([places[caption] for caption in self.held_out.captions])
        return recall(self.drawer.embed(drawn.images), self.text_emb[list(rows.values())], right)

    def _cosine_of_seeds(self, drawer: UnCLIPDrawer) -> float:
        """Mean cosine of two embeddings of one caption, drawn from different seeds: 1 = always the same."""
        rows = self.held_out.spread(PROMPTS)
        captions = [self.held_out.captions[row] for row in rows for _ in range(SEEDS)]
        emb = drawer.imagine(captions, self.seed).image_emb
        return 1 - diversity(emb.unflatten(0, (len(rows), SEEDS)))

    def _milliseconds(self, drawer: UnCLIPDrawer) -> float:
        """Median time of one embedding of one caption, its candidates included."""
        options = drawer.options
        times = []
        for turn in range(TIMED + 1):
            row, start = turn % len(self.held_out), time.perf_counter()
            self.pipe.sample_prior(
                self.text[row : row + 1],
                generators=generators_from([self.seed]),
                options=options.prior,
                candidates=options.prior_candidates,
            ).cpu()
            times.append(time.perf_counter() - start)
        return 1000 * statistics.median(times[1:])

    def _drawer(self, options: UnCLIPOptions) -> UnCLIPDrawer:
        return UnCLIPDrawer(self.pipe, options, self.batch_size, self.progress)


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Of one row; what does not apply is left out."""

    def told(name: str, form: str) -> str:
        return format(row[name], form) if name in row else ""

    return (
        row["name"],
        f"{row['parameters'] / 1e6:.1f} M" if "parameters" in row else "",
        told("guidance", "g"),
        told("cosine", ".3f"),
        told("gap", ".3f"),
        told("recall@1", ".1%"),
        told("cosine_of_seeds", ".3f"),
        told("milliseconds", ".0f"),
    )


HEAD = (
    "embedding from",
    "parameters",
    "guidance",
    "cosine to the true one",
    "gap to mismatched",
    "recall@1 of the picture",
    f"cosine between {SEEDS} seeds",
    "ms",
)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown."""
    return markdown([HEAD, *map(_cells, rows)])


def _kind(prior: nn.Module) -> str:
    """A name for the model's own prior."""
    names = {"ARPrior": "autoregressive", "OneShotPrior": "one-shot"}
    return names.get(type(prior).__name__, "diffusion")
