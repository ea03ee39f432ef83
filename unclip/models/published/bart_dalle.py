"""DALL-E mini and mega: an encoder for text and a decoder for codes (BART, 1910.13461)."""

# P texts, n images of each, B batch (P * n), L text tokens, N = h * w codes, m some of them,
# V text vocabulary, K codes of the codec, C width, H heads, d width of a head

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.config import PositiveInt, check_multiple, config
from unclip.models.dalle.attention import Pattern
from unclip.models.dalle.cache import CodeCache
from unclip.models.dalle.code_transformer import CodeGrid, CodeTransformer, check_text
from unclip.models.dalle.spans import Attend, FirstCodes, FirstTokens, NextCode, Span
from unclip.models.layers import DotProductAttention, ModuleList
from unclip.types import Rows

AttendSelf = Callable[[Tensor, Tensor], Tensor]  # q (B, H, m, d), kv (B, 2, H, m, d) -> as q
AttendText = Callable[[Tensor], Tensor]  # q (B, H, m, d) -> (B, H, m, d)


@config
class BartDALLEConfig(CodeGrid):
    """The defaults are those of DALL-E mega."""

    text_vocab: PositiveInt = 50272  # V
    context_length: PositiveInt = 64  # L; padding is masked
    image_vocab: PositiveInt = 16384  # K, of the codec
    grid: tuple[PositiveInt, PositiveInt] = (16, 16)  # h, w codes of an image
    width: PositiveInt = 2048
    encoder_depth: PositiveInt = 24
    decoder_depth: PositiveInt = 24
    heads: PositiveInt = 32
    mlp_width: PositiveInt = 4096
    pad_id: int = 1
    null: tuple[int, ...] = (0, 2)  # tokens of the empty text: start and end

    def __post_init__(self) -> None:
        check_multiple("width", self.width, heads=self.heads)
        if not 0 < len(self.null) <= self.context_length:
            raise ValueError(f"null is {self.null}; expected 1 to {self.context_length} tokens")


class Attention(nn.Module):
    """Attention branch with a norm before and after."""

    def __init__(self, config: BartDALLEConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm = nn.LayerNorm(config.width)
        self.out = nn.Linear(config.width, config.width, bias=False)
        self.norm_out = nn.LayerNorm(config.width)

    def project_out(self, h: Tensor) -> Tensor:
        """(B, H, m, d) -> (B, m, C)."""
        return self.norm_out(self.out(h.transpose(1, 2).flatten(2)))


class SelfAttention(Attention):
    def __init__(self, config: BartDALLEConfig) -> None:
        super().__init__(config)
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)

    def forward(self, x: Tensor, attend: AttendSelf) -> Tensor:
        """(B, m, C) -> (B, m, C)."""
        qkv = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1))
        qkv = qkv.permute(0, 2, 3, 1, 4)  # B 3 H m d
        return self.project_out(attend(qkv[:, 0], qkv[:, 1:]))


