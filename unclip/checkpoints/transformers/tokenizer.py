"""CLIP's tokenizer in transformers' folder layout, loaded and saved without transformers."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from unclip.config import save_json
from unclip.files import printable, read_json, read_text
from unclip.tokenizer import CLIP_END, CLIP_PAD, CLIP_START, END, PAD, START, BPETokenizer

if TYPE_CHECKING:
    from unclip.clip import Tokenize

VOCAB_FILE, MERGES_FILE, WHOLE_FILE = "vocab.json", "merges.txt", "tokenizer.json"
SETTINGS_FILE, SPECIAL_FILE = "tokenizer_config.json", "special_tokens_map.json"
# CLIP (2103.00020): special tokens, contractions, words, single digits, runs of anything else
WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
END_OF_WORD = "</w>"


def read_tokenizer(folder: Path, context_length: int) -> BPETokenizer:
    """Load a CLIPTokenizer's folder, with any vocabulary; ids are the same as transformers'.

    context_length: of the text encoder. Raises ValueError if the tokenizer's differs.
    """
    settings = read_json(folder / SETTINGS_FILE)
    if (length := settings.get("model_max_length", context_length)) != context_length:
        expected = f"expected {context_length}, as the text encoder"
        raise ValueError(f"{folder / SETTINGS_FILE}: model_max_length is {length}; {expected}")
    if not (folder / VOCAB_FILE).is_file():  # transformers 5 writes a single file
        return BPETokenizer.load(folder / WHOLE_FILE, context_length)
    if (folder / SPECIAL_FILE).is_file():
        settings = {**read_json(folder / SPECIAL_FILE), **settings}
    special = [settings.get(f"{name}_token") for name in ("bos", "eos", "unk", "pad")]
    special = [token["content"] if isinstance(token, dict) else token for token in special if token]
    vocab, merges = read_json(folder / VOCAB_FILE), read_merges(folder / MERGES_FILE)
    try:
        return BPETokenizer(clip_tokenizer(vocab, merges, special), context_length)
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{folder} is not a CLIP tokenizer: {printable(error)}") from None


def clip_tokenizer(
    vocab: dict[str, int], merges: Sequence[tuple[str, str]], special: Sequence[str]
) -> Tokenizer:
    """Build a tokenizer from a vocabulary and merges.

    special: tokens that are matched before all others. Karlo's folder includes its padding "!", so
    an exclamation mark in a prompt becomes that token, not the one for "!" at the end of a word.
    """
    model = models.BPE(vocab, list(merges), unk_token=CLIP_END, end_of_word_suffix=END_OF_WORD)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(dict.fromkeys([CLIP_START, CLIP_END, *special])))
    return tokenizer


def read_merges(file: Path) -> list[tuple[str, str]]:
    """Read a merges file. Raises FileNotFoundError if it is missing."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing")
    return parse_merges(read_text(file), file)


def parse_merges(text: str, source: Path) -> list[tuple[str, str]]:
    """Parse a merges file: two tokens per line, after a header "#version: ..."."""
    merges = []
    for line in text.split("\n"):
        match line.split():
            case [] | ["#version:", *_]:
                continue
            case [first, second]:
                merges.append((first, second))
            case _:
                raise ValueError(f"{source}: {line[:100]!r} is not a merge of two tokens")
    return merges


def end_last(own: BPETokenizer) -> tuple[BPETokenizer, list[int]]:
    """Swap the end token with the last one; return the tokenizer and the old id of each new id."""
    last, data = own.vocab_size - 1, json.loads(own.tokenizer.to_str())
    order = list(range(last + 1))
    order[own.end_id], order[last] = last, own.end_id
    data["model"]["vocab"] = {word: order[i] for word, i in data["model"]["vocab"].items()}
    for token in data["added_tokens"]:
        token["id"] = order[token["id"]]
    data["post_processor"] = None  # it has the old ids and is not needed
    return BPETokenizer(Tokenizer.from_str(json.dumps(data)), own.context_length), order


def write_tokenizer(tokenizer: Tokenize, folder: Path) -> str:
    """Write the folder; return the transformers class that loads it."""
    folder.mkdir(parents=True)
    if isinstance(tokenizer, BPETokenizer) and tokenizer.tokenizer.token_to_id(CLIP_START) is None:
        return _write_own(tokenizer, folder)
    if isinstance(tokenizer, BPETokenizer):
        model = json.loads(tokenizer.tokenizer.to_str())["model"]
        vocab, merges = model["vocab"], model["merges"]
        is_special = tokenizer.pad_id in tokenizer.tokenizer.get_added_tokens_decoder()
        pad = CLIP_PAD if is_special else CLIP_END
    else:
        from unclip.clip import OpenCLIPTokenizer  # late: open_clip is slow to import

        assert isinstance(tokenizer, OpenCLIPTokenizer)
        vocab, merges = open_clip_vocabulary(tokenizer.tokenizer)
        pad = CLIP_END  # as the padding token, "!" would get another id
    special = {"bos": CLIP_START, "eos": CLIP_END, "unk": CLIP_END, "pad": pad}
    (folder / VOCAB_FILE).write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *map(" ".join, merges), ""]
    (folder / MERGES_FILE).write_text("\n".join(lines), encoding="utf-8")
    _write_settings(folder, "CLIPTokenizer", tokenizer.context_length, special)
    return "CLIPTokenizer"


def open_clip_vocabulary(theirs: Any) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return vocabulary and merges of a SimpleTokenizer, start and end named as in CLIP."""
    names = {theirs.sot_token_id: CLIP_START, theirs.eot_token_id: CLIP_END}
    vocab: dict[str, int] = {names.get(i) or word: i for word, i in theirs.encoder.items()}
    return vocab, list(theirs.bpe_ranks)


def _write_own(own: BPETokenizer, folder: Path) -> str:
    """Write one of our tokenizers, with what our class adds: start, end, white space."""
    tokenizer = copy.deepcopy(own.tokenizer)
    spaces = [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    tokenizer.normalizer = normalizers.Sequence([*spaces, tokenizer.normalizer])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, own.start_id), (END, own.end_id)]
    )
    tokenizer.save(str(folder / WHOLE_FILE), pretty=False)
    special = {"bos": START, "eos": END, "unk": None, "pad": PAD}
    _write_settings(folder, "PreTrainedTokenizerFast", own.context_length, special)
    return "PreTrainedTokenizerFast"


def _write_settings(
    folder: Path, kind: str, context_length: int, special: Mapping[str, str | None]
) -> None:
    tokens = {f"{name}_token": token for name, token in special.items() if token is not None}
    settings = {"tokenizer_class": kind, "model_max_length": context_length, **tokens}
    save_json(settings, folder / SETTINGS_FILE)
    save_json(tokens, folder / SPECIAL_FILE)
