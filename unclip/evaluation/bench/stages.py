"""The process in which `unclip bench` times warm calls, stage by stage.

    python -m unclip.evaluation.bench.stages CONFIG OUT

CONFIG is a BenchConfig as JSON; what was measured is written to OUT.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import unclip
from unclip.cli.common import DTYPES
from unclip.config import parse
from unclip.evaluation import STAGES
from unclip.evaluation.bench import DALLE, KARLO, MEGA, PROMPT, BenchConfig, dalle, karlo
from unclip.evaluation.bench.calls import Work, picture_work
from unclip.evaluation.bench.clock import counted, timed
from unclip.evaluation.bench.dalle import code_work
from unclip.evaluation.bench.memory import PeakMemory
from unclip.pipelines.base import default_dtype, find_device
from unclip.pipelines.dalle.pipeline import DallePipeline
from unclip.pipelines.offload import parts
from unclip.pipelines.unclip.pipeline import UnCLIPPipeline
from unclip.types import CodeOptions, UnCLIPOptions

STEPS = (
    2  # of each stage under --steps-only: one with, and one without what is computed once a call
)


def where(config: BenchConfig) -> tuple[torch.device, torch.dtype]:
    """The device and the dtype that the networks will have."""
    device = find_device(config.device)
    return device, getattr(torch, DTYPES[config.dtype]) if config.dtype else default_dtype(device)


def open_model(config: BenchConfig) -> UnCLIPPipeline | DallePipeline:
    """The model of that name, or a random one with the networks of the stages that are asked for."""
    device, dtype = where(config)
    if config.model in KARLO:
        return karlo.build(config.model, dtype, device, config.stages or STAGES)
    if config.model in DALLE:
        return dalle.build(config.model, dtype, device)
    if config.model in MEGA:
        raise ValueError(
            f"{config.model} is a transformer without a codec; measure it --against plain"
        )
    pipe = unclip.load(config.model, device, dtype, offload=config.offload and not config.quantize)
    if not isinstance(pipe, UnCLIPPipeline | DallePipeline):
        raise ValueError(
            f"{config.model} is no unCLIP or DALL-E model, and only those can be measured stage by stage"
        )
    return pipe


def measure(pipe: UnCLIPPipeline | DallePipeline, config: BenchConfig) -> dict[str, Any]:
    """Seconds of whole calls and of each stage, once warmed up; operations, weights and memory."""
    if config.candidates and pipe.clip is None:
        raise ValueError(f"{config.model} has no CLIP to compare candidates with")
    memory = PeakMemory(pipe.device)
    weights = {name: _bytes(module) for name, module in _parts(pipe).items()}
    options = _prepared(pipe, config)
    work = _work(pipe, config, options)
    calls, steps = work.calls, work.steps
    most = STEPS if config.steps_only else None
    for call in calls.values():
        timed(call, pipe.device, most=1)  # what is kept from call to call is not counted
    flops = {name: counted(call, most).whole(steps.get(name, 0)) for name, call in calls.items()}
    cold = 1 if config.compile else 0  # rounds that do not count, for all else is warm by now
    if config.compile:
        unclip.compile(pipe)
    drawing = {"options": options, "progress": False}
    whole: dict[str, Callable[[int], object]] = {}
    if config.stages is None and not config.steps_only:
        batch = {"num_images": config.batch, "batch_size": config.batch}
        whole["call"] = lambda seed: pipe(PROMPT, seed=seed, **batch, **drawing)
    if n := config.candidates:
        whole["drawn"] = lambda seed: pipe(PROMPT, seed=seed, num_images=n, **drawing)
        whole["chosen"] = lambda seed: pipe(
            PROMPT, seed=seed, num_images=1, num_candidates=n, **drawing
        )
    seconds: dict[str, list[float]] = {}
    step_seconds: dict[str, list[float]] = {}
    for seed in range(config.repeat + cold):
        for name, draw in list(whole.items())[:: -1 if seed % 2 else 1]:
            found = timed(lambda on_step, draw=draw, seed=seed: draw(seed), pipe.device)
            seconds.setdefault(name, []).append(found.whole(0))
    for _ in range(config.repeat + cold):
        for name, call in calls.items():
            with memory.within(name):
                stage = timed(call, pipe.device, most)
            seconds.setdefault(name, []).append(stage.whole(steps.get(name, 0)))
            if name in steps:
                step_seconds.setdefault(name, []).append(stage.step)
    return {
        "seconds": {name: seconds[name][cold:] for name in (*whole, *calls)},
        "step_seconds": {name: values[cold:] for name, values in step_seconds.items()},
        "steps": steps,
        "flops": flops,
        "size": work.size,
        "weights": weights,
        "stage_memory": memory.of,
        "peak_memory": {"device" if pipe.device.type == "cuda" else "warm": memory.highest},
        "machine": machine(pipe.device, pipe.dtype),
    }


def _prepared(
    pipe: UnCLIPPipeline | DallePipeline, config: BenchConfig
) -> UnCLIPOptions | CodeOptions:
    """Changes the networks as the config wants, but for compilation, and gives the options to draw with."""
    if isinstance(pipe, DallePipeline):
        if config.preset or config.quantize or config.offload or config.steps_only:
            raise ValueError(
                "of a DALL-E no preset, int8 weights, offloading or single steps can be measured"
            )
        return pipe.options
    options = pipe.preset(config.preset) if config.preset else pipe.options
    if config.steps_only and len(options.upsamplers) > 1:
        raise ValueError(
            "the steps of several upsamplers are not alike; measure them without --steps-only"
        )
    if config.quantize:
        pipe.quantize(config.quantize)
    if config.offload:
        pipe.offload()
    return options


def _work(
    pipe: UnCLIPPipeline | DallePipeline, config: BenchConfig, options: UnCLIPOptions | CodeOptions
) -> Work:
    """The stages that are asked for."""
    of_kind = code_work if isinstance(pipe, DallePipeline) else picture_work
    work = of_kind(pipe, PROMPT, config.batch, options)
    if missing := [name for name in config.stages or () if name not in work.calls]:
        raise ValueError(
            f"{config.model} has no stage {missing[0]!r}; expected some of {', '.join(work.calls)}"
        )
    wanted = config.stages or tuple(work.calls)
    return replace(work, calls={name: call for name, call in work.calls.items() if name in wanted})


def _parts(pipe: UnCLIPPipeline | DallePipeline) -> dict[str, nn.Module]:
    """What `pipe.offload()` keeps in memory one at a time."""
    found: dict[str, nn.Module] = {}
    clip = {} if pipe.clip is None else {"clip": pipe.clip}
    for name, module in {**clip, **pipe.networks()}.items():
        pieces = parts([module])
        found |= {
            name if len(pieces) == 1 else f"{name}.{i}": piece for i, piece in enumerate(pieces)
        }
    return found


def _bytes(module: nn.Module) -> int:
    return sum(
        tensor.numel() * tensor.element_size()
        for tensor in (*module.parameters(), *module.buffers())
    )


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


def main() -> None:
    try:
        config = parse(BenchConfig, json.loads(sys.argv[1]))
        Path(sys.argv[2]).write_text(
            json.dumps(measure(open_model(config), config)), encoding="utf-8"
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
