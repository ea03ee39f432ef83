"""Parameter names of OpenAI's ADM (2105.05233), shared by GLIDE, Karlo and Kandinsky's prior."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from unclip.checkpoints.renaming import Rule, by_head, count, expecting, move, prefixed, repeated
from unclip.models.unet import LevelSpec, UNetConfig

HEAD_DIM = 64  # in every published network; tensors do not reveal it

UNET = (
    move("time_embed.0", "time.fc1"),
    move("time_embed.2", "time.fc2"),
    move("input_blocks.0.0", "stem"),
    move("out.0", "norm"),
    move("out.2", "head"),
)
RESBLOCK = (
    move("in_layers.0", "norm1"),
    move("in_layers.2", "conv1"),
    move("emb_layers.1", "time"),
    move("out_layers.0", "norm2"),
    move("out_layers.3", "conv2"),
    move("skip_connection", "skip"),
)
TRANSFORMER_BLOCK = (
    move("ln_1", "norm1"),
    move("attn.c_proj", "out"),
    move("ln_2", "norm2"),
    move("mlp.c_fc", "fc1"),
    move("mlp.c_proj", "fc2"),
)


def unet_config(
    tensors: Mapping[str, Tensor], source: str | Path, head_dim: int = HEAD_DIM
) -> UNetConfig:
    """Infer the sizes of a U-Net from its tensors. Raises ValueError if it is not an ADM U-Net."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    # Every level but the last ends in an output block with a second residual block, for upsampling.
    levels = 1 + count(shapes, r"(output_blocks\.\d+\.[12])\.in_layers\.2\.weight$")
    # The first input block of a level is the stem or the block that downsamples.
    per_level = count(shapes, r"input_blocks\.(\d+)\.") // levels
    with expecting("an ADM U-Net", source):
        channels = [
            shapes[f"input_blocks.{i * per_level + 1}.0.in_layers.2.weight"][0]
            for i in range(levels)
        ]
        additive = shapes["input_blocks.1.0.emb_layers.1.weight"][0] == channels[0]
        return UNetConfig(
            in_channels=shapes["input_blocks.0.0.weight"][1],
            out_channels=shapes["out.2.weight"][0],
            levels=tuple(
                LevelSpec(
                    c, per_level - 1, f"input_blocks.{i * per_level + 1}.1.qkv.weight" in shapes
                )
                for i, c in enumerate(channels)
            ),
            head_dim=head_dim,
            time_dim=shapes["time_embed.0.weight"][0],
            time_shift="additive" if additive else "scale_shift",
            context_dim=shapes.get("middle_block.1.encoder_kv.weight", (None, None))[1],
            mid_attention="middle_block.1.qkv.weight" in shapes,
        )


def unet_rules(config: UNetConfig) -> list[Rule]:
    """UNetModel with residual resampling -> UNet."""
    rules, last = list(UNET), len(config.levels) - 1

    def block(foreign: str, ours: str, channels: int, attention: bool) -> None:
        rules.extend(prefixed(f"{foreign}.0.", f"{ours}.res.", RESBLOCK))
        if attention:
            heads = channels // config.head_dim
            rules.extend(prefixed(f"{foreign}.1.", f"{ours}.attention.", _attention(heads)))

    down = up = 0
    for i, level in enumerate(config.levels):
        for _ in range(level.blocks):
            block(f"input_blocks.{down + 1}", f"down.{down}", level.channels, level.attention)
            down += 1
        if i < last:
            block(f"input_blocks.{down + 1}", f"down.{down}", level.channels, False)
            down += 1
    block("middle_block", "mid.0", config.levels[-1].channels, config.mid_attention)
    rules += prefixed(f"middle_block.{1 + config.mid_attention}.", "mid.1.res.", RESBLOCK)
    for i, level in reversed(list(enumerate(config.levels))):
        for _ in range(level.blocks + 1):
            block(f"output_blocks.{up}", f"up.{up}", level.channels, level.attention)
            up += 1
        if i > 0:
            resize = f"output_blocks.{up - 1}.{1 + level.attention}."
            rules += prefixed(resize, f"up.{up - 1}.resize.", RESBLOCK)
    return rules


def _attention(heads: int) -> list[Rule]:
    """Return the rules of an attention layer; ADM projects by convolutions of width 1 (trail=1)."""
    return [
        move("norm", "norm"),
        by_head("qkv", "qkv", heads, trail=1),
        by_head("encoder_kv", "context_kv", heads, parts=2, trail=1),
        move("proj_out", "out", trail=1),
    ]


def transformer_rules(depth: int, heads: int) -> list[Rule]:
    """Transformer -> `blocks`."""
    block = [by_head("attn.c_qkv", "qkv", heads), *TRANSFORMER_BLOCK]
    return repeated("resblocks.{}.", "blocks.{}.", depth, block)


def transformer_depth(tensors: Mapping[str, Tensor], prefix: str = "transformer.") -> int:
    """Count the blocks of a transformer."""
    return count(tensors, re.escape(prefix) + r"resblocks\.(\d+)\.")
