"""Evaluation of a DALL-E: images, reranked candidates, its codec and its likelihood."""

# N held-out pairs, P captions of them, n candidates of each, D CLIP embedding width, S image size

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.evaluation.base import Evaluation
from unclip.evaluation.codec import evaluate_codec
from unclip.evaluation.generator import ImageGenerator, Samples, ignore_cut_warnings
from unclip.evaluation.metrics import recall
from unclip.image_io import to_pil
from unclip.pipelines.dalle.pipeline import DallePipeline
from unclip.types import CodeOptions

CANDIDATES = (1, 8, 64, 512)  # each divides the last
RERANKED = 6  # captions with that many candidates


class DalleGenerator(ImageGenerator):
    """A DALL-E pipeline; its images have their full size."""

    pipe: DallePipeline
    options: CodeOptions

    @property
    def size(self) -> int:
        return self.pipe.codec.image_size

    def candidates(self, caption: str, count: int, seed: int) -> Samples:
        """Generate `count` images of one caption, without a selection."""
        options = replace(self.options, candidates=1)
        return self._generate([caption], count, seed, 2 * self.batch_size, options)


@dataclass(frozen=True)
class BestCandidates:
    """The candidates that CLIP scores highest, for each number of CANDIDATES."""

    rows: list[int]  # P held-out pairs
    emb: dict[int, Tensor]  # of the best of each group of n: (P, groups, D)
    images: dict[int, Tensor]  # the best of the first group: (P, 3, S, S) in [-1, 1]


class DalleEvaluation(Evaluation):
    """The evaluation of a DALL-E."""

    pipe: DallePipeline
    generator: DalleGenerator

    @cached_property
    def best(self) -> BestCandidates:
        """Best candidates by number; the largest number is generated once and split into groups."""
        rows, count = self.held_out.spread(RERANKED), max(CANDIDATES)
        emb: dict[int, list[Tensor]] = {n: [] for n in CANDIDATES}
        images: dict[int, list[Tensor]] = {n: [] for n in CANDIDATES}
        for row in rows:
            caption = self.held_out.captions[row]
            candidates = self.generator.candidates(caption, count, self.seed).images  # (n, 3, S, S)
            candidate_emb = self.generator.embed(candidates)  # (n, D)
            scores = F.cosine_similarity(candidate_emb, self.text_emb[row : row + 1])  # (n,)
            for n in CANDIDATES:
                best = scores.view(-1, n).argmax(dim=1) + torch.arange(0, count, n)  # (groups,)
                emb[n].append(candidate_emb[best])
                images[n].append(candidates[best[0]])
        stacked = ({n: torch.stack(x) for n, x in values.items()} for values in (emb, images))
        return BestCandidates(rows, *stacked)

    def candidates(self) -> dict[str, Any]:
        """Compare the best of n candidates to the caption and, as a check, to the true image."""
        best = self.best
        text, truth = (emb[best.rows][:, None] for emb in (self.text_emb, self.true_emb))  # P 1 D
        captions, targets = self._candidates(list(range(len(self.held_out))), best.rows)

        def figures(emb: Tensor) -> dict[str, float]:  # (P, groups, D)
            return {
                "clip_score": F.cosine_similarity(emb, text, dim=-1).mean().item(),
                "cosine_to_truth": F.cosine_similarity(emb, truth, dim=-1).mean().item(),
                **recall(
                    emb.flatten(0, 1), captions, targets.repeat_interleave(emb.shape[1]), ks=(1,)
                ),
            }

        by_count = {str(n): figures(emb) for n, emb in best.emb.items()}
        return {"captions": len(best.rows), "by_count": by_count}

    def codec(self) -> dict[str, Any]:
        """Evaluate the codec on the held-out images."""
        self._use(self.pipe.codec)
        return evaluate_codec(self.pipe.codec, self.held_out.images, self.generator.batch_size)

    def bound(self) -> dict[str, Any]:
        """Return the bound on ln p(image, caption) of the held-out pairs, in bits."""
        images = to_pil(self.held_out.floats())
        with ignore_cut_warnings():
            bound = self.pipe.elbo(images, self.held_out.captions, seed=self.seed)
        config, bit = self.pipe.dalle.config, math.log(2)
        terms = {name: getattr(bound, name) for name in ("pixels", "codes", "text", "entropy")}
        return {
            "bits_per_dim": bound.bits_per_dim.mean().item(),
            "bits_of_dim": {
                name: -term.mean().item() / (bound.dimensions * bit) for name, term in terms.items()
            },
            "bits_per_code": -bound.codes.mean().item() / (config.num_codes * bit),
            "bits_per_token": -bound.text.mean().item() / (config.context_length * bit),
        }
