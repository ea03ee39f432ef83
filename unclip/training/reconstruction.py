"""CLIP training with a reconstruction head, which predicts a small image from the image embedding.

With the contrastive loss, embeddings distinguish images, but need not describe where things are; a
reconstruction loss adds this. Its target is a small, blurred image, so that images that look alike
have similar embeddings. The head is not part of CLIP (2103.00020) or of the saved model.
"""

# B batch, D CLIP embedding width, s side of the reconstruction

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.clip import CLIP, contrastive_loss
from unclip.config import NonNegative, PositiveInt, config
from unclip.data.loader import Batch


@config
class ReconstructionConfig:
    weight: NonNegative = 10.0  # of the mean squared error, relative to the contrastive loss
    size: PositiveInt = 16  # side of the reconstruction
    width: PositiveInt = 1024  # of the head's hidden layers
    depth: PositiveInt = 2  # hidden layers
    emb_noise: NonNegative = 0.0  # length of noise on the head's input, which has length 1


class ReconstructionHead(nn.Module):
    """MLP from normalised image embeddings (B, D) to images (B, 3, s, s) in about [-1, 1].

    In training, noise of length `emb_noise` is added to the embeddings.
    """

    def __init__(self, emb_dim: int, config: ReconstructionConfig) -> None:
        super().__init__()
        self.config = config
        layers: list[nn.Module] = []
        for c_in, c_out in pairwise([emb_dim, *[config.width] * config.depth]):
            layers += [nn.Linear(c_in, c_out), nn.SiLU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(config.width, 3 * config.size**2))

    def forward(self, image_emb: Tensor) -> Tensor:
        scale = image_emb.shape[1] ** 0.5  # of noise and input: length 1 -> variance 1
        if self.training and self.config.emb_noise:
            noise = torch.randn_like(image_emb) / scale
            image_emb = image_emb + self.config.emb_noise * noise
        size = self.config.size
        return self.mlp(image_emb * scale).unflatten(1, (3, size, size))


class ReconstructingCLIP(nn.Module):
    """CLIP and a reconstruction head, trained as one network; `save` writes CLIP only."""

    def __init__(self, clip: CLIP, config: ReconstructionConfig) -> None:
        super().__init__()
        self.clip, self.head = clip, ReconstructionHead(clip.emb_dim, config)

    def forward(
        self, images: Tensor, ids: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the outputs of CLIP's `forward`, and reconstructions (B, 3, s, s)."""
        image_emb, text_emb, scale = self.clip(images, ids, mask)
        return image_emb, text_emb, scale, self.head(image_emb)

    def save(self, folder: Path) -> None:
        """Write CLIP's folder."""
        self.clip.save_pretrained(folder)


class ReconstructingCLIPLoss:
    """Symmetric InfoNCE, and the mean squared error of the image at the head's size."""

    def __init__(self, network: ReconstructingCLIP) -> None:
        self.clip, self.config = network.clip, network.head.config

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        ids, mask = self.clip.tokenizer(batch["caption"])
        image_emb, text_emb, scale, image = model(batch["image"], ids, mask)
        target = F.adaptive_avg_pool2d(batch["image"].to(image.device), self.config.size)
        contrastive = contrastive_loss(image_emb, text_emb, scale)
        mse = F.mse_loss(image.float(), target)
        terms = {"contrastive": contrastive.detach(), "mse": mse.detach(), "scale": scale.detach()}
        return {"loss": contrastive + self.config.weight * mse, **terms}
