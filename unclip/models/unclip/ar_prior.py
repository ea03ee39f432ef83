"""The autoregressive prior (unCLIP 2.2): an image embedding is sampled as a sequence of codes."""

# B embeddings, R conditions of each, N text positions, K codes of an embedding, V values of a
# code, D CLIP embedding width, C width, H heads, d width of a head

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor, nn

from unclip.config import PositiveInt, config
from unclip.embeddings import PCA
from unclip.models.dalle.sampling import sample_code
from unclip.models.layers import KeyValues, random_rows, timestep_embedding, zeroed
from unclip.models.unclip.prior import Combine, DirectPrior, OnPrediction, TextPriorConfig
from unclip.types import CodeOptions, TextEncoding, full_precision


class EmbeddingCodes(nn.Module):
    """Quantise image embeddings: K principal components, each in one of V buckets.

    The buckets of a component are equally wide, from the lowest to the highest coefficient seen
    in `fit`. Those of the dot product of image and text hold equally many pairs. It has no
    parameters: `fit` fills buffers, which are saved and stay in float32.
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
        """Learn components and buckets from N pairs of CLIP embeddings, (N, D) each."""
        pca = PCA.fit(image_emb, len(self.components))
        coefficients = pca.project(image_emb.float())  # N K
        low, high = coefficients.amin(dim=0), coefficients.amax(dim=0)
        quantiles = torch.linspace(0, 1, self.buckets + 1, dtype=torch.float64)[1:-1]
        dots = _cosine(image_emb, text_emb).cpu().double().sort().values
        self.mean.copy_(pca.mean)
        self.components.copy_(pca.components)
        self.low.copy_(low)
        self.bucket_width.copy_((high - low).clamp(min=1e-6) / self.buckets)
        # torch.quantile refuses large inputs.
        self.dot_edges.copy_(dots[(quantiles * (len(dots) - 1)).round().long()])

    def encode(self, image_emb: Tensor) -> Tensor:
        """Quantise (..., D) -> codes (..., K) in 0 .. V - 1; outliers go to the outer buckets."""
        with full_precision(image_emb):  # a bucket must not depend on rounding
            coefficients = (image_emb.to(self.mean) - self.mean) @ self.components.T
        buckets = ((coefficients - self.low) / self.bucket_width).floor()
        return buckets.clamp(0, self.buckets - 1).long()

    def decode(self, codes: Tensor) -> Tensor:
        """Return the image embeddings (..., D) at the centres of the buckets (..., K)."""
        with full_precision(codes):
            return (self.low + (codes + 0.5) * self.bucket_width) @ self.components + self.mean

    def encode_dot(self, image_emb: Tensor, text_emb: Tensor) -> Tensor:
        """Return the bucket (...) of the dot product of unit-length embeddings (..., D)."""
        return torch.bucketize(_cosine(image_emb, text_emb).to(self.dot_edges), self.dot_edges)


def _cosine(image_emb: Tensor, text_emb: Tensor) -> Tensor:
    product = F.normalize(image_emb.float(), dim=-1) * F.normalize(text_emb.float(), dim=-1)
    return product.sum(dim=-1)


@config
class ARPriorConfig(TextPriorConfig):
    components: PositiveInt = 319  # K, principal components of an image embedding, one code each
    buckets: Annotated[int, Ge(2)] = 1024  # V, values of a code, and of the dot product

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.components > self.emb_dim:
            raise ValueError(
                f"components is {self.components}; expected 1 to emb_dim = {self.emb_dim}"
            )


class ARCache:
    """Preallocated keys and values of B sequences; those of the text are filled in."""

    def __init__(self, text: KeyValues, own_tokens: int) -> None:
        self.text = text.mask.shape[1]
        self.mask = F.pad(text.mask, (0, own_tokens), value=True)[:, None, None]  # B 1 1 N+K
        self.blocks = [
            F.pad(torch.stack([k, v]), (0, 0, 0, own_tokens))  # 2 B H N+K d
            for k, v in zip(text.k, text.v, strict=True)
        ]


class ARPrior(DirectPrior):
    """Own tokens [dot product of image and text, codes]; each predicts the next code.

    The codes are principal components in order of variance. In sampling, the dot product comes
    from the upper half of the training set: captions that describe their image well.
    """

    def __init__(self, config: ARPriorConfig) -> None:
        super().__init__(config, own_tokens=config.components)
        C, V = config.width, config.buckets
        self.codes = EmbeddingCodes(config.emb_dim, config.components, V)
        self.dot_emb, self.code_emb = nn.Embedding(V, C), nn.Embedding(V, C)
        for embedding in (self.dot_emb, self.code_emb):  # similar for neighbouring buckets
            embedding.weight.data = 0.02 * timestep_embedding(torch.arange(V), C, max_period=V)
        self.head = zeroed(nn.Linear(C, V))

    @property
    def steps(self) -> int:
        """Number of codes K."""
        return self.config.components

    def fit(self, image_emb: Tensor, text_emb: Tensor) -> None:
        """Learn components and buckets from pairs (N, D); call it before training."""
        self.set_stats(image_emb.mean(dim=0), image_emb.std(dim=0))
        self.codes.fit(image_emb, text_emb)

    def forward(
        self, codes: Tensor, dot: Tensor, text: TextEncoding, drop: Tensor | None = None
    ) -> Tensor:
        """Compute logits (B, K, V) from codes (B, K), dot-product buckets (B,) and B texts."""
        tokens = [self.dot_emb(dot)[:, None], self.code_emb(codes[:, :-1])]
        x = torch.cat(tokens, dim=1) + self.positions[-self.config.components :]  # B K C
        return self.head(self.norm(self.transform(x, self.condition(text, drop))))

    def start_cache(self, text: KeyValues) -> ARCache:
        """Allocate a cache with one sequence for each row of `text`."""
        return ARCache(text, self.config.components)

    def step(self, token: Tensor, n: int, cache: ARCache) -> Tensor:
        """Compute logits (B, V) of code n from the code before it (B,), or for n = 0 the bucket."""
        embedding = self.code_emb if n else self.dot_emb
        x = (embedding(token) + self.positions[n - self.config.components])[:, None]  # B 1 C
        stop = cache.text + n + 1
        for block, kv in zip(self.blocks, cache.blocks, strict=True):
            q, k, v = block.project(x)  # B H 1 d
            kv[0, :, :, stop - 1], kv[1, :, :, stop - 1] = k[:, :, 0], v[:, :, 0]
            k, v = kv[:, :, :, :stop]
            x = block(x, q, k, v, cache.mask[..., :stop])
        return self.head(self.norm(x[:, 0]))

    def sample(
        self,
        text: KeyValues,
        generators: Sequence[torch.Generator],
        combine: Combine,
        *,
        temperature: float = 1.0,
        on_prediction: OnPrediction | None = None,
    ) -> Tensor:
        """See `DirectPrior.sample`; each generator samples K + 1 numbers."""
        K, V, R = self.config.components, self.config.buckets, len(text) // len(generators)
        uniform = random_rows(torch.rand, K + 1, generators, text.mask)  # B K+1
        options, cache = CodeOptions(temperature=temperature), self.start_cache(text)
        # Each bucket of the dot product holds equally many training pairs.
        token = V // 2 + (uniform[:, 0] * (V - V // 2)).long()  # B
        codes = []
        for n in range(K):
            logits = combine(self.step(token.repeat(R), n, cache).float())  # B V
            token = sample_code(logits, uniform[:, n + 1], options)
            codes.append(token)
            if on_prediction is not None:
                on_prediction(n + 1)
        return self.codes.decode(torch.stack(codes, dim=1))
