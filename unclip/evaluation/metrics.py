"""The arithmetic of the evaluation: embeddings and pictures in, numbers out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from unclip.embeddings import normalise

# N queries, M candidates, D embedding width, S image size


def agreement(emb: Tensor, true_emb: Tensor) -> dict[str, float]:
    """Mean cosine of emb (N, D) to true_emb (N, D): on the diagonal (matching), off it (mismatched), and the gap."""
    cosines = normalise(emb) @ normalise(true_emb).T  # (N, N)
    matching = cosines.diagonal().mean().item()
    off_diagonal = ~torch.eye(len(emb), dtype=torch.bool, device=emb.device)
    mismatched = cosines[off_diagonal].mean().item()
    return {"matching": matching, "mismatched": mismatched, "gap": matching - mismatched}


def recall(
    emb: Tensor, candidates: Tensor, right: Tensor, ks: Sequence[int] = (1, 5)
) -> dict[str, float]:
    """Fraction of emb (N, D) whose right row (N,) of candidates (M, D) is among the k nearest by cosine.

    A tie counts as a miss, so that embeddings that are all the same recall nothing.
    """
    cosines = normalise(emb) @ normalise(candidates).T  # (N, M)
    rank = (cosines >= cosines.gather(1, right[:, None])).sum(dim=1)  # (N,), 1 = first
    return {f"recall@{k}": (rank <= k).float().mean().item() for k in ks}


def diversity(emb: Tensor) -> float:
    """Mean cosine distance of two pictures of one prompt: (P prompts, n > 1 pictures, D)."""
    unit = normalise(emb)
    cosines = unit @ unit.mT  # (P, n, n)
    n = emb.shape[1]
    pairs = torch.triu_indices(n, n, offset=1)
    return (1 - cosines[:, pairs[0], pairs[1]]).mean().item()


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each picture, both (B, 3, S, S) in [-1, 1]; at most 100."""
    mse = (images.float() - truth.float()).square().mean(dim=(1, 2, 3))  # (B,)
    return 10 * torch.log10(4 / mse.clamp(min=4e-10))


def nearest_by_cosine(emb: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """Row (N,) of candidates (M, D) that is nearest to each of emb (N, D), and its cosine distance (N,)."""
    cosine, row = (normalise(emb) @ normalise(candidates).T).max(dim=1)
    return row, 1 - cosine


def nearest_by_pixels(
    images: Tensor, candidates: Tensor, chunk: int = 512
) -> tuple[Tensor, Tensor]:
    """Row (N,) of candidates (M, 3, S, S) uint8 that is nearest to each of images (N, 3, S, S) in [-1, 1].

    Also the root mean squared difference (N,) of the two, in [0, 2].
    """
    queries = rearrange(images.float().cpu(), "n c h w -> n (c h w)")
    best = torch.full((len(queries),), torch.inf)
    row = torch.zeros(len(queries), dtype=torch.long)
    for start in range(
        0, len(candidates), chunk
    ):  # all of them as floats would take 4 times the memory
        keys = rearrange(
            candidates[start : start + chunk].float().div(127.5).sub(1), "m c h w -> m (c h w)"
        )
        distance, nearest = torch.cdist(queries, keys).min(dim=1)  # (N,)
        row = torch.where(distance < best, nearest + start, row)
        best = torch.minimum(distance, best)
    return row, best / queries.shape[1] ** 0.5
