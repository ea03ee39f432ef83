"""Interface of transformers that generate the codes of an image from a text."""

# B batch, L text tokens, N = h * w codes, m some of them, K codes of the codec

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, nn
from typing_extensions import Self


class CodeGrid:
    """Grid and vocabulary in the config of a transformer that generates codes."""

    context_length: int  # L
    image_vocab: int  # K
    grid: tuple[int, int]  # h, w

    @property
    def num_codes(self) -> int:
        return self.grid[0] * self.grid[1]

    def check_codec(self, vocab_size: int, grid: tuple[int, int]) -> None:
        """Raise ValueError unless a codec has the vocabulary and grid of the transformer."""
        if (vocab_size, tuple(grid)) != (self.image_vocab, tuple(self.grid)):
            raise ValueError(
                f"the codec has {vocab_size} codes on a grid of {grid[0]} x {grid[1]}; "
                f"the transformer expects {self.image_vocab} on {self.grid[0]} x {self.grid[1]}"
            )


class Prefix(Protocol):
    """Texts processed once by `CodeTransformer.condition`: `Rows` with one row for each image."""

    @property
    def logits(self) -> Tensor: ...  # of the first code, (B, K)

    def __len__(self) -> int: ...

    def repeat_interleave(self, n: int) -> Self: ...

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self: ...


class CodeTransformer(nn.Module, ABC):
    """Transformer that generates codes, one at a time: `DALLE` and `BartDALLE`."""

    config: Any  # a CodeGrid

    @abstractmethod
    def tokens(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Convert a tokenizer's ids and mask, (B, L) each, to tokens (B, L)."""

    @abstractmethod
    def null_tokens(self, batch: int) -> Tensor:
        """The null text of classifier-free guidance: (batch, L)."""

    @abstractmethod
    def condition(self, tokens: Tensor) -> Prefix:
        """Process the text, which all images of a prompt share: tokens (B, L)."""

    @abstractmethod
    def start_cache(self, prefix: Any) -> Any:
        """Create a cache without codes for each row of the prefix; `select` gives that of some."""

    @abstractmethod
    def extend(self, codes: Tensor, cache: Any) -> Tensor:
        """Write the first m codes (B, m) to an empty cache -> logits of the next one (B, K)."""

    @abstractmethod
    def step(self, codes: Tensor, position: int | Tensor, cache: Any) -> Tensor:
        """Write the code (B,) at `position` -> logits of the next one (B, K).

        If the position is a tensor (), all shapes are static, so that one compiled graph serves
        every step.
        """


def check_text(ids: Tensor, mask: Tensor, length: int, vocab: int) -> None:
    """Raise ValueError unless ids are (B, length) and, where the mask is True, below `vocab`."""
    if ids.ndim != 2 or ids.shape[1] != length:
        raise ValueError(
            f"text ids are of shape {tuple(ids.shape)}; this transformer expects (B, {length})"
        )
    if not mask.any():
        return
    low, high = int(ids[mask].min()), int(ids[mask].max())
    if not 0 <= low <= high < vocab:
        raise ValueError(f"text ids are {low} to {high}; this transformer expects 0 to {vocab - 1}")
