"""Measures of a validation besides losses: retrieval by CLIP, cosines of the samples of a prior.

A measure is called as `measure(batches)`, with the averaged weights in the networks that it holds.
It pools the samples of all processes, and so returns the same numbers in each of them.
"""

# B batch, N samples of all processes, D CLIP embedding width

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate.utils import gather_object
from torch import Tensor

from unclip.clip import CLIP
from unclip.data.loader import Batch
from unclip.diffusion.samplers import Estimator, randn, sample
from unclip.diffusion.schedules import Schedule
from unclip.embeddings import caption_targets, cosine_gap, normalise
from unclip.models.unclip.prior import DenoisingPrior, DirectPrior
from unclip.training.losses import image_embeddings
from unclip.training.multiprocess import rank, world_size
from unclip.types import StageOptions, TextEncoding, full_precision

STEPS = 10  # of DDIM


@dataclass(eq=False)
class Retrieval:
    """Recall@1 of a CLIP: how often an image finds its caption among all, and the reverse.

    Equal captions count as one. A tie is a miss.
    """

    clip: CLIP

    def __call__(self, batches: Sequence[Batch]) -> dict[str, float]:
        image_emb = [image_embeddings(self.clip, batch) for batch in batches]
        text_emb = [self.clip.encode_captions(batch["caption"]).emb for batch in batches]
        images, texts, captions = _pool(image_emb, text_emb, batches)
        with full_precision(images):  # rounding would make ties
            cosines = normalise(images) @ normalise(texts).T  # N N
        _, labels = caption_targets(captions)
        matching = labels[:, None] == labels  # N N

        def recall(dim: int) -> float:
            right = cosines.where(matching, -torch.inf).amax(dim)
            wrong = cosines.where(~matching, -torch.inf).amax(dim)
            return (right > wrong).float().mean().item()

        return {"recall_of_captions": recall(1), "recall_of_images": recall(0)}


@dataclass(eq=False)
class SampledCosines:
    """Cosines of the embeddings that a prior samples for captions to the true image embeddings.

    To those of the captions' own images, and of images with other captions, if there are any.
    Sampling is without guidance. The noise of a sample depends on its number only.
    """

    prior: DenoisingPrior | DirectPrior
    clip: CLIP
    schedule: Schedule | None = None  # of a diffusion prior

    def __call__(self, batches: Sequence[Batch]) -> dict[str, float]:
        sampled, number = [], rank()
        for batch in batches:
            text = self.clip.encode_captions(batch["caption"])
            numbers = [number + i * world_size() for i in range(len(text))]
            sampled.append(self._sample(text, [torch.Generator().manual_seed(n) for n in numbers]))
            number = numbers[-1] + world_size()
        true = [image_embeddings(self.clip, batch) for batch in batches]
        emb, true_emb, captions = _pool(sampled, true, batches)
        with full_precision(emb):
            found = cosine_gap(emb, true_emb, captions)
        if len(set(captions)) == 1:
            return {"cosine": found["matching"]}
        unrelated = {"cosine_unrelated": found["mismatched"], "cosine_gap": found["gap"]}
        return {"cosine": found["matching"], **unrelated}

    def _sample(self, text: TextEncoding, generators: list[torch.Generator]) -> Tensor:
        """Sample an embedding for each of B texts: (B, D)."""
        prior, context = self.prior, self.prior.condition(text)
        if isinstance(prior, DirectPrior):
            return prior.sample(context, generators, combine=lambda predicted: predicted)
        assert self.schedule is not None
        options = StageOptions(min(STEPS, self.schedule.num_timesteps))
        estimate = Estimator(
            lambda x_t, t: prior.denoise(x_t, t, context),
            self.schedule,
            options,
            "x0",
            clip=prior.x0_limit,
        )
        x_T = randn((len(text), prior.config.emb_dim), generators, text.emb.device)
        return prior.denormalize(sample(estimate, x_T, self.schedule, options))


def _pool(
    a: Sequence[Tensor], b: Sequence[Tensor], batches: Sequence[Batch]
) -> tuple[Tensor, Tensor, list[str]]:
    """Return two kinds of embeddings, (N, D) each on the CPU, and captions of all processes."""
    captions = [caption for batch in batches for caption in batch["caption"]]
    own = torch.cat([*a]).float().cpu(), torch.cat([*b]).float().cpu(), captions
    parts_a, parts_b, parts = zip(*gather_object([own]), strict=True)
    return torch.cat(parts_a), torch.cat(parts_b), [caption for part in parts for caption in part]
