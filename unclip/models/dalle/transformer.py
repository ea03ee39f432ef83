"""DALL-E's transformer: text tokens and image codes as one stream, each predicted from those before (2102.12092)."""

# B batch, L text tokens, T = L + 1 text positions with the start, N = h * w codes, m some of them, V text tokens,
# K codes of the codec, C width, H heads, d width of a head

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unclip.models.dalle.attention import Kind, Pattern
from unclip.models.dalle.cache import CodeCache
from unclip.models.dalle.layers import Layer, LayerSpec
from unclip.models.dalle.rotary import rotary_angles, rotate
from unclip.models.dalle.streams import FirstCodes, FromStart, Kernel, NextCode, Run
from unclip.models.layers import Linear


class CodeGrid:
    """Of a transformer that writes codes: what its config says of them."""

    image_vocab: int
    grid: tuple[int, int]

    @property
    def num_codes(self) -> int:
        """N."""
        return self.grid[0] * self.grid[1]

    def check_codec(self, vocab_size: int, grid: tuple[int, int]) -> None:
        """ValueError unless a codec of this vocabulary and grid is the one that the transformer writes for."""
        if (vocab_size, tuple(grid)) != (self.image_vocab, tuple(self.grid)):
            raise ValueError(
                f"the codec has {vocab_size} codes on a grid of {grid[0]} x {grid[1]}; the transformer expects "
                f"{self.image_vocab} on {self.grid[0]} x {self.grid[1]}"
            )


@dataclass(frozen=True)
class DALLEConfig(CodeGrid):
    text_vocab: int  # V, of the tokenizer
    context_length: (
        int  # L, text tokens; a shorter text is padded, each place by a token of its own
    )
    image_vocab: int  # K, of the codec
    grid: tuple[int, int]  # h, w codes of a picture
    width: int
    depth: int
    heads: int
    head_dim: int = 64
    mlp_ratio: int = 4
    dropout: float = 0.0
    attention: tuple[Kind, ...] = (
        "row",
        "column",
        "row",
        "row",
    )  # of the layers, over and over (B.1)
    last_attention: Kind | None = "conv"  # of the last layer, if that is another
    kernel: int = 11  # side of the conv kind's kernel, and of corner's
    layer: LayerSpec = field(default_factory=LayerSpec)
    positions: Literal["learned", "rotary"] = "learned"  # rotary: DALLE-pytorch's
    reversible: bool = (
        False  # two residual streams, a branch from one to the other in turn (2001.04451)
    )

    def __post_init__(self) -> None:
        sizes = (
            "text_vocab",
            "context_length",
            "image_vocab",
            "width",
            "depth",
            "heads",
            "head_dim",
            "mlp_ratio",
        )
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if min(self.grid) < 1:
            raise ValueError(
                f"grid is {self.grid}; expected rows and columns of codes, at least 1 each"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout}; expected a fraction in [0, 1)")
        if not self.attention:
            raise ValueError(
                "attention is empty; expected the kind of each layer, or of the first ones, then repeated"
            )
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel is {self.kernel}; expected an odd number")
        if self.layer.shift and self.width % 4:
            raise ValueError(f"width is {self.width}; shifted layers need a multiple of 4")

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        """The attention of each layer."""
        kinds = [self.attention[i % len(self.attention)] for i in range(self.depth)]
        if self.last_attention is not None:
            kinds[-1] = self.last_attention
        return tuple(Pattern(kind, self.grid, self.kernel) for kind in kinds)


@dataclass(frozen=True)
class TextPrefix:
    """What the transformer makes of B texts, computed once and continued by any number of pictures."""

    kv: Tensor  # keys and values of the text in every layer, (B, layers, 2, H, T, d)
    logits: Tensor  # of the first code, (B, K)

    def __len__(self) -> int:
        return len(self.logits)

    def __getitem__(self, rows: slice | Tensor) -> TextPrefix:
        """Some rows of the batch; `rows` is a slice or an index or mask tensor."""
        return TextPrefix(self.kv[rows], self.logits[rows])

    def repeat_interleave(self, n: int) -> TextPrefix:
        """Each row n times in a row: (B, ...) -> (B * n, ...); a single row is not copied."""
        if len(self) == 1:
            return TextPrefix(self.kv.expand(n, *self.kv.shape[1:]), self.logits.expand(n, -1))
        return TextPrefix(
            self.kv.repeat_interleave(n, dim=0), self.logits.repeat_interleave(n, dim=0)
        )

    @staticmethod
    def cat(parts: Sequence[TextPrefix]) -> TextPrefix:
        """Rows of all parts one after the other."""
        return TextPrefix(
            torch.cat([part.kv for part in parts]), torch.cat([part.logits for part in parts])
        )


