"""Rename tables for DALLE2-pytorch's prior and U-Nets, as named by any of its releases."""

from __future__ import annotations

from collections.abc import Collection

from unclip.checkpoints.renaming import Rule, move, prefixed, repeated
from unclip.models.published.cross_attention_decoder import CrossAttentionDecoderConfig
from unclip.models.published.cross_attention_unet import CrossAttentionUNetConfig
from unclip.models.published.relative_prior import RelativePriorConfig

# Constants, buffers that are recomputed, and a CLIP that was saved with the model.
IGNORED = ("*.beta", "*.rotary_emb.*", "noise_scheduler*", "lowres_conds.*", "clip.*", "_dummy")


def prior_rules(
    config: RelativePriorConfig, names: Collection[str], bias_scale: float = 1.0
) -> list[Rule]:
    """DiffusionPriorNetwork -> RelativePrior.

    bias_scale: factor of the position bias before it is added to the scores, a power of two.
    """
    norm, core = norm_leaf(names), "causal_transformer."
    slots = "null_text_encodings" if "net.null_text_encodings" in names else "null_text_embed"
    rules = [
        move("learned_query", "query"),
        scaled(f"{core}rel_pos_bias.relative_attention_bias.weight", "bias.weight", bias_scale),
        move(slots, "no_token", lead=1),
        move("null_text_embeds", "null_emb", lead=2),
        move("to_time_embeds.0", "time"),  # the table, or the MLP:
        *(
            move(f"to_time_embeds.0.1.net.{i}{inner}", f"time.{2 * i}")
            for i, inner in enumerate((".0", ".0", ""))
        ),
        move(f"{core}init_norm.{norm}", "norm_in.weight"),
        move(f"{core}norm.{norm}", "norm.weight"),
        move(f"{core}project_out", "head"),
    ]
    block = [
        move("0.norm." + norm, "norm1.weight"),
        move("0.to_q", "q"),
        move("0.to_kv", "kv"),
        move("0.null_kv", "null_kv"),
        move("0.to_out.0", "out"),
        move("0.to_out.1." + norm, "norm2.weight"),
        move("1.0." + norm, "norm3.weight"),
        move("1.1", "fc1"),
        move("1.3." + norm, "norm4.weight"),
        move("1.5", "fc2"),
    ]
    rules += repeated(core + "layers.{}.", "blocks.{}.", config.depth, block)
    return [*prefixed("net.", "", rules), move("emb_norm", "emb_norm")]


def decoder_rules(
    config: CrossAttentionDecoderConfig, names: Collection[str], prefix: str
) -> list[Rule]:
    """Unet -> CrossAttentionDecoder; prefix: of the first U-Net, which holds all tensors there."""
    rules = [
        move("image_to_tokens.0", "image_to_tokens"),
        move("to_image_hiddens.0", "image_to_time"),
        move("text_to_cond", "text_to_tokens"),
        move("null_image_embed", "null_image_tokens", lead=1),
        move("null_image_hiddens", "null_image_time", lead=1),
        move("null_text_embed", "null_text_tokens", lead=1),
    ]
    return prefixed(prefix, "", rules) + prefixed(
        "", "unet.", unet_rules(config.unet, names, prefix)
    )


def unet_rules(config: CrossAttentionUNetConfig, names: Collection[str], prefix: str) -> list[Rule]:
    """Unet -> CrossAttentionUNet; prefix: "unets.0." for the first U-Net of a decoder."""
    norm, last = norm_leaf(names), len(config.levels) - 1
    cross = "cross_attn.fn." if any(".cross_attn.fn." in name for name in names) else "cross_attn."
    pixel = [
        move("norm." + norm, "norm1.weight"),
        move("to_q", "q"),
        move("to_kv", "kv"),
        move("null_kv", "null_kv"),
        move("to_out.0", "out"),
        move("to_out.1." + norm, "norm2.weight"),
    ]
    linear = [
        channels("norm.g", "norm1.weight"),
        move("to_qkv", "qkv", trail=2),
        move("to_out.0", "out", trail=2),
        channels("to_out.1.g", "norm2.weight"),
    ]
    block = [
        move("block1.project", "conv1"),
        move("block1.norm", "norm1"),
        move("time_mlp.1", "time"),
        *prefixed(cross, "attention.", pixel),
        move("block2.project", "conv2"),
        move("block2.norm", "norm2"),
        move("res_conv", "skip"),
    ]
    # module that resamples: its name there and here
    resize = {"conv": "", "unshuffle": ".1", "transposed": "", "nearest": ".1", "shuffle": ".net.0"}
    ours = {"conv": "", "unshuffle": ".1", "transposed": "", "nearest": ".1", "shuffle": ".0"}
    shrink, enlarge = ((resize[kind], ours[kind]) for kind in (config.down, config.up))
    stem = "init_conv" if f"{prefix}init_conv.weight" in names else "init_conv.convs.{}"
    rules = [
        move("to_time_hiddens.1", "time_in"),
        move("to_time_cond.0", "time_out"),
        move("to_time_tokens.0", "time_to_tokens"),
        move("norm_cond", "token_norm"),
        move("norm_mid_cond", "mid_token_norm"),
        *(move(stem.format(i), f"stem.{i}") for i in range(len(config.stem))),
        *prefixed("init_resnet_block.", "first.", block),
        *prefixed("mid_block1.", "mid.0.", block),
        *prefixed("mid_attn.fn.fn.", "mid_attention.", pixel),
        *prefixed("mid_block2.", "mid.1.", block),
        *prefixed("final_resnet_block.", "last.", block),
        move("to_out", "head"),
    ]
    for i, level in enumerate(config.levels):
        down, up = f"downs.{i}.", f"ups.{last - i}."
        our_down, our_up = f"down.{i}.", f"up.{last - i}."
        after = ("", "") if config.shrink_first or i == last else shrink
        attention, depth = (pixel, "fn.fn.") if level.attention == "full" else (linear, "fn.")
        rules += [
            move(f"{down}0{shrink[0]}", f"{our_down}before{shrink[1]}"),
            *prefixed(f"{down}1.", f"{our_down}blocks.0.", block),
            *prefixed(f"{down}3.{depth}", f"{our_down}attention.", attention),
            move(f"{down}4{after[0]}", f"{our_down}after{after[1]}"),
            *prefixed(f"{up}0.", f"{our_up}blocks.0.", block),
            *prefixed(f"{up}2.{depth}", f"{our_up}attention.", attention),
            move(f"{up}3{enlarge[0]}", f"{our_up}after{enlarge[1]}"),
        ]
        for j in range(level.blocks):
            rules += prefixed(f"{down}2.{j}.", f"{our_down}blocks.{j + 1}.", block)
            rules += prefixed(f"{up}1.{j}.", f"{our_up}blocks.{j + 1}.", block)
    return prefixed(prefix, "", rules)


def norm_leaf(names: Collection[str]) -> str:
    """Return the name of a norm's weight: gamma before release 0.16, then g."""
    return "gamma" if any(name.endswith(".gamma") for name in names) else "g"


def scaled(foreign: str, ours: str, factor: float) -> Rule:
    """Multiply the values by `factor`."""
    return Rule((foreign,), (ours,), lambda x: [x[0] * factor], lambda x: [x[0] / factor])


def channels(foreign: str, ours: str) -> Rule:
    """One number per channel: (1, C, 1, 1) -> (C,)."""
    return Rule(
        (foreign,), (ours,), lambda x: [x[0].flatten()], lambda x: [x[0][None, :, None, None]]
    )
