"""`unclip.compile(pipe)`: the same images in less time, after some seconds of preparation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils._pytree import tree_map

from unclip.models.cpu.kernels import remove_kernels
from unclip.models.cpu.packing import can_pack, pack
from unclip.models.unclip.prior import DenoisingPrior
from unclip.models.unet import UNet
from unclip.pipelines.base import Pipeline
from unclip.pipelines.dalle.pipeline import DallePipeline
from unclip.pipelines.memory import enable_memory_reuse

P = TypeVar("P", bound=Pipeline)


def compile(pipe: P, **options: Any) -> P:
    """Prepare the networks of a pipeline for their device, in place and permanently.

    On an accelerator every step runs through torch.compile with static shapes: a new batch size
    compiles again at its first step. On CUDA the default mode is "reduce-overhead", which replays
    a step as one CUDA graph. `options` are passed to torch.compile; if any are given, it is used on
    the CPU too, where it needs a C++ compiler.

    On the CPU weights are packed for its kernels (see `unclip.models.cpu.packing`): outputs are
    equal, except for the rounding of upsampling convolutions. Freed memory is kept during calls of
    any pipeline of the process (see `unclip.pipelines.memory`). If PyTorch cannot pack for this CPU
    (bf16 without AVX-512), weights stay as they are.
    """
    if not isinstance(pipe, Pipeline):
        kind = type(pipe).__name__
        raise ValueError(f"compile got a {kind}; expected a pipeline, as from unclip.load")
    if pipe.offloaded:
        raise ValueError("the networks are offloaded, and cannot be compiled; use one or the other")
    if pipe.device.type == "cpu":
        enable_memory_reuse()
        if not options:
            if can_pack(pipe.dtype):
                pipe.runtime.prepare(pack)
            return pipe
    options.setdefault("dynamic", False)
    if isinstance(pipe, DallePipeline):  # its steps write to a cache, which no CUDA graph may do
        pipe.runtime.prepare(remove_kernels)
        pipe.step = torch.compile(pipe.dalle.step, **options)
        return pipe
    if pipe.device.type == "cuda":
        options.setdefault("mode", "reduce-overhead")
    pipe.runtime.prepare(partial(_compile_steps, options=options))
    pipe.runtime.static_shapes = True
    return pipe


def _compile_steps(network: nn.Module, options: dict[str, Any]) -> None:
    remove_kernels(network)  # torch.compile fuses operations itself
    for module in network.modules():
        if isinstance(module, UNet | DenoisingPrior):
            name = "forward" if isinstance(module, UNet) else "predict"
            setattr(module, name, _compiled(getattr(module, name), options))


def _compiled(function: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    compiled = torch.compile(function, **options)

    def call(*args: Any, **kwargs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        outputs = compiled(*args, **kwargs)
        # A CUDA graph writes its output to memory of its own, which the next step overwrites.
        return tree_map(torch.clone, outputs)

    return call
