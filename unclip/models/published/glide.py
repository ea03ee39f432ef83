"""GLIDE (2112.10741): a U-Net conditioned on a caption that generates, upsamples or inpaints."""

# B batch, L text slots, W text width, s image size

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.config import PositiveInt, check_multiple, config
from unclip.models.layers import (
    DenoiserCache,
    ModuleList,
    Timestep,
    TransformerBlock,
    normal_parameter,
)
from unclip.models.unclip.decoder import ContextUNet, DecoderContext, TextTransformer
from unclip.models.unet import UNet, UNetConfig


@config
class GLIDEConfig:
    unet: UNetConfig
    image_size: PositiveInt
    text: TextTransformer
    low_size: PositiveInt | None = None  # of the images to upsample; None = not an upsampler
    inpaints: bool = False  # known pixels and their mask are concatenated to x_t

    def __post_init__(self) -> None:
        size, context_dim = self.image_size, self.unet.context_dim
        inputs = {"x_t": 3, "low_res": 3 if self.low_size else 0, "known": 4 * self.inpaints}
        self.unet.check("unet", inputs, True, image_size=size)
        check_multiple("image_size", size, low_size=self.low_size or 1)
        if context_dim != self.text.width:
            raise ValueError(
                f"unet.context_dim is {context_dim}; expected text.width = {self.text.width}"
            )


class PaddedTextTransformer(nn.Module):
    """Bidirectional transformer over all L slots; unused slots hold learned embeddings."""

    def __init__(self, config: TextTransformer) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.width)
        self.positions = normal_parameter(config.context_length, config.width, std=0.02)
        self.padding = normal_parameter(config.context_length, config.width, std=0.02)
        self.blocks = ModuleList[TransformerBlock](
            TransformerBlock(config.width, config.heads) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width)
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Encode token ids and the mask of real tokens, (B, L) each -> (B, L, W)."""
        x = torch.where(mask[..., None], self.tokens(ids) + self.positions, self.padding)
        visible = torch.ones_like(mask)[:, None, None]
        for block in self.blocks:
            x = block(x, *block.project(x), visible)
        return self.norm(x)


class GLIDE(ContextUNet):
    """The caption enters through the time embedding and, slot by slot, through attention."""

    def __init__(self, config: GLIDEConfig) -> None:
        super().__init__()
        self.config = config
        self.text = PaddedTextTransformer(config.text)
        self.text_to_time = nn.Linear(config.text.width, config.unet.time_width)
        self.unet = UNet(config.unet)

    def condition(
        self,
        ids: Tensor,
        mask: Tensor,
        low_res: Tensor | None = None,
        known: Tensor | None = None,
        size: tuple[int, int] | None = None,
    ) -> DecoderContext:
        """Compute the context of token ids and the mask of real tokens, (B, L) each.

        The null is a caption without tokens. low_res: (B, 3, ...) in [-1, 1] of any size, for
        upsamplers. known: (B, 4, s, s) from `decoder.masked_image`, for inpainting networks;
        None = nothing is known. size: of x_t, by default image_size.
        """
        config = self.config
        if ids.shape[1] != config.text.context_length:
            raise ValueError(
                f"the text has {ids.shape[1]} tokens; "
                f"this network takes {config.text.context_length}, padding included"
            )
        if (low_res is None) != (config.low_size is None):
            state = "missing" if low_res is None else "not expected"
            raise ValueError(f"low_res is {state}; low_size of this network is {config.low_size}")
        if known is not None and not config.inpaints:
            raise ValueError("known was given, but this network does not inpaint")
        x = self.text(ids, mask)  # B L W
        size = size or (config.image_size, config.image_size)
        channels = []
        if config.inpaints:
            channels.append(x.new_zeros(len(x), 4, *size) if known is None else known.to(x))
        if low_res is not None:
            channels.append(F.interpolate(low_res.to(x), size, mode="bilinear"))
        return DecoderContext(
            self.text_to_time(x[:, -1]),
            self.unet.project_context(x, torch.ones_like(mask)),
            torch.cat(channels, dim=1) if channels else None,
        )

    def denoise(
        self, x_t: Tensor, t: Timestep, context: DecoderContext, cache: DenoiserCache | None = None
    ) -> Tensor:
        """Call `ContextUNet.denoise` without the cache, to keep the exact images of a seed."""
        return super().denoise(x_t, t, context)

    def forward(self, x_t: Tensor, t: Tensor, *inputs: Any, **options: Any) -> Tensor:
        return super().forward(x_t, t, *inputs, size=x_t.shape[2:], **options)
