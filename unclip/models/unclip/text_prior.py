"""What all priors of unCLIP share: a caption's encoding as the first tokens of a causal transformer (unCLIP 2.2)."""

# B batch, L text tokens, D CLIP embedding width, W text width, C width, H heads, d width of a head

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from unclip.models.layers import KeyValues, TransformerBlock, attend_after
from unclip.models.unclip.embedding_stats import EmbeddingStats
from unclip.types import TextEncoding

Combine = Callable[
    [torch.Tensor], torch.Tensor
]  # predictions (R * B, ...) under R conditions -> (B, ...)
OnDraw = Callable[[int], None]  # called with 1 .. `steps`


@dataclass(frozen=True)
class TextPriorConfig:
    emb_dim: int  # D, of CLIP's embeddings
    text_width: int  # W, of CLIP's text states
    context_length: int  # slots for text tokens; a text may use fewer
    width: int
    depth: int
    heads: int
    mlp_ratio: int = 4
    dropout: float = 0.0
    null_text: Literal["learned", "empty_prompt"] = "learned"

    def __post_init__(self) -> None:
        for name in (
            "emb_dim",
            "text_width",
            "context_length",
            "width",
            "depth",
            "heads",
            "mlp_ratio",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout}; expected a fraction in [0, 1)")
        if self.width % self.heads:
            raise ValueError(f"width is {self.width}; heads = {self.heads} must divide it")
        if self.width % 2:
            raise ValueError(f"width is {self.width}; the time sinusoids need an even number")


class TextPrefix(KeyValues):
    """Keys and values of the text tokens and the text embedding, L + 1 positions, in every block of a prior."""


class TextPrior(EmbeddingStats):
    """Tokens [text states, text embedding | the prior's own]; own tokens take the last positions."""

    def __init__(self, config: TextPriorConfig, own: int) -> None:
        super().__init__(config.emb_dim)
        self.config = config
        D, C = config.emb_dim, config.width
        self.state_proj = nn.Linear(config.text_width, C)
        self.emb_proj = nn.Linear(D, C)
        self.positions = nn.Parameter(torch.randn(config.context_length + 1 + own, C) * 0.02)
        self.blocks = nn.ModuleList(
            TransformerBlock(C, config.heads, config.mlp_ratio, config.dropout)
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(C)
        if config.null_text == "learned":
            self.null_emb = nn.Parameter(torch.randn(D) * D**-0.5)
            self.null_state = nn.Parameter(torch.randn(config.text_width))

    def null_text(self, batch: int) -> TextEncoding:
        """The learned null: one token and an embedding that say nothing. ValueError if the null is the empty prompt."""
        if self.config.null_text != "learned":
            raise ValueError(
                'this prior has no learned null (null_text is "empty_prompt"): pass the encoding of ""'
            )
        emb = self.null_emb.expand(batch, -1)
        return TextEncoding(
            emb, self.null_state.expand(batch, 1, -1), emb.new_ones(batch, 1, dtype=torch.bool)
        )

    def condition(self, text: TextEncoding, drop: torch.Tensor | None = None) -> TextPrefix:
        """The part that sees none of the prior's own tokens; where `drop` (B,) bool is True the null stands in."""
        L, most = text.states.shape[1], self.config.context_length
        if L > most:
            raise ValueError(f"the text has {L} tokens; this prior takes at most {most}")
        text = text.to(dtype=self.positions.dtype)
        if drop is not None:
            text = self._with_nulls(text, drop)
        tokens = [self.state_proj(text.states), self.emb_proj(text.emb)[:, None]]
        positions = torch.cat(
            [self.positions[:L], self.positions[most : most + 1]]
        )  # the embedding keeps its slot
        x = torch.cat(tokens, dim=1) + positions  # B L+1 C
        mask = F.pad(text.mask, (0, 1), value=True)  # B L+1
        visible = torch.ones(L + 1, L + 1, dtype=torch.bool, device=mask.device)
        # A pad sees itself, or the softmax of a caption without any token would be 0 / 0; nobody sees the pad.
        visible = visible.tril() & (mask[:, None, None] | visible.triu())  # B 1 L+1 L+1
        ks, vs = [], []
        for i, block in enumerate(self.blocks):
            q, k, v = block.project(x)  # B H L+1 d
            ks.append(k)
            vs.append(v)
            if i + 1 < len(self.blocks):  # of the last block only the keys and values are wanted
                x = block(x, q, k, v, visible)
        return TextPrefix(tuple(ks), tuple(vs), mask)

    def through(self, x: torch.Tensor, prefix: TextPrefix) -> torch.Tensor:
        """The first n own tokens (B, n, C) through all blocks, each seeing the text and its predecessors -> (B, n, C).

        Each row of the prefix serves an equal share of them.
        """
        for block, *prefix_kv in zip(self.blocks, prefix.k, prefix.v, strict=True):
            q, k, v = block.project(x)  # B H n d
            x = block.finish(x, attend_after(prefix_kv, prefix.mask, q, k, v))
        return x

    def _with_nulls(self, text: TextEncoding, drop: torch.Tensor) -> TextEncoding:
        null = self.null_text(len(text))
        emb = torch.where(drop[:, None], null.emb, text.emb)
        states = torch.where(drop[:, None, None], null.states, text.states)
        mask = torch.where(
            drop[:, None], F.pad(null.mask, (0, text.mask.shape[1] - 1), value=False), text.mask
        )
        return TextEncoding(emb, states, mask)


class DirectPrior(TextPrior, ABC):
    """A prior that draws image embeddings without diffusion, and has no noise schedule."""

    @property
    @abstractmethod
    def steps(self) -> int:
        """Predictions that `sample` makes one after the other."""

    @abstractmethod
    def sample(
        self,
        prefix: TextPrefix,
        generators: Sequence[torch.Generator],
        combine: Combine,
        *,
        temperature: float = 1.0,
        on_draw: OnDraw | None = None,
    ) -> torch.Tensor:
        """CLIP image embeddings (B, D), one for each generator; no embedding depends on its batch.

        prefix: R * B rows, of one condition after the other; combine: of what is predicted under them, one prediction
        for each embedding (guidance, mixtures). temperature: of what is drawn; 0 = always the likeliest.
        """
