"""Decoder and upsampler of DALLE2-pytorch on a `CrossAttentionUNet`; LAION published weights.

The image embedding enters through the time embedding and as tokens, the caption's states as
tokens of the middle only.
"""

# B batch, D CLIP embedding width, N token slots, C token width, T width of the time embedding,
# s image size

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from unclip.config import PositiveInt, check_multiple, config
from unclip.models.layers import (
    Denoiser,
    DenoiserCache,
    Timestep,
    normal_parameter,
    per_row,
    replace_rows,
)
from unclip.models.published.cross_attention_unet import (
    CrossAttentionUNet,
    CrossAttentionUNetConfig,
)
from unclip.models.published.relative_prior import fit_text
from unclip.types import Rows, TextEncoding


@config
class CrossAttentionDecoderConfig:
    unet: CrossAttentionUNetConfig
    image_size: PositiveInt
    emb_dim: PositiveInt  # D
    text_width: int | None  # of CLIP's text states; None = no captions
    image_tokens: PositiveInt = 4  # number of tokens made of the image embedding
    text_slots: PositiveInt = 256  # a caption's tokens; unused slots hold learned tokens
    prediction: Literal["eps", "x0", "v"] = "eps"
    learned_variance: bool = False
    null_text: Literal["learned"] = "learned"

    def __post_init__(self) -> None:
        size = self.image_size
        self.unet.check("unet", {"x_t": 3}, self.learned_variance, image_size=size)


@config
class CrossAttentionUpsamplerConfig:
    unet: CrossAttentionUNetConfig
    low_size: PositiveInt
    high_size: PositiveInt
    prediction: Literal["eps", "x0", "v"] = "eps"
    learned_variance: bool = False

    def __post_init__(self) -> None:
        inputs, size = {"x_t": 3, "low_res": 3}, self.high_size
        self.unet.check("unet", inputs, self.learned_variance, high_size=size)
        check_multiple("high_size", size, low_size=self.low_size)


@dataclass(frozen=True)
class TokenContext(Rows):
    """The conditioning of a decoder, the same at every step."""

    time_shift: Tensor  # (B, T)
    image_tokens: Tensor  # (B, image_tokens, C)
    text_tokens: Tensor | None  # (B, N, C); None without captions


class CrossAttentionDecoder(Denoiser):
    """U-Net with the image embedding in its time embedding and, like the caption, as tokens."""

    def __init__(self, config: CrossAttentionDecoderConfig) -> None:
        super().__init__()
        self.config = config
        C, T = config.unet.token_dim, config.unet.time_width
        self.image_to_time = nn.Linear(config.emb_dim, T)
        self.image_to_tokens = nn.Linear(config.emb_dim, config.image_tokens * C)
        self.null_image_time = normal_parameter(T)
        self.null_image_tokens = normal_parameter(config.image_tokens, C)
        if config.text_width is not None:
            self.text_to_tokens = nn.Linear(config.text_width, C)
            self.null_text_tokens = normal_parameter(config.text_slots, C)
        self.unet = CrossAttentionUNet(config.unet)

    def condition(
        self,
        image_emb: Tensor,
        text: TextEncoding,
        drop_image: Tensor | None = None,
        drop_text: Tensor | None = None,
    ) -> TokenContext:
        """Compute the context of image embeddings (B, D) and captions.

        The nulls replace rows where `drop_image` or `drop_text` (B,) bool is True.
        """
        # Trained on unit vectors.
        image_emb = F.normalize(image_emb.to(self.null_image_time.dtype), dim=-1)
        time_shift = F.gelu(self.image_to_time(image_emb))  # B T
        n = self.config.image_tokens
        tokens = rearrange(self.image_to_tokens(image_emb), "b (n c) -> b n c", n=n)
        time_shift = replace_rows(time_shift, drop_image, self.null_image_time)
        tokens = replace_rows(tokens, drop_image, self.null_image_tokens)
        return TokenContext(time_shift, tokens, self._encode_text(text, drop_text))

    def _encode_text(self, text: TextEncoding, drop: Tensor | None) -> Tensor | None:
        """Return the caption's tokens (B, N, C), with learned tokens in unused slots."""
        if self.config.text_width is None:
            return None
        text = fit_text(text, self.config.text_slots, "decoder")
        free = self.config.text_slots - text.mask.shape[1]
        mask = text.mask if drop is None else text.mask & ~drop[:, None]
        tokens = self.text_to_tokens(text.states.to(self.null_text_tokens.dtype))
        tokens = F.pad(tokens, (0, 0, 0, free))
        return torch.where(F.pad(mask, (0, free))[..., None], tokens, self.null_text_tokens)

    def denoise(
        self, x_t: Tensor, t: Timestep, context: TokenContext, cache: DenoiserCache | None = None
    ) -> Tensor:
        """Predict from x_t (B, 3, s, s) at t, (B,) or one number -> (B, 3 or 6, s, s).

        The cache is not used.
        """
        tokens, text = context.image_tokens, context.text_tokens
        return self.unet(x_t, per_row(t, x_t), context.time_shift, tokens, text)


class CrossAttentionUpsampler(nn.Module):
    """U-Net over [x_t ; enlarged small image] without any other conditioning."""

    def __init__(self, config: CrossAttentionUpsamplerConfig) -> None:
        super().__init__()
        self.config = config
        self.unet = CrossAttentionUNet(config.unet)

    def condition(self, low_res: Tensor) -> Tensor:
        """Repeat pixels high_size / low_size times: (B, 3, s, s) -> (B, 3, S, S)."""
        factor = self.config.high_size // self.config.low_size
        return F.interpolate(low_res, scale_factor=factor, mode="nearest")

    def denoise(
        self, x_t: Tensor, t: Timestep, context: Tensor, cache: DenoiserCache | None = None
    ) -> Tensor:
        """Predict from x_t (B, 3, S, S) at t, (B,) or one number -> (B, 3 or 6, S, S).

        context: the small image in [-1, 1], enlarged by `condition` or not. The cache is not used.
        """
        if context.shape[2:] != x_t.shape[2:]:
            context = self.condition(context)
        return self.unet(torch.cat([x_t, context.to(x_t.dtype)], dim=1), per_row(t, x_t))

    forward = denoise
