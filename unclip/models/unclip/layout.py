"""The layout network: a small blurred image predicted from its CLIP image embedding by an MLP.

A decoder may get it as extra channels at every step, as DiffuseVAE (2201.00308) gives its U-Net
the output of a VAE. Regression learns in minutes what an embedding says about coarse shapes; the
diffusion model adds the rest.
"""

# B batch, D CLIP embedding width, s image size

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.models.unclip.prior import EmbeddingStats

GUIDE_LR = 0.05  # step size of `guide_embedding`, in standard deviations of an embedding


@dataclass(frozen=True)
class LayoutConfig:
    emb_dim: int  # D, of CLIP's embeddings
    size: int = 16  # side of the output image
    width: int = 768
    depth: int = 3  # hidden layers

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")


class _Linear(nn.Linear):
    """A linear layer that is never packed or quantised: `guide_embedding` needs gradients."""


class Layout(EmbeddingStats):
    """Mean of all images with an embedding: (B, D) -> (B, 3, size, size), about in [-1, 1]."""

    def __init__(self, config: LayoutConfig) -> None:
        super().__init__(config.emb_dim)
        self.config = config
        widths = [config.emb_dim, *[config.width] * config.depth]
        layers: list[nn.Module] = []
        for c_in, c_out in zip(widths, widths[1:], strict=False):
            layers += [_Linear(c_in, c_out), nn.SiLU()]
        self.mlp = nn.Sequential(*layers, _Linear(config.width, 3 * config.size**2))

    def forward(self, image_emb: Tensor) -> Tensor:
        x = self.mlp(self.normalize(image_emb.float()).to(image_emb.dtype))
        return x.unflatten(1, (3, self.config.size, self.config.size))

    def guide_embedding(
        self, image_emb: Tensor, known: Tensor, weight: float | Tensor, steps: int = 30
    ) -> Tensor:
        """Move embeddings (B, D) so that their layouts match the known pixels of an image.

        Minimises weight * (squared error where the image is known) + (squared distance from
        `image_emb`, in standard deviations). known: (B, 4, s, s), see `decoder.masked_image`.
        weight: one number or (B,).
        """
        pooled = F.adaptive_avg_pool2d(known.float(), self.config.size)
        # Gradients need copies of tensors that were made in inference mode.
        with torch.inference_mode(False), torch.enable_grad():
            state = {
                name: tensor.detach().to(torch.float, copy=True)
                for name, tensor in self.state_dict().items()
            }
            start, std = image_emb.detach().to(torch.float, copy=True), state["emb_std"]
            colours, share = pooled.detach().clone().split([3, 1], dim=1)
            colours = colours / share.clamp(min=1e-3)
            offset = torch.zeros_like(start, requires_grad=True)
            adam = torch.optim.Adam([offset], lr=GUIDE_LR)
            for _ in range(steps):
                layout = torch.func.functional_call(self, state, (start + offset * std,))
                error = ((layout - colours).square() * share).flatten(1).mean(dim=1)  # B
                loss = (weight * error + offset.square().mean(dim=1)).sum()
                (offset.grad,) = torch.autograd.grad(loss, offset)
                adam.step()
            return (start + offset.detach() * std).to(image_emb.dtype)
