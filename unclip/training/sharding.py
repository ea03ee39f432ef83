"""Sharded training (FSDP2, HSDP): which layers are units, and the rows that a process holds.

Every large layer is a unit of its own, not every block: our networks call parts of a block, such as
its projection of keys and values, outside its `forward`, where FSDP would not gather its weights.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import (
    FullyShardedDataParallelPlugin,
    is_torch_version,
    parse_flag_from_env,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

# Layers whose parameters are used in their `forward` only. Embeddings and the convolutions of dVAE
# are also used directly.
UNITS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.MultiheadAttention)


def requested() -> bool:
    """Return whether accelerate's launch config asks for FSDP; ValueError for FSDP1."""
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return False
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise ValueError(f"fsdp_version is {version}; expected 2")
    if not is_torch_version(">=", "2.7.0"):
        raise ValueError(f"FSDP2 needs torch 2.7 or newer; this is {torch.__version__}")
    return True


def make_mesh(device_type: str, processes: int) -> DeviceMesh:
    """Return the mesh ("shard",), or ("replicate", "shard") for HSDP, as the launch config says."""
    replicas = int(os.environ.get("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "1"))
    if processes % replicas:
        raise ValueError(
            f"parallelism_config_dp_replicate_size is {replicas}; "
            f"expected a divisor of {processes}, the number of processes"
        )
    if replicas == 1:
        return init_device_mesh(device_type, (processes,), mesh_dim_names=("shard",))
    shape = (replicas, processes // replicas)
    return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))


def shard(model: nn.Module, mesh: DeviceMesh, precision: str) -> None:
    """Shard the trained parameters of a model in place; frozen ones and scalars stay whole.

    In bf16 the units are gathered in bf16 and their gradients reduced in fp32. The buffers become
    those of the first process, as in DDP: each process measures statistics of its own data.
    """
    for buffer in model.buffers():
        dist.broadcast(buffer, 0)
    # torch warns about changing the output of a unit in place, which no network here does.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    whole = {p for p in model.parameters() if p.ndim == 0 or not p.requires_grad}
    bf16 = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    options = {"mesh": mesh, "ignored_params": whole, "offload_policy": plugin.cpu_offload}
    for unit in _units(model, plugin.min_num_params or 0):
        fully_shard(
            unit,
            reshard_after_forward=bool(plugin.reshard_after_forward),
            mp_policy=bf16 if precision == "bf16" else MixedPrecisionPolicy(),
            **options,
        )
    fully_shard(model, reshard_after_forward=False, **options)
    for p in whole:
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(_average_gradient)


def reshard(model: nn.Module) -> None:
    """Free what is gathered, so that the next `forward` gathers the present weights."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _units(module: nn.Module, min_size: int) -> Iterator[nn.Module]:
    trained = [p for p in module.parameters() if p.requires_grad and p.ndim]
    if isinstance(module, UNITS):
        if sum(p.numel() for p in trained) >= max(1, min_size):
            yield module
        return
    for child in module.children():
        yield from _units(child, min_size)


def _average_gradient(parameter: Tensor) -> None:
    """Average over the processes. After `no_sync` steps the earlier part is equal in all."""
    assert parameter.grad is not None
    dist.all_reduce(parameter.grad)
    parameter.grad /= dist.get_world_size()


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds, without a copy."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def first_row(tensor: Tensor) -> int:
    """Return the number of the first row that this process holds."""
    if not isinstance(tensor, DTensor):
        return 0
    shards = tensor.device_mesh["shard"] if tensor.device_mesh.ndim > 1 else tensor.device_mesh
    rows = -(-tensor.shape[0] // shards.size())  # of each process, fewer on the last ones
    return min(tensor.shape[0], rows * shards.get_local_rank())


def is_primary(tensor: Tensor) -> bool:
    """Return whether this process is the one that saves its part of a tensor."""
    if not isinstance(tensor, DTensor):
        return not dist.is_initialized() or dist.get_rank() == 0
    mesh = tensor.device_mesh
    return mesh.ndim == 1 or mesh.get_local_rank("replicate") == 0


@torch.no_grad()
def gather(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """Return copies of a model's whole tensors on the CPU in processes with `keep`, {} in others.

    All processes must call it.
    """
    whole: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            whole[name] = full.to("cpu", copy=True)
    return whole


def skeleton(model: nn.Module) -> nn.Module:
    """Return a copy of a model without memory: its parameters and buffers are on the meta device.

    Buffers that are not saved keep their values.
    """
    saved = model.state_dict(keep_vars=True)
    memo: dict[int, Any] = {}
    for tensor in saved.values():
        empty = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
    return copy.deepcopy(model, memo)


def fill(empty: nn.Module, weights: Mapping[str, Tensor], device: torch.device | str) -> None:
    """Give a skeleton its tensors, on a device; on "meta" it has no memory again."""
    empty.load_state_dict({n: x.to(device) for n, x in weights.items()}, assign=True)


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(p, DTensor) for p in model.parameters())