class CrossAttention(Attention):
    """Attention to the text, whose keys and values all images of a prompt share."""

    def __init__(self, config: BartDALLEConfig) -> None:
        super().__init__(config)
        self.q = nn.Linear(config.width, config.width, bias=False)
        self.kv = nn.Linear(config.width, 2 * config.width, bias=False)

    def project_text(self, states: Tensor) -> Tensor:
        """Encoder output (P, L, C) -> keys and values (P, 2, H, L, d)."""
        return self.kv(states).unflatten(-1, (2, self.heads, -1)).permute(0, 2, 3, 1, 4)

    def forward(self, x: Tensor, attend: AttendText) -> Tensor:
        """(B, m, C) -> (B, m, C)."""
        q = self.q(self.norm(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # B H m d
        return self.project_out(attend(q))


class GatedMLP(nn.Module):
    """gelu(a) * b of two projections (2002.05202), with a norm before and one inside."""

    def __init__(self, config: BartDALLEConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width)
        self.fc1 = nn.Linear(config.width, 2 * config.mlp_width, bias=False)
        self.norm_in = nn.LayerNorm(config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, h = self.fc1(self.norm(x)).chunk(2, dim=-1)
        return self.fc2(self.norm_in(F.gelu(gate) * h))


class EncoderLayer(nn.Module):
    def __init__(self, config: BartDALLEConfig) -> None:
        super().__init__()
        self.attention = SelfAttention(config)
        self.mlp = GatedMLP(config)

    def forward(self, x: Tensor, attend: AttendSelf) -> Tensor:
        x = x + self.attention(x, attend)
        return x + self.mlp(x)


class DecoderLayer(nn.Module):
    def __init__(self, config: BartDALLEConfig) -> None:
        super().__init__()
        self.attention = SelfAttention(config)
        self.cross = CrossAttention(config)
        self.mlp = GatedMLP(config)

    def forward(self, x: Tensor, attend_self: AttendSelf, attend_text: AttendText) -> Tensor:
        x = x + self.attention(x, attend_self)
        x = x + self.cross(x, attend_text)
        return x + self.mlp(x)


@dataclass(frozen=True)
class EncodedTexts:
    """Keys and values of P texts for the decoder; the n images of a text share them."""

    kv: Tensor  # (P, layers, 2, H, L, d)
    mask: Tensor  # (P, L) bool, True = a token
    images: int = 1  # n

    @property
    def batch(self) -> int:
        """P * n."""
        return len(self.kv) * self.images

    def select(self, rows: Tensor) -> EncodedTexts:
        """Return the texts of some images, in order; shared if all texts keep equally many."""
        at, counts = (rows // self.images).unique_consecutive(return_counts=True)
        if (counts != counts[0]).any():
            at, counts = rows // self.images, counts.new_ones(1)
        return EncodedTexts(self.kv[at], self.mask[at], int(counts[0]))

    def attend(self, dot_product: Attend, layer: int, q: Tensor) -> Tensor:
        """Queries (P * n, H, m, d), grouped by text -> the same shape."""
        n, m = self.images, q.shape[2]
        q = q.unflatten(0, (-1, n)).transpose(1, 2).flatten(2, 3)  # P H n*m d
        h = dot_product(q, *self.kv[:, layer].unbind(1), self.mask[:, None, None])
        return h.unflatten(2, (n, m)).transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True)
class BartPrefix(Rows):
    """Texts processed once, with one row for each image."""

    logits: Tensor  # of the first code, (B, K)
    start_kv: Tensor  # keys and values of the start in every layer, (B, layers, 2, H, 1, d)
    texts: tuple[EncodedTexts, ...]  # of B images in all

    def repeat_interleave(self, n: int) -> BartPrefix:
        """Repeat each row n times: (B, ...) -> (B * n, ...). Texts are not copied."""
        texts = tuple(replace(text, images=text.images * n) for text in self.texts)
        logits, start_kv = (x.repeat_interleave(n, dim=0) for x in (self.logits, self.start_kv))
        return BartPrefix(logits, start_kv, texts)

    @classmethod
    def cat(cls, parts: Sequence[BartPrefix]) -> BartPrefix:
        """Concatenate the rows of all parts. Texts are not copied."""
        return cls(
            torch.cat([part.logits for part in parts]),
            torch.cat([part.start_kv for part in parts]),
            tuple(text for part in parts for text in part.texts),
        )


@dataclass(frozen=True)
class BartCache:
    texts: tuple[EncodedTexts, ...]
    codes: CodeCache

    def select(self, rows: Tensor) -> BartCache:
        """Return the cache of some images, in order."""
        texts, start = [], 0
        for text in self.texts:
            own = rows[(start <= rows) & (rows < start + text.batch)] - start
            texts += [text.select(own)] if len(own) else []
            start += text.batch
        return BartCache(tuple(texts), self.codes.select(rows))


class BartLogits(NamedTuple):
    codes: Tensor  # (B, N, K)


class BartDALLE(CodeTransformer):
    """Text tokens (P, L) with padding (see `tokens`); codes in raster order after a start token."""

    def __init__(self, config: BartDALLEConfig) -> None:
        super().__init__()
        self.config = config
        self.patterns = (Pattern("full", config.grid),) * config.decoder_depth
        C = config.width
        self.attend = DotProductAttention()
        self.text_emb = nn.Embedding(config.text_vocab, C)
        self.text_positions = nn.Embedding(config.context_length, C)
        self.text_norm = nn.LayerNorm(C)
        self.encoder = ModuleList[EncoderLayer](
            EncoderLayer(config) for _ in range(config.encoder_depth)
        )
        self.encoder_norm = nn.LayerNorm(C)
        self.start = nn.Parameter(torch.zeros(C))
        self.code_emb = nn.Embedding(config.image_vocab, C)
        self.code_positions = nn.Embedding(config.num_codes, C)  # 0 start, n + 1 code n
        self.code_norm = nn.LayerNorm(C)
        self.decoder = ModuleList[DecoderLayer](
            DecoderLayer(config) for _ in range(config.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(C)
        self.code_head = nn.Linear(C, config.image_vocab, bias=False)
        for p in self.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.02)

    def tokens(self, ids: Tensor, mask: Tensor) -> Tensor:
        check_text(ids, mask, self.config.context_length, self.config.text_vocab)
        return ids.masked_fill(~mask, self.config.pad_id).to(self.start.device)

    def null_tokens(self, batch: int) -> Tensor:
        tokens = torch.full((batch, self.config.context_length), self.config.pad_id)
        tokens[:, : len(self.config.null)] = torch.tensor(self.config.null)
        return tokens.to(self.start.device)

    def forward(self, tokens: Tensor, codes: Tensor) -> BartLogits:
        """Predict every code: text (B, L), codes (B, N) or (B, h, w) -> logits."""
        codes, N = codes.flatten(1), self.config.num_codes
        if codes.shape[1] != N:
            raise ValueError(f"an image has {codes.shape[1]} codes; this transformer expects {N}")
        span = FirstTokens(self.patterns, 1, N, codes.device, self.attend)
        code_emb = self._embed(codes[:, :-1], span.positions[1:])
        x = torch.cat([self._embed_start(len(codes)), code_emb], dim=1)  # B N C
        return BartLogits(self.code_head(self._decode(x, span, [self._encode_texts(tokens)])))

    def encode(self, tokens: Tensor) -> Tensor:
        """Apply the encoder: (P, L) -> (P, L, C)."""
        mask = (tokens != self.config.pad_id)[:, None, None]  # P 1 1 L

        def attend(q: Tensor, kv: Tensor) -> Tensor:
            return self.attend(q, *kv.unbind(1), mask)

        x = self.text_norm(self.text_emb(tokens) + self.text_positions.weight)
        for layer in self.encoder:
            x = layer(x, attend)
        return self.encoder_norm(x)

    def _encode_texts(self, tokens: Tensor) -> EncodedTexts:
        """Encode texts (P, L) and project them for all layers of the decoder."""
        states = self.encode(tokens)
        kv = torch.stack([layer.cross.project_text(states) for layer in self.decoder], dim=1)
        return EncodedTexts(kv, tokens != self.config.pad_id)

    # Sampling, one code at a time

    def condition(self, tokens: Tensor) -> BartPrefix:
        texts = self._encode_texts(tokens)
        span = FirstTokens(self.patterns, 1, 1, tokens.device, self.attend)
        x = self._decode(self._embed_start(len(tokens)), span, [texts])  # P 1 C
        return BartPrefix(self.code_head(x[:, -1]), torch.stack(span.text_kv, dim=1), (texts,))

    def start_cache(self, prefix: BartPrefix) -> BartCache:
        return BartCache(prefix.texts, CodeCache(prefix.start_kv, self.patterns))

    def extend(self, codes: Tensor, cache: BartCache) -> Tensor:
        span = FirstCodes(self.patterns, cache.codes, codes.shape[1], self.attend)
        x = self._decode(self._embed(codes, span.positions), span, cache.texts)
        return self.code_head(x[:, -1])

    def step(self, codes: Tensor, position: int | Tensor, cache: BartCache) -> Tensor:
        span = NextCode(cache.codes, position, self.attend)
        x = self._decode(self._embed(codes[:, None], span.positions), span, cache.texts)
        return self.code_head(x[:, 0])

    # The parts of a pass

    def _embed(self, codes: Tensor, at: Tensor) -> Tensor:
        """Embed codes (B, m) at positions (m,) of the stream -> (B, m, C)."""
        return self.code_norm(self.code_emb(codes) + self.code_positions(at))

    def _embed_start(self, batch: int) -> Tensor:
        return self.code_norm(self.start + self.code_positions.weight[:1]).expand(batch, 1, -1)

    def _decode(self, x: Tensor, span: Span, texts: Sequence[EncodedTexts]) -> Tensor:
        """Apply the decoder's layers and norm: (B, m, C) -> (B, m, C)."""
        sizes = [text.batch for text in texts]

        def attend_text(layer: int, q: Tensor) -> Tensor:
            parts = zip(texts, q.split(sizes), strict=True)
            return torch.cat([text.attend(self.attend, layer, part) for text, part in parts])

        for i, layer in enumerate(self.decoder):
            x = layer(x, partial(span.attend, i), partial(attend_text, i))
        return self.decoder_norm(x)
