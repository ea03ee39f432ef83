"""DALL-E mini and mega: an encoder reads the text, a decoder writes the codes (BART, 1910.13461).

It answers the same calls as `dalle.DALLE`, and `sample_codes` draws from both.
"""

# P texts, n pictures of each, B batch (P * n), L text tokens, N = h * w codes, m some of them, V text tokens,
# K codes of the codec, C width, H heads, d width of a head

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.models.dalle.attention import Pattern
from unclip.models.dalle.cache import CodeCache
from unclip.models.dalle.streams import FirstCodes, FromStart, NextCode, Run
from unclip.models.dalle.transformer import CodeGrid, check_text
from unclip.models.layers import Linear, attend

See = Callable[
    [Tensor, Tensor], Tensor
]  # queries (B, H, m, d), keys and values (B, 2, H, m, d) -> (B, H, m, d)
Read = Callable[[Tensor], Tensor]  # queries (B, H, m, d) -> (B, H, m, d)


@dataclass(frozen=True)
class BartDALLEConfig(CodeGrid):
    """DALL-E mega, unless told otherwise."""

    text_vocab: int = 50272  # V
    context_length: int = 64  # L; a text's padding is not seen
    image_vocab: int = 16384  # K, of the codec
    grid: tuple[int, int] = (16, 16)  # h, w codes of a picture
    width: int = 2048
    encoder_depth: int = 24
    decoder_depth: int = 24
    heads: int = 32
    mlp_width: int = 4096
    pad_id: int = 1
    null: tuple[int, ...] = (0, 2)  # the text that says nothing: its start and its end

    def __post_init__(self) -> None:
        sizes = (
            "text_vocab",
            "context_length",
            "image_vocab",
            "width",
            "encoder_depth",
            "decoder_depth",
            "heads",
        )
        for name in (*sizes, "mlp_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if min(self.grid) < 1:
            raise ValueError(
                f"grid is {self.grid}; expected rows and columns of codes, at least 1 each"
            )
        if self.width % self.heads:
            raise ValueError(f"width is {self.width}; expected a multiple of heads = {self.heads}")
        if not 0 < len(self.null) <= self.context_length:
            raise ValueError(f"null is {self.null}; expected 1 to {self.context_length} tokens")


class Attention(nn.Module):
    """A branch with a norm before and one behind it."""

    def __init__(self, config: BartDALLEConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm = nn.LayerNorm(config.width)
        self.out = Linear(config.width, config.width, bias=False)
        self.norm_out = nn.LayerNorm(config.width)

    def left(self, h: Tensor) -> Tensor:
        """What leaves the heads, (B, H, m, d) -> (B, m, C)."""
        return self.norm_out(self.out(h.transpose(1, 2).flatten(2)))


class SelfAttention(Attention):
    def __init__(self, config: BartDALLEConfig) -> None:
        super().__init__(config)
        self.qkv = Linear(config.width, 3 * config.width, bias=False)

    def forward(self, x: Tensor, see: See) -> Tensor:
        """(B, m, C) -> (B, m, C)."""
        qkv = (
            self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(0, 2, 3, 1, 4)
        )  # B 3 H m d
        return self.left(see(qkv[:, 0], qkv[:, 1:]))


class CrossAttention(Attention):
    """Reads the text, whose keys and values are made once and then given to every picture of it."""

    def __init__(self, config: BartDALLEConfig) -> None:
        super().__init__(config)
        self.q = Linear(config.width, config.width, bias=False)
        self.kv = Linear(config.width, 2 * config.width, bias=False)

    def of_text(self, states: Tensor) -> Tensor:
        """What the encoder says, (P, L, C) -> keys and values (P, 2, H, L, d)."""
        return self.kv(states).unflatten(-1, (2, self.heads, -1)).permute(0, 2, 3, 1, 4)

    def forward(self, x: Tensor, read: Read) -> Tensor:
        """(B, m, C) -> (B, m, C)."""
        q = self.q(self.norm(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # B H m d
        return self.left(read(q))


class GatedMLP(nn.Module):
    """gelu(a) * b of two projections (2002.05202), with a norm before and one inside."""

    def __init__(self, config: BartDALLEConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width)
        self.fc1 = Linear(config.width, 2 * config.mlp_width, bias=False)
        self.norm_in = nn.LayerNorm(config.mlp_width)
        self.fc2 = Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, h = self.fc1(self.norm(x)).chunk(2, dim=-1)
        return self.fc2(self.norm_in(F.gelu(gate) * h))


class EncoderLayer(nn.Module):
    def __init__(self, config: BartDALLEConfig) -> None:
        super().__init__()
        self.attention = SelfAttention(config)
        self.mlp = GatedMLP(config)

    def forward(self, x: Tensor, see: See) -> Tensor:
        x = x + self.attention(x, see)
        return x + self.mlp(x)


class DecoderLayer(nn.Module):
    def __init__(self, config: BartDALLEConfig) -> None:
        super().__init__()
        self.attention = SelfAttention(config)
        self.cross = CrossAttention(config)
        self.mlp = GatedMLP(config)

    def forward(self, x: Tensor, see: See, read: Read) -> Tensor:
        x = x + self.attention(x, see)
        x = x + self.cross(x, read)
        return x + self.mlp(x)


@dataclass(frozen=True)
class Texts:
    """P texts as the decoder's layers read them; all n pictures of a text read the same memory."""

    kv: Tensor  # keys and values, (P, layers, 2, H, L, d)
    mask: Tensor  # (P, L) bool, True = a token
    each: int = 1  # n

    @property
    def batch(self) -> int:
        """P * n."""
        return len(self.kv) * self.each

    def read(self, layer: int, q: Tensor) -> Tensor:
        """Queries (P * n, H, m, d), those of a text's pictures side by side -> the same shape."""
        shape = (self.each, q.shape[2])  # n m
        q = q.unflatten(0, (len(self.kv), self.each)).transpose(1, 2).flatten(2, 3)  # P H n*m d
        h = attend(q, *self.kv[:, layer].unbind(1), self.mask[:, None, None])
        return h.unflatten(2, shape).transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True)
class BartPrefix:
    """All that is the same for every picture of a text: what the decoder reads of it, and where it starts from."""

    texts: tuple[Texts, ...]  # of B pictures in all
    start_kv: Tensor  # keys and values of the start in every layer, (B, layers, 2, H, 1, d)
    logits: Tensor  # of the first code, (B, K)

    def __len__(self) -> int:
        return len(self.logits)

    def repeat_interleave(self, n: int) -> BartPrefix:
        """Each row n times in a row: (B, ...) -> (B * n, ...); the texts are not copied."""
        texts = tuple(Texts(text.kv, text.mask, text.each * n) for text in self.texts)
        return BartPrefix(
            texts, *(x.repeat_interleave(n, dim=0) for x in (self.start_kv, self.logits))
        )

    @staticmethod
    def cat(parts: Sequence[BartPrefix]) -> BartPrefix:
        """Rows of all parts one after the other; the texts are not copied."""
        texts = tuple(text for part in parts for text in part.texts)
        return BartPrefix(
            texts,
            *(torch.cat([getattr(p, name) for p in parts]) for name in ("start_kv", "logits")),
        )


@dataclass(frozen=True)
class BartCache:
    """Pictures in the making, and their texts."""

    texts: tuple[Texts, ...]
    codes: CodeCache


class BartLogits(NamedTuple):
    codes: Tensor  # (B, N, K)


class BartDALLE(nn.Module):
    """Text tokens (P, L), padding included (see `tokens`), and codes in raster order behind a start of their own."""

    def __init__(self, config: BartDALLEConfig) -> None:
        super().__init__()
        self.config = config
        self.patterns = (Pattern("full", config.grid),) * config.decoder_depth
        C = config.width
        self.text_emb = nn.Embedding(config.text_vocab, C)
        self.text_positions = nn.Embedding(config.context_length, C)
        self.text_norm = nn.LayerNorm(C)
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_depth))
        self.encoder_norm = nn.LayerNorm(C)
        self.start = nn.Parameter(torch.zeros(C))
        self.code_emb = nn.Embedding(config.image_vocab, C)
        self.code_positions = nn.Embedding(
            config.num_codes, C
        )  # the start is at 0, code n at n + 1
        self.code_norm = nn.LayerNorm(C)
        self.decoder = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_depth))
        self.decoder_norm = nn.LayerNorm(C)
        self.code_head = Linear(C, config.image_vocab, bias=False)
        for p in self.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.02)

    def tokens(self, ids: Tensor, mask: Tensor) -> Tensor:
        """A tokenizer's ids (P, L) and mask (P, L) -> tokens (P, L)."""
        check_text(ids, mask, self.config.context_length, self.config.text_vocab)
        return ids.masked_fill(~mask, self.config.pad_id).to(self.start.device)

    def null_tokens(self, batch: int) -> Tensor:
        """The text that says nothing: (batch, L)."""
        tokens = torch.full((batch, self.config.context_length), self.config.pad_id)
        tokens[:, : len(self.config.null)] = torch.tensor(self.config.null)
        return tokens.to(self.start.device)

    def encode(self, tokens: Tensor) -> Tensor:
        """Tokens (P, L) -> what the encoder says of them (P, L, C)."""
        mask = (tokens != self.config.pad_id)[:, None, None]  # P 1 1 L
        x = self.text_norm(self.text_emb(tokens) + self.text_positions.weight)
        for layer in self.encoder:
            x = layer(x, lambda q, kv: attend(q, *kv.unbind(1), mask))
        return self.encoder_norm(x)

    def read(self, tokens: Tensor) -> Texts:
        """Tokens (P, L) -> the keys and values that the decoder's layers make of them."""
        states = self.encode(tokens)
        kv = torch.stack([layer.cross.of_text(states) for layer in self.decoder], dim=1)
        return Texts(kv, tokens != self.config.pad_id)

    def _embed(self, codes: Tensor, at: Tensor) -> Tensor:
        """Codes (B, m) that stand at positions (m,) of the stream -> (B, m, C)."""
        return self.code_norm(self.code_emb(codes) + self.code_positions(at))

    def _embed_start(self, batch: int) -> Tensor:
        return self.code_norm(self.start + self.code_positions.weight[:1]).expand(batch, 1, -1)

    def _through(self, x: Tensor, run: Run, texts: Sequence[Texts]) -> Tensor:
        """The decoder's layers: (B, m, C) -> normalised (B, m, C)."""
        sizes = [text.batch for text in texts]

        def read(i: int, q: Tensor) -> Tensor:
            return torch.cat(
                [text.read(i, part) for text, part in zip(texts, q.split(sizes), strict=True)]
            )

        for i, layer in enumerate(self.decoder):
            x = layer(x, partial(run.attend, i), partial(read, i))
        return self.decoder_norm(x)

    def forward(self, tokens: Tensor, codes: Tensor) -> BartLogits:
        """Text tokens (B, L) and codes (B, N) or (B, h, w) -> logits of the codes, each from what stands before it."""
        codes, N = codes.flatten(1), self.config.num_codes
        if codes.shape[1] != N:
            raise ValueError(f"{codes.shape[1]} codes a picture; this transformer expects {N}")
        run = FromStart(self.patterns, 1, N, codes.device)
        x = torch.cat(
            [self._embed_start(len(codes)), self._embed(codes[:, :-1], run.at[1:])], dim=1
        )  # B N C
        return BartLogits(self.code_head(self._through(x, run, [self.read(tokens)])))

    # -- one code after the other

    def condition(self, tokens: Tensor) -> BartPrefix:
        """What is the same for all pictures of a text: tokens (P, L)."""
        texts = self.read(tokens)
        run = FromStart(self.patterns, 1, 1, tokens.device)
        x = self._through(self._embed_start(len(tokens)), run, [texts])  # P 1 C
        return BartPrefix((texts,), torch.stack(run.kept, dim=1), self.code_head(x[:, -1]))

    def start_cache(self, prefix: BartPrefix) -> BartCache:
        """An empty picture for each row of the prefix."""
        return BartCache(prefix.texts, CodeCache(prefix.start_kv, self.patterns))

    def extend(self, codes: Tensor, cache: BartCache) -> Tensor:
        """The first m codes (B, m) at once, into an empty cache -> logits of the next one (B, K)."""
        run = FirstCodes(self.patterns, cache.codes, codes.shape[1], codes.device)
        return self.code_head(self._through(self._embed(codes, run.at), run, cache.texts)[:, -1])

    def step(self, codes: Tensor, position: int | Tensor, cache: BartCache) -> Tensor:
        """The code (B,) at `position` -> logits of the next one (B, K).

        With the position as a tensor () no shape depends on it, so one compiled graph serves every step.
        """
        run = NextCode(cache.codes, position)
        return self.code_head(
            self._through(self._embed(codes[:, None], run.at), run, cache.texts)[:, 0]
        )
