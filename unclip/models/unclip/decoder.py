"""The decoder (unCLIP 2.1): diffusion of images given a CLIP image embedding and a caption."""

# B batch, L text tokens, D CLIP embedding width, W text width, N context tokens, s image size,
# M width of the U-Net's modulation

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from unclip.config import PositiveInt, check_multiple, config
from unclip.models.layers import (
    Denoiser,
    DenoiserCache,
    KeyValues,
    ModuleList,
    Timestep,
    TransformerBlock,
    embed_time,
    normal_parameter,
    replace_rows,
)
from unclip.models.unclip.prior import EmbeddingStats
from unclip.models.unet import UNet, UNetConfig
from unclip.types import Rows, TextEncoding, full_precision

GUIDE_LR = 0.05  # step size of `guide_embedding`, in standard deviations of an embedding

EncodedText = tuple[Tensor, Tensor, Tensor]
"""The caption's embedding (B, D or width), its context tokens (B, L, context_dim), mask (B, L)."""


@config
class ClipStates:
    """Read the caption through the states of CLIP's text tower (Karlo)."""

    kind: Literal["clip_states"] = "clip_states"


@config
class TextTransformer:
    """Read the caption with a bidirectional transformer of the decoder's own (GLIDE, unCLIP)."""

    vocab_size: PositiveInt
    context_length: PositiveInt
    width: PositiveInt
    depth: PositiveInt
    heads: PositiveInt
    kind: Literal["transformer"] = "transformer"

    def __post_init__(self) -> None:
        check_multiple("width", self.width, heads=self.heads)


@config
class LayoutConfig:
    emb_dim: PositiveInt  # D, of CLIP's embeddings
    size: PositiveInt = 16  # side of the output image
    width: PositiveInt = 768
    depth: PositiveInt = 3  # hidden layers


@config
class DecoderConfig:
    unet: UNetConfig
    image_size: PositiveInt
    emb_dim: PositiveInt  # D, of CLIP's embeddings
    text_width: PositiveInt  # W, of CLIP's text states
    context_tokens: PositiveInt = 4  # number of context tokens made of the image embedding
    text: ClipStates | TextTransformer = field(default_factory=ClipStates)
    null_text: Literal["learned", "empty_prompt"] = "learned"
    text_emb_in_time: bool = True  # add the caption's embedding to the time embedding
    prediction: Literal["eps", "x0", "v"] = "eps"
    learned_variance: bool = False
    layout: LayoutConfig | None = None  # its output is concatenated to x_t
    inpaints: bool = False  # known pixels and their mask are concatenated to x_t (GLIDE 2.4)

    def __post_init__(self) -> None:
        size = self.image_size
        self.unet.check("unet", self.inputs, self.learned_variance, image_size=size)
        if self.unet.context_dim is None:
            raise ValueError("unet.context_dim is not set; a decoder needs the context width")
        if self.layout and self.layout.emb_dim != self.emb_dim:
            raise ValueError(
                f"layout.emb_dim is {self.layout.emb_dim}; expected emb_dim = {self.emb_dim}"
            )

    @property
    def inputs(self) -> dict[str, int]:
        """Number of channels of each input of the U-Net."""
        return {"x_t": 3, "layout": 3 if self.layout else 0, "known": 4 if self.inpaints else 0}


@dataclass(frozen=True)
class DecoderContext(Rows):
    """The conditioning of a decoder, the same at every step."""

    time_shift: Tensor  # (B, time_dim), added to the time embedding
    kv: KeyValues  # of the N context tokens
    extra_channels: Tensor | None = None  # (B, C, s, s), concatenated to x_t


class ContextUNet(Denoiser):
    """A U-Net whose conditioning is a `DecoderContext`."""

    unet: UNet

    def denoise(
        self, x_t: Tensor, t: Timestep, context: DecoderContext, cache: DenoiserCache | None = None
    ) -> Tensor:
        """Predict from x_t (B, 3, s, s) at t, (B,) or one number -> (B, 3 or 6, s, s).

        The second half of the channels is the variance, if it is learned.
        """
        x, unet = x_t, self.unet
        if context.extra_channels is not None:
            x = torch.cat([x, context.extra_channels.to(x.dtype)], dim=1)

        def modulate(t: Tensor) -> Tensor:
            return unet.modulation(unet.time(t) + context.time_shift)

        modulation = embed_time(modulate, t, x, cache)  # B M
        deep_features = None if cache is None else cache.deep_features(t)
        output, deep_features = unet(x, modulation, context.kv, deep_features)
        if cache is not None:
            cache.store(t, deep_features)
        return output


