"""Comparison of priors for one CLIP and decoder (unCLIP section 5.1, `unclip evaluate-priors`)."""

# N held-out pairs, D CLIP embedding width

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from unclip import __version__
from unclip.checkpoints.formats import LoadedPrior
from unclip.config import to_dict
from unclip.embeddings import caption_targets, cosine_gap
from unclip.evaluation.metrics import diversity, recall
from unclip.evaluation.pairs import Pairs
from unclip.evaluation.unclip import PredictedEmbeddings, UnCLIPGenerator
from unclip.models.unclip.ar_prior import ARPrior
from unclip.models.unclip.one_shot_prior import OneShotPrior
from unclip.pipelines.request import generators_from
from unclip.pipelines.unclip.pipeline import UnCLIPPipeline
from unclip.pipelines.unclip.stages import AnyPrior
from unclip.types import UnCLIPOptions

DIVERSITY_PROMPTS, DIVERSITY_SEEDS = 32, 8
TIMED_CALLS = 5  # after one warm-up call
# Rows without a prior: the decoder's ablations of unCLIP section 5.1, and an upper bound.
TEXT_EMBEDDING, TEXT_ONLY, TRUE_EMBEDDING = "text embedding", "text only", "true embedding"


class PriorComparison:
    """Priors sample the embedding of caption k from the seed `seed` + k; one decoder decodes it."""

    def __init__(
        self,
        pipe: UnCLIPPipeline,
        priors: Mapping[str, LoadedPrior | AnyPrior],
        held_out: Pairs,
        *,
        guidance: Mapping[str, float] | None = None,
        options: UnCLIPOptions | None = None,
        seed: int = 0,
        batch_size: int = 32,
        progress: bool = True,
    ) -> None:
        """priors: by name, added to the model's own. guidance: by name, overrides the options'."""
        held_out.check_captions()
        self.pipe, self.held_out, self.seed = pipe, held_out, seed
        own = {} if pipe.prior is None else {_name(pipe.prior): pipe.prior}
        reserved = {*own, TEXT_EMBEDDING, TEXT_ONLY, TRUE_EMBEDDING}
        if taken := sorted(priors.keys() & reserved):
            raise ValueError(
                f"the name {taken[0]!r} of a prior is taken by another row; choose another name"
            )
        self.priors = {**own, **priors}
        self.guidance = dict(guidance or {})
        if unknown := sorted(self.guidance.keys() - self.priors.keys()):
            raise ValueError(
                f"guidance is for prior {unknown[0]!r}; expected one of {', '.join(self.priors)}"
            )
        self.options, self.batch_size, self.progress = options or pipe.options, batch_size, progress
        self.generator = self._generator(self.options)
        self.text = self.generator.encode_text(held_out.captions)
        self.text_emb = self.text.emb.cpu()
        self.true_emb = self.generator.embed(held_out.images)

    def settings(self) -> dict[str, Any]:
        """Return model, options and machine as JSON types."""
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
        """Yield the results of each prior, then of the decoder without one, as JSON types."""
        own = self.pipe.prior
        try:
            for name, prior in self.priors.items():
                self.pipe.prior = prior
                network = self.pipe.prior
                assert network is not None
                yield {"name": name, **self._evaluate_prior(name, network)}
        finally:
            if own is not None:
                self.pipe.prior = own
        generators = generators_from(range(self.seed, self.seed + len(self.held_out)))
        if self.pipe.prior is not None:
            emb = self.pipe.as_image(self.text_emb.to(self.pipe.device)).cpu()
            yield {"name": TEXT_EMBEDDING, **self._evaluate(emb, generators)}
        yield {"name": TEXT_ONLY, **self._evaluate(None, generators)}
        yield {"name": TRUE_EMBEDDING, **self._evaluate(self.true_emb, generators)}

    def _evaluate_prior(self, name: str, prior: nn.Module) -> dict[str, Any]:
        guidance = self.guidance.get(name, self.options.prior.guidance)
        sampling = replace(self.options.prior, guidance=guidance)
        options = replace(self.options, prior=sampling, embedding="prior")
        generator = self._generator(options)
        predicted = generator.predict_embeddings(self.held_out.captions, self.seed)
        return {
            "type": type(prior).__name__,
            "parameters": sum(p.numel() for p in prior.parameters()),
            "guidance": guidance,
            **self._evaluate(predicted.image_emb, predicted.generators),
            "cosine_of_seeds": self._cosine_of_seeds(generator),
            "milliseconds": self._milliseconds(generator),
        }

    def _evaluate(self, emb: Tensor | None, generators: list[torch.Generator]) -> dict[str, float]:
        """Compare embeddings to the true ones, and retrieve the captions of decoded images."""
        captions = self.held_out.captions
        samples = self.generator.decode(PredictedEmbeddings(captions, self.text, emb, generators))
        first, targets = caption_targets(captions)
        found = recall(self.generator.embed(samples.images), self.text_emb[first], targets)
        if emb is None:
            return found
        similarity = cosine_gap(emb, self.true_emb, captions)
        return {"cosine": similarity["matching"], "gap": similarity["gap"], **found}

    def _cosine_of_seeds(self, generator: UnCLIPGenerator) -> float:
        """Return the mean cosine of embeddings of one caption from different seeds."""
        rows = self.held_out.spread(DIVERSITY_PROMPTS)
        captions = [self.held_out.captions[row] for row in rows for _ in range(DIVERSITY_SEEDS)]
        emb = generator.predict_embeddings(captions, self.seed).image_emb
        assert emb is not None
        return 1 - diversity(emb.unflatten(0, (len(rows), DIVERSITY_SEEDS)))

    def _milliseconds(self, generator: UnCLIPGenerator) -> float:
        """Return the median time to sample one embedding, including its candidates."""
        options = generator.options
        times = []
        for i in range(TIMED_CALLS + 1):
            row, start = i % len(self.held_out), time.perf_counter()
            self.pipe.sample_prior(
                self.text[row : row + 1],
                generators=generators_from([self.seed]),
                options=options.prior,
                candidates=options.prior_candidates,
            ).cpu()
            times.append(time.perf_counter() - start)
        return 1000 * statistics.median(times[1:])

    def _generator(self, options: UnCLIPOptions) -> UnCLIPGenerator:
        return UnCLIPGenerator(self.pipe, options, self.batch_size, self.progress)


def _name(prior: nn.Module) -> str:
    """Return a row name for the model's own prior."""
    if isinstance(prior, ARPrior):
        return "autoregressive"
    return "one-shot" if isinstance(prior, OneShotPrior) else "diffusion"
