"""Where things are in a picture, told from its image embedding alone: a small blurred picture by an MLP.

A decoder may be shown it at every step, as DiffuseVAE (2201.00308) shows its U-Net what a VAE makes of the latent: what
an embedding says of coarse shapes is learned by regression in minutes, and diffusion is left with what it does not say.
"""

# B batch, D CLIP embedding width, s picture size

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from unclip.models.unclip.embedding_stats import EmbeddingStats

AGREE_LR = 0.05  # of a standard deviation, about, that an embedding goes in a step


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


class _Linear(nn.Linear):
    """Which nothing takes the place of: what packs or rounds weights to draw knows no gradients."""


class Layout(EmbeddingStats):
    """The mean of all pictures with an embedding: (B, D) -> (B, 3, size, size), in about [-1, 1]."""

    def __init__(self, config: LayoutConfig) -> None:
        super().__init__(config.emb_dim)
        self.config = config
        widths = [config.emb_dim, *[config.width] * config.depth]
        hidden = [
            [_Linear(c_in, c_out), nn.SiLU()]
            for c_in, c_out in zip(widths, widths[1:], strict=False)
        ]
        self.mlp = nn.Sequential(*sum(hidden, []), _Linear(config.width, 3 * config.size**2))

    def forward(self, image_emb: torch.Tensor) -> torch.Tensor:
        x = self.mlp(self.normalize(image_emb.float()).to(image_emb.dtype))
        return x.unflatten(1, (3, self.config.size, self.config.size))

    def agreeing(
        self,
        image_emb: torch.Tensor,
        known: torch.Tensor,
        weight: float | torch.Tensor,
        steps: int = 30,
    ) -> torch.Tensor:
        """Embeddings near `image_emb` (B, D) whose layouts agree with what is known of a picture.

        known: (B, 4, s, s), see `known_part`.
        weight: of the squared error where the picture is known against the squared way that an embedding goes, in
        standard deviations; one number or (B,). It is how probable the picture is, against how near `image_emb` is.
        """
        pooled = F.adaptive_avg_pool2d(known.float(), self.config.size)
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
        ):  # which want copies of what was made under the former
            state = {
                name: tensor.detach().to(torch.float, copy=True)
                for name, tensor in self.state_dict().items()
            }
            start, std = image_emb.detach().to(torch.float, copy=True), state["emb_std"]
            colours, share = pooled.detach().clone().split([3, 1], dim=1)
            colours = colours / share.clamp(min=1e-3)
            way = torch.zeros_like(start, requires_grad=True)
            adam = torch.optim.Adam([way], lr=AGREE_LR)
            for _ in range(steps):
                layout = torch.func.functional_call(self, state, (start + way * std,))
                error = ((layout - colours).square() * share).flatten(1).mean(dim=1)  # B
                (way.grad,) = torch.autograd.grad(
                    (weight * error + way.square().mean(dim=1)).sum(), way
                )
                adam.step()
            return (start + way.detach() * std).to(image_emb.dtype)
