"""The decoder: draws a picture from a CLIP image embedding and a caption (unCLIP 2.1)."""

# B batch, L text tokens, D CLIP embedding width, W text width, N context tokens, s picture size

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from unclip.models.layers import KeyValues, TransformerBlock
from unclip.models.unclip.layout import Layout, LayoutConfig
from unclip.models.unet import UNet, UNetConfig
from unclip.types import TextEncoding


@dataclass(frozen=True)
class ClipStates:
    """The caption is seen through CLIP's text tower (Karlo): Linear and LayerNorm over its states."""

    kind: Literal["clip_states"] = "clip_states"


@dataclass(frozen=True)
class TextTransformer:
    """The caption is read by a bidirectional transformer of the decoder's own (GLIDE, unCLIP)."""

    vocab_size: int
    context_length: int
    width: int
    depth: int
    heads: int
    kind: Literal["transformer"] = "transformer"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context_length", "width", "depth", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"text.{name} is {getattr(self, name)}; expected at least 1")
        if self.width % self.heads:
            raise ValueError(f"text.width is {self.width}; heads = {self.heads} must divide it")


@dataclass(frozen=True)
class DecoderConfig:
    unet: UNetConfig
    image_size: int
    emb_dim: int  # D, of CLIP's embeddings
    text_width: int  # W, of CLIP's text states
    context_tokens: int = 4  # tokens made of the image embedding
    text: ClipStates | TextTransformer = field(default_factory=ClipStates)
    null_text: Literal["learned", "empty_prompt"] = "learned"
    text_emb_in_time: bool = True  # the caption's embedding is added to the time embedding too
    prediction: Literal["eps", "x0", "v"] = "eps"
    learned_variance: bool = False
    layout: LayoutConfig | None = None  # it is shown what the image embedding tells of shapes
    inpaints: bool = False  # it is told which pixels are known, and what they are (GLIDE 2.4)

    def __post_init__(self) -> None:
        channels = (
            3 + (3 if self.layout else 0) + (4 if self.inpaints else 0),
            (6 if self.learned_variance else 3),
        )
        if (self.unet.in_channels, self.unet.out_channels) != channels:
            raise ValueError(
                f"unet has {self.unet.in_channels} channels in and {self.unet.out_channels} out; a decoder with "
                f"{'a' if self.layout else 'no'} layout, inpaints={self.inpaints} and "
                f"learned_variance={self.learned_variance} needs {channels[0]} and {channels[1]}"
            )
        if self.layout and self.layout.emb_dim != self.emb_dim:
            raise ValueError(
                f"layout.emb_dim is {self.layout.emb_dim}; expected emb_dim, {self.emb_dim}"
            )
        if self.unet.context_dim is None:
            raise ValueError(
                "unet.context_dim is not set; the decoder's attention needs the width of its context"
            )
        if self.image_size % self.unet.size_divisor:
            raise ValueError(
                f"image_size is {self.image_size}; expected a multiple of {self.unet.size_divisor}"
            )
        for name in ("image_size", "emb_dim", "text_width", "context_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")


@dataclass(frozen=True)
class DecoderContext:
    """All that the decoder needs to know of image embedding and caption; the same at every step."""

    time_shift: torch.Tensor  # (B, time_dim), added to the time embedding
    kv: KeyValues  # of the N context tokens
    beside: torch.Tensor | None = (
        None  # (B, 3, 4 or 7, s, s), channels beside those of x_t: layout, known part
    )

    def __len__(self) -> int:
        return self.time_shift.shape[0]

    def __getitem__(self, rows: slice | torch.Tensor) -> DecoderContext:
        """Some rows of the batch; `rows` is a slice or an index or mask tensor."""
        return DecoderContext(
            self.time_shift[rows], self.kv[rows], None if self.beside is None else self.beside[rows]
        )

    def repeat_interleave(self, n: int) -> DecoderContext:
        """Each row n times in a row: (B, ...) -> (B * n, ...)."""
        beside = None if self.beside is None else self.beside.repeat_interleave(n, dim=0)
        return DecoderContext(
            self.time_shift.repeat_interleave(n, dim=0), self.kv.repeat_interleave(n), beside
        )

    @classmethod
    def cat(cls, parts: Sequence[DecoderContext]) -> DecoderContext:
        """Rows of all parts one after the other; the shorter contexts are padded to the longest."""
        beside = None if parts[0].beside is None else torch.cat([part.beside for part in parts])
        return cls(
            torch.cat([part.time_shift for part in parts]),
            KeyValues.cat([part.kv for part in parts]),
            beside,
        )


