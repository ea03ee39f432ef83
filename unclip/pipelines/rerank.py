"""Selection of the candidate images that CLIP finds closest to their prompt (2102.12092, 2.6)."""

# P prompts, N images, D CLIP embedding width

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor

from unclip.embeddings import normalise
from unclip.pipelines.request import check_count
from unclip.types import GenerationResult

ManyImages = Sequence[Image.Image] | Tensor  # a tensor is (N, 3, S, S) in [-1, 1]
EncodeImage = Callable[[ManyImages], Tensor]  # N images -> CLIP embeddings (N, D)
CHUNK = 64  # images that CLIP encodes together


@torch.inference_mode()
def clip_scores(encode_image: EncodeImage, images: ManyImages, text_emb: Tensor) -> list[float]:
    """Return the cosine of each image's embedding with its text's, text_emb (N, D)."""
    chunks = [encode_image(images[i : i + CHUNK]).float() for i in range(0, len(images), CHUNK)]
    image_emb = torch.cat(chunks)  # N D
    return (normalise(image_emb) * normalise(text_emb.to(image_emb))).sum(dim=-1).tolist()


class BestOf:
    """Keep the num_images of num_candidates images of each prompt with the highest CLIP scores.

    Only one batch and the best images are in memory.
    """

    def __init__(
        self, encode_image: EncodeImage, text_emb: Tensor, num_images: int, num_candidates: int
    ) -> None:
        """text_emb: embeddings of the P prompts, (P, D)."""
        self.encode_image, self.text_emb = encode_image, text_emb
        self.num_images, self.num_candidates = num_images, num_candidates
        self._best: dict[int, GenerationResult] = {}  # by prompt
        self._seen = 0

    def add(self, batch: GenerationResult) -> None:
        """Score the next batch, in the order of the prompts."""
        prompts = [(self._seen + k) // self.num_candidates for k in range(len(batch))]
        self._seen += len(batch)
        scores = clip_scores(self.encode_image, batch.images, self.text_emb[prompts])
        batch = replace(batch, scores=scores)
        for p in dict.fromkeys(prompts):
            more = batch.pick([k for k, prompt in enumerate(prompts) if prompt == p])
            if p in self._best:
                more = GenerationResult.cat([self._best[p], more])
            self._best[p] = _highest(more, self.num_images)

    def result(self) -> GenerationResult:
        """Return the best images, with score and number of candidates in their metadata."""
        kept = GenerationResult.cat([self._best[p] for p in sorted(self._best)])
        assert kept.scores is not None
        metadata = [
            {**entry, "score": score, "candidates": self.num_candidates}
            for entry, score in zip(kept.metadata, kept.scores, strict=True)
        ]
        return replace(kept, metadata=metadata)


def check_candidates(num_images: int, num_candidates: int) -> None:
    """Raise ValueError unless num_images of num_candidates can be kept."""
    check_count("num_images", num_images)
    check_count("num_candidates", num_candidates)
    if num_candidates < num_images:
        least = f"num_images, which is {num_images}"
        raise ValueError(f"num_candidates is {num_candidates}; expected at least {least}")


def _highest(result: GenerationResult, count: int) -> GenerationResult:
    """Return the `count` images with the highest scores; the first ones win ties."""
    scores = result.scores
    assert scores is not None
    return result.pick(sorted(range(len(result)), key=lambda k: -scores[k])[:count])
