"""Training of CLIP's text tower only, on fixed image embeddings (LiT, 2111.07991).

CLIP learns new wordings of captions, while networks that were trained on its image embeddings
remain valid. These also read its text encodings; the encodings of captions that the tower already
understood are therefore kept close to their old values.
"""

# B batch, L text tokens, D CLIP embedding width, W text width

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from unclip.clip import CLIP, contrastive_loss
from unclip.config import NonNegative, config
from unclip.data.loader import Batch
from unclip.embeddings import normalise
from unclip.training.losses import image_embeddings
from unclip.types import TextEncoding, full_precision


@config
class TextTowerConfig:
    base: str  # folder of a trained CLIP, with which the training starts
    keep: NonNegative = 1.0  # weight of the distance to its text encodings


class TextTower(nn.Module):
    """A CLIP with a trainable text tower and a frozen image tower; `save` writes both."""

    def __init__(self, clip: CLIP) -> None:
        super().__init__()
        self.clip = clip
        for name, parameter in clip.model.named_parameters():
            parameter.requires_grad_(not name.startswith(("visual.", "logit_")))

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the text tower; the image tower stays in eval mode."""
        super().train(mode)
        if self.clip.model.visual is not None:
            self.clip.model.visual.eval()
        return self

    def forward(self, ids: Tensor, mask: Tensor) -> TextEncoding:
        return self.clip.encode_tokens(ids, mask)

    def save(self, folder: Path) -> None:
        """Write CLIP's folder."""
        self.clip.save_pretrained(folder)


@dataclass(eq=False)
class TextTowerLoss:
    """Symmetric InfoNCE, and the distance to old encodings of captions that `base` matched."""

    network: TextTower
    base: CLIP
    config: TextTowerConfig

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        ids, mask = self.base.tokenizer(batch["caption"])
        with torch.no_grad():
            image_emb = normalise(image_embeddings(self.base, batch))
            former = self.base.encode_tokens(ids, mask)
            scale = self.base.logit_scale.float().exp()
        text = model(ids, mask)
        contrastive = contrastive_loss(image_emb, normalise(text.emb.float()), scale)
        distance = self._distance(text, former, image_emb)
        terms = {"contrastive": contrastive.detach(), "distance": distance.detach()}
        return {"loss": contrastive + self.config.keep * distance, **terms}

    @staticmethod
    def _distance(text: TextEncoding, former: TextEncoding, image_emb: Tensor) -> Tensor:
        """Return the squared distance to old embeddings and states, for matched captions."""
        text_emb, former_emb = normalise(text.emb.float()), normalise(former.emb.float())
        with full_precision(image_emb):  # a rounding error must not decide which image is nearest
            nearest = (former_emb @ image_emb.T).argmax(dim=1)
        found = nearest == torch.arange(len(nearest), device=nearest.device)  # (B,)
        if not found.any():
            return text_emb.new_zeros(())
        of_emb = (text_emb - former_emb)[found].square().sum(dim=1).mean()
        real = former.mask & found[:, None]  # (B, L)
        return of_emb + F.mse_loss(text.states.float()[real], former.states.float()[real])
