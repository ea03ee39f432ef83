"""VQGANs of taming-transformers (2012.09841): f16 with 1,024 or 16,384 codes, Gumbel f8."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from unclip.checkpoints.formats import Format, States
from unclip.checkpoints.pickles import read_checkpoint
from unclip.checkpoints.renaming import (
    Part,
    Rule,
    build,
    count,
    expecting,
    fuse,
    move,
    prefixed,
    without_prefix,
)
from unclip.checkpoints.states import find_state
from unclip.config import MAX_CONFIG
from unclip.files import read_text
from unclip.models.codecs.quantizers import GumbelConfig, NearestConfig
from unclip.models.codecs.vqgan import VQGAN, VQGANConfig
from unclip.models.unet import LevelSpec
from unclip.safe_yaml import parse_yaml

IGNORED = ("loss.*",)  # the discriminator and the perceptual network
FIRST_STAGE = "first_stage_model."  # prefix of a VQGAN that another network was trained on
IMAGE_SIZE = 256  # of every published one; tensors do not reveal it
RESBLOCK = (
    *(move(name, name) for name in ("norm1", "conv1", "norm2", "conv2")),
    move("nin_shortcut", "skip"),
)
ATTENTION = (move("norm", "norm"), fuse(["q", "k", "v"], "qkv"), move("proj_out", "out"))
MIDDLE = ("mid.block_1", "mid.attn_1", "mid.block_2")
END = ("norm_out", "silu", "conv_out")


def recognise(path: Path) -> bool:
    """Recognise a file with a quantizer, which the checkpoint of another network does not have."""
    if not path.is_file() or path.suffix not in (".ckpt", ".pt", ".pth"):
        return False
    return any(name.startswith("quantize.") for name in _read(path))


def _read(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a VQGAN, alone or as the first stage of a transformer or LDM."""
    state = find_state(read_checkpoint(path))
    return without_prefix(state, FIRST_STAGE) or state


def load(path: Path, dtype: torch.dtype = torch.float32) -> VQGAN:
    """Load the codec in a file, in eval mode; a YAML file next to it may give the image size."""
    state = _read(path)
    return build_vqgan(state, infer_config(state, path, _image_size(path)), path, dtype)


def build_vqgan(
    state: Mapping[str, Tensor], config: VQGANConfig, source: str | Path, dtype: torch.dtype
) -> VQGAN:
    """Build a VQGAN from taming's tensors."""
    return build(VQGAN, config, [Part(state, rules(config), source)], dtype, IGNORED)


def probe(path: Path) -> States:
    state = _read(path)
    return {"codec": {name: x for name, x in state.items() if not name.startswith("loss.")}}


def infer_config(
    state: Mapping[str, Tensor], source: str | Path, image_size: int = IMAGE_SIZE
) -> VQGANConfig:
    """Infer the sizes from taming's tensors. Raises ValueError if they are not of a VQGAN."""
    with expecting("a VQGAN of taming-transformers", source):
        levels = []
        for i in range(max(1, count(state, r"decoder\.up\.(\d+)\."))):
            channels = len(state[f"decoder.up.{i}.block.0.conv1.weight"])
            # The encoder has one block less than the decoder.
            blocks = count(state, rf"decoder\.up\.{i}\.block\.(\d+)\.") - 1
            levels.append(LevelSpec(channels, blocks, f"decoder.up.{i}.attn.0.q.weight" in state))
        nearest = "quantize.embedding.weight" in state
        codebook = state["quantize.embedding.weight" if nearest else "quantize.embed.weight"]
        return VQGANConfig(
            image_size=image_size,
            vocab_size=codebook.shape[0],
            code_width=codebook.shape[1],
            levels=tuple(levels),
            feature_width=state["decoder.conv_in.weight"].shape[1],
            quantizer=NearestConfig() if nearest else GumbelConfig(),
        )


def rules(config: VQGANConfig) -> list[Rule]:
    """VQModel or GumbelVQ -> VQGAN."""
    quantizer = {
        NearestConfig: [move("quantize.embedding.weight", "quantizer.codebook")],
        GumbelConfig: [
            move("quantize.embed.weight", "quantizer.codebook"),
            move("quantize.proj", "quantizer.head"),
        ],
    }[type(config.quantizer)]
    return [
        *_sequence("encoder", _encoder_layers(config)),
        *_sequence("decoder", _decoder_layers(config)),
        move("quant_conv", "quant_conv"),
        move("post_quant_conv", "post_quant_conv"),
        *quantizer,
    ]


def _encoder_layers(config: VQGANConfig) -> Iterator[str]:
    """Yield taming's names of the encoder's layers in their order."""
    yield "conv_in"
    for i, level in enumerate(config.levels):
        yield from _blocks(f"down.{i}", level.blocks, level.attention)
        if i < len(config.levels) - 1:
            yield f"down.{i}.downsample.conv"
    yield from (*MIDDLE, *END)


def _decoder_layers(config: VQGANConfig) -> Iterator[str]:
    yield from ("conv_in", *MIDDLE)
    for i, level in reversed(list(enumerate(config.levels))):
        yield from _blocks(f"up.{i}", level.blocks + 1, level.attention)
        if i > 0:
            yield f"up.{i}.upsample.conv"
    yield from END


def _blocks(level: str, blocks: int, attention: bool) -> Iterator[str]:
    for j in range(blocks):
        yield f"{level}.block.{j}"
        if attention:
            yield f"{level}.attn.{j}"


def _sequence(side: str, layers: Iterator[str]) -> Iterator[Rule]:
    """Yield the rules for named layers -> an nn.Sequential."""
    for n, name in enumerate(layers):
        foreign, ours = f"{side}.{name}", f"{side}.{n}"
        if "block" in name:
            yield from prefixed(f"{foreign}.", f"{ours}.", RESBLOCK)
        elif "attn" in name:
            yield from prefixed(f"{foreign}.", f"{ours}.", ATTENTION)
        else:
            yield move(foreign, ours)


def _image_size(checkpoint: Path) -> int:
    """Return the resolution in a YAML file next to the checkpoint (its name or model), or 256."""
    for file in (checkpoint.with_suffix(".yaml"), checkpoint.with_name("model.yaml")):
        if file.is_file():
            try:
                config, _ = parse_yaml(read_text(file, MAX_CONFIG), str(file))
                params = config["model"]["params"]
                params = params.get("first_stage_config", {}).get("params", params)
                return int(params["ddconfig"]["resolution"])
            except (AttributeError, LookupError, TypeError, ValueError, OverflowError):
                raise ValueError(
                    f"{file} has no model.params.ddconfig.resolution; correct or remove the file"
                ) from None
    return IMAGE_SIZE


FORMAT = Format("taming-transformers", "codec", recognise, load, probe)
