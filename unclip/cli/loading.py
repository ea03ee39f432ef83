"""Load the model that the command line names."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING, Any

from unclip.checkpoints.folders import locate
from unclip.cli.arguments import DTYPES, check_flags

if TYPE_CHECKING:  # `unclip --help` must not import torch
    from unclip.pipelines.dalle.pipeline import DallePipeline
    from unclip.pipelines.glide import GLIDEPipeline
    from unclip.pipelines.unclip.pipeline import UnCLIPPipeline

    AnyPipeline = UnCLIPPipeline | GLIDEPipeline | DallePipeline


def load_model(args: Namespace, default_dtype: str | None = None) -> AnyPipeline:
    """Load --model with --prior and --lora; offload, quantize or compile it as the flags say."""
    offload_at_once = args.offload and not (args.quantize or args.lora)
    dtype = args.dtype or default_dtype
    pipe = load_named(args.model, args.device, dtype, offload=offload_at_once)
    check_flags(pipe, args)
    if args.prior is not None:
        from unclip.pipelines import load_prior

        unclip: UnCLIPPipeline = _check_kind(pipe, "unclip", args, "an unCLIP model for --prior")
        unclip.prior = load_prior(args.prior)
    for path, scale in args.lora or ():
        adapted: UnCLIPPipeline = _check_kind(pipe, "unclip", args, "an unCLIP model for --lora")
        adapted.load_lora(path, scale, merge=True)
    if args.quantize:
        pipe.quantize(args.quantize)
    if args.compile:
        from unclip.pipelines.compilation import compile

        compile(pipe)
    if args.offload:
        pipe.offload()
    return pipe


def load_named(
    name: str, device: str | None, dtype: str | None, *, offload: bool = False
) -> AnyPipeline:
    """Call `unclip.load` with a dtype as the command line spells it."""
    from unclip.pipelines import load

    locate(name)  # an unknown name is reported before torch is imported

    import torch

    torch_dtype = None if dtype is None else getattr(torch, DTYPES[dtype])
    pipe: Any = load(name, device, torch_dtype, offload=offload)
    return pipe


def load_unclip(args: Namespace) -> UnCLIPPipeline:
    """Load --model; raise a ValueError if it is not an unCLIP model."""
    return _check_kind(load_model(args), "unclip", args, "an unCLIP model")


def load_dalle(args: Namespace) -> DallePipeline:
    """Load --model; raise a ValueError if it is not a DALL-E."""
    return _check_kind(load_model(args), "dalle", args, "a DALL-E model")


def _check_kind(pipe: Any, kind: str, args: Namespace, expected: str) -> Any:
    if pipe.kind != kind:
        command = args.run.__name__.replace("_", "-")
        raise ValueError(f"{pipe.name} is of kind {pipe.kind}; {command} needs {expected}")
    return pipe
