"""The autoregressive prior: an image embedding is drawn code by code, each from the caption and those before it.

unCLIP 2.2; the codes are of `EmbeddingCodes`.
"""

# B embeddings, R conditions of each, N text positions, K codes of an embedding, V values of a code, D CLIP embedding
# width, C width, H heads, d width of a head

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.models.dalle.sampling import draw_code
from unclip.models.layers import attend, timestep_embedding, zeroed
from unclip.models.unclip.embedding_codes import EmbeddingCodes
from unclip.models.unclip.text_prior import (
    Combine,
    DirectPrior,
    OnDraw,
    TextPrefix,
    TextPriorConfig,
)
from unclip.types import CodeOptions, TextEncoding


@dataclass(frozen=True)
class ARPriorConfig(TextPriorConfig):
    components: int = 319  # K, principal components of an image embedding, a code for each
    buckets: int = 1024  # V, values of a code, and of the dot product

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.components <= self.emb_dim:
            raise ValueError(
                f"components is {self.components}; expected 1 to emb_dim = {self.emb_dim}"
            )
        if self.buckets < 2:
            raise ValueError(f"buckets is {self.buckets}; expected at least 2")


class ARCache:
    """Keys and values of B streams, in memory for all of their tokens; the text's are there from the beginning."""

    def __init__(self, prefix: TextPrefix, own: int) -> None:
        self.text = prefix.mask.shape[1]
        self.mask = F.pad(prefix.mask, (0, own), value=True)[:, None, None]  # B 1 1 N+own
        self.blocks = [
            F.pad(torch.stack([k, v]), (0, 0, 0, own))  # 2 B H N+own d
            for k, v in zip(prefix.k, prefix.v, strict=True)
        ]


class ARPrior(DirectPrior):
    """Tokens [text states, text embedding | dot product of image and text, codes]; each predicts the next code.

    An embedding's codes are its principal components, the first the one of most variance. In sampling the dot product
    is drawn from the upper half of those in training: captions that tell much of their picture.
    """

    def __init__(self, config: ARPriorConfig) -> None:
        super().__init__(config, own=config.components)
        C, V = config.width, config.buckets
        self.codes = EmbeddingCodes(config.emb_dim, config.components, V)
        self.dot_emb, self.code_emb = nn.Embedding(V, C), nn.Embedding(V, C)
        for embedding in (self.dot_emb, self.code_emb):  # neighbouring buckets start alike
            embedding.weight.data = 0.02 * timestep_embedding(torch.arange(V), C, max_period=V)
        self.head = zeroed(nn.Linear(C, V))

    @property
    def steps(self) -> int:
        """K."""
        return self.config.components

    def fit(self, image_emb: Tensor, text_emb: Tensor) -> None:
        """Learns components and buckets from pairs of CLIP embeddings (N, D); to be called before training."""
        self.set_stats(image_emb.mean(dim=0), image_emb.std(dim=0))
        self.codes.fit(image_emb, text_emb)

    def forward(
        self, codes: Tensor, dot: Tensor, text: TextEncoding, drop: Tensor | None = None
    ) -> Tensor:
        """Codes (B, K), bucket of the dot product (B,) and text -> logits of each code (B, K, V)."""
        tokens = torch.cat(
            [self.dot_emb(dot)[:, None], self.code_emb(codes[:, :-1])], dim=1
        )  # B K C
        x = tokens + self.positions[-self.config.components :]
        return self.head(self.norm(self.through(x, self.condition(text, drop))))

    def start_cache(self, prefix: TextPrefix) -> ARCache:
        """For a stream of each row of the prefix."""
        return ARCache(prefix, self.config.components)

    def step(self, token: Tensor, n: int, cache: ARCache) -> Tensor:
        """Logits (B, V) of code n, from the one before it (B,); of code 0, from the bucket of the dot product."""
        x = (self.code_emb if n else self.dot_emb)(token) + self.positions[
            n - self.config.components
        ]
        x, stop = x[:, None], cache.text + n + 1  # B 1 C
        for block, kv in zip(self.blocks, cache.blocks, strict=True):
            q, k, v = block.project(x)  # B H 1 d
            kv[0, :, :, stop - 1], kv[1, :, :, stop - 1] = k[:, :, 0], v[:, :, 0]
            x = block.finish(
                x, attend(q, kv[0, :, :, :stop], kv[1, :, :, :stop], cache.mask[..., :stop])
            )
        return self.head(self.norm(x[:, 0]))

    def sample(
        self,
        prefix: TextPrefix,
        generators: Sequence[torch.Generator],
        combine: Combine,
        *,
        temperature: float = 1.0,
        on_draw: OnDraw | None = None,
    ) -> Tensor:
        """As `DirectPrior.sample`; each generator draws K + 1 numbers."""
        K, V, R = self.config.components, self.config.buckets, len(prefix) // len(generators)
        uniform = torch.stack(
            [torch.rand(K + 1, generator=g, device=g.device).cpu() for g in generators]
        )  # B K+1
        uniform = uniform.to(prefix.mask.device)
        how, cache = CodeOptions(temperature=temperature), self.start_cache(prefix)
        token = (
            V // 2 + (uniform[:, 0] * (V - V // 2)).long()
        )  # equally many of training's are in each bucket
        codes = []
        for n in range(K):
            logits = combine(self.step(token.repeat(R), n, cache).float())  # B V
            token = draw_code(logits, uniform[:, n + 1], how)
            codes.append(token)
            if on_draw is not None:
                on_draw(n + 1)
        return self.codes.decode(torch.stack(codes, dim=1))
