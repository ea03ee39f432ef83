"""Of many candidates, the pictures that CLIP finds closest to their prompt (2102.12092, 2.6)."""

# P prompts, n candidates of each, D CLIP embedding width

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unclip.embeddings import normalise
from unclip.pipelines.base import check_count
from unclip.types import GenerationResult

if TYPE_CHECKING:
    from PIL import Image

EncodeImage = Callable[["Sequence[Image.Image]"], Tensor]  # n pictures -> CLIP embeddings (n, D)
CHUNK = 64  # pictures that CLIP looks at together


@torch.inference_mode()
def clip_scores(
    encode_image: EncodeImage, images: Sequence[Image.Image], text_emb: Tensor
) -> list[float]:
    """Cosine of each picture's embedding with its text's, text_emb (N, D); in [-1, 1]."""
    image_emb = torch.cat(
        [encode_image(images[i : i + CHUNK]).float() for i in range(0, len(images), CHUNK)]
    )  # N D
    return (normalise(image_emb) * normalise(text_emb.to(image_emb))).sum(dim=-1).tolist()


def best_of(
    draw: Callable[[int], Iterator[GenerationResult]],
    encode_image: EncodeImage,
    encode_text: Callable[[], Tensor],
    num_images: int,
    num_candidates: int,
) -> GenerationResult:
    """The num_images of num_candidates pictures of each prompt that CLIP scores highest, the best first.

    draw(n) gives n pictures of each of P prompts in their order, batch by batch: no more than a batch and the best are
    in memory. encode_text() is what the P prompts mean, (P, D). Metadata of what is kept tells score and candidates.
    """
    check_count("num_images", num_images)
    check_count("num_candidates", num_candidates)
    if num_candidates < num_images:
        raise ValueError(
            f"num_candidates is {num_candidates}; expected at least num_images, which is {num_images}"
        )
    texts = encode_text()
    best: list[GenerationResult | None] = [None] * len(texts)
    seen = 0
    for batch in draw(num_candidates):
        prompts = [(seen + k) // num_candidates for k in range(len(batch))]
        seen += len(batch)
        batch = replace(batch, scores=clip_scores(encode_image, batch.images, texts[prompts]))
        for p in dict.fromkeys(prompts):
            more = batch.pick([k for k, prompt in enumerate(prompts) if prompt == p])
            best[p] = _highest(
                more if best[p] is None else GenerationResult.cat([best[p], more]), num_images
            )
    kept = GenerationResult.cat(best)
    told = [
        {**entry, "score": score, "candidates": num_candidates}
        for entry, score in zip(kept.metadata, kept.scores, strict=True)
    ]
    return replace(kept, metadata=told)


def _highest(result: GenerationResult, count: int) -> GenerationResult:
    """Of equal ones, those that came first."""
    return result.pick(sorted(range(len(result)), key=lambda k: -result.scores[k])[:count])
