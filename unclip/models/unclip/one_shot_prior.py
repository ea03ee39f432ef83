"""A prior that predicts the image embedding in one pass, as ECLIPSE does (2312.04655)."""

# B embeddings, R conditions of each, D CLIP embedding width, C width

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from unclip.config import config
from unclip.models.layers import KeyValues, normal_parameter, random_rows, zeroed
from unclip.models.unclip.prior import Combine, DirectPrior, OnPrediction, TextPriorConfig
from unclip.types import TextEncoding


@config
class OneShotPriorConfig(TextPriorConfig):
    # learned: one embedding for each text; noise: a random one, as in ECLIPSE
    query: Literal["learned", "noise"] = "learned"


class OneShotPrior(DirectPrior):
    """One own token, the query, from which the prediction is read."""

    def __init__(self, config: OneShotPriorConfig) -> None:
        super().__init__(config, own_tokens=1)
        D, C = config.emb_dim, config.width
        if config.query == "learned":
            self.query = normal_parameter(C, std=0.02)
        else:
            self.noise_proj = nn.Linear(D, C)
        self.head = zeroed(nn.Linear(C, D))

    @property
    def steps(self) -> int:
        return 1

    def predict(self, text: KeyValues, noise: Tensor | None = None) -> Tensor:
        """Predict normalised embeddings (B, D). A learned query ignores the noise (B, D)."""
        if self.config.query == "learned":
            query = self.query.expand(len(text), -1)
        else:
            assert noise is not None
            query = self.noise_proj(noise.to(self.positions.dtype))  # B C
        x = query[:, None] + self.positions[-1:]  # B 1 C
        return self.head(self.norm(self.transform(x, text)[:, 0]))

    def forward(
        self, text: TextEncoding, noise: Tensor | None = None, drop: Tensor | None = None
    ) -> Tensor:
        """Predict normalised embeddings (B, D) from B texts and noise (B, D)."""
        return self.predict(self.condition(text, drop), noise)

    def sample(
        self,
        text: KeyValues,
        generators: Sequence[torch.Generator],
        combine: Combine,
        *,
        temperature: float = 1.0,
        on_prediction: OnPrediction | None = None,
    ) -> Tensor:
        """See `DirectPrior.sample`. temperature scales the noise, D numbers from each generator."""
        noise = None
        if self.config.query == "noise":
            D, R = self.config.emb_dim, len(text) // len(generators)
            noise = temperature * random_rows(torch.randn, D, generators, text.mask)  # B D
            noise = noise.repeat(R, 1)
        emb = self.denormalize(combine(self.predict(text, noise).float()))
        if on_prediction is not None:
            on_prediction(1)
        return emb