class DALLELogits(NamedTuple):
    """Predictions of every token of the stream but the start."""

    text: Tensor  # (B, L, V + L)
    codes: Tensor  # (B, N, K)


class DALLE(nn.Module):
    """Stream [start, L text tokens | N image codes in raster order]; one head predicts text, one codes.

    A text is given as tokens (B, L) of 0 .. V + L - 1, in which place p of the padding holds V + p: see `tokens`.
    """

    gradient_checkpointing = False
    attention_kernel: Kernel = "sdpa"  # of `forward`; flex is for CUDA, and long streams

    def __init__(self, config: DALLEConfig) -> None:
        super().__init__()
        self.config, self.patterns = config, config.patterns
        C, L, text_vocab = (
            config.width,
            config.context_length,
            config.text_vocab + config.context_length,
        )
        self.start = nn.Parameter(torch.zeros(C))
        self.text_emb = nn.Embedding(text_vocab, C)
        self.code_emb = nn.Embedding(config.image_vocab, C)
        if config.positions == "learned":
            self.text_positions = nn.Embedding(L + 1, C)
            self.rows, self.columns = (nn.Embedding(size, C) for size in config.grid)
        shape = (C, config.heads, config.head_dim, config.mlp_ratio, config.dropout, config.layer)
        self.layers = nn.ModuleList(Layer(*shape) for _ in range(config.depth))
        self.norm = nn.LayerNorm(C)
        self.text_head = Linear(C, text_vocab)
        self.code_head = Linear(C, config.image_vocab)
        self._init_weights()

    def _init_weights(self) -> None:
        """As GPT-2: normal, the ends of residual branches smaller the more of them are added up."""
        nn.init.normal_(self.start, std=0.02)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                is_end = name.endswith((".out", ".fc2"))
                nn.init.normal_(
                    module.weight, std=0.02 * ((2 * self.config.depth) ** -0.5 if is_end else 1)
                )
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def tokens(self, ids: Tensor, mask: Tensor, drop: Tensor | None = None) -> Tensor:
        """A tokenizer's ids (B, L) and mask (B, L) -> tokens (B, L); rows where `drop` (B,) is True become the null."""
        L, V = self.config.context_length, self.config.text_vocab
        check_text(ids, mask, L, V)
        if drop is not None:
            mask = mask & ~drop.to(mask.device)[:, None]
        return torch.where(mask, ids, torch.arange(V, V + L, device=ids.device)).to(
            self.start.device
        )

    def null_tokens(self, batch: int) -> Tensor:
        """The text that says nothing, every place its padding: (batch, L). The empty caption is the same."""
        V, L = self.config.text_vocab, self.config.context_length
        return torch.arange(V, V + L, device=self.start.device).expand(batch, L)

    def _embed_text(self, tokens: Tensor) -> Tensor:
        x = torch.cat(
            [self.start.expand(len(tokens), 1, -1), self.text_emb(tokens)], dim=1
        )  # B T C
        return x + self.text_positions.weight if self.config.positions == "learned" else x

    def _embed_codes(self, codes: Tensor, at: Tensor) -> Tensor:
        """Codes (B, m) at positions (m,) of the picture -> (B, m, C)."""
        x, width = self.code_emb(codes), self.config.grid[1]
        return (
            x + self.rows(at // width) + self.columns(at % width)
            if self.config.positions == "learned"
            else x
        )

    def _through(self, x: Tensor, run: Run) -> Tensor:
        """All layers: (B, n, C) -> normalised (B, n, C)."""
        config, other = self.config, x
        angles = None
        if config.positions == "rotary":
            angles = rotary_angles(
                config.context_length + 1, config.grid, config.head_dim, x.device
            )[run.at]  # n r

        def attend(i: int, q: Tensor, kv: Tensor) -> Tensor:
            if angles is not None:  # the values too
                q, kv = rotate(q, angles), rotate(kv, angles)
            return run.attend(i, q, kv)

        for i, layer in enumerate(self.layers):
            seeing = partial(attend, i), partial(run.shift, i)
            if config.reversible:
                x = x + layer.attention(other, *seeing)
                other = other + layer.mlp(x, seeing[1])
            elif self.gradient_checkpointing and self.training:
                x = checkpoint(layer, x, *seeing, use_reentrant=False)
            else:
                x = layer(x, *seeing)
        return self.norm((x + other) / 2 if config.reversible else x)

    def forward(self, tokens: Tensor, codes: Tensor) -> DALLELogits:
        """Text tokens (B, L) and codes (B, N) or (B, h, w) -> logits of both, each from what stands before it."""
        codes = codes.flatten(1)
        L, N = self.config.context_length, self.config.num_codes
        if codes.shape[1] != N:
            raise ValueError(f"{codes.shape[1]} codes a picture; this transformer expects {N}")
        run = FromStart(self.patterns, L + 1, L + N, codes.device, self.attention_kernel)
        of_codes = self._embed_codes(codes[:, :-1], torch.arange(N - 1, device=codes.device))
        x = torch.cat([self._embed_text(tokens), of_codes], dim=1)  # B L+N C
        x = self._through(x, run)
        return DALLELogits(self.text_head(x[:, :L]), self.code_head(x[:, L:]))

    def log_likelihood(self, tokens: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """ln p of each text token (B, L) and of each code (B, N), in nats."""
        codes = codes.flatten(1)
        logits = self(tokens, codes)
        return _log_p(logits.text, tokens), _log_p(logits.codes, codes)

    # -- one code after the other

    def condition(self, tokens: Tensor) -> TextPrefix:
        """The part of the stream that is the same for all pictures of a text: tokens (B, L)."""
        T = self.config.context_length + 1
        run = FromStart(self.patterns, T, T, tokens.device)
        x = self._through(self._embed_text(tokens), run)  # B T C
        return TextPrefix(torch.stack(run.kept, dim=1), self.code_head(x[:, -1]))

    def start_cache(self, prefix: TextPrefix) -> CodeCache:
        """An empty picture for each row of the prefix."""
        return CodeCache(
            prefix.kv, self.patterns, self.config.width if self.config.layer.shift else 0
        )

    def extend(self, codes: Tensor, cache: CodeCache) -> Tensor:
        """The first m codes (B, m) at once, into an empty cache -> logits of the next one (B, K)."""
        run = FirstCodes(self.patterns, cache, codes.shape[1], codes.device)
        x = self._embed_codes(codes, run.at - cache.text)  # B m C
        return self.code_head(self._through(x, run)[:, -1])

    def step(self, codes: Tensor, position: int | Tensor, cache: CodeCache) -> Tensor:
        """The code (B,) at `position` -> logits of the next one (B, K).

        With the position as a tensor () no shape depends on it, so one compiled graph serves every step.
        """
        run = NextCode(cache, position)
        x = self._embed_codes(codes[:, None], run.position)  # B 1 C
        return self.code_head(self._through(x, run)[:, 0])


def _log_p(logits: Tensor, targets: Tensor) -> Tensor:
    """(B, n, K), (B, n) -> (B, n)."""
    return -F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), reduction="none"
    ).view_as(targets)


def check_text(ids: Tensor, mask: Tensor, length: int, vocab: int) -> None:
    """Raise ValueError unless ids are (B, length), and those that the mask (B, length) shows are below `vocab`."""
    if ids.ndim != 2 or ids.shape[1] != length:
        raise ValueError(
            f"text ids are of shape {tuple(ids.shape)}; this transformer expects (B, {length})"
        )
    if mask.any() and not 0 <= int(ids[mask].min()) <= int(ids[mask].max()) < vocab:
        low, high = int(ids[mask].min()), int(ids[mask].max())
        raise ValueError(
            f"text ids run from {low} to {high}; this transformer knows 0 to {vocab - 1}"
        )
