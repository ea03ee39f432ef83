"""A diffusion prior of layouts: small, blurred images, given an image embedding and a caption.

An image embedding leaves open where things are and what shapes they have. The mean of all images
that fit it, which `Layout` predicts, is blurred; a sample is not. The samples are the decoder's
extra input, as in a cascade whose first stage has `size` pixels (2106.15282).
"""

# B batch, D CLIP embedding width, L text tokens, W width of their states, K components of a layout
# (or texts of a mixture), M width of the MLP, s side of a layout

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.config import DropRate, Positive, PositiveFraction, PositiveInt, config
from unclip.models.layers import (
    Denoiser,
    DenoiserCache,
    ModuleList,
    TimeMLP,
    Timestep,
    embed_time,
    normal_parameter,
    replace_rows,
    zeroed,
)
from unclip.models.unclip.mlp_prior import ModulatedBlock
from unclip.models.unclip.prior import EmbeddingStats
from unclip.types import Rows, TextEncoding, full_precision, mix_rows


@config
class LayoutPriorConfig:
    emb_dim: PositiveInt  # D, of CLIP's embeddings
    size: PositiveInt = 16  # side of a layout
    components: PositiveInt = 256  # K, principal components of layouts
    width: PositiveInt = 512
    depth: PositiveInt = 4  # residual blocks
    dropout: DropRate = 0.1
    x0_limit: Positive = 6.0  # bound of components in sampling, in standard deviations
    steps: PositiveInt = 20  # of sampling, with DDIM
    guidance: Positive = 1.5
    text_width: PositiveInt | None = None  # W, of CLIP's text states; None = they are not read
    text_heads: PositiveInt = 8  # means of the states
    # Share of the timesteps at which a variation starts from the noised layout of its image;
    # 1 = nothing of it is kept
    variation: PositiveFraction = 0.5


@dataclass(frozen=True)
class LayoutContext(Rows):
    summary: Tensor  # (B, M) of image embedding and caption


