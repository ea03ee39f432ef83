"""DALL-E's bound on the joint likelihood of pictures and captions (2102.12092, equation 1)."""

# B batch, H W picture, h w grid of codes, K codes of the codec

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
    """ln p(x, y) >= E_q(z|x) [ln p(x|z) + ln p(z|y) + ln p(y) - ln q(z|x)]: its terms in nats, each (B,)."""

    pixels: Tensor  # ln p(x|z), a density over pixels in [0, 1]
    codes: Tensor  # ln p(z|y)
    text: Tensor  # ln p(y), padding included
    entropy: Tensor  # of q(z|x)
    dimensions: int  # values of a picture, 3 H W

    @staticmethod
    def cat(parts: Sequence[JointBound]) -> JointBound:
        """Of pictures of one size, one part after the other."""
        terms = {name: torch.cat([getattr(part, name) for part in parts]) for name in TERMS}
        return JointBound(**terms, dimensions=parts[0].dimensions)

    @property
    def nats(self) -> Tensor:
        """The bound on ln p(x, y): (B,)."""
        return self.pixels + self.codes + self.text + self.entropy

    @property
    def bits_per_dim(self) -> Tensor:
        """Of -ln p(x, y), at most: (B,). For pixels counted in steps of 1 / 256, add 8."""
        return -self.nats / (self.dimensions * math.log(2))


@torch.no_grad()
def joint_bound(
    dalle: DALLE,
    codec: ImageCodec,
    images: Tensor,
    tokens: Tensor,
    generator: torch.Generator | None = None,
) -> JointBound:
    """The bound for pictures (B, 3, H, W) in [-1, 1] and text tokens (B, L), from one draw of z."""
    posterior = torch.distributions.Categorical(logits=codec.logits(images))  # B h w
    p = posterior.probs.flatten(0, 2)  # B*h*w K
    codes = torch.multinomial(p, 1, generator=generator).view(posterior.batch_shape)  # B h w
    ln_text, ln_codes = dalle.log_likelihood(tokens, codes)
    return JointBound(
        pixels=codec.log_likelihood(images, codes),
        codes=ln_codes.sum(dim=1),
        text=ln_text.sum(dim=1),
        entropy=posterior.entropy().sum(dim=(1, 2)),
        dimensions=images[0].numel(),
    )
