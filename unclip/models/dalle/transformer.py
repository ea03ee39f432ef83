"""DALL-E's transformer: text tokens and image codes as one autoregressive stream (2102.12092)."""

# B batch, L text tokens, T = L + 1 text positions with the start, N = h * w codes, m some of them,
# V text vocabulary, K codes of the codec, C width, H heads, d width of a head

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from annotated_types import MinLen
from torch import Tensor, nn

from unclip.config import DropRate, PositiveInt, check_multiple, config
from unclip.models.dalle.attention import Kind, Pattern
from unclip.models.dalle.cache import CodeCache
from unclip.models.dalle.code_transformer import CodeGrid, CodeTransformer, check_text
from unclip.models.dalle.layers import Layer, LayerSpec, rotary_angles
from unclip.models.dalle.spans import FirstCodes, FirstTokens, Kernel, NextCode, Span
from unclip.models.layers import DotProductAttention, ModuleList, run_part
from unclip.types import Rows


@config
class DALLEConfig(CodeGrid):
    text_vocab: PositiveInt  # V, of the tokenizer
    context_length: PositiveInt  # L; each padding position of a shorter text has its own token
    image_vocab: PositiveInt  # K, of the codec
    grid: tuple[PositiveInt, PositiveInt]  # h, w codes of an image
    width: PositiveInt
    depth: PositiveInt
    heads: PositiveInt
    head_dim: PositiveInt = 64
    mlp_ratio: PositiveInt = 4
    dropout: DropRate = 0.0
    # attention of the layers, repeated to the depth (B.1)
    attention: Annotated[tuple[Kind, ...], MinLen(1)] = ("row", "column", "row", "row")
    last_attention: Kind | None = "conv"  # of the last layer; None = as the repetition gives
    kernel: PositiveInt = 11  # kernel size of conv and corner attention
    layer: LayerSpec = field(default_factory=LayerSpec)
    positions: Literal["learned", "rotary"] = "learned"  # rotary: as in DALLE-pytorch
    reversible: bool = False  # two residual streams, updated in turn (2001.04451)

    def __post_init__(self) -> None:
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel is {self.kernel}; expected an odd number")
        if self.layer.shift:
            check_multiple("width", self.width, shifted_parts=4)

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        """The attention pattern of each layer."""
        kinds: list[Kind] = [self.attention[i % len(self.attention)] for i in range(self.depth)]
        if self.last_attention is not None:
            kinds[-1] = self.last_attention
        return tuple(Pattern(kind, self.grid, self.kernel) for kind in kinds)


@dataclass(frozen=True)
class DALLEPrefix(Rows):
    """Texts processed once, with one row for each image."""

    logits: Tensor  # of the first code, (B, K)
    kv: Tensor  # keys and values of the text in every layer, (B, layers, 2, H, T, d)

    def repeat_interleave(self, n: int) -> DALLEPrefix:
        """Repeat each row n times; a single row is not copied."""
        if len(self) == 1:
            return self._map(lambda x: x.expand(n, *x.shape[1:]))
        return super().repeat_interleave(n)


class DALLELogits(NamedTuple):
    """Predictions of every token of the stream except the start."""

    text: Tensor  # (B, L, V + L)
    codes: Tensor  # (B, N, K)