class ClipStatesEncoder(nn.Module):
    """CLIP's text embedding unchanged, and its states projected to context tokens."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        assert config.unet.context_dim is not None
        self.emb_dim = config.emb_dim
        self.text_emb_in_time = config.text_emb_in_time
        self.proj = nn.Linear(config.text_width, config.unet.context_dim)
        self.norm = nn.LayerNorm(config.unet.context_dim)
        if config.null_text == "learned":
            if config.text_emb_in_time:
                self.null_text_emb = normal_parameter(self.emb_dim, std=self.emb_dim**-0.5)
            self.null_text_state = normal_parameter(config.text_width)

    def forward(self, text: TextEncoding, drop: Tensor | None) -> EncodedText:
        emb, states, mask = text.emb, text.states, text.mask
        if drop is not None:
            if self.text_emb_in_time:
                emb = replace_rows(emb, drop, self.null_text_emb)
            states = replace_rows(states, drop, self.null_text_state)
            mask = replace_rows(mask, drop, first_only(mask))
        return emb, self.norm(self.proj(states)), mask


class TextTransformerEncoder(nn.Module):
    """Transformer over token ids: the last token's output, and all outputs as tokens (GLIDE 3)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        text = config.text
        assert isinstance(text, TextTransformer) and config.unet.context_dim is not None
        self.emb_dim = text.width
        self.tokens = nn.Embedding(text.vocab_size, text.width)
        self.positions = normal_parameter(text.context_length, text.width, std=0.02)
        self.blocks = ModuleList[TransformerBlock](
            TransformerBlock(text.width, text.heads) for _ in range(text.depth)
        )
        self.norm = nn.LayerNorm(text.width)
        self.proj = nn.Linear(text.width, config.unet.context_dim)
        nn.init.normal_(self.tokens.weight, std=0.02)
        if config.null_text == "learned":
            self.null_text_state = normal_parameter(text.width, std=0.02)

    def forward(self, text: TextEncoding, drop: Tensor | None) -> EncodedText:
        ids, mask = text.ids, text.mask
        if ids is None:
            raise ValueError(
                "the text has no token ids; this decoder needs them, as from encode_text"
            )
        slots = len(self.positions)
        if ids.shape[1] > slots:
            raise ValueError(
                f"the text has {ids.shape[1]} tokens; this decoder takes at most {slots}"
            )
        x = self.tokens(ids)  # B L width
        if drop is not None:
            x = replace_rows(x, drop, self.null_text_state)
            mask = replace_rows(mask, drop, first_only(mask))
        x = x + self.positions[: x.shape[1]]
        for block in self.blocks:
            x = block(x, *block.project(x), mask[:, None, None])
        x = self.norm(x)
        last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(dim=1)  # B
        return x[torch.arange(len(x), device=x.device), last], self.proj(x), mask


def first_only(mask: Tensor) -> Tensor:
    """Return a mask of the same shape with only the first position open."""
    return (torch.arange(mask.shape[1], device=mask.device) == 0).expand_as(mask)


def masked_image(image: Tensor, hole: Tensor) -> Tensor:
    """Return the input of an inpainting decoder: [image, 0 in the hole; 1 where it is known].

    image (B, 3, s, s), hole (B or 1, 1, s, s) bool -> (B, 4, s, s).
    """
    known = (~hole).to(image.dtype).expand(len(image), -1, -1, -1)
    return torch.cat([image * known, known], dim=1)


