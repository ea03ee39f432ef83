"""DALL-E's bound on the joint likelihood of images and captions (2102.12092, equation 1)."""

# B batch, H W image, h w grid of codes, K codes of the codec

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unclip.models.codecs.codec import ImageCodec
from unclip.models.dalle.transformer import DALLE

TERMS = ("pixels", "codes", "text", "entropy")


@dataclass(frozen=True)
class JointBound:
    """Terms of ln p(x, y) >= E_q(z|x) [ln p(x|z) + ln p(z|y) + ln p(y) - ln q(z|x)], in nats."""

    pixels: Tensor  # (B,) ln p(x|z), a density over pixels in [0, 1]
    codes: Tensor  # (B,) ln p(z|y)
    text: Tensor  # (B,) ln p(y), padding included
    entropy: Tensor  # (B,) of q(z|x)
    dimensions: int  # values of an image, 3 H W

    @staticmethod
    def cat(parts: Sequence[JointBound]) -> JointBound:
        """Concatenate bounds of images of one size."""
        terms = {name: torch.cat([getattr(part, name) for part in parts]) for name in TERMS}
        return JointBound(**terms, dimensions=parts[0].dimensions)

    @property
    def nats(self) -> Tensor:
        """The bound on ln p(x, y): (B,)."""
        return self.pixels + self.codes + self.text + self.entropy

    @property
    def bits_per_dim(self) -> Tensor:
        """Upper bound on -ln p(x, y) in bits per value: (B,). For 8-bit pixel values, add 8."""
        return -self.nats / (self.dimensions * math.log(2))


@torch.no_grad()
def joint_bound(
    dalle: DALLE,
    codec: ImageCodec,
    images: Tensor,
    tokens: Tensor,
    generator: torch.Generator | None = None,
) -> JointBound:
    """Compute the bound for images (B, 3, H, W) in [-1, 1] and text (B, L) from one sample of z."""
    posterior = torch.distributions.Categorical(logits=codec.logits(images))  # B h w
    p = posterior.probs.flatten(0, 2)  # B*h*w K
    codes = torch.multinomial(p, 1, generator=generator).view(posterior.batch_shape)  # B h w
    text_log_p, code_log_p = dalle.log_likelihood(tokens, codes)
    return JointBound(
        pixels=codec.log_likelihood(images, codes),
        codes=code_log_p.sum(dim=1),
        text=text_log_p.sum(dim=1),
        entropy=posterior.entropy().sum(dim=(1, 2)),
        dimensions=images[0].numel(),
    )
