"""The process in which `unclip bench` times warm calls, stage by stage.

    python -m unclip.evaluation.bench.stages CONFIG OUT

CONFIG is a BenchConfig as JSON; what was measured is written to OUT.
"""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import unclip
from unclip.config import parse
from unclip.evaluation import DTYPES, STAGES
from unclip.evaluation.bench import PROMPT, RANDOM, BenchConfig, karlo
from unclip.evaluation.bench.calls import Inputs, stage_calls, stage_steps
from unclip.evaluation.bench.clock import counted, timed
from unclip.pipelines.base import default_dtype, find_device
from unclip.pipelines.offload import parts
from unclip.pipelines.unclip import UnCLIPPipeline

STEPS = 2  # of each stage under --steps-only: one with, and one without what is computed once a call


def where(config: BenchConfig) -> tuple[torch.device, torch.dtype]:
    """The device and the dtype that the networks will have."""
    device = find_device(config.device)
    return device, getattr(torch, DTYPES[config.dtype]) if config.dtype else default_dtype(device)


def open_model(config: BenchConfig) -> UnCLIPPipeline:
    """The model of that name, or a random one with the networks of the stages that are asked for."""
    device, dtype = where(config)
    if config.model in RANDOM:
        return karlo.build(config.model, dtype, device, config.stages)
    pipe = unclip.load(config.model, device, dtype)
    if not isinstance(pipe, UnCLIPPipeline):
        raise ValueError(f"{config.model} is no unCLIP model, and only those can be measured stage by stage")
    return pipe


def measure(pipe: UnCLIPPipeline, config: BenchConfig) -> dict[str, Any]:
    """Seconds of whole calls and of each stage, once warmed up; operations, weights and memory."""
    options = pipe.preset(config.preset) if config.preset else pipe.options
    if config.steps_only and len(options.upsamplers) > 1:
        raise ValueError("the steps of several upsamplers are not alike; measure them without --steps-only")
    weights = {name: _bytes(module) for name, module in _parts(pipe).items()}
    if config.quantize:
        pipe.quantize(config.quantize)
    if config.offload:
        pipe.offload()
    inputs, steps = Inputs.make(pipe, [PROMPT], config.batch), stage_steps(options)
    calls = {name: call for name, call in stage_calls(pipe, inputs, options).items() if name in config.stages}
    most = STEPS if config.steps_only else None
    for call in calls.values():
        timed(
            call, pipe.device, most=1
        )  # what is kept from call to call, such as the empty prompt's part, is not counted
    flops = {name: counted(call, most).whole(steps[name]) for name, call in calls.items()}
    cold = 1 if config.compile else 0  # rounds that do not count, for all else is warm by now
    if config.compile:
        unclip.compile(pipe)
    seconds: dict[str, list[float]] = {}
    if config.stages == STAGES and not config.steps_only:
        drawing = {"num_images": config.batch, "options": options, "batch_size": config.batch, "progress": False}
        for seed in range(config.repeat + cold):
            whole = timed(lambda on_step, seed=seed: pipe(PROMPT, seed=seed, **drawing), pipe.device)
            seconds.setdefault("call", []).append(whole.whole(0))
    step_seconds: dict[str, list[float]] = {}
    for _ in range(config.repeat + cold):
        for name, call in calls.items():
            stage = timed(call, pipe.device, most)
            seconds.setdefault(name, []).append(stage.whole(steps[name]))
            if steps[name]:
                step_seconds.setdefault(name, []).append(stage.step)
    cuda = pipe.device.type == "cuda"
    return {
        "seconds": {name: values[cold:] for name, values in seconds.items()},
        "step_seconds": {name: values[cold:] for name, values in step_seconds.items()},
        "steps": {name: count for name, count in steps.items() if count},
        "flops": flops,
        "size": picture_size(pipe, len(options.upsamplers)),
        "weights": weights,
        "peak_memory": {"device": torch.cuda.max_memory_allocated(pipe.device)} if cuda else {},
        "machine": machine(pipe.device, pipe.dtype),
    }


def _parts(pipe: UnCLIPPipeline) -> dict[str, nn.Module]:
    """What `pipe.offload()` keeps in memory one at a time."""
    found: dict[str, nn.Module] = {}
    for name, module in {"clip": pipe.clip, **pipe.networks()}.items():
        pieces = parts([module])
        found |= {name if len(pieces) == 1 else f"{name}.{i}": piece for i, piece in enumerate(pieces)}
    return found


def _bytes(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))


def machine(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What computes, beside processor and system."""
    return {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def picture_size(pipe: UnCLIPPipeline, upsamplers: int) -> int:
    return pipe.upsamplers[upsamplers - 1].config.high_size if upsamplers else pipe.decoder.config.image_size


def main() -> None:
    try:
        config = parse(BenchConfig, json.loads(sys.argv[1]))
        Path(sys.argv[2]).write_text(json.dumps(measure(open_model(config), config)), encoding="utf-8")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
