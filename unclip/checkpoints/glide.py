"""GLIDE (openai/glide-text2im) as published: base.pt and upsample.pt, or the pair for inpainting.

Sizes are inferred from the tensors, except image sizes. GLIDE reads GPT-2's tokens: the vocabulary
is in the folder (`encoder.json.gz` and `vocab.bpe.gz` from GLIDE's repository, or GPT-2's
`tokenizer.json`) or downloaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from unclip.checkpoints import adm
from unclip.checkpoints.formats import Bundle, Format, States
from unclip.checkpoints.renaming import Part, Rule, build, expecting, move, prefixed
from unclip.checkpoints.states import read_state
from unclip.checkpoints.transformers.tokenizer import parse_merges
from unclip.diffusion.schedules import ScheduleConfig
from unclip.files import parse_json, printable, read_gzip
from unclip.models.published.glide import GLIDE, GLIDEConfig
from unclip.models.unclip.decoder import TextTransformer
from unclip.tokenizer import GPT2Tokenizer
from unclip.types import GLIDEOptions

UPSAMPLERS = {"base.pt": "upsample.pt", "base_inpaint.pt": "upsample_inpaint.pt"}
VOCAB_FILE, MERGES_FILE, TOKENIZER_FILE = "encoder.json.gz", "vocab.bpe.gz", "tokenizer.json"
GPT2 = "openai-community/gpt2"
LOW_SIZE, HIGH_SIZE = 64, 256
# input channels -> low_size, inpaints
KINDS = {3: (None, False), 6: (LOW_SIZE, False), 7: (None, True), 10: (LOW_SIZE, True)}
TEXT_RULES = (
    move("token_embedding", "text.tokens"),
    move("positional_embedding", "text.positions"),
    move("padding_embedding", "text.padding"),
    move("final_ln", "text.norm"),
    move("transformer_proj", "text_to_time"),
)


def recognise(path: Path) -> bool:
    """Recognise a base network's file, or a folder with one."""
    if path.is_file():
        return path.name in UPSAMPLERS
    return any((path / name).is_file() for name in UPSAMPLERS)


def load_bundle(path: Path, dtype: torch.dtype = torch.float32) -> Bundle:
    """Load a base network and the files next to it; without an upsampler, images stay 64 x 64."""
    files = _files(path)
    networks = {name: read_network(file, dtype) for name, file in files.items()}
    schedules = {"decoder": ScheduleConfig(), "upsampler_0": ScheduleConfig("linear")}
    text = networks["decoder"].config.text
    tokenizer = read_tokenizer(files["decoder"].parent, text.context_length)
    return Bundle(
        kind="glide",
        components={"tokenizer": tokenizer, **networks},
        schedules={name: schedules[name] for name in networks},
        options=GLIDEOptions() if "upsampler_0" in networks else GLIDEOptions(upsamplers=()),
        name="glide-inpaint" if networks["decoder"].config.inpaints else "glide",
        licence="MIT",
    )


def probe(path: Path) -> States:
    return {name: read_state(file) for name, file in _files(path).items()}


def _files(path: Path) -> dict[str, Path]:
    base = path
    if path.is_dir():
        base = next(path / name for name in UPSAMPLERS if (path / name).is_file())
    upsampler = base.with_name(UPSAMPLERS[base.name])
    return {"decoder": base} | ({"upsampler_0": upsampler} if upsampler.is_file() else {})


def read_tokenizer(folder: Path, context_length: int) -> GPT2Tokenizer:
    """Load GPT-2's tokenizer from the folder, or download it."""
    if (folder / VOCAB_FILE).is_file() and (folder / MERGES_FILE).is_file():
        try:
            vocab = parse_json(read_gzip(folder / VOCAB_FILE))
            text = read_gzip(folder / MERGES_FILE).decode("utf-8")
            return GPT2Tokenizer(vocab, parse_merges(text, folder / MERGES_FILE), context_length)
        except Exception as error:  # tokenizers has no specific type
            reason = printable(error)
            raise ValueError(f"{folder / VOCAB_FILE}: not a vocabulary: {reason}") from None
    if not (file := folder / TOKENIZER_FILE).is_file():
        from huggingface_hub import hf_hub_download

        try:
            file = Path(hf_hub_download(GPT2, TOKENIZER_FILE))
        except Exception as error:  # offline, or an error class of the Hub's
            reason = str(error).strip().splitlines()[0]
            files = f"{VOCAB_FILE} with {MERGES_FILE} (GLIDE's) and no {TOKENIZER_FILE} ({GPT2})"
            fault = f"{folder} has no {files}, and downloading it failed: {reason}"
            raise ValueError(fault) from None
    return GPT2Tokenizer.load(file, context_length)


def read_network(file: Path, dtype: torch.dtype = torch.float32) -> GLIDE:
    """Load a base network or an upsampler; its input channels show which, and if it inpaints."""
    state = read_state(file)
    config = glide_config(state, file)
    return build(GLIDE, config, [Part(state, glide_rules(config), file)], dtype)


def glide_config(state: Mapping[str, Tensor], source: Path) -> GLIDEConfig:
    """Infer the sizes of a network from its tensors."""
    unet = adm.unet_config(state, source)
    if unet.in_channels not in KINDS:
        channels = f"{unet.in_channels} input channels; GLIDE's have 3, 6, 7 or 10"
        raise ValueError(f"{source} has a U-Net with {channels}")
    low_size, inpaints = KINDS[unet.in_channels]
    with expecting("a network of GLIDE", source):
        vocab_size, width = state["token_embedding.weight"].shape
        slots = len(state["positional_embedding"])
    depth = adm.transformer_depth(state)
    text = TextTransformer(vocab_size, slots, width, depth, width // adm.HEAD_DIM)
    return GLIDEConfig(unet, HIGH_SIZE if low_size else LOW_SIZE, text, low_size, inpaints)


def glide_rules(config: GLIDEConfig) -> list[Rule]:
    """Text2ImUNet and its variants -> GLIDE."""
    transformer = adm.transformer_rules(config.text.depth, config.text.heads)
    return [
        *prefixed("", "unet.", adm.unet_rules(config.unet)),
        *prefixed("transformer.", "text.", transformer),
        *TEXT_RULES,
    ]


FORMAT = Format("GLIDE", "glide", recognise, load_bundle, probe)
