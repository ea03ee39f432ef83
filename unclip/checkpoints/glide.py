"""GLIDE (openai/glide-text2im) as it was published: base.pt and upsample.pt, or the pair that inpaints.

All sizes are read from the tensors but those of the pictures. GLIDE reads GPT-2's tokens: its vocabulary lies in the
folder (`encoder.json.gz` and `vocab.bpe.gz` of GLIDE's repository, or GPT-2's `tokenizer.json`), or is fetched.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from unclip.checkpoints import adm
from unclip.checkpoints.pickles import read_state
from unclip.checkpoints.renaming import Rule, build, move, under
from unclip.checkpoints.store import Bundle
from unclip.diffusion.schedules import ScheduleConfig
from unclip.models.published.glide import GLIDE, GLIDEConfig
from unclip.models.unclip.decoder import TextTransformer
from unclip.tokenizer import GPT2Tokenizer
from unclip.types import GLIDEOptions

PAIRS = {"base.pt": "upsample.pt", "base_inpaint.pt": "upsample_inpaint.pt"}
VOCAB_FILE, MERGES_FILE, TOKENIZER_FILE = "encoder.json.gz", "vocab.bpe.gz", "tokenizer.json"
GPT2 = "openai-community/gpt2"
LOW_SIZE, HIGH_SIZE = 64, 256
KINDS = {
    3: (None, False),
    6: (LOW_SIZE, False),
    7: (None, True),
    10: (LOW_SIZE, True),
}  # by channels: low_size, inpaints
TEXT = (
    move("token_embedding", "text.tokens"),
    move("positional_embedding", "text.positions"),
    move("padding_embedding", "text.padding"),
    move("final_ln", "text.norm"),
    move("transformer_proj", "text_to_time"),
)


def recognise(path: Path) -> bool:
    return path.name in PAIRS if path.is_file() else any((path / name).is_file() for name in PAIRS)


def load_bundle(path: Path, dtype: torch.dtype = torch.float32) -> Bundle:
    """A folder, or the file of a base network with the others beside it; without an upsampler pictures stay small."""
    base = (
        path if path.is_file() else next(path / name for name in PAIRS if (path / name).is_file())
    )
    upsampler = base.with_name(PAIRS[base.name])
    decoder = read_network(base, dtype)
    networks, schedules = {"decoder": decoder}, {"decoder": ScheduleConfig()}
    if upsampler.is_file():
        networks["upsampler_0"] = read_network(upsampler, dtype)
        schedules["upsampler_0"] = ScheduleConfig("linear")
    return Bundle(
        kind="glide",
        components={
            "tokenizer": read_tokenizer(base.parent, decoder.config.text.context_length),
            **networks,
        },
        schedules=schedules,
        options=GLIDEOptions() if upsampler.is_file() else GLIDEOptions(upsamplers=()),
        name="glide-inpaint" if decoder.config.inpaints else "glide",
        licence="MIT",
    )


def read_tokenizer(folder: Path, context_length: int) -> GPT2Tokenizer:
    """From GLIDE's own vocabulary files or GPT-2's tokenizer.json in the folder, or else fetched from the Hub."""
    if (folder / VOCAB_FILE).is_file() and (folder / MERGES_FILE).is_file():
        try:
            vocab = json.loads(gzip.decompress((folder / VOCAB_FILE).read_bytes()))
            lines = (
                gzip.decompress((folder / MERGES_FILE).read_bytes())
                .decode("utf-8")
                .split("\n")[1:-1]
            )
            return GPT2Tokenizer(vocab, [tuple(line.split()) for line in lines], context_length)
        except Exception as error:  # gzip, json and tokenizers each have their own
            raise ValueError(
                f"{folder / VOCAB_FILE} and {MERGES_FILE} hold no vocabulary: {error}"
            ) from None
    if not (file := folder / TOKENIZER_FILE).is_file():
        from huggingface_hub import hf_hub_download

        try:
            file = Path(hf_hub_download(GPT2, TOKENIZER_FILE))
        except Exception as error:  # offline, or one of the Hub's own kinds
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"{folder} has no {VOCAB_FILE} with {MERGES_FILE} (of GLIDE's repository) and no {TOKENIZER_FILE} "
                f"(of {GPT2}), which could not be fetched either: {reason}"
            ) from None
    return GPT2Tokenizer.load(file, context_length)


def read_network(file: Path, dtype: torch.dtype = torch.float32) -> GLIDE:
    """Base, upsample or either's inpaint variant, told by the channels that its U-Net takes."""
    state = read_state(file)
    config = glide_config(state, file)
    return build(GLIDE, config, state, glide_rules(config), file, dtype)


def glide_config(state: Mapping[str, Tensor], source: Path) -> GLIDEConfig:
    """The sizes of a network as its tensors tell them."""
    unet = adm.unet_config(state, source)
    if unet.in_channels not in KINDS:
        raise ValueError(
            f"{source} holds a U-Net of {unet.in_channels} channels; GLIDE's have 3, 6, 7 or 10"
        )
    low_size, inpaints = KINDS[unet.in_channels]
    try:
        (vocab_size, width), slots = (
            state["token_embedding.weight"].shape,
            len(state["positional_embedding"]),
        )
    except KeyError as error:
        raise ValueError(
            f"{source} holds no network of GLIDE's: {error.args[0]} is missing"
        ) from None
    text = TextTransformer(
        vocab_size, slots, width, adm.transformer_depth(state), width // adm.HEAD_DIM
    )
    return GLIDEConfig(unet, HIGH_SIZE if low_size else LOW_SIZE, text, low_size, inpaints)


def glide_rules(config: GLIDEConfig) -> list[Rule]:
    """Text2ImUNet and its kin -> GLIDE."""
    transformer = adm.transformer_rules(config.text.depth, config.text.heads)
    return [
        *under("", "unet.", adm.unet_rules(config.unet)),
        *under("transformer.", "text.", transformer),
        *TEXT,
    ]
