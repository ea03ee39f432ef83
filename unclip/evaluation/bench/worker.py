"""Tasks of `unclip bench` that run in a separate process.

    python -m unclip.evaluation.bench.worker measure CONFIG OUT.json   time warm calls
    python -m unclip.evaluation.bench.worker save CONFIG FOLDER        write a random Karlo
    python -m unclip.evaluation.bench.worker peak MACHINE OUT.json     measure the peak rate

CONFIG is a BenchConfig and MACHINE has "device" and "dtype", both as JSON.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import unclip
from unclip.config import parse
from unclip.evaluation import STAGES
from unclip.evaluation.bench import DALLE, KARLO, PROMPT, BenchConfig
from unclip.evaluation.bench.memory import PeakMemory
from unclip.evaluation.bench.random_models import build_dalle, build_karlo
from unclip.evaluation.bench.stage_calls import StageCalls, dalle_stages, unclip_stages
from unclip.evaluation.bench.timing import count_operations, interleave, measure_peak, time_stage
from unclip.files import exit_on_error
from unclip.pipelines.dalle.pipeline import DallePipeline
from unclip.pipelines.memory import enable_memory_reuse
from unclip.pipelines.offload import parts
from unclip.pipelines.runtime import default_dtype, find_device
from unclip.pipelines.unclip.pipeline import UnCLIPPipeline
from unclip.types import CodeOptions, UnCLIPOptions, parse_setting, set_options

FEW_STEPS = 2  # for --steps-only: only the first includes what is computed once per call


def placement(config: BenchConfig) -> tuple[torch.device, torch.dtype]:
    """Return the device and dtype of the networks."""
    device = find_device(config.device)
    return device, getattr(torch, config.dtype) if config.dtype else default_dtype(device)


def open_model(config: BenchConfig) -> UnCLIPPipeline | DallePipeline:
    """Load a model, or build a random one with the networks of the selected stages."""
    device, dtype = placement(config)
    if config.model in KARLO:
        return build_karlo(config.model, dtype, device, config.stages or STAGES["unclip"])
    if config.model in DALLE:
        return build_dalle(config.model, dtype, device)
    pipe = unclip.load(config.model, device, dtype, offload=config.offload and not config.quantize)
    if not isinstance(pipe, UnCLIPPipeline | DallePipeline):
        raise ValueError(f"{config.model} is of kind {pipe.kind}; expected unclip or dalle")
    return pipe


def measure(pipe: UnCLIPPipeline | DallePipeline, config: BenchConfig) -> dict[str, Any]:
    """Measure warm calls and each stage: seconds, operations, bytes of weights and peak memory."""
    if config.num_candidates and pipe.clip is None:
        raise ValueError(f"{config.model} has no CLIP, which --num-candidates needs")
    memory = PeakMemory(pipe.device)
    weights = {name: _num_bytes(module) for name, module in _offloaded_parts(pipe).items()}
    options = _configure(pipe, config)
    stages = _stages(pipe, config, options)
    calls, steps = stages.calls, stages.steps
    max_steps = FEW_STEPS if config.steps_only else None
    for call in calls.values():  # fill what is cached between calls
        time_stage(call, pipe.device, max_steps=1)
    flops = {
        name: count_operations(call, max_steps).total(steps.get(name, 0))
        for name, call in calls.items()
    }
    cold = 0
    if config.compile:
        unclip.compile(pipe)
        cold = 1  # the first round compiles and is dropped
    seconds = _time_calls(pipe, config, options, config.repeat + cold)
    step_seconds: dict[str, list[float]] = {}
    for _ in range(config.repeat + cold):
        for name, call in calls.items():
            with memory.measure(name):
                costs = time_stage(call, pipe.device, max_steps)
            seconds.setdefault(name, []).append(costs.total(steps.get(name, 0)))
            if name in steps:
                step_seconds.setdefault(name, []).append(costs.step)
    return {
        "seconds": {name: values[cold:] for name, values in seconds.items()},
        "step_seconds": {name: values[cold:] for name, values in step_seconds.items()},
        "steps": steps,
        "flops": flops,
        "size": stages.size,
        "weights": weights,
        "stage_memory": memory.by_name,
        "peak_memory": {"device" if pipe.device.type == "cuda" else "warm": memory.highest},
        "machine": machine(pipe.device, pipe.dtype),
    }


def _time_calls(
    pipe: UnCLIPPipeline | DallePipeline, config: BenchConfig, options: Any, repeat: int
) -> dict[str, list[float]]:
    """Time whole calls of the pipeline."""

    def call(**arguments: Any) -> Callable[[int], float]:
        def seconds(seed: int) -> float:
            costs = time_stage(
                lambda _: pipe(PROMPT, seed=seed, options=options, progress=False, **arguments),
                pipe.device,
            )
            return costs.total(0)

        return seconds

    candidates: dict[str, Callable[[int], float]] = {}
    if config.stages is None and not config.steps_only:
        candidates["call"] = call(num_images=config.batch, batch_size=config.batch)
    if config.num_candidates:
        candidates["generated"] = call(num_images=config.num_candidates)
        candidates["reranked"] = call(num_images=1, num_candidates=config.num_candidates)
    return interleave(candidates, repeat)


def _configure(
    pipe: UnCLIPPipeline | DallePipeline, config: BenchConfig
) -> UnCLIPOptions | CodeOptions:
    """Quantize and offload as configured, and return the sampling options."""
    if isinstance(pipe, DallePipeline):
        if config.preset or config.quantize or config.offload or config.steps_only:
            raise ValueError(
                "a DALL-E model does not support presets, int8 weights, offloading or --steps-only"
            )
        return set_options(pipe.options, map(parse_setting, config.set))
    options = pipe.preset(config.preset) if config.preset else pipe.options
    options = set_options(options, map(parse_setting, config.set))
    if config.steps_only and len(options.upsamplers) > 1:
        raise ValueError("--steps-only needs equal steps, but the model has several upsamplers")
    if config.quantize:
        pipe.quantize(config.quantize)
    if config.offload:
        pipe.offload()
    return options


def _stages(pipe: UnCLIPPipeline | DallePipeline, config: BenchConfig, options: Any) -> StageCalls:
    if isinstance(pipe, DallePipeline):
        stages = dalle_stages(pipe, PROMPT, config.batch, options)
    else:
        stages = unclip_stages(pipe, PROMPT, config.batch, options)
    selected, known = config.stages or tuple(stages.calls), ", ".join(stages.calls)
    if missing := [name for name in selected if name not in stages.calls]:
        raise ValueError(f"{config.model} has no stage {missing[0]!r}; expected some of {known}")
    return replace(stages, calls={n: call for n, call in stages.calls.items() if n in selected})


def _offloaded_parts(pipe: UnCLIPPipeline | DallePipeline) -> dict[str, nn.Module]:
    """Return the modules that `pipe.offload()` moves one at a time."""
    clip = {} if pipe.clip is None else {"clip": pipe.clip}
    found: dict[str, nn.Module] = {}
    for name, network in {**clip, **pipe.networks()}.items():
        modules = parts([network])
        for i, module in enumerate(modules):
            found[name if len(modules) == 1 else f"{name}.{i}"] = module
    return found


def _num_bytes(module: nn.Module) -> int:
    return sum(x.numel() * x.element_size() for x in (*module.parameters(), *module.buffers()))


def machine(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Describe the device and the software."""
    return {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def main(arguments: Sequence[str]) -> None:
    task, argument, out = arguments
    data = json.loads(argument)
    if task == "peak":
        results = measure_peak(find_device(data["device"]), getattr(torch, data["dtype"]))
        Path(out).write_text(json.dumps(results), encoding="utf-8")
        return
    config = parse(BenchConfig, data)
    enable_memory_reuse()  # as the command line does
    with exit_on_error():
        if task == "save":
            open_model(replace(config, device="cpu", stages=None)).save_pretrained(out)
        else:
            results = measure(open_model(config), config)
            Path(out).write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
