"""The cost of a training step, measured by computing one: parameters, memory, FLOPs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

_aten = torch.ops.aten
# torch counts only the attention kernels of CUDA.
CPU_ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, *rest, **kw: sdpa_flop_count(q, k, v)
    ),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *rest, **kw: sdpa_backward_flop_count(grad, q, k, v)
    ),
}


def describe(
    model: nn.Module,
    loss: Callable[[], Tensor],
    batch: dict[str, Any],
    *,
    accumulate: int = 1,
    ema: bool = True,
) -> str:
    """Run `loss` and its backward pass once and describe the cost of a step in this process."""
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    own = {p.untyped_storage().data_ptr() for p in parameters}
    saved: dict[int, int] = {}  # storage -> bytes kept for the backward pass

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as flops:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            value = loss()
        value.backward()
    model.zero_grad(set_to_none=True)

    memory = {
        "weights": sum(p.numel() * p.element_size() for p in parameters),
        "gradients": 4 * trained,
        "AdamW": 8 * trained,
        "EMA": 4 * trained if ema else 0,
        "activations": sum(saved.values()),
    }
    parts = ", ".join(f"{name} {_size(size)}" for name, size in memory.items() if size)
    samples = len(next(iter(batch.values())))
    per_sample = flops.get_total_flops() / samples
    per_step = flops.get_total_flops() * accumulate
    return "\n".join(
        [
            f"parameters   {sum(p.numel() for p in parameters):,} ({trained:,} trained)",
            f"batch        {samples} samples x {accumulate}, per process",
            f"memory       {_size(sum(memory.values()))}: {parts}",
            f"FLOPs        {per_step:.3e} per step, {per_sample:.3e} per sample",
            f"loss         {value.item():.4g} before training",
        ]
    )


def _size(size: float) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"
