"""Byte-pair tokenizers that are saved with their model."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from unclip.config import PositiveInt, config, parse
from unclip.files import printable, read_bytes, read_json

# B batch, L tokens

TOKENIZER_FILE = "tokenizer.json"
MAX_FILE = 16 * 2**20  # bytes; 50,000 tokens take 4 MB

MIN_WORDS = 4000  # tokens of a vocabulary that is expected to hold words
FUNCTION_WORDS = frozenset({"a", "an", "and", "in", "of", "on", "the", "with"})
KNOWN = 1.5  # letters per token
SPACE = "Ġ"  # stands for the space before a word
PAD, START, END = "<pad>", "<start>", "<end>"
CLIP_PAD, CLIP_START, CLIP_END = "!", "<|startoftext|>", "<|endoftext|>"
BART = ("<pad>", "<s>", "</s>")
QUOTED = 60  # characters of a prompt in a message
MAX_WORD = 256  # characters; what is longer is learned and merged in pieces


class PromptWarning(UserWarning):
    """A warning that quotes a prompt; servers do not log it."""


class TruncationWarning(PromptWarning):
    """Texts of more than `limit` tokens: `truncated` has each with the part that was cut."""

    def __init__(self, message: str, truncated: Sequence[tuple[str, str]], limit: int) -> None:
        super().__init__(message)
        self.truncated, self.limit = truncated, limit


def warn_truncated(truncated: Sequence[tuple[str, str]], limit: int) -> None:
    """Warn once of truncated prompts, given as pairs (text, the part that was cut).

    limit: number of tokens that a text may have, without the start and end tokens.
    """
    if not truncated:
        return
    text, cut = max(truncated, key=lambda pair: len(pair[1]))
    cut = cut.strip()
    cut = cut if len(cut) <= QUOTED else f"{cut[:QUOTED]}..."
    others = f"{len(truncated)} prompts, such as" if len(truncated) > 1 else "the prompt"
    have, it = ("have", "this one") if len(truncated) > 1 else ("has", "it")
    message = f"{others} {text[:40]!r}... {have} more than {limit} tokens"
    message = f"{message}; {it} was truncated by {cut!r}"
    warnings.warn(TruncationWarning(message, truncated, limit), stacklevel=3)


class TruncationCount:
    """Counts captions that are longer than the context, instead of a warning for each batch."""

    def __init__(self) -> None:
        self.captions = self.truncated = self.limit = 0
        self._longest = ""

    @contextlib.contextmanager
    def counting(self, captions: int) -> Iterator[None]:
        """Count the truncation of `captions` captions that are tokenized inside `with`."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", TruncationWarning)
            yield
        self.captions += captions
        for warning in caught:
            if isinstance(warning.message, TruncationWarning):
                texts = [text for text, _ in warning.message.truncated]
                self.truncated += len(texts)
                self.limit = warning.message.limit
                self._longest = max(self._longest, *texts, key=len)
            else:
                warnings.warn(warning.message, stacklevel=3)

    def report(self) -> None:
        """Warn of the captions that are cut, if there are any."""
        if self.truncated:
            count = f"{self.truncated:,} of {self.captions:,} captions"
            end = f"the longest ends {self._longest[-QUOTED:]!r}"
            fault = f"{count} are longer than {self.limit} tokens and are cut; {end}"
            warnings.warn(fault, stacklevel=3)


