"""A byte-pair tokenizer that travels with its model: trained on the captions of a data set, or CLIP's own."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from unclip.files import read_json

# B batch, L tokens

TOKENIZER_FILE = "tokenizer.json"

PAD, START, END = "<pad>", "<start>", "<end>"
CLIP_PAD, CLIP_START, CLIP_END = "!", "<|startoftext|>", "<|endoftext|>"
BART = ("<pad>", "<s>", "</s>")


def warn_cut(text: str, cut: str, context_length: int) -> None:
    """Says which part of a prompt did not fit; nothing is ever cut silently."""
    warnings.warn(
        f"the prompt {text[:40]!r}... has more than {context_length} tokens; this part was cut: {cut.strip()!r}",
        stacklevel=3,
    )


class BPETokenizer:
    """Byte-level BPE over lower-cased text: any string can be encoded.

    A tokenizer that was trained here has pad, start and end as ids 0, 1, 2. CLIP's and BART's have their own names for
    them, and CLIP's pads with "!", which stands in captions too. marked: whether a text stands between start and end,
    as CLIP and BART want it; DALL-E has a start of its own and no end.
    """

    def __init__(self, tokenizer: Tokenizer, context_length: int, marked: bool = True) -> None:
        others = ((CLIP_PAD, CLIP_START, CLIP_END), BART)
        names = next(
            (names for names in others if tokenizer.token_to_id(names[1]) is not None),
            (PAD, START, END),
        )
        ids = [tokenizer.token_to_id(name) for name in names]
        if marked and (missing := [name for name, i in zip(names, ids, strict=True) if i is None]):
            raise ValueError(
                f"this tokenizer has no {' and no '.join(missing)}; train one with BPETokenizer.train"
            )
        self.pad_id, self.start_id, self.end_id = (
            i or 0 for i in ids
        )  # unmarked, a text needs none of them
        self.tokenizer = tokenizer
        self.context_length, self.marked = context_length, marked

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.get_vocab_size()

    @classmethod
    def train(
        cls, captions: Iterable[str], vocab_size: int, context_length: int, marked: bool = True
    ) -> BPETokenizer:
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
        return cls(tokenizer, context_length, marked)

    @classmethod
    def load(cls, file: str | Path, context_length: int, marked: bool = True) -> BPETokenizer:
        """Reads a `tokenizer.json` as the `tokenizers` library writes it."""
        if not Path(file).is_file():
            raise FileNotFoundError(
                f"no tokenizer at {file}; expected the tokenizer.json of a model folder"
            )
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(
                f"{file} holds no tokenizer ({error}); fetch or export it again"
            ) from None
        tokenizer.no_padding()  # transformers keeps in the file how it was last used
        tokenizer.no_truncation()
        return cls(tokenizer, context_length, marked)

    def save(self, file: str | Path) -> None:
        self.tokenizer.save(str(file), pretty=False)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> BPETokenizer:
        """A folder that `save_pretrained` wrote."""
        config = read_json(Path(folder) / "config.json")
        return cls.load(Path(folder) / TOKENIZER_FILE, config["context_length"], config["marked"])

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes the vocabulary and how a text is laid out; dtype is for networks."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.save(Path(folder) / TOKENIZER_FILE)
        config = {
            "type": "BPETokenizer",
            "context_length": self.context_length,
            "marked": self.marked,
        }
        (Path(folder) / "config.json").write_text(json.dumps(config) + "\n")

    def __call__(
        self, texts: Sequence[str], dropout: float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """B strings -> ids (B, L) long and mask (B, L) bool, True = a real token (start and end included).

        dropout: the probability with which BPE passes over a merge, for training; it draws from torch's own generator.
        """
        ids = torch.full((len(texts), self.context_length), self.pad_id)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        room = self.context_length - 2 * self.marked
        for row, text in enumerate(texts):
            text = " ".join(text.split())
            tokens = self._with_dropout(text, dropout) if dropout else None
            if (
                tokens is None or len(tokens) > room
            ):  # what dropout made too long may fit without it
                code = self.tokenizer.encode(text, add_special_tokens=False)
                if len(code.ids) > room:
                    warn_cut(text, text[code.offsets[room][0] :], self.context_length)
                tokens = code.ids[:room]
            if self.marked:
                tokens = [self.start_id, *tokens, self.end_id]
            ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
            mask[row, : len(tokens)] = True
        return ids, mask

    def _with_dropout(self, text: str, p: float) -> list[int]:
        """BPE-dropout (1910.13267). Not that of `tokenizers`, which cannot be seeded: a resumed run would differ."""
        words = self.tokenizer.pre_tokenizer.pre_tokenize_str(
            self.tokenizer.normalizer.normalize_str(text)
        )
        end = self.tokenizer.model.end_of_word_suffix or ""  # CLIP's
        letters = ([*word[:-1], word[-1] + end] for word, _ in words)
        return [
            self.tokenizer.token_to_id(part) for parts in letters for part in self._merge(parts, p)
        ]

    def _merge(self, parts: list[str], p: float) -> list[str]:
        """The best merge of two neighbours, again and again; each time each merge is passed over with probability p."""
        while True:
            ranks = [
                self._ranks.get(pair, len(self._ranks))
                for pair in zip(parts, parts[1:], strict=False)
            ]
            kept = [
                (rank, i)
                for i, (rank, draw) in enumerate(
                    zip(ranks, torch.rand(len(ranks)).tolist(), strict=True)
                )
                if rank < len(self._ranks) and draw >= p
            ]
            if not kept:
                return parts
            _, i = min(kept)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]

    @cached_property
    def _ranks(self) -> dict[tuple[str, str], int]:
        """The learned merges, the first learned first."""
        merges = json.loads(self.tokenizer.to_str())["model"]["merges"]
        pairs = (
            merge.split(" ") if isinstance(merge, str) else merge for merge in merges
        )  # older files have "a b"
        return {tuple(pair): rank for rank, pair in enumerate(pairs)}

    def decode(self, ids: Sequence[int]) -> str:
        """The lower-cased text of token ids; special tokens are left out."""
        text, end = (
            self.tokenizer.decode(list(ids), skip_special_tokens=True),
            self.tokenizer.model.end_of_word_suffix,
        )
        return (text.replace(end, " ") if end else text).strip()


class GPT2Tokenizer:
    """GPT-2's byte-level BPE over lower-cased text, as GLIDE reads it: no start, no end, padded with the last id."""

    def __init__(
        self, vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], context_length: int
    ) -> None:
        # Special tokens are left out: a caption that spells one is a caption of these letters.
        self.tokenizer = Tokenizer(models.BPE(dict(vocab), list(merges)))
        self.tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self.tokenizer.decoder = decoders.ByteLevel()
        self.pad_id = len(vocab) - 1
        self.context_length = context_length

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.get_vocab_size()

    @classmethod
    def load(cls, file: str | Path, context_length: int) -> GPT2Tokenizer:
        """Reads a `tokenizer.json`, GPT-2's own for one."""
        try:
            model = json.loads(Path(file).read_text(encoding="utf-8"))["model"]
            pairs = (
                merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]
            )
            return cls(model["vocab"], [tuple(pair) for pair in pairs], context_length)
        except FileNotFoundError:
            raise
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(
                f"{file} holds no tokenizer of GPT-2's kind ({error}); fetch or export it again"
            ) from None

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> GPT2Tokenizer:
        """A folder that `save_pretrained` wrote."""
        return cls.load(
            Path(folder) / TOKENIZER_FILE, read_json(Path(folder) / "config.json")["context_length"]
        )

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes the vocabulary and how many tokens a text may have; dtype is for networks."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(str(Path(folder) / TOKENIZER_FILE), pretty=False)
        config = {"type": "GPT2Tokenizer", "context_length": self.context_length}
        (Path(folder) / "config.json").write_text(json.dumps(config) + "\n")

    def __call__(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """B strings -> ids (B, L) long and mask (B, L) bool, True = a real token."""
        ids = torch.full((len(texts), self.context_length), self.pad_id)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for row, text in enumerate(texts):
            tokens = self.tokenizer.encode(text.lower()).ids
            if len(tokens) > self.context_length:
                warn_cut(text, self.decode(tokens[self.context_length :]), self.context_length)
            tokens = tokens[: self.context_length]
            ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
            mask[row, : len(tokens)] = True
        return ids, mask

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids))


TOKENIZERS = {"BPETokenizer": BPETokenizer, "GPT2Tokenizer": GPT2Tokenizer}


def load_tokenizer(folder: str | Path) -> BPETokenizer | GPT2Tokenizer:
    """The tokenizer in a folder that `save_pretrained` wrote; ValueError names an unknown type."""
    kind = read_json(Path(folder) / "config.json").get("type")
    if kind not in TOKENIZERS:
        raise ValueError(
            f"{folder}/config.json: type is {kind!r}; expected one of {', '.join(TOKENIZERS)}"
        )
    return TOKENIZERS[kind].from_pretrained(folder)
