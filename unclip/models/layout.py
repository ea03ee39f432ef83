"""Where things are in a picture, told from its image embedding alone: a small blurred picture by an MLP.

A decoder may be shown it at every step, as DiffuseVAE (2201.00308) shows its U-Net what a VAE makes of the latent: what
an embedding says of coarse shapes is learned by regression in minutes, and diffusion is left with what it does not say.
"""

# B batch, D CLIP embedding width

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from unclip.models.embedding_stats import EmbeddingStats


@dataclass(frozen=True)
class LayoutConfig:
    emb_dim: int  # D, of CLIP's embeddings
    size: int = 16  # side of the picture
    width: int = 768
    depth: int = 3  # hidden layers

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")


class Layout(EmbeddingStats):
    """The mean of all pictures with an embedding: (B, D) -> (B, 3, size, size), in about [-1, 1]."""

    def __init__(self, config: LayoutConfig) -> None:
        super().__init__(config.emb_dim)
        self.config = config
        widths = [config.emb_dim, *[config.width] * config.depth]
        hidden = [[nn.Linear(c_in, c_out), nn.SiLU()] for c_in, c_out in zip(widths, widths[1:], strict=False)]
        self.mlp = nn.Sequential(*sum(hidden, []), nn.Linear(config.width, 3 * config.size**2))

    def forward(self, image_emb: torch.Tensor) -> torch.Tensor:
        x = self.mlp(self.normalize(image_emb.float()).to(image_emb.dtype))
        return x.unflatten(1, (3, self.config.size, self.config.size))