class BPETokenizer:
    """Byte-level BPE over lower-cased text, which can encode any string.

    Tokenizers trained here have pad, start and end tokens as ids 0, 1 and 2; those of CLIP and BART
    have their own, and CLIP's pad token "!" also occurs in captions.

    marked: add the start and end tokens to each text, as CLIP and BART expect. DALL-E does not.
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
                f"this tokenizer has no {' and no '.join(missing)} token; "
                "train one with BPETokenizer.train"
            )
        # Unmarked tokenizers need none of them.
        self.pad_id, self.start_id, self.end_id = (i or 0 for i in ids)
        self.tokenizer = tokenizer
        self.context_length, self.marked = context_length, marked

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.get_vocab_size()

    @classmethod
    def train(
        cls, captions: Iterable[str], vocab_size: int, context_length: int, marked: bool = True
    ) -> BPETokenizer:
        """Learn `vocab_size` tokens, 256 bytes and 3 special tokens included, from captions."""
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
        tokenizer.train_from_iterator(map(_split_long_words, captions), trainer)
        return cls(tokenizer, context_length, marked)

    @classmethod
    def load(cls, file: str | Path, context_length: int, marked: bool = True) -> BPETokenizer:
        """Load a `tokenizer.json` of the `tokenizers` library."""
        if not Path(file).exists():
            raise FileNotFoundError(f"{file} is missing; expected a model's tokenizer.json")
        data = read_bytes(file, MAX_FILE)
        try:
            tokenizer = Tokenizer.from_buffer(data)
        except Exception as error:  # the library has no specific type
            reason = printable(error)
            raise ValueError(f"{file} is not a tokenizer ({reason}); download it again") from None
        tokenizer.no_padding()  # transformers saves its last padding settings in the file
        tokenizer.no_truncation()
        return cls(tokenizer, context_length, marked)

    def save(self, file: str | Path) -> None:
        """Write a `tokenizer.json`."""
        self.tokenizer.save(str(file), pretty=False)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write the vocabulary and the config; dtype is ignored, as it concerns networks only."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.save(Path(folder) / TOKENIZER_FILE)
        config = {"context_length": self.context_length, "marked": self.marked}
        _write_config({"type": "BPETokenizer", **config}, folder)

    def __call__(
        self, texts: Sequence[str], dropout: float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode B texts: -> ids (B, L) long and mask (B, L) bool, True = a token of the text.

        Start and end tokens count as tokens of the text.
        dropout: probability of skipping a merge in training (BPE-dropout, 1910.13267), with random
        numbers from torch's global generator.
        """
        room, rows, truncated = self.context_length - 2 * self.marked, [], []
        for text in texts:
            text = " ".join(text.split())
            tokens = self._with_dropout(text, dropout, room) if dropout else None
            if tokens is None or len(tokens) > room:  # without dropout the text may fit
                code = self.tokenizer.encode(text, add_special_tokens=False)
                if len(code.ids) > room:
                    truncated.append((text, text[code.offsets[room][0] :]))
                tokens = code.ids[:room]
            rows.append([self.start_id, *tokens, self.end_id] if self.marked else tokens)
        warn_truncated(truncated, room)
        return _pad(rows, self.context_length, self.pad_id)

    def knows_a_word_of(self, text: str) -> bool:
        """Return whether a word of the text, function words aside, was probably in the captions.

        Its tokens then have at least `KNOWN` letters on average; the letters of other words are
        mostly tokens of their own. Always true if the vocabulary was not learned from captions by
        `train`, or is too small to hold words.
        """
        if self.tokenizer.token_to_id(PAD) is None or self.tokenizer.token_to_id(START) is None:
            return True  # CLIP's or BART's
        words = set(self.tokenizer.normalizer.normalize_str(text).split()[:100]) - FUNCTION_WORDS
        encoded = [self.tokenizer.encode(word, add_special_tokens=False).tokens for word in words]
        known = any(
            len("".join(tokens)) - len(SPACE) >= KNOWN * len(tokens) or len(tokens) == 1
            for tokens in encoded
        )
        return known or not words or self.vocab_size < MIN_WORDS

    def _with_dropout(self, text: str, p: float, room: int) -> list[int]:
        """Encode one text with BPE-dropout, up to the word that exceeds `room` tokens.

        The implementation of `tokenizers` cannot be seeded, so a resumed run would differ.
        """
        text = self.tokenizer.normalizer.normalize_str(text)
        words = self.tokenizer.pre_tokenizer.pre_tokenize_str(text)
        end = self.tokenizer.model.end_of_word_suffix or ""  # CLIP has one
        tokens: list[int] = []
        for word, _ in words:
            letters = [*word[:-1], word[-1] + end]
            for start in range(0, len(letters), MAX_WORD):
                parts = self._merge(letters[start : start + MAX_WORD], p)
                tokens += [self._vocab[part] for part in parts]
                if len(tokens) > room:
                    return tokens
        return tokens

    def _merge(self, parts: list[str], p: float) -> list[str]:
        """Apply the best merge of two neighbours repeatedly, skipping each with probability p."""
        while True:
            pairs = list(pairwise(parts))
            draws = torch.rand(len(pairs)).tolist()
            candidates = [
                (self._ranks[pair], i)
                for i, pair in enumerate(pairs)
                if draws[i] >= p and pair in self._ranks
            ]
            if not candidates:
                return parts
            _, i = min(candidates)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]

    @cached_property
    def _ranks(self) -> dict[tuple[str, str], int]:
        """Map each learned merge to its rank, in the order of training."""
        merges = json.loads(self.tokenizer.to_str())["model"]["merges"]
        return {pair: rank for rank, pair in enumerate(_pairs(merges))}

    @cached_property
    def _vocab(self) -> dict[str, int]:
        return self.tokenizer.get_vocab()

    def decode(self, ids: Sequence[int]) -> str:
        """Return the lower-cased text of token ids, without special tokens."""
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        end = self.tokenizer.model.end_of_word_suffix
        return (text.replace(end, " ") if end else text).strip()


