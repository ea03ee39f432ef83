"""Mean and standard deviation of CLIP's image embeddings, kept with the weights of what is trained on them."""

# D CLIP embedding width

from __future__ import annotations

import torch
from torch import nn


class EmbeddingStats(nn.Module):
    """Scales image embeddings to about unit variance; the buffers stay in float32 whatever the parameters are."""

    emb_mean: torch.Tensor
    emb_std: torch.Tensor

    def __init__(self, emb_dim: int) -> None:
        super().__init__()
        self.register_buffer("emb_mean", torch.zeros(emb_dim))
        self.register_buffer("emb_std", torch.full((emb_dim,), emb_dim**-0.5))

    def set_stats(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Mean and standard deviation (D,) of the image embeddings, by which `normalize` scales.

        ValueError for another width, for what is not finite, and for a deviation that is not positive.
        """
        D = len(self.emb_mean)
        if mean.numel() != D or std.numel() != D:
            raise ValueError(
                f"mean has {mean.numel()} numbers and std {std.numel()}; expected {D} each"
            )
        if wrong := int((~mean.isfinite()).sum()):
            raise ValueError(f"mean has {wrong} dimensions that are not finite")
        if wrong := int((~(std.isfinite() & (std > 0))).sum()):
            raise ValueError(
                f"std has {wrong} dimensions that are not positive and finite; are there two embeddings?"
            )
        self.emb_mean.copy_(mean.reshape(D))
        self.emb_std.copy_(std.reshape(D))

    @property
    def emb_norm(self) -> torch.Tensor:
        """The usual length of an image embedding, ()."""
        return (self.emb_mean.square() + self.emb_std.square()).sum().sqrt()

    def normalize(self, emb: torch.Tensor) -> torch.Tensor:
        """CLIP image embeddings (..., D) -> x_0, of about unit variance."""
        return (emb - self.emb_mean) / self.emb_std

    def denormalize(self, x_0: torch.Tensor) -> torch.Tensor:
        """x_0 (..., D) -> CLIP image embeddings."""
        return x_0 * self.emb_std + self.emb_mean
