"""A byte-pair tokenizer that is trained on the captions of a data set and travels with its model."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

# B batch, L tokens

PAD, START, END = "<pad>", "<start>", "<end>"


def warn_cut(text: str, cut: str, context_length: int) -> None:
    """Says which part of a prompt did not fit; nothing is ever cut silently."""
    warnings.warn(
        f"the prompt {text[:40]!r}... has more than {context_length} tokens; this part was cut: {cut.strip()!r}",
        stacklevel=3,
    )


class BPETokenizer:
    """Byte-level BPE over lower-cased text: any string can be encoded, and ids 0, 1, 2 are pad, start and end."""

    pad_id, start_id, end_id = 0, 1, 2

    def __init__(self, tokenizer: Tokenizer, context_length: int) -> None:
        for i, token in enumerate((PAD, START, END)):
            if tokenizer.token_to_id(token) != i:
                raise ValueError(f"this tokenizer has no {token} as id {i}; train it with BPETokenizer.train")
        self.tokenizer = tokenizer
        self.context_length = context_length

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.get_vocab_size()

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int, context_length: int) -> BPETokenizer:
        """Learns `vocab_size` tokens (256 bytes and 3 special ones among them) from the captions."""
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[PAD, START, END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(captions, trainer)
        return cls(tokenizer, context_length)

    @classmethod
    def load(cls, file: str | Path, context_length: int) -> BPETokenizer:
        """Reads a `tokenizer.json` as the `tokenizers` library writes it."""
        if not Path(file).is_file():
            raise FileNotFoundError(f"no tokenizer at {file}; expected the tokenizer.json of a model folder")
        return cls(Tokenizer.from_file(str(file)), context_length)

    def save(self, file: str | Path) -> None:
        self.tokenizer.save(str(file), pretty=False)

    def __call__(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """B strings -> ids (B, L) long and mask (B, L) bool, True = a real token (start and end included)."""
        ids = torch.full((len(texts), self.context_length), self.pad_id)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        room = self.context_length - 2
        for row, text in enumerate(texts):
            code = self.tokenizer.encode(" ".join(text.split()), add_special_tokens=False)
            if len(code.ids) > room:
                warn_cut(text, " ".join(text.split())[code.offsets[room][0] :], self.context_length)
            tokens = [self.start_id, *code.ids[:room], self.end_id]
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = True
        return ids, mask

    def decode(self, ids: Sequence[int]) -> str:
        """The lower-cased text of token ids; special tokens are left out."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True).strip()