class TextPool(nn.Module):
    """Means of CLIP's text states, weighted by learned scores: (B, L, W) -> (B, M).

    A text embedding mostly says what distinguishes captions of different concepts. The states also
    say the rest, such as a style.
    """

    def __init__(self, text_width: int, heads: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(text_width)
        self.score = nn.Linear(text_width, heads)
        self.out = nn.Linear(heads * text_width, width)
        self.fc = nn.Linear(width, width)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        x = self.norm(states.to(self.norm.weight.dtype))
        scores = self.score(x).masked_fill(~mask[..., None], -1e4)  # B L heads
        weights = scores.float().softmax(dim=1).to(x.dtype)
        x = self.out((weights.mT @ x).flatten(1))
        return x + self.fc(F.silu(x))


class LayoutPrior(EmbeddingStats, Denoiser):
    """Predicts a layout's principal components from noised ones, embedding and caption."""

    mean: Tensor
    basis: Tensor
    scale: Tensor

    def __init__(self, config: LayoutPriorConfig) -> None:
        super().__init__(config.emb_dim)
        self.config = config
        D, K, M, pixels = config.emb_dim, config.components, config.width, 3 * config.size**2
        self.register_buffer("mean", torch.zeros(pixels))
        self.register_buffer("basis", torch.zeros(K, pixels))
        self.register_buffer("scale", torch.ones(K))
        self.image_proj, self.text_proj = nn.Linear(D, M), nn.Linear(D, M)
        self.null_image = normal_parameter(M, std=0.02)
        self.null_text = normal_parameter(M, std=0.02)
        self.time = TimeMLP(M, M)
        self.x_proj = nn.Linear(K, M)
        self.mlp = ModuleList[ModulatedBlock](
            ModulatedBlock(M, config.dropout) for _ in range(config.depth)
        )
        self.out_norm = nn.LayerNorm(M)
        self.head = zeroed(nn.Linear(M, K))
        W = config.text_width
        self.text_pool = None if W is None else TextPool(W, config.text_heads, M)

    @torch.no_grad()
    def fit_components(self, layouts: Tensor) -> None:
        """Set the principal components to those of layouts (N, 3, s, s).

        Components are divided by the square root of their standard deviation, not by all of it:
        large ones stay larger, because they are seen more.
        """
        x = layouts.flatten(1).double()
        mean = x.mean(dim=0)
        _, singular, basis = torch.linalg.svd(x - mean, full_matrices=False)
        K = self.config.components
        if len(singular) < K:
            raise ValueError(f"{len(x)} layouts; expected at least {K}, one for each component")
        std = (singular[:K] / len(x) ** 0.5).clamp(min=1e-6)
        scale = std.sqrt() * std.mean().sqrt()
        for buffer, value in ((self.mean, mean), (self.basis, basis[:K]), (self.scale, scale)):
            buffer.copy_(value)

    def encode(self, layouts: Tensor) -> Tensor:
        """Return the scaled components of layouts: (B, 3, s, s) in [-1, 1] -> (B, K) float32."""
        with full_precision(layouts):  # small components would be lost in rounding errors
            return (layouts.flatten(1).float() - self.mean) @ self.basis.T / self.scale

    def decode(self, x_0: Tensor) -> Tensor:
        """Invert `encode`: (B, K) -> (B, 3, s, s) float32."""
        with full_precision(x_0):
            pixels = (x_0.float() * self.scale) @ self.basis + self.mean
        return pixels.unflatten(1, (3, self.config.size, self.config.size))

    def condition(
        self,
        image_emb: Tensor | None,
        text: TextEncoding | None,
        drop_image: Tensor | None = None,
        drop_text: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> LayoutContext:
        """Combine image embeddings (B, D) with B texts, or with mixtures of K texts each.

        The nulls replace a condition that is None, and rows where `drop_image` or `drop_text`
        (B,) bool is True. Without any condition, the context has one row. weights: (K, B) of the
        texts of mixtures, all first texts before all second ones.
        """
        dtype, summary = self.null_image.dtype, self.null_image.new_zeros(1, 1)
        if image_emb is None:
            summary = summary + self.null_image
        else:
            x = self.image_proj(self.normalize(image_emb.float()).to(dtype))
            summary = summary + replace_rows(x, drop_image, self.null_image)
        if text is None:
            return LayoutContext(summary + self.null_text)
        emb = mix_rows(text.emb.float(), weights)
        x = F.normalize(emb, dim=-1) * self.config.emb_dim**0.5  # unit variance
        x = self.text_proj(x.to(dtype))
        if self.text_pool is not None:
            x = x + mix_rows(self.text_pool(text.states, text.mask), weights)
        return LayoutContext(summary + replace_rows(x, drop_text, self.null_text))

    def denoise(
        self, x_t: Tensor, t: Timestep, context: LayoutContext, cache: DenoiserCache | None = None
    ) -> Tensor:
        """Predict the components x_0 from x_t (B, K) at t, (B,) or one number -> (B, K)."""
        condition = F.silu(embed_time(self.time, t, x_t, cache) + context.summary)
        x = self.x_proj(x_t.to(condition.dtype))
        for block in self.mlp:
            x = block(x, condition)
        return self.head(self.out_norm(x))


def layouts(batch: dict[str, Any], size: int) -> Tensor:
    """Return the layouts (B, 3, size, size) of a batch, precomputed or of its images.

    Raises ValueError for precomputed ones of another size, and for embeddings without layouts.
    """
    if "layout" not in batch and "image" not in batch:
        raise ValueError(f"the embeddings have no layouts; compute them with --layout {size}")
    if "layout" not in batch:
        return F.adaptive_avg_pool2d(batch["image"], size)
    if (width := batch["layout"].shape[1]) != 3 * size**2:
        given = f"the data has layouts of {width} numbers"
        raise ValueError(f"{given}; expected {3 * size**2}, for model.size {size}")
    return batch["layout"].view(-1, 3, size, size)
