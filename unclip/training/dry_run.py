"""The cost of a training step, measured by computing one: parameters, memory, FLOPs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
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
    **state: Any,
) -> str:
    """Run `loss` and its backward pass once and describe the cost of a step in this process.

    state: the other arguments of `step_memory`.
    """
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    losses: list[Tensor] = []

    def recorded_loss() -> Tensor:
        losses.append(loss())
        return losses[0]

    state["accumulate"] = accumulate > 1
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as flops:
        memory = step_memory(model, recorded_loss, **state)
    parts = ", ".join(f"{name} {size(count)}" for name, count in memory.items() if count)
    samples = len(next(iter(batch.values())))
    per_sample = flops.get_total_flops() / samples
    per_step = flops.get_total_flops() * accumulate
    return "\n".join(
        [
            f"parameters   {sum(p.numel() for p in parameters):,} ({trained:,} trained)",
            f"batch        {samples} samples x {accumulate}, per process",
            f"memory       {size(sum(memory.values()))}: {parts}",
            f"FLOPs        {per_step:.3e} per step, {per_sample:.3e} per sample",
            f"loss         {losses[0].item():.4g} before training",
        ]
    )


def step_memory(
    model: nn.Module,
    loss: Callable[[], Tensor],
    *,
    ema: bool = True,
    optimizer: Literal["adamw", "adamw8bit"] = "adamw",
    frozen: Sequence[nn.Module] = (),
    accumulate: bool = False,
) -> dict[str, int]:
    """Run `loss` and its backward pass once; return the bytes that a training step needs.

    It also works on the meta device, for networks that do not fit on this machine; the result then
    includes attention matrices, which fused kernels do not store. "activations" is the peak of the
    memory allocated during the step, without the gradients. frozen: other networks of the loss.
    accumulate: the gradients of earlier batches exist from the start.
    """
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    others = {p for network in frozen for p in network.parameters()} - {*parameters}
    for p in parameters if accumulate else ():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    with _Allocations() as allocations:
        loss().backward()
    gradients = [p.grad for p in parameters if p.grad is not None and not accumulate]
    activations = max(allocations.peak - sum(x.nbytes for x in gradients), 0)
    model.zero_grad(set_to_none=True)
    return {
        "weights": sum(p.nbytes for p in parameters),
        "frozen networks": sum(p.nbytes for p in others),
        "gradients": 4 * trained,
        "AdamW": (2 if optimizer == "adamw8bit" else 8) * trained,
        "EMA": 4 * trained if ema else 0,
        "activations": activations,
    }


class _Allocations(TorchDispatchMode):
    """Counts the bytes of the tensors that operations return, until their memory is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._bytes = 0
        self._counted: dict[int, weakref.finalize] = {}  # storage -> finalizer that subtracts it

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        before = {_storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and _storage(x) not in before:
                self._count(x.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._counted:
            self._counted[key] = weakref.finalize(storage, self._forget, key, size)
            self._bytes += size
            self.peak = max(self.peak, self._bytes)

    def _forget(self, key: int, size: int) -> None:
        del self._counted[key]
        self._bytes -= size


def _storage(tensor: Tensor) -> int:
    """Identify a tensor's memory, which has no address on the meta device."""
    return tensor.untyped_storage()._cdata


def size(count: float) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"
