"""GLIDE (2112.10741): a U-Net that draws from a caption alone; others of its kind enlarge, or fill in what is lost."""

# B batch, L text slots, W text width, s picture size

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from unclip.models.layers import TransformerBlock
from unclip.models.unclip.decoder import DecoderContext, TextTransformer
from unclip.models.unet import UNet, UNetConfig


@dataclass(frozen=True)
class GLIDEConfig:
    unet: UNetConfig
    image_size: int
    text: TextTransformer
    low_size: int | None = (
        None  # of the pictures that it enlarges; None = it draws from noise alone
    )
    inpaints: bool = False  # it is told which pixels are known, and what they are

    def __post_init__(self) -> None:
        channels = 3 + (3 if self.low_size else 0) + (4 if self.inpaints else 0)
        if self.unet.in_channels != channels or self.unet.out_channels != 6:
            raise ValueError(
                f"unet has {self.unet.in_channels} channels in and {self.unet.out_channels} out; "
                f"with low_size={self.low_size} and inpaints={self.inpaints} it needs {channels} and 6"
            )
        if self.unet.context_dim != self.text.width:
            raise ValueError(
                f"unet.context_dim is {self.unet.context_dim}; expected text.width = {self.text.width}"
            )
        if self.image_size < 1 or self.image_size % self.unet.size_divisor:
            raise ValueError(
                f"image_size is {self.image_size}; expected a multiple of {self.unet.size_divisor}"
            )
        if self.low_size is not None and (self.low_size < 1 or self.image_size % self.low_size):
            raise ValueError(
                f"low_size is {self.low_size}; it must divide image_size = {self.image_size}"
            )


class PaddedTextTransformer(nn.Module):
    """A bidirectional transformer over all L slots; those that a caption leaves free hold learned embeddings."""

    def __init__(self, config: TextTransformer) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Parameter(torch.randn(config.context_length, config.width) * 0.02)
        self.padding = nn.Parameter(torch.randn(config.context_length, config.width) * 0.02)
        self.blocks = nn.ModuleList(
            TransformerBlock(config.width, config.heads) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width)
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Token ids and which of them are real, (B, L) each -> (B, L, W)."""
        x = torch.where(mask[..., None], self.tokens(ids) + self.positions, self.padding)
        seen = torch.ones_like(mask)[:, None, None]
        for block in self.blocks:
            x = block(x, *block.project(x), seen)
        return self.norm(x)


class GLIDE(nn.Module):
    """The caption reaches the U-Net in its time embedding and, slot by slot, in its attention."""

    def __init__(self, config: GLIDEConfig) -> None:
        super().__init__()
        self.config = config
        self.text = PaddedTextTransformer(config.text)
        self.text_to_time = nn.Linear(config.text.width, config.unet.time_width)
        self.unet = UNet(config.unet)

    def condition(self, ids: torch.Tensor, mask: torch.Tensor) -> DecoderContext:
        """Token ids and which of them are real, (B, L) each -> context. The null is a caption without any token."""
        slots = self.config.text.context_length
        if ids.shape[1] != slots:
            raise ValueError(
                f"the text has {ids.shape[1]} tokens; this network takes {slots}, pads included"
            )
        x = self.text(ids, mask)  # B L W
        return DecoderContext(
            self.text_to_time(x[:, -1]), self.unet.project_context(x, torch.ones_like(mask))
        )

    def denoise(
        self,
        x_t: torch.Tensor,
        t: torch.Tensor,
        context: DecoderContext,
        low_res: torch.Tensor | None = None,
        known: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, 3, s, s), (B,) -> (B, 6, s, s): the noise, then the variance.

        low_res: (B, 3, ...) in [-1, 1] of any size, for a network that enlarges. known: (B, 4, s, s), for one that
        inpaints, a picture where its fourth channel is 1, and 0 elsewhere; None = nothing is known.
        """
        if (low_res is None) != (self.config.low_size is None):
            state = "missing" if low_res is None else "not expected"
            raise ValueError(
                f"low_res is {state}; low_size of this network is {self.config.low_size}"
            )
        if known is not None and not self.config.inpaints:
            raise ValueError("this network does not inpaint: it can't be told what is known")
        channels = [x_t]
        if self.config.inpaints:
            channels.append(
                x_t.new_zeros(len(x_t), 4, *x_t.shape[2:]) if known is None else known.to(x_t.dtype)
            )
        if low_res is not None:
            channels.append(F.interpolate(low_res.to(x_t.dtype), x_t.shape[2:], mode="bilinear"))
        time = self.unet.time_embedding(t) + context.time_shift
        return self.unet(torch.cat(channels, dim=1), self.unet.modulation(time), context.kv)[0]

    def forward(
        self,
        x_t: torch.Tensor,
        t: torch.Tensor,
        ids: torch.Tensor,
        mask: torch.Tensor,
        low_res: torch.Tensor | None = None,
        known: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.denoise(x_t, t, self.condition(ids, mask), low_res, known)
