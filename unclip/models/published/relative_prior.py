"""A diffusion prior with relative positions: DALLE2-pytorch's causal transformer (LAION's weights).

Differences from `DiffusionPrior` (unCLIP 2.2): relative position biases (T5, 1910.10683, 2.1) and
rotary embeddings (2104.09864) in place of absolute positions, one head of keys and values for all
queries (1911.02150) with a learned null key, norms without biases before and after attention,
SwiGLU (2002.05202), and CLIP embeddings of unit length.
"""

# B batch, N text slots, C width (= CLIP embedding width = text width), H heads, d head width,
# n tokens, m keys

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from unclip.config import Positive, PositiveInt, config
from unclip.models.layers import (
    Denoiser,
    DenoiserCache,
    KeyValues,
    ModuleList,
    Timestep,
    normal_parameter,
    per_row,
)
from unclip.types import TextEncoding

BUCKETS = 32  # of distances, with one bias each
FARTHEST = 128  # distances from this on share the last bucket
ROTATED = 32  # components of a head with rotary embeddings
COSINE_SCALE = 16.0


@config
class RelativePriorConfig:
    width: PositiveInt  # C, also of CLIP's embeddings and text states
    context_length: PositiveInt  # N, slots for text tokens
    depth: PositiveInt
    heads: PositiveInt
    head_dim: PositiveInt = 64
    mlp_ratio: Positive = 4.0
    mlp_norm: bool = False  # a norm inside the MLP (NormFormer, 2110.09456)
    num_timesteps: int | None = None  # a table of time embeddings; None = sinusoids through an MLP
    # Slots without text: a learned token each (DALL-E 1), or masked
    padding: Literal["learned", "masked"] = "learned"
    # Replacement of dropped texts in training; None = no text was dropped
    text_null: Literal["learned", "masked"] | None = "learned"
    similarity: Literal["cosine", "dot"] = "cosine"  # of queries and keys
    rotary: bool = True
    norm_in: bool = False
    norm_out: bool = True
    # Norms that divide by the largest entry (CogView, 2105.13290)
    peak_norms: Literal["none", "last", "all"] = "last"
    head: bool = True  # a Linear after the last norm

    def __post_init__(self) -> None:
        if self.num_timesteps is None and (self.width % 2 or self.width < 4):
            raise ValueError(f"width is {self.width}; time sinusoids need an even number >= 4")
        if self.text_null == "learned" and self.padding != "learned":
            raise ValueError('text_null is "learned", which needs padding "learned"; got "masked"')

    # The names that all priors share.
    @property
    def emb_dim(self) -> int:
        return self.width

    @property
    def text_width(self) -> int:
        return self.width

    @property
    def null_text(self) -> Literal["learned"]:
        """The null is never the empty prompt."""
        return "learned"