class GPT2Tokenizer:
    """GPT-2's byte-level BPE over lower-cased text, as GLIDE uses it.

    It adds no start and end tokens and pads with the last id.
    """

    def __init__(
        self, vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], context_length: int
    ) -> None:
        # Without special tokens, a caption that spells one is encoded as ordinary text.
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
        """Load a `tokenizer.json`, such as that of GPT-2."""
        data = read_json(Path(file), MAX_FILE)
        try:
            model = data["model"]
            return cls(model["vocab"], _pairs(model["merges"]), context_length)
        except Exception as error:  # the library has no specific type
            reason = printable(error)
            raise ValueError(f"{file} is not a GPT-2 tokenizer ({reason}); download it") from None

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write the vocabulary and the config; dtype is ignored, as it concerns networks only."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(str(Path(folder) / TOKENIZER_FILE), pretty=False)
        _write_config({"type": "GPT2Tokenizer", "context_length": self.context_length}, folder)

    def __call__(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode B texts: -> ids (B, L) long and mask (B, L) bool, True = a token of the text."""
        length, rows, truncated = self.context_length, [], []
        for text in texts:
            tokens = self.tokenizer.encode(text.lower()).ids
            if len(tokens) > length:
                truncated.append((text, self.decode(tokens[length:])))
            rows.append(tokens[:length])
        warn_truncated(truncated, length)
        return _pad(rows, length, self.pad_id)

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids))


def _split_long_words(text: str) -> str:
    """Split overlong words: the time to learn merges grows with the square of the word length."""
    words = text.split()
    if all(len(word) <= MAX_WORD for word in words):
        return text
    pieces = (word[i : i + MAX_WORD] for word in words for i in range(0, len(word), MAX_WORD))
    return " ".join(pieces)


def _pad(rows: Sequence[list[int]], length: int, pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids (B, L) and their mask (B, L), True = not padding."""
    ids = torch.tensor([[*row, *[pad_id] * (length - len(row))] for row in rows], dtype=torch.long)
    lengths = torch.tensor([len(row) for row in rows])
    return ids.view(-1, length), torch.arange(length) < lengths[:, None]


def _write_config(config: dict[str, Any], folder: str | Path) -> None:
    (Path(folder) / "config.json").write_text(json.dumps(config) + "\n")


def _pairs(merges: Sequence[str | Sequence[str]]) -> list[tuple[str, str]]:
    """Return merges as pairs; older files store "a b" instead of ["a", "b"]."""
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
    return [(left, right) for left, right in pairs]


@config
class TokenizerConfig:
    """The config.json in a tokenizer's folder."""

    type: Literal["BPETokenizer", "GPT2Tokenizer"]
    context_length: PositiveInt
    marked: bool = True  # of a BPETokenizer


def load_tokenizer(folder: str | Path) -> BPETokenizer | GPT2Tokenizer:
    """Load a tokenizer from a folder that `save_pretrained` wrote.

    Raises FileNotFoundError, or ValueError that names a damaged file.
    """
    file, config_file = Path(folder) / TOKENIZER_FILE, Path(folder) / "config.json"
    config = parse(TokenizerConfig, read_json(config_file), str(config_file))
    if config.type == "GPT2Tokenizer":
        return GPT2Tokenizer.load(file, config.context_length)
    return BPETokenizer.load(file, config.context_length, config.marked)
