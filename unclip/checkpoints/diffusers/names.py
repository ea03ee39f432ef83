"""Rename tables for the parameters of diffusers' classes."""

from __future__ import annotations

from unclip.checkpoints.renaming import Rule, fuse, move, prefixed, repeated
from unclip.models.unclip.prior import PriorConfig
from unclip.models.unet import UNetConfig

PRIOR = (
    move("time_embedding.linear_1", "time.fc1"),
    move("time_embedding.linear_2", "time.fc2"),
    move("proj_in", "x_proj"),
    move("embedding_proj", "emb_proj"),
    move("encoder_hidden_states_proj", "state_proj"),
    move("positional_embedding", "positions", lead=1),
    move("prd_embedding", "query", lead=2),
    move("norm_out", "norm"),
    move("proj_to_clip_embeddings", "head"),
    move("clip_mean", "emb_mean", lead=1),
    move("clip_std", "emb_std", lead=1),
)
PRIOR_BLOCK = (
    move("norm1", "norm1"),
    fuse(("attn1.to_q", "attn1.to_k", "attn1.to_v"), "qkv"),
    move("attn1.to_out.0", "out"),
    move("norm3", "norm2"),
    move("ff.net.0.proj", "fc1"),
    move("ff.net.2", "fc2"),
)
TEXT_PROJ = (
    move("learned_classifier_free_guidance_embeddings", "null_image"),
    move("embedding_proj", "text_to_time"),
    move("clip_image_embeddings_project_to_time_embeddings", "image_to_time"),
    move("clip_extra_context_tokens_proj", "image_to_context"),
    move("encoder_hidden_states_proj", "text.proj"),
    move("text_encoder_hidden_states_norm", "text.norm"),
)
UNET = (
    move("conv_in", "stem"),
    move("time_embedding.linear_1", "time.fc1"),
    move("time_embedding.linear_2", "time.fc2"),
    move("conv_norm_out", "norm"),
    move("conv_out", "head"),
)
RESBLOCK = (
    move("norm1", "norm1"),
    move("conv1", "conv1"),
    move("time_emb_proj", "time"),
    move("norm2", "norm2"),
    move("conv2", "conv2"),
    move("conv_shortcut", "skip"),
)
ATTENTION = (
    move("group_norm", "norm"),
    fuse(("to_q", "to_k", "to_v"), "qkv"),
    fuse(("add_k_proj", "add_v_proj"), "context_kv"),
    move("to_out.0", "out"),
)


def prior_rules(config: PriorConfig) -> list[Rule]:
    """PriorTransformer -> DiffusionPrior."""
    blocks = repeated("transformer_blocks.{}.", "blocks.{}.", config.depth, PRIOR_BLOCK)
    return [*PRIOR, *blocks]


def text_proj_rules() -> list[Rule]:
    """UnCLIPTextProjModel -> Decoder without its U-Net."""
    return list(TEXT_PROJ)


def unet_rules(config: UNetConfig) -> list[Rule]:
    """UNet2DConditionModel or UNet2DModel with residual resampling, as in Karlo -> UNet."""
    rules, last = list(UNET), len(config.levels) - 1

    def block(foreign: str, j: int, ours: str) -> None:
        rules.extend(prefixed(f"{foreign}.resnets.{j}.", f"{ours}.res.", RESBLOCK))
        rules.extend(prefixed(f"{foreign}.attentions.{j}.", f"{ours}.attention.", ATTENTION))

    down = up = 0
    for i, level in enumerate(config.levels):
        for j in range(level.blocks):
            block(f"down_blocks.{i}", j, f"down.{down + j}")
        down += level.blocks
        if i < last:
            rules += prefixed(f"down_blocks.{i}.downsamplers.0.", f"down.{down}.res.", RESBLOCK)
            down += 1
    for j in range(2):
        block("mid_block", j, f"mid.{j}")
    for i, level in enumerate(reversed(config.levels)):
        for j in range(level.blocks + 1):
            block(f"up_blocks.{i}", j, f"up.{up + j}")
        up += level.blocks + 1
        if i < last:
            rules += prefixed(f"up_blocks.{i}.upsamplers.0.", f"up.{up - 1}.resize.", RESBLOCK)
    return rules