class PeakLayerNorm(nn.LayerNorm):
    """LayerNorm of x divided by its largest entry, which changes the sign and the effect of eps."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x / x.amax(dim=-1, keepdim=True))


class RelativeBlock(nn.Module):
    """Attention with one head of keys and values, then SwiGLU.

    `project` is separate, so that keys and values of a prefix can be cached.
    """

    def __init__(self, config: RelativePriorConfig) -> None:
        super().__init__()
        self.config = config
        C, inner = config.width, config.heads * config.head_dim
        mlp = int(config.mlp_ratio * config.width)
        Norm = PeakLayerNorm if config.peak_norms == "all" else nn.LayerNorm
        self.norm1 = Norm(C, bias=False)
        self.q = nn.Linear(C, inner, bias=False)
        self.kv = nn.Linear(C, 2 * config.head_dim, bias=False)
        self.null_kv = normal_parameter(2, config.head_dim)
        self.out = nn.Linear(inner, C, bias=False)
        self.norm2 = Norm(C, bias=False)
        self.norm3 = Norm(C, bias=False)
        self.fc1 = nn.Linear(C, 2 * mlp, bias=False)
        self.norm4 = Norm(mlp, bias=False) if config.mlp_norm else nn.Identity()
        self.fc2 = nn.Linear(mlp, C, bias=False)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project tokens (B, n, C) at `positions` (n,).

        Returns queries (B, H, n, d), keys and values (B, 1, n, d).
        """
        x = self.norm1(x)
        q = rearrange(self.q(x), "b n (h d) -> b h n d", h=self.config.heads)
        k, v = self.kv(x)[:, None].chunk(2, dim=-1)
        if self.config.rotary:
            q, k = rotate(q, positions), rotate(k, positions)
        return self._normalised(q), self._normalised(k), v

    def null(self, batch: int) -> tuple[Tensor, Tensor]:
        """Return the null key and value, (B, 1, 1, d) each."""
        k, v = self.null_kv[:, None, None, None].expand(-1, batch, -1, -1, -1)
        return self._normalised(k), v

    def forward(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """Tokens (B, n, C), their queries, m keys and values, bias (B|1, H, n, m) -> (B, n, C)."""
        cosine = self.config.similarity == "cosine"
        scale = COSINE_SCALE if cosine else self.config.head_dim**-0.5
        k, v = (y.expand(-1, self.config.heads, -1, -1) for y in (k, v))
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)  # B H n d
        x = x + self.norm2(self.out(rearrange(h, "b h n d -> b n (h d)")))
        h, gate = self.fc1(self.norm3(x)).chunk(2, dim=-1)
        return x + self.fc2(self.norm4(h * F.silu(gate)))

    def _normalised(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) if self.config.similarity == "cosine" else x


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotate the first 32 components of (..., n, d) in pairs (RoFormer, 2104.09864, 3.2.2)."""
    dim = min(ROTATED, x.shape[-1])
    frequencies = 10_000.0 ** -(torch.arange(0, dim, 2, device=x.device, dtype=torch.float32) / dim)
    angles = positions[:, None] * frequencies  # n dim/2
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    rotated, rest = x[..., :dim], x[..., dim:]
    even, odd = rotated[..., 0::2], rotated[..., 1::2]
    pairs = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return torch.cat([pairs.flatten(-2), rest], dim=-1)


class TimeTable(nn.Embedding):
    """A learned embedding of each timestep: (B,) -> (B, C)."""

    def forward(self, t: Tensor) -> Tensor:
        return super().forward(t.round().long())


class TimeSinusoids(nn.Sequential):
    """Sinusoids of t through an MLP with two hidden layers: (B,) -> (B, C)."""

    def __init__(self, width: int) -> None:
        hidden = 2 * width
        first, second = nn.Linear(width, hidden), nn.Linear(hidden, hidden)
        super().__init__(first, nn.SiLU(), second, nn.SiLU(), nn.Linear(hidden, width))
        self.width = width

    def forward(self, t: Tensor) -> Tensor:
        return super().forward(sinusoids(t, self.width).to(next(self.parameters()).dtype))


def sinusoids(t: Tensor, dim: int) -> Tensor:
    """Sinusoids [sin, cos] of t: (B,) -> (B, dim) float32.

    The dim / 2 frequencies go from 1 to 1 / 10000, both included.
    """
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, device=t.device) * (-math.log(10_000) / (half - 1)))
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class RelativePrior(Denoiser):
    """Tokens [text states, text embedding | t, x_t, query]; x_0 is read from the query."""

    emb_norm: Tensor
    x0_limit = None  # x_0 has length √C, and single components may be large

    def __init__(self, config: RelativePriorConfig) -> None:
        super().__init__()
        self.config = config
        C = config.width
        steps = config.num_timesteps
        self.time = TimeSinusoids(C) if steps is None else TimeTable(steps, C)
        self.query = normal_parameter(C)
        self.bias = nn.Embedding(BUCKETS, config.heads)
        if config.padding == "learned":
            self.no_token = normal_parameter(config.context_length, C)
        if config.text_null == "learned":
            self.null_emb = normal_parameter(C)
        self.norm_in = self._norm("all") if config.norm_in else nn.Identity()
        self.blocks = ModuleList[RelativeBlock](RelativeBlock(config) for _ in range(config.depth))
        self.norm = self._norm("last", "all") if config.norm_out else nn.Identity()
        self.head = nn.Linear(C, C, bias=False) if config.head else nn.Identity()
        self.register_buffer("emb_norm", torch.ones(()))

    def _norm(self, *peak: str) -> nn.LayerNorm:
        kind = PeakLayerNorm if self.config.peak_norms in peak else nn.LayerNorm
        return kind(self.config.width, bias=False)

    def normalize(self, emb: Tensor) -> Tensor:
        """Scale CLIP image embeddings (..., C) to length √C, which gives about unit variance."""
        return F.normalize(emb, dim=-1) * self.config.width**0.5

    def denormalize(self, x_0: Tensor) -> Tensor:
        """Convert x_0 (..., C) to CLIP image embeddings of length `emb_norm`.

        The length is 1, as in training. For a decoder that was trained on embeddings of CLIP's own
        length, set `prior.emb_norm.fill_(pipe.encode_image(images).norm(dim=-1).mean())`.
        """
        return F.normalize(x_0, dim=-1) * self.emb_norm

    def null_text(self, batch: int) -> TextEncoding:
        """Return the null, a text without tokens. Raises ValueError if there is none."""
        self._check_null()
        emb = self.query.new_zeros(batch, self.config.width)
        return TextEncoding(emb, emb[:, None], emb.new_zeros(batch, 1, dtype=torch.bool))

    def _check_null(self) -> None:
        if self.config.text_null is None:
            raise ValueError(
                "this prior was trained without dropped texts and cannot be guided; "
                "set guidance to 1"
            )

    def condition(self, text: TextEncoding, drop: Tensor | None = None) -> KeyValues:
        """Compute keys and values of the text, which see neither t nor x_t.

        The null replaces texts without tokens, and texts where `drop` (B,) bool is True.
        """
        N = self.config.context_length
        text = fit_text(text, N, "prior")
        B, L = text.mask.shape
        if drop is not None:
            self._check_null()
        text = text.to(dtype=self.query.dtype)
        learned_slots = self.config.padding == "learned"
        learned_null = self.config.text_null == "learned"
        mask = F.pad(text.mask if drop is None else text.mask & ~drop[:, None], (0, N - L))  # B N
        known = mask.any(dim=1, keepdim=True)  # B 1
        # Masked slots are never seen, but must not be 0, because PeakLayerNorm divides by them.
        no_token = self.no_token if learned_slots else self.query
        no_emb = self.null_emb if learned_null else self.query
        states = torch.where(mask[..., None], F.pad(text.states, (0, 0, 0, N - L)), no_token)
        emb = torch.where(known, F.normalize(text.emb, dim=-1), no_emb)
        x = self.norm_in(torch.cat([states, emb[:, None]], dim=1))  # B N+1 C
        parts = [torch.ones_like(known), mask | learned_slots, known | learned_null]
        visible = torch.cat(parts, dim=1)  # B N+2
        positions = torch.arange(N + 1, device=x.device)
        bias = self._attention_bias(positions, visible)  # B H N+1 N+2
        ks, vs = [], []
        for i, block in enumerate(self.blocks):
            q, k, v = block.project(x, positions)
            k_null, v_null = block.null(B)
            ks.append(torch.cat([k_null, k], dim=2))  # B 1 N+2 d
            vs.append(torch.cat([v_null, v], dim=2))
            if i + 1 < len(self.blocks):  # the output of the last block is not needed
                x = block(x, q, ks[-1], vs[-1], bias)
        return KeyValues(tuple(ks), tuple(vs), visible)

    def denoise(
        self, x_t: Tensor, t: Timestep, context: KeyValues, cache: DenoiserCache | None = None
    ) -> Tensor:
        """Predict x_0 from x_t (B, C) at t, (B,) or one number -> (B, C).

        Each row of `context`, from `condition`, serves an equal share of B. The cache is not used.
        """
        B, N = len(x_t), self.config.context_length
        context = context.expand(B)
        tokens = [self.time(per_row(t, x_t)), x_t.to(self.query.dtype), self.query.expand(B, -1)]
        x = self.norm_in(torch.stack(tokens, dim=1))  # B 3 C
        positions = torch.arange(N + 1, N + 4, device=x.device)
        bias = self._attention_bias(positions, F.pad(context.mask, (0, 3), value=True))  # B H 3 N+5
        for block, k_text, v_text in zip(self.blocks, context.k, context.v, strict=True):
            q, k, v = block.project(x, positions)
            x = block(x, q, torch.cat([k_text, k], dim=2), torch.cat([v_text, v], dim=2), bias)
        return self.head(self.norm(x[:, -1]))

    def _attention_bias(self, positions: Tensor, visible: Tensor) -> Tensor:
        """Bias of queries at `positions` (n,) for keys with mask `visible` (B, m): (B, H, n, m).

        It is -inf where a key is not seen.
        """
        # Key 0 is the null and key j the token at j - 1, as in training: a token shares its bucket
        # with its predecessor.
        keys = torch.arange(visible.shape[1], device=positions.device)
        bias = self.bias(bucket(positions[:, None] - keys)).permute(2, 0, 1)  # H n m
        seen = visible[:, None, None] & (keys <= positions[:, None] + 1)  # B 1 n m
        return torch.where(seen, bias, -torch.inf)


def fit_text(text: TextEncoding, slots: int, network: str) -> TextEncoding:
    """Trim the padding of texts to `slots` columns. Raises ValueError if the tokens do not fit."""
    text = text if text.mask.shape[1] <= slots else text.trim()
    if text.mask.shape[1] > slots:
        raise ValueError(
            f"the text has {text.mask.shape[1]} tokens; this {network} takes at most {slots}"
        )
    return text


def bucket(distance: Tensor) -> Tensor:
    """Return T5's buckets of backward distances: one each up to 15, then wider (1910.10683)."""
    near = BUCKETS // 2
    distance = distance.clamp(min=0)
    octaves = torch.log(distance.clamp(min=1).float() / near) / math.log(FARTHEST / near)
    wide = octaves * (BUCKETS - near)
    return torch.where(distance < near, distance, (near + wide.long()).clamp(max=BUCKETS - 1))