class Decoder(ContextUNet):
    """U-Net conditioned on image embedding and caption through its time embedding and attention."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        width, time_dim = config.unet.context_dim, config.unet.time_width
        assert width is not None
        self.null_image = normal_parameter(config.emb_dim, std=config.emb_dim**-0.5)
        self.image_to_time = nn.Linear(config.emb_dim, time_dim)
        self.image_to_context = nn.Linear(config.emb_dim, config.context_tokens * width)
        is_clip = isinstance(config.text, ClipStates)
        self.text = ClipStatesEncoder(config) if is_clip else TextTransformerEncoder(config)
        self.text_to_time = (
            nn.Linear(self.text.emb_dim, time_dim) if config.text_emb_in_time else None
        )
        self.layout = None if config.layout is None else Layout(config.layout)
        self.unet = UNet(config.unet)
        with torch.no_grad():  # extra channels are ignored at first
            for weight in self.extra_channel_weights().values():
                weight.zero_()

    def extra_channel_weights(self) -> dict[str, Tensor]:
        """Return views of the first convolution's weights for the "layout" and "known" channels."""
        inputs, patch = self.config.inputs, self.config.unet.patch
        weights = self.unet.stem.weight.split([n * patch**2 for n in inputs.values()], dim=1)
        views = dict(zip(inputs, weights, strict=True))
        return {name: view for name, view in views.items() if name != "x_t" and view.shape[1]}

    def condition(
        self,
        image_emb: Tensor,
        text: TextEncoding,
        drop_image: Tensor | None = None,
        drop_text: Tensor | None = None,
        known: Tensor | None = None,
        layout: Tensor | None = None,
    ) -> DecoderContext:
        """Compute the context of CLIP image embeddings (B, D) and captions.

        The nulls replace rows where `drop_image` or `drop_text` (B,) bool is True. known:
        (B, 4, s, s) from `masked_image`, for a decoder that inpaints; None = nothing is known.
        layout: (B, 3, h, h) in [-1, 1]; None = the mean for the embedding, see `Layout`.
        """
        if known is not None and not self.config.inpaints:
            raise ValueError("known was given, but this decoder was not trained to inpaint")
        if drop_text is not None and self.config.null_text == "empty_prompt":
            raise ValueError(
                'drop_text was given, but null_text is "empty_prompt"; encode "" instead'
            )
        dtype = self.null_image.dtype
        image_emb = replace_rows(image_emb.to(dtype), drop_image, self.null_image)
        text_emb, text_tokens, text_mask = self.text(text.to(dtype=dtype), drop_text)
        time_shift = self.image_to_time(image_emb)  # B time_dim
        if self.text_to_time is not None:
            time_shift = time_shift + self.text_to_time(text_emb)
        n = self.config.context_tokens
        image_tokens = rearrange(self.image_to_context(image_emb), "b (c n) -> b n c", n=n)
        context = torch.cat([image_tokens, text_tokens], dim=1)  # B n+L context_dim
        mask = F.pad(text_mask, (n, 0), value=True)  # B n+L
        extra_channels = self._extra_channels(image_emb, drop_image, known, layout)
        return DecoderContext(time_shift, self.unet.project_context(context, mask), extra_channels)

    def _extra_channels(
        self,
        image_emb: Tensor,
        drop_image: Tensor | None,
        known: Tensor | None,
        layout: Tensor | None,
    ) -> Tensor | None:
        """Concatenate layout and known pixels, as configured; zeros where there are none."""
        size, channels = (self.config.image_size, self.config.image_size), []
        if self.layout is not None:
            small: Tensor = self.layout(image_emb) if layout is None else layout.to(image_emb)
            layout = F.interpolate(small, size, mode="bilinear")  # B 3 s s
            if drop_image is not None:
                layout = layout * ~drop_image[:, None, None, None]
            channels.append(layout)
        if self.config.inpaints:
            nothing = image_emb.new_zeros(len(image_emb), 4, *size)
            channels.append(nothing if known is None else known.to(image_emb))
        return torch.cat(channels, dim=1) if channels else None


class _Linear(nn.Linear):
    """A linear layer that is never packed or quantised: `guide_embedding` needs gradients."""


class Layout(EmbeddingStats):
    """MLP from an embedding to the mean of its images: (B, D) -> (B, 3, size, size), [-1, 1].

    A decoder may get this small blurred image as extra channels at every step, as DiffuseVAE
    (2201.00308) gives its U-Net the output of a VAE. Regression learns in minutes what an embedding
    says about coarse shapes; the diffusion model adds the rest.
    """

    def __init__(self, config: LayoutConfig) -> None:
        super().__init__(config.emb_dim)
        self.config = config
        widths = [config.emb_dim, *[config.width] * config.depth]
        layers: list[nn.Module] = []
        for c_in, c_out in zip(widths, widths[1:], strict=False):
            layers += [_Linear(c_in, c_out), nn.SiLU()]
        self.mlp = nn.Sequential(*layers, _Linear(config.width, 3 * config.size**2))

    def forward(self, image_emb: Tensor) -> Tensor:
        x = self.mlp(self.normalize(image_emb.float()).to(image_emb.dtype))
        return x.unflatten(1, (3, self.config.size, self.config.size))

    def guide_embedding(
        self, image_emb: Tensor, known: Tensor, weight: float | Tensor, steps: int = 30
    ) -> Tensor:
        """Move embeddings (B, D) so that their layouts match the known pixels of an image.

        Minimises weight * (squared error where the image is known) + (squared distance from
        `image_emb`, in standard deviations). known: (B, 4, s, s), see `masked_image`.
        weight: one number or (B,).
        """
        pooled = F.adaptive_avg_pool2d(known.float(), self.config.size)
        # Gradients need copies of tensors that were made in inference mode.
        with torch.inference_mode(False), torch.enable_grad(), full_precision(image_emb):
            state = {
                name: tensor.detach().to(torch.float, copy=True)
                for name, tensor in self.state_dict().items()
            }
            start, std = image_emb.detach().to(torch.float, copy=True), state["emb_std"]
            colours, share = pooled.detach().clone().split([3, 1], dim=1)
            colours = colours / share.clamp(min=1e-3)
            offset = torch.zeros_like(start, requires_grad=True)
            adam = torch.optim.Adam([offset], lr=GUIDE_LR)
            for _ in range(steps):
                layout = torch.func.functional_call(self, state, (start + offset * std,))
                error = ((layout - colours).square() * share).flatten(1).mean(dim=1)  # B
                loss = (weight * error + offset.square().mean(dim=1)).sum()
                (offset.grad,) = torch.autograd.grad(loss, offset)
                adam.step()
            return (start + offset.detach() * std).to(image_emb.dtype)
