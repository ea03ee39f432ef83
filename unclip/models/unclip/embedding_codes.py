"""Image embeddings as codes: principal components, each in one of some buckets (unCLIP 2.2)."""

# N embeddings, D CLIP embedding width, K components, V buckets

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.embeddings import PCA
from unclip.models.codecs.quantizers import full_precision


class EmbeddingCodes(nn.Module):
    """Without parameters: what `fit` learns are buffers, which are saved and stay float32.

    The buckets of a component are equally wide, from the lowest to the highest coefficient that was seen. Those of the
    dot product of image and text, which orders the captions by how well they tell of their picture, hold equally many.
    """

    mean: Tensor  # (D,)
    components: Tensor  # (K, D) orthonormal, by decreasing variance
    low: Tensor  # (K,)
    bucket_width: Tensor  # (K,)
    dot_edges: Tensor  # (V - 1,) between buckets

    def __init__(self, emb_dim: int, components: int, buckets: int) -> None:
        super().__init__()
        self.buckets = buckets
        self.register_buffer("mean", torch.zeros(emb_dim))
        self.register_buffer("components", torch.eye(components, emb_dim))
        self.register_buffer("low", torch.full((components,), -1.0))
        self.register_buffer("bucket_width", torch.full((components,), 2.0 / buckets))
        self.register_buffer("dot_edges", torch.linspace(-1, 1, buckets + 1)[1:-1].clone())

    def fit(self, image_emb: Tensor, text_emb: Tensor) -> None:
        """Learns from N pairs of CLIP embeddings (N, D)."""
        pca = PCA.fit(image_emb, len(self.components))
        coefficients = pca.project(image_emb.float())  # N K
        low, high = coefficients.amin(dim=0), coefficients.amax(dim=0)
        quantiles = torch.linspace(0, 1, self.buckets + 1, dtype=torch.float64)[1:-1]
        dots = _dot(image_emb, text_emb).cpu().double().sort().values
        self.mean.copy_(pca.mean)
        self.components.copy_(pca.components)
        self.low.copy_(low)
        self.bucket_width.copy_((high - low).clamp(min=1e-6) / self.buckets)
        self.dot_edges.copy_(
            dots[(quantiles * (len(dots) - 1)).round().long()]
        )  # torch.quantile has a limit of size

    def encode(self, image_emb: Tensor) -> Tensor:
        """(..., D) -> codes (..., K) of 0 .. V - 1; what is beyond the outermost buckets goes into them."""
        with full_precision(image_emb):  # which bucket it is must not hang on a rounding
            coefficients = (image_emb.to(self.mean) - self.mean) @ self.components.T
        return (
            ((coefficients - self.low) / self.bucket_width)
            .floor()
            .clamp(0, self.buckets - 1)
            .long()
        )

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (..., K) -> image embeddings (..., D) of the middles of their buckets."""
        with full_precision(codes):
            return (self.low + (codes + 0.5) * self.bucket_width) @ self.components + self.mean

    def encode_dot(self, image_emb: Tensor, text_emb: Tensor) -> Tensor:
        """Bucket (...) of the dot product of the embeddings (..., D) at unit length."""
        return torch.bucketize(_dot(image_emb, text_emb).to(self.dot_edges), self.dot_edges)


def _dot(image_emb: Tensor, text_emb: Tensor) -> Tensor:
    return (F.normalize(image_emb.float(), dim=-1) * F.normalize(text_emb.float(), dim=-1)).sum(
        dim=-1
    )
