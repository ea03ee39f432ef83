"""A prior that predicts the image embedding in one pass, without diffusion, as ECLIPSE does (2312.04655)."""

# B embeddings, R conditions of each, D CLIP embedding width, C width

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from unclip.models.layers import zeroed
from unclip.models.unclip.text_prior import (
    Combine,
    DirectPrior,
    OnDraw,
    TextPrefix,
    TextPriorConfig,
)
from unclip.types import TextEncoding


@dataclass(frozen=True)
class OneShotPriorConfig(TextPriorConfig):
    query: Literal["learned", "noise"] = (
        "learned"  # learned: one embedding for each text; noise: as in ECLIPSE
    )


class OneShotPrior(DirectPrior):
    """Tokens [text states, text embedding | query]; the prediction is read from the query."""

    steps = 1

    def __init__(self, config: OneShotPriorConfig) -> None:
        super().__init__(config, own=1)
        D, C = config.emb_dim, config.width
        if config.query == "learned":
            self.query = nn.Parameter(torch.randn(C) * 0.02)
        else:
            self.noise_proj = nn.Linear(D, C)
        self.head = zeroed(nn.Linear(C, D))

    def predict(self, prefix: TextPrefix, noise: Tensor | None = None) -> Tensor:
        """The normalised embedding (B, D) of each row; noise (B, D), which a learned query ignores."""
        if self.config.query == "learned":
            query = self.query.expand(len(prefix), -1)
        else:
            query = self.noise_proj(noise.to(self.positions.dtype))  # B C
        x = query[:, None] + self.positions[-1:]  # B 1 C
        return self.head(self.norm(self.through(x, prefix)[:, 0]))

    def forward(
        self, text: TextEncoding, noise: Tensor | None = None, drop: Tensor | None = None
    ) -> Tensor:
        """Text of B captions and noise (B, D) -> normalised embeddings (B, D)."""
        return self.predict(self.condition(text, drop), noise)

    def sample(
        self,
        prefix: TextPrefix,
        generators: Sequence[torch.Generator],
        combine: Combine,
        *,
        temperature: float = 1.0,
        on_draw: OnDraw | None = None,
    ) -> Tensor:
        """As `DirectPrior.sample`; temperature scales the noise. Each generator draws D numbers, or none."""
        noise = None
        if self.config.query == "noise":
            D, R = self.config.emb_dim, len(prefix) // len(generators)
            drawn = torch.stack(
                [torch.randn(D, generator=g, device=g.device).cpu() for g in generators]
            )  # B D
            noise = (temperature * drawn).to(prefix.mask.device).repeat(R, 1)
        emb = self.denormalize(combine(self.predict(prefix, noise).float()))
        if on_draw is not None:
            on_draw(1)
        return emb