class DALLE(CodeTransformer):
    """Stream [start, L text tokens | N codes in raster order], with a head for text and for codes.

    Text tokens are 0 .. V + L - 1; padding position p is token V + p (see `tokens`).
    """

    gradient_checkpointing = False
    attention_kernel: Kernel = "sdpa"  # of `forward`; flex is for CUDA and long streams

    def __init__(self, config: DALLEConfig) -> None:
        super().__init__()
        self.config, self.patterns = config, config.patterns
        C, L = config.width, config.context_length
        text_vocab = config.text_vocab + L
        self.start = nn.Parameter(torch.zeros(C))
        self.text_emb = nn.Embedding(text_vocab, C)
        self.code_emb = nn.Embedding(config.image_vocab, C)
        if config.positions == "learned":
            self.text_positions = nn.Embedding(L + 1, C)
            self.rows, self.columns = (nn.Embedding(size, C) for size in config.grid)
        shape = (C, config.heads, config.head_dim, config.mlp_ratio, config.dropout, config.layer)
        self.layers = ModuleList[Layer](Layer(i, *shape) for i in range(config.depth))
        self.attend = DotProductAttention()
        self.norm = nn.LayerNorm(C)
        self.text_head = nn.Linear(C, text_vocab)
        self.code_head = nn.Linear(C, config.image_vocab)
        self._init_weights()

    def _init_weights(self) -> None:
        """Initialise as GPT-2: normal, with smaller output projections in deeper networks."""
        nn.init.normal_(self.start, std=0.02)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                is_output = name.endswith((".out", ".fc2"))
                scale = (2 * self.config.depth) ** -0.5 if is_output else 1
                nn.init.normal_(module.weight, std=0.02 * scale)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def tokens(self, ids: Tensor, mask: Tensor, drop: Tensor | None = None) -> Tensor:
        """Convert a tokenizer's ids and mask, (B, L) each, to tokens (B, L).

        Rows where `drop` (B,) bool is True become the null text.
        """
        L, V = self.config.context_length, self.config.text_vocab
        check_text(ids, mask, L, V)
        if drop is not None:
            mask = mask & ~drop.to(mask.device)[:, None]
        tokens = torch.where(mask, ids, torch.arange(V, V + L, device=ids.device))
        return tokens.to(self.start.device)

    def null_tokens(self, batch: int) -> Tensor:
        """The null text, padding only, which is also the empty caption: (batch, L)."""
        V, L = self.config.text_vocab, self.config.context_length
        return torch.arange(V, V + L, device=self.start.device).expand(batch, L)

    def forward(self, tokens: Tensor, codes: Tensor) -> DALLELogits:
        """Predict every token: text (B, L), codes (B, N) or (B, h, w) -> logits of both."""
        codes = codes.flatten(1)
        L, N = self.config.context_length, self.config.num_codes
        if codes.shape[1] != N:
            raise ValueError(f"an image has {codes.shape[1]} codes; this transformer expects {N}")
        device = codes.device
        span = FirstTokens(self.patterns, L + 1, L + N, device, self.attend, self.attention_kernel)
        code_emb = self._embed_codes(codes[:, :-1], torch.arange(N - 1, device=device))
        x = torch.cat([self._embed_text(tokens), code_emb], dim=1)  # B L+N C
        x = self._transform(x, span)
        return DALLELogits(self.text_head(x[:, :L]), self.code_head(x[:, L:]))

    def log_likelihood(self, tokens: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """ln p of each text token (B, L) and of each code (B, N), in nats."""
        codes = codes.flatten(1)
        logits = self(tokens, codes)
        return _log_p(logits.text, tokens), _log_p(logits.codes, codes)

    # Sampling, one code at a time

    def condition(self, tokens: Tensor) -> DALLEPrefix:
        T = self.config.context_length + 1
        span = FirstTokens(self.patterns, T, T, tokens.device, self.attend)
        x = self._transform(self._embed_text(tokens), span)  # B T C
        return DALLEPrefix(self.code_head(x[:, -1]), torch.stack(span.text_kv, dim=1))

    def start_cache(self, prefix: DALLEPrefix) -> CodeCache:
        shifted_width = self.config.width if self.config.layer.shift else 0
        return CodeCache(prefix.kv, self.patterns, shifted_width)

    def extend(self, codes: Tensor, cache: CodeCache) -> Tensor:
        span = FirstCodes(self.patterns, cache, codes.shape[1], self.attend)
        x = self._embed_codes(codes, span.positions - cache.text)  # B m C
        return self.code_head(self._transform(x, span)[:, -1])

    def step(self, codes: Tensor, position: int | Tensor, cache: CodeCache) -> Tensor:
        span = NextCode(cache, position, self.attend)
        x = self._embed_codes(codes[:, None], span.code_position)  # B 1 C
        return self.code_head(self._transform(x, span)[:, 0])

    # The parts of a pass

    def _embed_text(self, tokens: Tensor) -> Tensor:
        start = self.start.expand(len(tokens), 1, -1)
        x = torch.cat([start, self.text_emb(tokens)], dim=1)  # B T C
        return x + self.text_positions.weight if self.config.positions == "learned" else x

    def _embed_codes(self, codes: Tensor, at: Tensor) -> Tensor:
        """Embed codes (B, m) at positions (m,) of the image -> (B, m, C)."""
        x, width = self.code_emb(codes), self.config.grid[1]
        if self.config.positions == "rotary":
            return x
        return x + self.rows(at // width) + self.columns(at % width)

    def _transform(self, x: Tensor, span: Span) -> Tensor:
        """Apply all layers and the norm: (B, n, C) -> (B, n, C)."""
        config, angles = self.config, None
        if config.positions == "rotary":
            T = config.context_length + 1
            angles = rotary_angles(T, config.grid, config.head_dim, x.device)[span.positions]  # n r
        run = partial(run_part, recompute=self.gradient_checkpointing)
        if config.reversible:
            first = second = x
            for layer in self.layers:
                first = first + run(layer.attention, second, span, angles)
                second = second + run(layer.mlp, first, span)
            return self.norm((first + second) / 2)
        for layer in self.layers:
            x = run(layer, x, span, angles)
        return self.norm(x)


def _log_p(logits: Tensor, targets: Tensor) -> Tensor:
    """(B, n, K), (B, n) -> (B, n)."""
    logits = logits.float().flatten(0, 1)
    return -F.cross_entropy(logits, targets.flatten(), reduction="none").view_as(targets)
