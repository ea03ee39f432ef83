"""What a step will cost, found by computing one: parameters, memory, FLOPs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

if TYPE_CHECKING:
    from unclip.training.fit import FitConfig

_aten = torch.ops.aten
# torch counts the attention kernels of CUDA only.
CPU_ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *rest, **kw: sdpa_flop_count(
        q, k, v
    ),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *rest, **kw: sdpa_backward_flop_count(grad, q, k, v)
    ),
}


def describe(
    model: nn.Module, loss: Callable[[], Tensor], batch: dict[str, Any], config: FitConfig
) -> str:
    """Run `loss` and its gradient once, and tell the parameters, the memory and the FLOPs of a step in this process."""
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    saved: dict[
        int, int
    ] = {}  # bytes that the forward pass keeps for the backward pass, by storage
    own = {p.untyped_storage().data_ptr() for p in parameters}

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
            f"memory       {_size(sum(memory.values()))}: "
            + ", ".join(f"{name} {_size(size)}" for name, size in memory.items() if size),
            f"FLOPs        {per_step:.3e} a step, {per_step / samples / config.accumulate:.3e} a sample",
            f"loss         {value.item():.4g} before training",
        ]
    )


def _size(size: float) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"
