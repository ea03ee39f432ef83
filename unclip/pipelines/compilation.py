"""`unclip.compile(pipe)`: the same pictures, sooner, after some seconds of preparation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from unclip.models.cpu.packing import can_pack, pack
from unclip.models.unclip.prior import DiffusionPrior
from unclip.models.unet import UNet
from unclip.pipelines.runtime import Placement

P = TypeVar("P")


def compile(pipe: P, **options: Any) -> P:
    """Prepares the networks of a pipeline for their device, in place and for good.

    On an accelerator every step goes through torch.compile with static shapes: another batch size compiles again, at
    its first step. On CUDA the default mode is "reduce-overhead", which replays a step as one CUDA graph. `options` are
    torch.compile's own; given any, it is used on the CPU too, where it needs a C++ compiler.

    On the CPU weights are laid out as its kernels want them (see `unclip.models.cpu.packing`): the same bits, but for the
    rounding of the enlarging convolutions. Where PyTorch can't do that on this CPU (bf16 without AVX-512), nothing is
    changed.
    """
    if not isinstance(pipe, Placement):
        raise ValueError(
            f"a {type(pipe).__name__} was given; expected a pipeline, such as unclip.load gives"
        )
    if pipe.offloaded:
        raise ValueError(
            "the networks are offloaded, and compiled ones must stay where they are; use one or the other"
        )
    if pipe.device.type == "cpu" and not options:
        if can_pack(pipe.dtype):
            _prepare(pipe, pack)
        return pipe
    options.setdefault("dynamic", False)
    if hasattr(pipe, "dalle"):  # whose steps write into their cache, which no CUDA graph may
        pipe.step = torch.compile(pipe.dalle.step, **options)
        _prepare(pipe, lambda network: None)
        return pipe
    if pipe.device.type == "cuda":
        options.setdefault("mode", "reduce-overhead")
    _prepare(pipe, partial(_compile_steps, options=options))
    pipe.static_shapes = True
    return pipe


def _prepare(pipe: Placement, prepare: Callable[[nn.Module], None]) -> None:
    for network in pipe.networks().values():
        prepare(network)
    pipe._prepare = prepare  # for networks that come later


def _compile_steps(network: nn.Module, options: dict[str, Any]) -> None:
    for module in network.modules():
        if isinstance(module, UNet | DiffusionPrior):
            name = "forward" if isinstance(module, UNet) else "predict"
            setattr(module, name, _compiled(getattr(module, name), options))


def _compiled(function: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    compiled = torch.compile(function, **options)

    def call(*args: Any, **kwargs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        outputs = compiled(*args, **kwargs)
        # A CUDA graph writes its output to memory of its own, which the next step overwrites.
        return torch.utils._pytree.tree_map(torch.clone, outputs)

    return call
