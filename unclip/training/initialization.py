"""Inputs of a training run other than data: initial weights, a frozen CLIP, a tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unclip.clip import CLIP, Tokenize
from unclip.config import parse
from unclip.data.loader import Loader
from unclip.models.lora import CONFIG_FILE, LoRAConfig, add_lora, load_lora, read_lora
from unclip.models.unclip.decoder import Decoder
from unclip.tokenizer import TOKENIZER_FILE, BPETokenizer, TruncationCount
from unclip.training.checkpoints import STATE, Checkpoints, read_state
from unclip.training.launch import Run
from unclip.training.tensors import SavedTensors
from unclip.weights import load_strictly, read_tensors

STEM = "unet.stem.weight"
SAMPLED, CHUNK = 10_000, 256  # samples whose captions are measured; captions at a time


def initialize(
    network: nn.Module,
    run: Run[Any],
    load: Callable[[Any, str], None] | None = None,
) -> Run[Any]:
    """Load the weights of --init or of the config's `base`, and add the config's adapter.

    With `lora`, --init may also be an adapter of `base`, or a checkpoint of a run with `lora`.
    load: `load_weights` by default. Returns `run` without --init. ValueError for an adapter of a
    network with random weights.
    """
    config, load = run.config, load or load_weights
    lora = config.lora
    source: Any = None if run.resume else run.init or config.base
    is_adapter = source and (Path(source) / CONFIG_FILE).is_file()
    adapted = source and _saved_lora(Path(source))
    if not lora and (is_adapter or adapted):
        raise ValueError(f"{source} is an adapter; set lora to train it further, or merge it first")
    base = config.base if is_adapter else source
    if is_adapter and not base:
        raise ValueError(f"{source} is an adapter; set base, not model, to the network it adapts")
    if lora and not (base or run.resume or run.dry_run):
        raise ValueError("lora adapts a trained network; set base, or give --init")
    if base and not adapted:
        load(network, base)
    if lora:
        add_lora(network, lora)
    if adapted:
        lora.check_continues(adapted.rank, adapted.scale, source)
        load(network, source)
    if is_adapter:
        load_lora(network, lora, read_lora(source))
    return replace(run, init=None)


def _saved_lora(source: Path) -> LoRAConfig | None:
    """Return the settings of a checkpoint of a run with `lora`: a network and its adapter."""
    if not (source / STATE).is_file():
        return None
    settings = read_state(source).settings.get("lora")
    return None if settings is None else parse(LoRAConfig, settings, f"{source / STATE}: lora")


def load_weights(model: nn.Module, source: str | Path) -> None:
    """Load weights from a safetensors file, a component folder or a checkpoint (EMA weights)."""
    path, tensors = read_weights(source)
    load_strictly(model, tensors, path)


def read_weights(source: str | Path) -> tuple[Path, dict[str, Tensor]]:
    """Return the file that `load_weights` reads and its tensors."""
    path = Path(source)
    if path.is_dir():
        kinds = [kind for kind in ("ema", "model") if next(path.glob(f"{kind}*.safetensors"), None)]
        if not kinds:
            raise FileNotFoundError(f"no ema.safetensors or model.safetensors in {path}")
        saved = SavedTensors(path, kinds[0])
        return saved.source, dict(saved)
    # Copies, not the mapped file: trained weights must not depend on a file that may be replaced.
    return path, {name: tensor.clone() for name, tensor in read_tensors(path).items()}


@torch.no_grad()
def warm_start(decoder: Decoder, source: str | Path, keep_layout: bool = False) -> None:
    """Load the weights of a decoder that may have fewer extra input channels.

    The weights of new channels (layout, masked image) start at zero, so that the output is that of
    the other decoder. With `keep_layout` the layout network keeps its own weights. Raises
    ValueError if the decoders differ in anything else.
    """
    file, state = read_weights(source)
    has_layout = any(name.startswith("layout.") for name in state)
    channels = 3 * decoder.config.unet.patch**2  # of x_t, and of the layout
    if STEM in state and (rest := state[STEM].shape[1] - channels * (1 + has_layout)) >= 0:
        x_t, *extra = state[STEM].split([channels, channels * has_layout, rest], dim=1)
        saved = {n: w for n, w in zip(("layout", "known"), extra, strict=True) if w.shape[1]}
        own = decoder.extra_channel_weights()
        if saved.keys() <= own.keys():  # else `load_strictly` reports the shapes
            parts = [saved.get(name, torch.zeros_like(weight)) for name, weight in own.items()]
            state[STEM] = torch.cat([x_t, *parts], dim=1)
    if keep_layout and decoder.layout is not None:
        state |= {f"layout.{name}": tensor for name, tensor in decoder.layout.state_dict().items()}
    load_strictly(decoder, state, file)


def load_clip(folder: str | Path, config: Any, device: torch.device) -> CLIP:
    """Load a frozen CLIP for a network with `config`; ValueError if their sizes do not match.

    Widths must be equal. The network may have room for more tokens than CLIP has.
    """
    clip = CLIP.from_pretrained(folder)
    widths = {"emb_dim": clip.emb_dim, "text_width": clip.text_width}
    for name, size in widths.items():
        if (value := getattr(config, name, size)) not in (size, None):
            raise ValueError(f"model.{name} is {value}; expected {size}, as in the CLIP {folder}")
    vocab_size = clip.config.model_cfg["text_cfg"].get("vocab_size", 0)  # 0: unknown
    limits = {"context_length": clip.context_length, "vocab_size": vocab_size}
    # "text" is the decoder's own text transformer
    for prefix, part in (("model", config), ("model.text", getattr(config, "text", None))):
        for name, size in limits.items():
            if (value := getattr(part, name, size)) < size:
                raise ValueError(f"{prefix}.{name} is {value}; the CLIP {folder} has {size}")
    return clip.to(device).requires_grad_(False)


def make_tokenizer(
    run: Run[Any],
    captions: Iterable[str],
    vocab_size: int,
    context_length: int,
    marked: bool = True,
) -> BPETokenizer:
    """Return the tokenizer of a network that reads captions itself.

    It is, in this order: that of the checkpoint in --resume, `run.config.tokenizer`, that of the
    weights in --init, or a new one of `vocab_size` tokens trained on the captions. Raises
    FileNotFoundError if the weights have none, ValueError if it has more tokens than the network.
    """
    config = run.config
    if run.resume:
        checkpoints = Checkpoints(Path(config.fit.output) / "checkpoints", config.fit.keep)
        file = find_tokenizer(checkpoints.find(run.resume, only=TOKENIZER_FILE))
    elif config.tokenizer:
        file = Path(config.tokenizer)
    elif run.init:
        file = find_tokenizer(Path(run.init))
    else:
        return BPETokenizer.train(captions, vocab_size, context_length, marked)
    tokenizer = BPETokenizer.load(file, context_length, marked)
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(f"{file} has {tokenizer.vocab_size} tokens; expected at most {vocab_size}")
    return tokenizer


def report_long_captions(tokenizer: Tokenize, loader: Loader) -> None:
    """Warn once about captions longer than the context, in up to `SAMPLED` samples."""
    if loader.process_index:
        return
    count, captions = TruncationCount(), loader.captions(SAMPLED)
    while chunk := list(islice(captions, CHUNK)):
        with count.counting(len(chunk)):
            tokenizer(chunk)
    count.report()


def find_tokenizer(weights: Path) -> Path:
    """Return the tokenizer of a weights file, a component or model folder, or a checkpoint.

    FileNotFoundError if there is nothing at `weights`.
    """
    if not weights.exists():
        raise FileNotFoundError(f"{weights} does not exist; expected a model, or a file of weights")
    folder = (weights if weights.is_dir() else weights.parent).resolve()
    places = [folder / TOKENIZER_FILE, folder.parent / "tokenizer" / TOKENIZER_FILE]
    if (folder / "state.json").is_file():  # checkpoints of older versions have no tokenizer
        places.append(folder.parent.parent / "model" / TOKENIZER_FILE)
    return next((place for place in places if place.is_file()), places[0])
