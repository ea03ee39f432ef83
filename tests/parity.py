"""diffusers' names for our parameters: a rename table for each network, and what it takes to apply one.

A table maps module paths; a leaf keeps its `weight` or `bias`. FUSED lists modules that are one Linear here: the rows
of their parts, one after the other.
"""

from __future__ import annotations

import torch
from torch import nn

from unclip.models.unet import UNetConfig

PRIOR = {
    "time_embedding.linear_1": "time.fc1",
    "time_embedding.linear_2": "time.fc2",
    "proj_in": "x_proj",
    "embedding_proj": "emb_proj",
    "encoder_hidden_states_proj": "state_proj",
    "positional_embedding": "positions",  # (1, 81, C) there, (81, C) here
    "prd_embedding": "query",  # (1, 1, C) there, (C,) here
    "norm_out": "norm",
    "proj_to_clip_embeddings": "head",
    "clip_mean": "emb_mean",  # (1, D) there, (D,) here, and a buffer
    "clip_std": "emb_std",
}
PRIOR_BLOCK = {
    "norm1": "norm1",
    "attn1.to_out.0": "out",
    "norm3": "norm2",
    "ff.net.0.proj": "fc1",
    "ff.net.2": "fc2",
}
PRIOR_FUSED = {"qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v")}

TEXT_PROJ = {
    "learned_classifier_free_guidance_embeddings": "null_image",
    "embedding_proj": "text_to_time",
    "clip_image_embeddings_project_to_time_embeddings": "image_to_time",
    "clip_extra_context_tokens_proj": "image_to_context",
    "encoder_hidden_states_proj": "text.proj",
    "text_encoder_hidden_states_norm": "text.norm",
}

RESBLOCK = {
    "norm1": "norm1",
    "conv1": "conv1",
    "time_emb_proj": "time",
    "norm2": "norm2",
    "conv2": "conv2",
    "conv_shortcut": "skip",
}
ATTENTION = {"group_norm": "norm", "to_out.0": "out"}
ATTENTION_FUSED = {"qkv": ("to_q", "to_k", "to_v"), "context_kv": ("add_k_proj", "add_v_proj")}


def prior_table(depth: int) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """(module there -> module here, fused module here -> its parts there) of PriorTransformer."""
    table, fused = dict(PRIOR), {}
    for i in range(depth):
        table |= {f"transformer_blocks.{i}.{k}": f"blocks.{i}.{v}" for k, v in PRIOR_BLOCK.items()}
        fused |= {f"blocks.{i}.{k}": tuple(f"transformer_blocks.{i}.{p}" for p in v) for k, v in PRIOR_FUSED.items()}
    return table, fused


def unet_table(config: UNetConfig) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """The same of UNet2DConditionModel and UNet2DModel with residual resampling, as Karlo has them."""
    res, attention = {}, {}  # of each residual block and each attention: place there -> place here
    down = up = 0
    last = len(config.levels) - 1
    for i, level in enumerate(config.levels):
        for j in range(level.blocks):
            res[f"down_blocks.{i}.resnets.{j}"] = f"down.{down}.res"
            attention[f"down_blocks.{i}.attentions.{j}"] = f"down.{down}.attention"
            down += 1
        if i < last:
            res[f"down_blocks.{i}.downsamplers.0"] = f"down.{down}.res"
            down += 1
    for j in range(2):
        res[f"mid_block.resnets.{j}"] = f"mid.{j}.res"
    attention["mid_block.attentions.0"] = "mid.0.attention"
    for i, level in enumerate(reversed(config.levels)):
        for j in range(level.blocks + 1):
            res[f"up_blocks.{i}.resnets.{j}"] = f"up.{up}.res"
            attention[f"up_blocks.{i}.attentions.{j}"] = f"up.{up}.attention"
            up += 1
        if i < last:
            res[f"up_blocks.{i}.upsamplers.0"] = f"up.{up - 1}.resize"

    table = {
        "conv_in": "stem",
        "time_embedding.linear_1": "time.fc1",
        "time_embedding.linear_2": "time.fc2",
        "conv_norm_out": "norm",
        "conv_out": "head",
    }
    fused = {}
    for there, here in res.items():
        table |= {f"{there}.{k}": f"{here}.{v}" for k, v in RESBLOCK.items()}
    for there, here in attention.items():
        table |= {f"{there}.{k}": f"{here}.{v}" for k, v in ATTENTION.items()}
        fused |= {f"{here}.{k}": tuple(f"{there}.{p}" for p in v) for k, v in ATTENTION_FUSED.items()}
    return table, fused


def renamed(
    state: dict[str, torch.Tensor],
    table: dict[str, str],
    fused: dict[str, tuple[str, ...]],
    shapes: dict[str, torch.Size],
) -> dict[str, torch.Tensor]:
    """diffusers' state dict under our names and in our `shapes`. Every tensor must find its place."""
    left, out = dict(state), {}
    for there, here in table.items():
        for leaf in ("", ".weight", ".bias"):
            if there + leaf in left:
                out[here + leaf] = left.pop(there + leaf)
    for here, parts in fused.items():
        for leaf in (".weight", ".bias"):
            if parts[0] + leaf in left:
                out[here + leaf] = torch.cat([left.pop(part + leaf) for part in parts])
    assert not left, f"no place for {sorted(left)}"
    return {name: tensor.reshape(shapes[name]) for name, tensor in out.items()}


def load_from_diffusers(
    module: nn.Module,
    reference: nn.Module,
    table: dict[str, str],
    fused: dict[str, tuple[str, ...]],
    but_for: str | None = None,
) -> None:
    """Gives `module` the weights of `reference`: all that it has, but for those of the submodule `but_for`."""
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    missing, _ = module.load_state_dict(renamed(reference.state_dict(), table, fused, shapes), strict=False)
    missing = [name for name in missing if name.split(".")[0] != but_for]
    assert not missing, f"no value for {missing}"


def randomize(module: nn.Module, std: float = 0.1) -> nn.Module:
    """Noise on every parameter, so that none is left at the 0 or 1 of its initialisation."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * std)
    return module
