"""Estimate the memory per process of sharded training, without its machines, CLIP or data.

The network is built on the meta device and sharded over a fake process group.
"""

# B batch, L text tokens

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from unclip.checkpoints.store import NETWORKS
from unclip.models.layers import enable_gradient_checkpointing
from unclip.models.lora import add_lora
from unclip.models.unclip.decoder import Decoder
from unclip.models.unclip.mlp_prior import MLPPrior
from unclip.models.unclip.prior import DiffusionPrior
from unclip.models.unclip.upsampler import Upsampler
from unclip.training.dry_run import size, step_memory
from unclip.training.sharding import local, make_mesh, shard
from unclip.types import TextEncoding

CLIP_TOKENS = 77  # of a caption, for networks that do not limit it


def describe_sharded(config: Any, processes: int) -> str:
    """Describe the memory of a process of the training `config`; ValueError for a CLIP.

    Activations are those of the network's forward pass, for priors, decoders and upsamplers.
    """
    if processes < 1:
        raise ValueError(f"--dry-run is {processes}; expected a number of processes, at least 1")
    model, fit = _build(config), config.fit
    counts = sum(p.numel() for p in model.parameters()), _trained(model)
    activations = _activations(_build(config), config)
    with _pretended_group(processes):
        shard(model, make_mesh("cpu", processes), fit.precision)
        trained = sum(local(p).numel() for p in model.parameters() if p.requires_grad)
        frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
        units = [_trained(m) for m in model.modules() if isinstance(m, FSDPModule)]
    root, largest = counts[1] - sum(units[1:]), max(units[1:], default=0)
    memory = {
        "weights": 4 * (trained + frozen),
        "gradients": 4 * trained,
        "AdamW": (2 if config.optim.kind == "adamw8bit" else 8) * trained,
        "EMA": 4 * trained if fit.ema is not None else 0,
        # The root stays gathered. Three layers are gathered at a time: one is used, the next one
        # arrives, and the gradient of a third is reduced.
        "gathered layers": 4 * (2 * root + 3 * largest),
        "activations": activations or 0,
    }
    parts = ", ".join(f"{name} {size(count)}" for name, count in memory.items() if count)
    lines = [
        f"parameters   {counts[0]:,} ({counts[1]:,} trained)",
        f"processes    {processes}, FSDP2, {config.data.batch_size} samples each",
        f"memory       {size(sum(memory.values()))} per process: {parts}",
    ]
    return "\n".join(lines if activations else [*lines, "             without activations"])


def _build(config: Any) -> nn.Module:
    networks = {config_type: network for network, config_type in NETWORKS.values()}
    if getattr(config, "last", None) is not None:
        raise ValueError("--dry-run PROCESSES does not support last; expected a plain --dry-run")
    if type(config.model) not in networks:
        raise ValueError(f"--dry-run PROCESSES does not support {type(config.model).__name__}")
    with torch.device("meta"):
        model = networks[type(config.model)](config.model)
    if getattr(config, "lora", None) is not None:
        add_lora(model, config.lora)
    if config.fit.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    return model


def _trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@contextlib.contextmanager
def _pretended_group(processes: int) -> Iterator[None]:
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers "fake"

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _activations(model: nn.Module, config: Any) -> int | None:
    dtype = torch.bfloat16 if config.fit.precision == "bf16" else torch.float32
    with torch.device("meta"):
        inputs = _example(model, config.data.batch_size)
        if inputs is None:
            return None
        model = model.to(dtype)
        memory = step_memory(model, lambda: model(*inputs).float().square().mean(), accumulate=True)
        return memory["activations"]


def _example(model: nn.Module, B: int) -> tuple[Any, ...] | None:
    """Return inputs of a network on the default device; None for other networks."""
    t, drop = torch.zeros(B, dtype=torch.int64), torch.zeros(B, dtype=torch.bool)
    if isinstance(model, (DiffusionPrior, MLPPrior)):
        config = model.config
        text = _text(B, config.context_length, config)
        return torch.zeros(B, config.emb_dim), t, text, _if_learned(drop, config)
    if isinstance(model, Decoder):
        config = model.config
        x_t = torch.zeros(B, 3, config.image_size, config.image_size)
        text = _text(B, getattr(config.text, "context_length", CLIP_TOKENS), config)
        return x_t, t, torch.zeros(B, config.emb_dim), text, drop, _if_learned(drop, config)
    if isinstance(model, Upsampler):
        low, high = model.config.low_size, model.config.high_size
        return torch.zeros(B, 3, high, high), t, torch.zeros(B, 3, low, low)
    return None


def _text(B: int, L: int, config: Any) -> TextEncoding:
    ids = torch.zeros(B, L, dtype=torch.int64)
    states = torch.zeros(B, L, config.text_width)
    return TextEncoding(torch.zeros(B, config.emb_dim), states, ids == 0, ids)


def _if_learned(drop: Tensor, config: Any) -> Tensor | None:
    return drop if config.null_text == "learned" else None
