"""What a step will cost, found by computing one: parameters, memory, FLOPs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:
    from .fit import FitConfig


def describe(model: nn.Module, loss: Callable[[], Tensor], batch: dict[str, Any], config: FitConfig) -> str:
    """Run `loss` and its gradient once, and tell the parameters, the memory and the FLOPs of a step in this process."""
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    saved: dict[int, int] = {}  # bytes that the forward pass keeps for the backward pass, by storage
    own = {p.untyped_storage().data_ptr() for p in parameters}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with FlopCounterMode(display=False) as flops:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            value = loss()
        value.backward()
    model.zero_grad(set_to_none=True)

    weights = sum(p.numel() * p.element_size() for p in parameters)
    memory = {
        "weights": weights,
        "gradients": 4 * trained,
        "AdamW": 8 * trained,
        "EMA": 4 * trained if config.ema is not None else 0,
        "activations": sum(saved.values()),
    }
    samples = len(next(iter(batch.values())))
    per_step = flops.get_total_flops() * config.accumulate
    return "\n".join(
        [
            f"parameters   {sum(p.numel() for p in parameters):,} ({trained:,} trained)",
            f"batch        {samples} samples x {config.accumulate}, in each process",
            f"memory       {_gigabytes(sum(memory.values()))}: "
            + ", ".join(f"{name} {_gigabytes(size)}" for name, size in memory.items() if size),
            f"FLOPs        {per_step:.3e} a step, {per_step / samples / config.accumulate:.3e} a sample",
            f"loss         {value.item():.4g} before training",
        ]
    )


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"
