"""What DALL-E's transformer is trained on: captions and image codes, precomputed or encoded at each step."""

# B batch, L text tokens, N = h * w codes

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.models.codecs.codec import ImageCodec
from unclip.models.dalle.transformer import DALLE
from unclip.tokenizer import BPETokenizer

Batch = dict[str, Any]  # "caption", and "codes" (B, h, w) or "image" (B, 3, S, S) in [-1, 1]


@dataclass(frozen=True)
class DALLELossConfig:
    text_weight: float = 0.125  # of the text's loss; the picture's has the rest (2102.12092, 2.2)
    drop_text: float = (
        0.1  # how often the null stands in for a caption, so that guidance has a second half
    )
    bpe_dropout: float = 0.1  # of merges, in training (2102.12092, B.2)

    def __post_init__(self) -> None:
        for name in ("text_weight", "drop_text", "bpe_dropout"):
            if not 0 <= (p := getattr(self, name)) < 1:
                raise ValueError(f"{name} is {p}; expected a fraction in [0, 1)")


class DALLELoss:
    """Cross-entropies of text and codes in nats a token, each over its own tokens (2102.12092, 2.2).

    The null is not learned as a text: only rows with their caption count for the text's loss. In eval mode no caption
    is dropped, nor any merge.
    """

    def __init__(
        self, dalle: DALLE, tokenizer: BPETokenizer, codec: ImageCodec, config: DALLELossConfig
    ) -> None:
        self.dalle, self.tokenizer, self.codec, self.config = dalle, tokenizer, codec, config

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        codes, training = image_codes(self.codec, batch), self.dalle.training
        ids, mask = self.tokenizer(batch["caption"], self.config.bpe_dropout if training else 0.0)
        drop = torch.rand(len(ids)) < (self.config.drop_text if training else 0.0)
        tokens = self.dalle.tokens(ids, mask, drop)  # B L
        logits = model(tokens, codes)
        told = ~drop.to(tokens.device)
        of_text = F.cross_entropy(
            logits.text.float().flatten(0, 1), tokens.flatten(), reduction="none"
        )
        text = (of_text.view_as(tokens).mean(dim=1) * told).sum() / told.sum().clamp(min=1)
        image = F.cross_entropy(logits.codes.float().flatten(0, 1), codes.flatten())
        loss = self.config.text_weight * text + (1 - self.config.text_weight) * image
        return {"loss": loss, "text": text.detach(), "image": image.detach()}


def image_codes(codec: ImageCodec, batch: Batch) -> Tensor:
    """Codes (B, h, w) of a batch on the codec's device; no gradient reaches the codec."""
    if "codes" in batch:
        return batch["codes"].to(next(codec.parameters()).device)
    return codec.encode(batch["image"].to(next(codec.parameters()).device))