class ClipStatesEncoder(nn.Module):
    """CLIP's text embedding as it is, and its states as context tokens."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.emb_dim = config.emb_dim
        self.text_emb_in_time = config.text_emb_in_time
        self.proj = nn.Linear(config.text_width, config.unet.context_dim)
        self.norm = nn.LayerNorm(config.unet.context_dim)
        if config.null_text == "learned":
            if config.text_emb_in_time:
                self.null_text_emb = nn.Parameter(
                    torch.randn(config.emb_dim) * config.emb_dim**-0.5
                )
            self.null_text_state = nn.Parameter(torch.randn(config.text_width))

    def forward(
        self, text: TextEncoding, drop: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        emb, states, mask = text.emb, text.states, text.mask
        if drop is not None:
            if self.text_emb_in_time:
                emb = torch.where(drop[:, None], self.null_text_emb, emb)
            states = torch.where(drop[:, None, None], self.null_text_state, states)
            mask = torch.where(drop[:, None], first_only(mask), mask)
        return emb, self.norm(self.proj(states)), mask  # B D, B L context_dim, B L


class TextTransformerEncoder(nn.Module):
    """Token ids -> the last token's output, and all outputs as context tokens (GLIDE 3)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        text = config.text
        self.emb_dim = text.width
        self.tokens = nn.Embedding(text.vocab_size, text.width)
        self.positions = nn.Parameter(torch.randn(text.context_length, text.width) * 0.02)
        self.blocks = nn.ModuleList(
            TransformerBlock(text.width, text.heads) for _ in range(text.depth)
        )
        self.norm = nn.LayerNorm(text.width)
        self.proj = nn.Linear(text.width, config.unet.context_dim)
        nn.init.normal_(self.tokens.weight, std=0.02)
        if config.null_text == "learned":
            self.null_text_state = nn.Parameter(torch.randn(text.width) * 0.02)

    def forward(
        self, text: TextEncoding, drop: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ids, mask = text.ids, text.mask
        if ids is None:
            raise ValueError(
                'the text has no token ids; a decoder with a text "transformer" needs TextEncoding.ids'
            )
        if ids.shape[1] > len(self.positions):
            raise ValueError(
                f"the text has {ids.shape[1]} tokens; this decoder takes at most {len(self.positions)}"
            )
        x = self.tokens(ids)  # B L width
        if drop is not None:
            x = torch.where(drop[:, None, None], self.null_text_state, x)
            mask = torch.where(drop[:, None], first_only(mask), mask)
        x = x + self.positions[: x.shape[1]]
        for block in self.blocks:
            x = block(x, *block.project(x), mask[:, None, None])
        x = self.norm(x)
        last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(dim=1)  # B
        return (
            x[torch.arange(len(x), device=x.device), last],
            self.proj(x),
            mask,
        )  # B width, B L context_dim, B L


def first_only(mask: torch.Tensor) -> torch.Tensor:
    """A mask of the same shape with the first position open."""
    return (torch.arange(mask.shape[1], device=mask.device) == 0).expand_as(mask)


def masked_image(picture: torch.Tensor, hole: torch.Tensor) -> torch.Tensor:
    """What a decoder that inpaints is told: picture (B, 3, s, s), hole (B or 1, 1, s, s) bool -> (B, 4, s, s).

    The picture outside of the hole, 0 inside; then 1 where it is known, 0 where it is not.
    """
    known = (~hole).to(picture.dtype).expand(len(picture), -1, -1, -1)
    return torch.cat([picture * known, known], dim=1)


class Decoder(nn.Module):
    """A U-Net that sees the image embedding and the caption in its time embedding and in its attention."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        width, time_dim = config.unet.context_dim, config.unet.time_width
        self.null_image = nn.Parameter(torch.randn(config.emb_dim) * config.emb_dim**-0.5)
        self.image_to_time = nn.Linear(config.emb_dim, time_dim)
        self.image_to_context = nn.Linear(config.emb_dim, config.context_tokens * width)
        self.text = (
            ClipStatesEncoder if config.text.kind == "clip_states" else TextTransformerEncoder
        )(config)
        self.text_to_time = (
            nn.Linear(self.text.emb_dim, time_dim) if config.text_emb_in_time else None
        )
        self.layout = None if config.layout is None else Layout(config.layout)
        self.unet = UNet(config.unet)
        with torch.no_grad():
            for weight in self.weights_beside().values():
                weight.zero_()

    def weights_beside(self) -> dict[str, torch.Tensor]:
        """Of the first convolution, views: what it makes of "layout" and "known". Zero where training begins."""
        channels = {
            "x_t": 3,
            "layout": 3 if self.config.layout else 0,
            "known": 4 if self.config.inpaints else 0,
        }
        weights = self.unet.stem.weight.split(
            [n * self.config.unet.patch**2 for n in channels.values()], dim=1
        )
        return {
            name: w
            for name, w in zip(channels, weights, strict=True)
            if name != "x_t" and w.shape[1]
        }

    def condition(
        self,
        image_emb: torch.Tensor,
        text: TextEncoding,
        drop_image: torch.Tensor | None = None,
        drop_text: torch.Tensor | None = None,
        known: torch.Tensor | None = None,
    ) -> DecoderContext:
        """Image embeddings (B, D) as CLIP gives them and captions -> context; `drop_*` (B,) bool marks the nulls.

        known: (B, 4, s, s), for a decoder that inpaints: see `known_part`; None = nothing is known.
        """
        if known is not None and not self.config.inpaints:
            raise ValueError("this decoder does not inpaint: it can't be told what is known")
        if drop_text is not None and self.config.null_text == "empty_prompt":
            raise ValueError(
                'drop_text was given, but null_text is "empty_prompt": pass the encoding of "" as text'
            )
        dtype = self.null_image.dtype
        image_emb, text = image_emb.to(dtype), text.to(dtype=dtype)
        if drop_image is not None:
            image_emb = torch.where(drop_image[:, None], self.null_image, image_emb)
        text_emb, text_tokens, text_mask = self.text(text, drop_text)
        time_shift = self.image_to_time(image_emb)  # B time_dim
        if self.text_to_time is not None:
            time_shift = time_shift + self.text_to_time(text_emb)
        n = self.config.context_tokens
        image_tokens = rearrange(self.image_to_context(image_emb), "b (c n) -> b n c", n=n)
        context = torch.cat([image_tokens, text_tokens], dim=1)  # B n+L context_dim
        mask = F.pad(text_mask, (n, 0), value=True)  # B n+L
        beside = self._beside(image_emb, drop_image, known)
        return DecoderContext(time_shift, self.unet.project_context(context, mask), beside)

    def _beside(
        self, image_emb: torch.Tensor, drop_image: torch.Tensor | None, known: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Layout and known part, where the decoder is shown them; zeros where there is nothing to be shown."""
        size, pictures = (self.config.image_size, self.config.image_size), []
        if self.layout is not None:
            layout = F.interpolate(self.layout(image_emb), size, mode="bilinear")  # B 3 s s
            pictures.append(
                layout if drop_image is None else layout * ~drop_image[:, None, None, None]
            )
        if self.config.inpaints:
            pictures.append(
                image_emb.new_zeros(len(image_emb), 4, *size)
                if known is None
                else known.to(image_emb)
            )
        return torch.cat(pictures, dim=1) if pictures else None

    def denoise(self, x_t: torch.Tensor, t: torch.Tensor, context: DecoderContext) -> torch.Tensor:
        """(B, 3, s, s), (B,) -> (B, 3 or 6, s, s): the prediction, then the variance if it is learned."""
        modulation = self.unet.modulation(self.unet.time_embedding(t) + context.time_shift)
        return self.step(x_t, modulation, context)[0]

    def embed(self, t: torch.Tensor, context: DecoderContext) -> torch.Tensor:
        """What `step` is to be told at T timesteps: (T,) -> (T, B, M)."""
        return self.unet.modulation(self.unet.time_embedding(t)[:, None] + context.time_shift)

    def step(
        self,
        x_t: torch.Tensor,
        modulation: torch.Tensor,
        context: DecoderContext,
        deep_features: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`denoise` from the modulation (B, M) on; `deep_features` goes in and comes out as in `UNet`."""
        if context.beside is not None:
            x_t = torch.cat([x_t, context.beside.to(x_t.dtype)], dim=1)
        return self.unet(x_t, modulation, context.kv, deep_features)

    def forward(
        self,
        x_t: torch.Tensor,
        t: torch.Tensor,
        image_emb: torch.Tensor,
        text: TextEncoding,
        drop_image: torch.Tensor | None = None,
        drop_text: torch.Tensor | None = None,
        known: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.denoise(x_t, t, self.condition(image_emb, text, drop_image, drop_text, known))
