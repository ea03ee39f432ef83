"""The decoder and the upsamplers of DALLE2-pytorch, whose weights laion published: `CrossAttentionUNet` conditioned.

The image embedding is told to the time embedding and as tokens, the caption's states as tokens in the middle only.
"""

# B batch, D CLIP embedding width, N token slots, C token width, T width of the time embedding, s size

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from unclip.models.published.cross_attention_unet import (
    CrossAttentionUNet,
    CrossAttentionUNetConfig,
)
from unclip.models.published.relative_prior import fitting
from unclip.types import Rows, TextEncoding


@dataclass(frozen=True)
class CrossAttentionDecoderConfig:
    unet: CrossAttentionUNetConfig
    image_size: int
    emb_dim: int  # D
    text_width: int | None  # of CLIP's text states; None = the caption is not read
    image_tokens: int = 4  # made of the image embedding
    text_slots: int = 256  # a caption's tokens and, in the slots that it leaves free, learned ones
    prediction: Literal["eps", "x0", "v"] = "eps"
    learned_variance: bool = False
    null_text: Literal["learned"] = "learned"

    def __post_init__(self) -> None:
        check_channels(self.unet, self.image_size, 3, self.learned_variance)
        for name in ("emb_dim", "image_tokens", "text_slots"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")


@dataclass(frozen=True)
class CrossAttentionUpsamplerConfig:
    unet: CrossAttentionUNetConfig
    low_size: int
    high_size: int
    prediction: Literal["eps", "x0", "v"] = "eps"
    learned_variance: bool = False

    def __post_init__(self) -> None:
        check_channels(self.unet, self.high_size, 6, self.learned_variance)
        if self.low_size < 1 or self.high_size % self.low_size:
            raise ValueError(
                f"low_size is {self.low_size}; it must divide high_size = {self.high_size}"
            )


def check_channels(
    unet: CrossAttentionUNetConfig, size: int, channels_in: int, learned_variance: bool
) -> None:
    channels_out = 6 if learned_variance else 3
    if (unet.in_channels, unet.out_channels) != (channels_in, channels_out):
        raise ValueError(
            f"unet has {unet.in_channels} channels in and {unet.out_channels} out; expected {channels_in} in and, with "
            f"learned_variance={learned_variance}, {channels_out} out"
        )
    if size < 1 or size % unet.size_divisor:
        raise ValueError(
            f"the picture's size is {size}; expected a multiple of {unet.size_divisor}"
        )


@dataclass(frozen=True)
class TokenContext(Rows):
    """All that the decoder needs to know of image embedding and caption; the same at every step."""

    time_shift: torch.Tensor  # (B, T)
    image_tokens: torch.Tensor  # (B, image_tokens, C)
    text_tokens: torch.Tensor | None  # (B, N, C); None for a decoder that reads no captions

    def __len__(self) -> int:
        return len(self.time_shift)

    def _map(self, f: Callable[[torch.Tensor], torch.Tensor]) -> TokenContext:
        text = None if self.text_tokens is None else f(self.text_tokens)
        return TokenContext(f(self.time_shift), f(self.image_tokens), text)

    @classmethod
    def cat(cls, parts: Sequence[TokenContext]) -> TokenContext:
        """Rows of all parts one after the other."""
        texts = [part.text_tokens for part in parts if part.text_tokens is not None]
        shifts, images = (
            [getattr(part, name) for part in parts] for name in ("time_shift", "image_tokens")
        )
        return cls(torch.cat(shifts), torch.cat(images), torch.cat(texts) if texts else None)


class CrossAttentionDecoder(nn.Module):
    """A U-Net that sees the image embedding in its time embedding and, like the caption, as tokens."""

    def __init__(self, config: CrossAttentionDecoderConfig) -> None:
        super().__init__()
        self.config = config
        C, T = config.unet.token_dim, config.unet.time_width
        self.image_to_time = nn.Linear(config.emb_dim, T)
        self.image_to_tokens = nn.Linear(config.emb_dim, config.image_tokens * C)
        self.null_image_time = nn.Parameter(torch.randn(T))
        self.null_image_tokens = nn.Parameter(torch.randn(config.image_tokens, C))
        if config.text_width is not None:
            self.text_to_tokens = nn.Linear(config.text_width, C)
            self.null_text_tokens = nn.Parameter(torch.randn(config.text_slots, C))
        self.unet = CrossAttentionUNet(config.unet)

    def condition(
        self,
        image_emb: torch.Tensor,
        text: TextEncoding,
        drop_image: torch.Tensor | None = None,
        drop_text: torch.Tensor | None = None,
    ) -> TokenContext:
        """Image embeddings (B, D) of any length and captions -> context; `drop_*` (B,) bool marks the nulls."""
        # In training every embedding was a unit vector.
        image_emb = F.normalize(image_emb.to(self.null_image_time.dtype), dim=-1)
        time_shift = F.gelu(self.image_to_time(image_emb))  # B T
        tokens = rearrange(
            self.image_to_tokens(image_emb), "b (n c) -> b n c", n=self.config.image_tokens
        )
        if drop_image is not None:
            time_shift = torch.where(drop_image[:, None], self.null_image_time, time_shift)
            tokens = torch.where(drop_image[:, None, None], self.null_image_tokens, tokens)
        return TokenContext(time_shift, tokens, self._read(text, drop_text))

    def _read(self, text: TextEncoding, drop: torch.Tensor | None) -> torch.Tensor | None:
        """Captions -> (B, N, C), with learned tokens in the slots without text."""
        if self.config.text_width is None:
            return None
        text = fitting(text, self.config.text_slots, "decoder")
        free = self.config.text_slots - text.mask.shape[1]
        mask = text.mask if drop is None else text.mask & ~drop[:, None]
        tokens = F.pad(
            self.text_to_tokens(text.states.to(self.null_text_tokens.dtype)), (0, 0, 0, free)
        )
        return torch.where(F.pad(mask, (0, free))[..., None], tokens, self.null_text_tokens)

    def denoise(self, x_t: torch.Tensor, t: torch.Tensor, context: TokenContext) -> torch.Tensor:
        """(B, 3, s, s), (B,) -> (B, 3 or 6, s, s): the prediction, then the variance if it is learned."""
        return self.unet(x_t, t, context.time_shift, context.image_tokens, context.text_tokens)

    def forward(
        self,
        x_t: torch.Tensor,
        t: torch.Tensor,
        image_emb: torch.Tensor,
        text: TextEncoding,
        drop_image: torch.Tensor | None = None,
        drop_text: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.denoise(x_t, t, self.condition(image_emb, text, drop_image, drop_text))


class CrossAttentionUpsampler(nn.Module):
    """A U-Net over [x_t ; enlarged low-resolution picture] that is told nothing else."""

    def __init__(self, config: CrossAttentionUpsamplerConfig) -> None:
        super().__init__()
        self.config = config
        self.unet = CrossAttentionUNet(config.unet)

    def prepare(self, low_res: torch.Tensor) -> torch.Tensor:
        """Enlarged by high_size / low_size, each pixel repeated: (B, 3, s, s) -> (B, 3, S, S)."""
        return F.interpolate(
            low_res, scale_factor=self.config.high_size // self.config.low_size, mode="nearest"
        )

    def denoise(
        self, x_t: torch.Tensor, t: torch.Tensor, low_res: torch.Tensor, last: bool = False
    ) -> torch.Tensor:
        """(B, 3, S, S), (B,), low_res in [-1, 1] at low or high size -> (B, 3 or 6, S, S)."""
        if low_res.shape[2:] != x_t.shape[2:]:
            low_res = self.prepare(low_res)
        return self.unet(torch.cat([x_t, low_res.to(x_t.dtype)], dim=1), t)

    forward = denoise
