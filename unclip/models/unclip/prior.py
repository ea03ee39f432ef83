"""The diffusion prior: a causal transformer from a caption's encoding to a CLIP image embedding (unCLIP 2.2)."""

# B batch, D CLIP embedding width, C width

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from unclip.models.layers import TimeMLP, zeroed
from unclip.models.unclip.text_prior import TextPrefix, TextPrior, TextPriorConfig
from unclip.types import TextEncoding


@dataclass(frozen=True)
class PriorConfig(TextPriorConfig):
    x0_limit: float | None = (
        5.0  # sampling keeps x_0 within it, in standard deviations (Karlo); None = anywhere
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.x0_limit is not None and self.x0_limit <= 0:
            raise ValueError(
                f"x0_limit is {self.x0_limit}; expected a positive number, or None for no limit"
            )


class DiffusionPrior(TextPrior):
    """Tokens [text states, text embedding | t, x_t, query]; the prediction of x_0 is read from the query."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__(config, own=3)
        D, C = config.emb_dim, config.width
        self.time = TimeMLP(C, C)
        self.x_proj = nn.Linear(D, C)
        self.query = nn.Parameter(torch.randn(C) * 0.02)
        self.head = zeroed(nn.Linear(C, D))

    @property
    def x0_limit(self) -> float | None:
        """Bound of x_0 in sampling."""
        return self.config.x0_limit

    def denoise(self, x_t: torch.Tensor, t: torch.Tensor, prefix: TextPrefix) -> torch.Tensor:
        """Predicts the normalised embedding: (B, D), (B,) -> (B, D). Each row of the prefix serves an equal share."""
        return self.step(x_t, self.time(t), prefix)[0]

    def embed(self, t: torch.Tensor, prefix: TextPrefix) -> torch.Tensor:
        """What `step` is to be told at T timesteps: (T,) -> (T, 1, C)."""
        return self.time(t)[:, None]

    def step(
        self, x_t: torch.Tensor, time: torch.Tensor, prefix: TextPrefix, deep_features: None = None
    ) -> tuple[torch.Tensor, None]:
        """`denoise` from the time embedding (B or 1, C) on; there is nothing to be used again at another step."""
        B = len(x_t)
        tokens = [
            time.expand(B, -1),
            self.x_proj(x_t.to(self.query.dtype)),
            self.query.expand(B, -1),
        ]
        x = torch.stack(tokens, dim=1) + self.positions[-3:]  # B 3 C
        return self.head(self.norm(self.through(x, prefix)[:, -1])), None

    def forward(
        self,
        x_t: torch.Tensor,
        t: torch.Tensor,
        text: TextEncoding,
        drop: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.denoise(x_t, t, self.condition(text, drop))
