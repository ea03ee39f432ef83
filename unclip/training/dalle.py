"""The loss of DALL-E's transformer on captions and image codes, precomputed or encoded per step.

A batch has "caption", and "codes" (B, h, w) or "image" (B, 3, S, S) in [-1, 1].
"""

# B batch, L text tokens, h w grid of codes, S image size

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.config import DropRate, ProperFraction, config
from unclip.data.loader import Batch
from unclip.models.codecs.codec import ImageCodec
from unclip.models.dalle.transformer import DALLE
from unclip.tokenizer import BPETokenizer


@config
class DALLELossConfig:
    text_weight: ProperFraction = 0.125  # the image's loss has the rest (2102.12092, 2.2)
    drop_text: DropRate = 0.1  # probability of the null caption, for classifier-free guidance
    bpe_dropout: DropRate = 0.1  # probability of skipping a merge, in training (2102.12092, B.2)


class DALLELoss:
    """Cross-entropies of text and codes in nats per token, each over its tokens (2102.12092, 2.2).

    The text's loss excludes dropped captions: the null is not a text to predict. Eval mode drops
    neither captions nor merges.
    """

    def __init__(
        self, dalle: DALLE, tokenizer: BPETokenizer, codec: ImageCodec, config: DALLELossConfig
    ) -> None:
        self.dalle, self.tokenizer, self.codec, self.config = dalle, tokenizer, codec, config

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        codes, training = image_codes(self.codec, batch), self.dalle.training  # (B, h, w)
        ids, mask = self.tokenizer(batch["caption"], self.config.bpe_dropout if training else 0.0)
        drop = torch.rand(len(ids)) < (self.config.drop_text if training else 0.0)  # (B,)
        tokens = self.dalle.tokens(ids, mask, drop)  # (B, L)
        logits = model(tokens, codes)
        used = ~drop.to(tokens.device)
        text_logits = logits.text.float().flatten(0, 1)
        text = F.cross_entropy(text_logits, tokens.flatten(), reduction="none").view_as(tokens)
        text = (text.mean(dim=1) * used).sum() / used.sum().clamp(min=1)
        image = F.cross_entropy(logits.codes.float().flatten(0, 1), codes.flatten())
        loss = self.config.text_weight * text + (1 - self.config.text_weight) * image
        return {"loss": loss, "text": text.detach(), "image": image.detach()}


def image_codes(codec: ImageCodec, batch: Batch) -> Tensor:
    """Return the codes (B, h, w) of a batch on the codec's device, without gradient."""
    device = next(codec.parameters()).device
    if "codes" in batch:
        return batch["codes"].to(device)
    return codec.encode(batch["image"].to(device))
