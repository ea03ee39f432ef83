"""Networks of unCLIP (2204.06125) for diffusers, as written by `unclip convert`.

Decoder and upsampler need layers that diffusers' U-Nets do not have together: pixels folded into
channels ("patch"), resampling by one convolution next to attention to a context, and extra input
channels from a small image that is made from the CLIP embedding ("layout"). diffusers has no prior
that denoises with an MLP, and none of layouts.
"""

# B batch, C channels, S pixels, N context tokens, L text tokens, D CLIP embedding width, W text
# width, K components of a layout, M width of an MLP

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.transformers.prior_transformer import PriorTransformerOutput
from torch import Tensor, nn


class NullText(ModelMixin, ConfigMixin):
    """The learned text of a prior for guidance: an embedding (D,) and one state (W,)."""

    @register_to_config
    def __init__(self, emb_dim: int, text_width: int) -> None:
        super().__init__()
        self.null_emb = nn.Parameter(torch.zeros(emb_dim))
        self.null_state = nn.Parameter(torch.zeros(text_width))

    def forward(self, batch: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return embeddings (B, D), states (B, L, W) and their mask (B, L)."""
        states = F.pad(self.null_state[None], (0, 0, 0, length - 1)).expand(batch, -1, -1)
        mask = torch.arange(length, device=states.device) == 0
        return self.null_emb.expand(batch, -1), states, mask.expand(batch, -1)


class TimeMLP(nn.Module):
    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.in_dim = in_dim
        self.fc1, self.fc2 = nn.Linear(in_dim, out_dim), nn.Linear(out_dim, out_dim)

    def forward(self, t: Tensor) -> Tensor:
        half = self.in_dim // 2
        steps = torch.arange(half, dtype=torch.float32, device=t.device)
        angles = t[:, None].float() * torch.exp(-math.log(10_000.0) * steps / half)
        h = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.fc1.weight.dtype)
        return self.fc2(F.silu(self.fc1(h)))


class TextBlock(nn.Module):
    """Block of a bidirectional transformer."""

    def __init__(self, width: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1 = nn.Linear(width, mlp_ratio * width)
        self.fc2 = nn.Linear(mlp_ratio * width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        x = x + self.out(h.transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ModulatedBlock(nn.Module):
    """A residual MLP block, modulated by a condition (B, M)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.modulation = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift, gate = self.modulation(condition).chunk(3, dim=-1)
        h = self.norm(x) * (1 + scale) + shift
        return x + gate * self.fc2(F.silu(self.fc1(h)))


class MLPPrior(ModelMixin, ConfigMixin):
    """Caption -> CLIP image embeddings; it is called like diffusers' PriorTransformer."""

    emb_mean: Tensor
    emb_std: Tensor

    @register_to_config
    def __init__(
        self,
        emb_dim: int,
        text_width: int,
        context_length: int,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: int,
        mlp_width: int,
        mlp_depth: int,
        text_states: bool,
    ) -> None:
        super().__init__()
        self.register_buffer("emb_mean", torch.zeros(emb_dim))
        self.register_buffer("emb_std", torch.ones(emb_dim))
        self.state_proj, self.emb_proj = nn.Linear(text_width, width), nn.Linear(emb_dim, width)
        self.positions = nn.Parameter(torch.zeros(context_length + 1, width))
        self.blocks = nn.ModuleList(TextBlock(width, heads, mlp_ratio) for _ in range(depth))
        self.norm, self.summary = nn.LayerNorm(width), nn.Linear(width, mlp_width)
        self.time, self.x_proj = TimeMLP(mlp_width, mlp_width), nn.Linear(emb_dim, mlp_width)
        self.mlp = nn.ModuleList(ModulatedBlock(mlp_width) for _ in range(mlp_depth))
        self.out_norm, self.head = nn.LayerNorm(mlp_width), nn.Linear(mlp_width, emb_dim)

    def forward(
        self, x: Tensor, t: Tensor, text_emb: Tensor, states: Tensor, mask: Tensor
    ) -> PriorTransformerOutput:
        """Predict normalised embeddings from x (B, D) at t (B,) -> (B, D).

        text_emb (B, D), states (B, L, W) and mask (B, L) are of captions.
        """
        condition = F.silu(self.time(t) + self._summarise(text_emb, states, mask))
        x = self.x_proj(x)
        for block in self.mlp:
            x = block(x, condition)
        return PriorTransformerOutput(self.head(self.out_norm(x)))

    def _summarise(self, text_emb: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        if not self.config.text_states:
            states, mask = states[:, :0], mask[:, :0]
        tokens = torch.cat([self.state_proj(states), self.emb_proj(text_emb)[:, None]], dim=1)
        x = tokens + torch.cat([self.positions[: states.shape[1]], self.positions[-1:]])
        mask = F.pad(mask, (0, 1), value=True)
        for block in self.blocks:
            x = block(x, mask)
        return self.summary(self.norm(x[:, -1]))

    def post_process_latents(self, x: Tensor) -> Tensor:
        """Return CLIP image embeddings for normalised ones."""
        return x * self.emb_std + self.emb_mean


class TextPool(nn.Module):
    def __init__(self, text_width: int, heads: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(text_width)
        self.score = nn.Linear(text_width, heads)
        self.out = nn.Linear(heads * text_width, width)
        self.fc = nn.Linear(width, width)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        x = self.norm(states.to(self.norm.weight.dtype))
        scores = self.score(x).masked_fill(~mask[..., None], -1e4)
        weights = scores.float().softmax(dim=1).to(x.dtype)
        x = self.out((weights.mT @ x).flatten(1))
        return x + self.fc(F.silu(x))


class LayoutPrior(ModelMixin, ConfigMixin):
    """Image embedding and caption -> the principal components of a small image."""

    emb_mean: Tensor
    emb_std: Tensor
    mean: Tensor
    basis: Tensor
    scale: Tensor

    @register_to_config
    def __init__(
        self,
        emb_dim: int,
        size: int,
        components: int,
        width: int,
        depth: int,
        text_width: int | None = None,
        text_heads: int = 8,
    ) -> None:
        super().__init__()
        self.register_buffer("emb_mean", torch.zeros(emb_dim))
        self.register_buffer("emb_std", torch.ones(emb_dim))
        self.register_buffer("mean", torch.zeros(3 * size**2))
        self.register_buffer("basis", torch.zeros(components, 3 * size**2))
        self.register_buffer("scale", torch.ones(components))
        self.image_proj, self.text_proj = nn.Linear(emb_dim, width), nn.Linear(emb_dim, width)
        self.null_image = nn.Parameter(torch.zeros(width))
        self.null_text = nn.Parameter(torch.zeros(width))
        self.time, self.x_proj = TimeMLP(width, width), nn.Linear(components, width)
        self.mlp = nn.ModuleList(ModulatedBlock(width) for _ in range(depth))
        self.out_norm, self.head = nn.LayerNorm(width), nn.Linear(width, components)
        reads_states = text_width is not None
        self.text_pool = TextPool(text_width, text_heads, width) if reads_states else None

    def condition(
        self, image_emb: Tensor, text_emb: Tensor, states: Tensor, mask: Tensor
    ) -> tuple[Tensor, ...]:
        """Return what `forward` needs for embeddings of images (B, D) and for captions."""
        dtype = self.null_image.dtype
        image = (image_emb.float() - self.emb_mean) / self.emb_std
        text = F.normalize(text_emb.float(), dim=-1) * self.config.emb_dim**0.5
        summary = self.image_proj(image.to(dtype)) + self.text_proj(text.to(dtype))
        if self.text_pool is not None:
            summary = summary + self.text_pool(states, mask)
        return (summary,)

    def null(self, batch: int) -> tuple[Tensor, ...]:
        """Return what `forward` needs for the null of guidance."""
        return ((self.null_image + self.null_text).expand(batch, -1),)

    def forward(self, x: Tensor, t: Tensor, *conditions: Tensor) -> Tensor:
        """Predict the components from x (B, K) at t (B,) -> (B, K)."""
        condition = F.silu(self.time(t) + conditions[0])
        x = self.x_proj(x.to(condition.dtype))
        for block in self.mlp:
            x = block(x, condition)
        return self.head(self.out_norm(x))

    def decode(self, x: Tensor) -> Tensor:
        """Return small images in [-1, 1] of components: (B, K) -> (B, 3, size, size)."""
        pixels = (x * self.scale) @ self.basis.to(x) + self.mean
        return pixels.unflatten(1, (3, self.config.size, self.config.size)).clamp(-1, 1)


class UpConv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class ResBlock(nn.Module):
    takes_time = True  # diffusers runs this file for each network: isinstance would not hold

    def __init__(
        self, c_in: int, c_out: int, config: dict[str, Any], resize: str | None = None
    ) -> None:
        super().__init__()
        self.resize, self.scale_shift = resize, config["time_shift"] == "scale_shift"
        time_dim = config["time_dim"] or 4 * config["levels"][0]["channels"]
        conv = UpConv2d if resize == "up" else nn.Conv2d
        self.norm1 = nn.GroupNorm(config["groups"], c_in)
        self.conv1 = conv(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(time_dim, 2 * c_out if self.scale_shift else c_out)
        self.norm2 = nn.GroupNorm(config["groups"], c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = F.silu(self.norm1(x))
        if self.resize == "down":
            x, h = F.avg_pool2d(x, 2), F.avg_pool2d(h, 2)
        elif self.resize == "up":
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        h, shift = self.conv1(h), self.time(F.silu(time))[:, :, None, None]
        if self.scale_shift:
            scale, shift = shift.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + shift)
        return self.conv2(F.silu(h)) + self.skip(x)


class Attention(nn.Module):
    """Each pixel attends to [context ; pixels] in one softmax."""

    def __init__(self, channels: int, config: dict[str, Any]) -> None:
        super().__init__()
        self.heads, width = channels // config["head_dim"], config["context_dim"]
        self.norm = nn.GroupNorm(config["groups"], channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.context_kv = nn.Linear(width, 2 * channels) if width else None
        self.out = nn.Linear(channels, channels)

    def _split(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        return x.unflatten(-1, (parts, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()

    def forward(self, x: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        q, k, v = self._split(self.qkv(self.norm(x).flatten(2).mT), 3)
        visible = None
        if self.context_kv is not None and context is not None and mask is not None:
            k_context, v_context = self._split(self.context_kv(context), 2)
            k, v = torch.cat([k_context, k], dim=2), torch.cat([v_context, v], dim=2)
            visible = F.pad(mask, (0, q.shape[2]), value=True)[:, None, None]
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        return x + self.out(h.transpose(1, 2).flatten(2)).mT.unflatten(2, x.shape[2:])


class Block(nn.Module):
    def __init__(
        self, res: nn.Module, attention: nn.Module | None = None, resize: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.res, self.attention, self.resize = res, attention, resize

    def forward(
        self, x: Tensor, time: Tensor, context: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        x = _apply(self.res, x, time)
        if self.attention is not None:
            x = self.attention(x, context, mask)
        return x if self.resize is None else _apply(self.resize, x, time)


def _apply(module: nn.Module, x: Tensor, time: Tensor) -> Tensor:
    return module(x, time) if getattr(module, "takes_time", False) else module(x)


class UNet(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        levels, self.patch = config["levels"], config["patch"]
        first, last = levels[0]["channels"], levels[-1]["channels"]

        def attention(channels: int, wanted: bool) -> nn.Module | None:
            return Attention(channels, config) if wanted else None

        def resample(c: int, resize: str) -> nn.Module:
            if config["resample"] == "residual":
                return ResBlock(c, c, config, resize)
            up = resize == "up"
            return UpConv2d(c, c, 3, padding=1) if up else nn.Conv2d(c, c, 3, 2, padding=1)

        self.time = TimeMLP(first, config["time_dim"] or 4 * first)
        self.stem = nn.Conv2d(config["in_channels"] * self.patch**2, first, 3, padding=1)
        self.down, self.mid, self.up = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        skips, c = [first], first
        for i, level in enumerate(levels):
            for _ in range(level["blocks"]):
                res, c = ResBlock(c, level["channels"], config), level["channels"]
                self.down.append(Block(res, attention(c, level["attention"])))
                skips.append(c)
            if i < len(levels) - 1:
                self.down.append(Block(resample(c, "down")))
                skips.append(c)
        for wanted in (config["mid_attention"], False):
            self.mid.append(Block(ResBlock(last, last, config), attention(last, wanted)))
        for i, level in reversed(list(enumerate(levels))):
            for j in range(level["blocks"] + 1):
                res = ResBlock(c + skips.pop(), level["channels"], config)
                c = level["channels"]
                resize = resample(c, "up") if i > 0 and j == level["blocks"] else None
                self.up.append(Block(res, attention(c, level["attention"]), resize))
        self.norm = nn.GroupNorm(config["groups"], first)
        self.head = nn.Conv2d(first, config["out_channels"] * self.patch**2, 3, padding=1)

    def forward(
        self, x: Tensor, time: Tensor, context: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        h = self.stem(F.pixel_unshuffle(x, self.patch))
        skips = [h]
        for block in self.down:
            skips.append(h := block(h, time, context, mask))
        for block in self.mid:
            h = block(h, time, context, mask)
        for block in self.up:
            h = block(torch.cat([h, skips.pop()], dim=1), time, context, mask)
        return F.pixel_shuffle(self.head(F.silu(self.norm(h))), self.patch)


class TextProjection(nn.Module):
    def __init__(self, text_width: int, context_dim: int, emb_dim: int, learned: bool) -> None:
        super().__init__()
        self.proj, self.norm = nn.Linear(text_width, context_dim), nn.LayerNorm(context_dim)
        if learned:
            self.null_text_emb = nn.Parameter(torch.zeros(emb_dim))
            self.null_text_state = nn.Parameter(torch.zeros(text_width))


class Layout(nn.Module):
    """CLIP embedding -> the mean of its images, small."""

    emb_mean: Tensor
    emb_std: Tensor

    def __init__(self, emb_dim: int, size: int, width: int, depth: int) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("emb_mean", torch.zeros(emb_dim))
        self.register_buffer("emb_std", torch.ones(emb_dim))
        layers: list[nn.Module] = []
        for i in range(depth):
            layers += [nn.Linear(width if i else emb_dim, width), nn.SiLU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(width, 3 * size**2))

    def forward(self, image_emb: Tensor) -> Tensor:
        x = (image_emb - self.emb_mean) / self.emb_std
        return self.mlp(x.to(image_emb.dtype)).unflatten(1, (3, self.size, self.size))


class Decoder(ModelMixin, ConfigMixin):
    """CLIP image embedding and caption -> small images."""

    @register_to_config
    def __init__(
        self,
        unet_config: dict[str, Any],
        image_size: int,
        emb_dim: int,
        text_width: int,
        context_tokens: int,
        null_text: str,
        text_emb_in_time: bool,
        layout_config: dict[str, Any] | None,
        inpaints: bool,
    ) -> None:
        super().__init__()
        width = unet_config["context_dim"]
        first = unet_config["levels"][0]["channels"]
        time_dim = unet_config["time_dim"] or 4 * first
        self.learned = null_text == "learned"
        self.null_image = nn.Parameter(torch.zeros(emb_dim))
        self.image_to_time = nn.Linear(emb_dim, time_dim)
        self.image_to_context = nn.Linear(emb_dim, context_tokens * width)
        self.text = TextProjection(text_width, width, emb_dim, self.learned)
        self.text_to_time = nn.Linear(emb_dim, time_dim) if text_emb_in_time else None
        self.layout = None if layout_config is None else Layout(**layout_config)
        self.unet = UNet(unet_config)

    def condition(
        self,
        image_emb: Tensor | None,
        text_emb: Tensor,
        states: Tensor,
        mask: Tensor,
        layout: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Return what `forward` needs; image_emb None = the null of guidance.

        text_emb (B, D), states (B, L, W) and mask (B, L) are of captions, or of the empty prompt
        for the null. layout: (B, 3, h, h) in [-1, 1]; None = the mean for the embedding.
        """
        B, size, dtype = len(text_emb), self.config.image_size, self.null_image.dtype
        is_null = image_emb is None
        emb = self.null_image.expand(B, -1) if image_emb is None else image_emb.to(dtype)
        text_emb, states = text_emb.to(dtype), states.to(dtype)
        if is_null and self.learned:
            text_emb = self.text.null_text_emb.expand(B, -1)
            states, mask = self.text.null_text_state.expand(B, 1, -1), mask.new_ones(B, 1)
        time_shift = self.image_to_time(emb)
        if self.text_to_time is not None:
            time_shift = time_shift + self.text_to_time(text_emb)
        n = self.config.context_tokens
        tokens = self.image_to_context(emb).unflatten(1, (-1, n)).mT
        context = torch.cat([tokens, self.text.norm(self.text.proj(states))], dim=1)
        extra = emb.new_zeros(B, 0, size, size)
        if self.layout is not None:
            small = self.layout(emb) if layout is None else layout.to(emb)
            layout = F.interpolate(small, (size, size), mode="bilinear")
            extra = layout * 0 if is_null else layout
        if self.config.inpaints:  # nothing is known
            extra = F.pad(extra, (0, 0, 0, 0, 0, 4))
        return time_shift, context, F.pad(mask, (n, 0), value=True), extra

    def forward(self, x: Tensor, t: Tensor, *conditions: Tensor) -> Tensor:
        """Predict from x (B, 3, s, s) at t (B,) -> (B, 3, s, s), or (B, 6, s, s) with variances."""
        time_shift, context, mask, extra = conditions
        x = torch.cat([x.to(extra.dtype), extra], dim=1)
        return self.unet(x, self.unet.time(t) + time_shift, context, mask)


class Upsampler(ModelMixin, ConfigMixin):
    """Small images -> large images."""

    @register_to_config
    def __init__(
        self, unet_config: dict[str, Any], low_size: int, high_size: int, residual: bool
    ) -> None:
        super().__init__()
        self.unet = UNet(unet_config)

    def condition(self, small: Tensor) -> tuple[Tensor, ...]:
        size = (self.config.high_size, self.config.high_size)
        return (F.interpolate(small.float(), size, mode="bicubic", antialias=True),)

    def forward(self, x: Tensor, t: Tensor, *conditions: Tensor) -> Tensor:
        """Predict from x (B, 3, S, S) at t (B,) -> (B, 3, S, S), or (B, 6, S, S) with variances."""
        dtype = self.unet.stem.weight.dtype
        low_res = conditions[0].to(dtype)
        output = self.unet(torch.cat([x.to(dtype), low_res], dim=1), self.unet.time(t))
        if not self.config.residual:
            return output
        return output + F.pad(low_res, (0, 0, 0, 0, 0, output.shape[1] - 3))
