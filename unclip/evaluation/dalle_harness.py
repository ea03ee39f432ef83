"""What is asked of a DALL-E beyond its pictures: of its codec, its likelihood, and choosing among candidates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.evaluation.codec import evaluate_codec
from unclip.evaluation.drawing import DalleDrawer, no_cut_warnings
from unclip.evaluation.harness import Evaluation
from unclip.evaluation.metrics import recall
from unclip.pipelines.base import to_pil
from unclip.pipelines.dalle.pipeline import DallePipeline

# N held-out pairs, P captions of them, n candidates of each, D CLIP embedding width, S picture side

CANDIDATES = (1, 8, 64, 512)  # each a divisor of the last
RERANKED = 6  # captions that so many candidates are drawn of


@dataclass(frozen=True)
class Chosen:
    """What CLIP chooses among the candidates of some captions, for each number of CANDIDATES."""

    rows: list[int]  # P held-out pairs
    emb: dict[
        int, Tensor
    ]  # of each group's best, (P, groups, D): fewer candidates make more groups
    first: dict[int, Tensor]  # the first group's best picture, (P, 3, S, S) in [-1, 1]


class DalleEvaluation(Evaluation):
    pipe: DallePipeline
    drawer: DalleDrawer

    def _measure(self, part: str) -> dict[str, Any]:
        return self._pictures() if part == "pictures" else {part: getattr(self, part)()}

    @cached_property
    def chosen(self) -> Chosen:
        """The largest number is drawn once; smaller ones are groups of it."""
        rows, most = self.held_out.spread(RERANKED), max(CANDIDATES)
        emb: dict[int, list[Tensor]] = {n: [] for n in CANDIDATES}
        first: dict[int, list[Tensor]] = {n: [] for n in CANDIDATES}
        for row in rows:
            images = self.drawer.candidates(
                self.held_out.captions[row], most, self.seed
            ).images  # n 3 S S
            found = self.drawer.embed(images)  # n D
            score = F.cosine_similarity(found, self.text_emb[row : row + 1])  # n
            for n in CANDIDATES:
                best = score.view(-1, n).argmax(dim=1) + torch.arange(0, most, n)  # most / n
                emb[n].append(found[best])
                first[n].append(images[best[0]])
        return Chosen(
            rows, *({n: torch.stack(found) for n, found in kept.items()} for kept in (emb, first))
        )

    def candidates(self) -> dict[str, Any]:
        """What CLIP's choice among n pictures is worth: by its own measures, and by likeness to the true picture."""
        chosen = self.chosen
        text, truth = (emb[chosen.rows][:, None] for emb in (self.text_emb, self.true_emb))  # P 1 D
        among, right = self._among(range(len(self.held_out)), chosen.rows)
        return {
            "captions": len(chosen.rows),
            "of": {
                str(n): {
                    "clip_score": F.cosine_similarity(emb, text, dim=-1).mean().item(),
                    "cosine_to_truth": F.cosine_similarity(emb, truth, dim=-1).mean().item(),
                    **recall(
                        emb.flatten(0, 1), among, right.repeat_interleave(emb.shape[1]), ks=(1,)
                    ),
                }
                for n, emb in chosen.emb.items()
            },
        }

    def codec(self) -> dict[str, Any]:
        """What the codec loses of the held-out pictures, and how it uses its codes."""
        return evaluate_codec(self.pipe.codec, self.held_out.images, self.drawer.batch_size)

    def bound(self) -> dict[str, Any]:
        """The bound on ln p(picture, caption) of the held-out pairs: per value, code and text token in bits."""
        with no_cut_warnings():
            bound = self.pipe.elbo(
                to_pil(self.held_out.floats()), self.held_out.captions, seed=self.seed
            )
        config, bit = self.pipe.dalle.config, math.log(2)
        return {
            "bits_per_dim": bound.bits_per_dim.mean().item(),
            "bits_of_dim": {
                name: -getattr(bound, name).mean().item() / (bound.dimensions * bit)
                for name in ("pixels", "codes", "text", "entropy")
            },
            "bits_per_code": -bound.codes.mean().item() / (config.num_codes * bit),
            "bits_per_token": -bound.text.mean().item() / (config.context_length * bit),
        }
