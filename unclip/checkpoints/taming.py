"""VQ-GANs of taming-transformers (2012.09841): f16 with 1,024 or 16,384 codes, f8 with Gumbel-softmax and 8,192."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import yaml
from torch import Tensor

from unclip.checkpoints.pickles import read_checkpoint
from unclip.checkpoints.renaming import Rule, fuse, move, to_here, under
from unclip.models.codecs.quantizers import GumbelConfig, NearestConfig
from unclip.models.codecs.vqgan import VQGAN, VQGANConfig
from unclip.models.unet import LevelSpec
from unclip.weights import load_strictly

IGNORED = ("loss.*",)  # the discriminator and the perceptual network
IMAGE_SIZE = 256  # of every published one; tensors don't tell it
RESBLOCK = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "nin_shortcut": "skip",
}
MIDDLE = ("mid.block_1", "mid.attn_1", "mid.block_2")
END = ("norm_out", "silu", "conv_out")


def recognise(path: Path) -> bool:
    return path.is_file() and path.suffix == ".ckpt"


def load(path: Path, dtype: torch.dtype = torch.float32) -> VQGAN:
    """The codec in a .ckpt, in eval mode; a YAML file beside it may tell the picture size. ValueError if it is none."""
    content = read_checkpoint(path)
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise ValueError(
            f"{path} has no 'state_dict'; expected a checkpoint of taming-transformers"
        )
    with torch.device("meta"):
        vqgan = VQGAN(sizes(state, path, _image_size(path))).to(dtype)
    shapes = {name: tensor.shape for name, tensor in vqgan.state_dict().items()}
    load_strictly(vqgan, to_here(state, rules(vqgan.config), shapes, path, IGNORED), path)
    return vqgan.eval()


def sizes(
    state: Mapping[str, Tensor], source: str | Path, image_size: int = IMAGE_SIZE
) -> VQGANConfig:
    """What the shapes and names of taming's tensors tell; ValueError if they are of something else."""
    try:
        levels = []
        for i in range(1 + max(_numbers(state, r"decoder\.up\.(\d+)\."))):
            blocks = max(
                _numbers(state, rf"decoder\.up\.{i}\.block\.(\d+)\.")
            )  # one more than the encoder has
            channels = len(state[f"decoder.up.{i}.block.0.conv1.weight"])
            levels.append(LevelSpec(channels, blocks, f"decoder.up.{i}.attn.0.q.weight" in state))
        nearest = "quantize.embedding.weight" in state
        codebook = state["quantize.embedding.weight" if nearest else "quantize.embed.weight"]
        feature_width = state["decoder.conv_in.weight"].shape[1]
    except (KeyError, ValueError) as error:
        missing = error.args[0] if isinstance(error, KeyError) else "decoder.up"
        raise ValueError(
            f"{source} is no VQ-GAN of taming-transformers: {missing} is missing"
        ) from None
    return VQGANConfig(
        image_size=image_size,
        vocab_size=codebook.shape[0],
        code_width=codebook.shape[1],
        levels=tuple(levels),
        feature_width=feature_width,
        quantizer=NearestConfig() if nearest else GumbelConfig(),
    )


def rules(config: VQGANConfig) -> list[Rule]:
    """taming's names for the tensors of a VQ-GAN here."""
    quantizer = {
        NearestConfig: [move("quantize.embedding.weight", "quantizer.codebook")],
        GumbelConfig: [
            move("quantize.embed.weight", "quantizer.codebook"),
            move("quantize.proj", "quantizer.head"),
        ],
    }[type(config.quantizer)]
    return [
        *_sequence("encoder", _encoder_names(config)),
        *_sequence("decoder", _decoder_names(config)),
        move("quant_conv", "quant_conv"),
        move("post_quant_conv", "post_quant_conv"),
        *quantizer,
    ]


def _encoder_names(config: VQGANConfig) -> Iterator[str]:
    """What taming calls the layers of the encoder, in their order."""
    yield "conv_in"
    for i, level in enumerate(config.levels):
        yield from _blocks(f"down.{i}", level.blocks, level.attention)
        if i < len(config.levels) - 1:
            yield f"down.{i}.downsample.conv"
    yield from (*MIDDLE, *END)


def _decoder_names(config: VQGANConfig) -> Iterator[str]:
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


def _sequence(side: str, names: Iterator[str]) -> Iterator[Rule]:
    """Rules for the layers of an nn.Sequential that are called so."""
    resblock = [move(there, here) for there, here in RESBLOCK.items()]
    attention = [move("norm", "norm"), fuse(["q", "k", "v"], "qkv"), move("proj_out", "out")]
    for n, name in enumerate(names):
        there, here = f"{side}.{name}", f"{side}.{n}"
        if "block" in name:
            yield from under(f"{there}.", f"{here}.", resblock)
        elif "attn" in name:
            yield from under(f"{there}.", f"{here}.", attention)
        else:
            yield move(there, here)


def _numbers(names: Mapping[str, Tensor], pattern: str) -> set[int]:
    return {int(found[1]) for name in names if (found := re.match(pattern, name))}


def _image_size(checkpoint: Path) -> int:
    """The resolution in a YAML file that lies beside a checkpoint (its own name or model.yaml), else the usual one."""
    for file in (checkpoint.with_suffix(".yaml"), checkpoint.with_name("model.yaml")):
        if file.is_file():
            try:
                config = yaml.safe_load(file.read_text(encoding="utf-8"))
                return int(config["model"]["params"]["ddconfig"]["resolution"])
            except (yaml.YAMLError, KeyError, TypeError, ValueError):
                raise ValueError(
                    f"{file} tells no model.params.ddconfig.resolution; mend or remove it"
                ) from None
    return IMAGE_SIZE
