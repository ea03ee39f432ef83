"""The tokenizer of a network that learns to read: weights mean nothing without the vocabulary they were trained on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from unclip.tokenizer import TOKENIZER_FILE, BPETokenizer
from unclip.training.checkpoints import Checkpoints
from unclip.training.launch import Run


def make_tokenizer(
    run: Run[Any],
    captions: Iterable[str],
    vocab_size: int,
    context_length: int,
    marked: bool = True,
) -> BPETokenizer:
    """The tokenizer of the checkpoint that is resumed, or `run.config.tokenizer`, or that of the weights in --init.

    Without any of these, one of `vocab_size` tokens is learned from the captions. FileNotFoundError if the weights have
    none; ValueError if it has more tokens than the network.
    """
    config = run.config
    if run.resume:
        file = _tokenizer_of(
            Checkpoints(Path(config.fit.output) / "checkpoints", config.fit.keep).find(run.resume)
        )
    elif config.tokenizer:
        file = Path(config.tokenizer)
    elif run.init:
        file = _tokenizer_of(Path(run.init))
    else:
        return BPETokenizer.train(captions, vocab_size, context_length, marked)
    tokenizer = BPETokenizer.load(file, context_length, marked)
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"{file} has {tokenizer.vocab_size} tokens; this model has only {vocab_size}"
        )
    return tokenizer


def _tokenizer_of(weights: Path) -> Path:
    """The file that belongs to weights: beside them, or where else in a model folder or a run it is."""
    folder = (weights if weights.is_dir() else weights.parent).resolve()
    places = [folder / TOKENIZER_FILE, folder.parent / "tokenizer" / TOKENIZER_FILE]
    if (folder / "state.json").is_file():  # checkpoints of older versions have none of their own
        places.append(folder.parent.parent / "model" / TOKENIZER_FILE)
    return next((place for place in places if place.is_file()), places[0])
