"""Where a training runs: the device of this process, and of how many processes it is one."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, ProjectConfiguration, parse_flag_from_env

from unclip.training.log import available_trackers

if TYPE_CHECKING:
    from unclip.training.fit import FitConfig


def this_process() -> PartialState:
    """What accelerate knows of this process: its device, its number, and how many there are.

    Whoever asks first settles it until the process ends. Where there is no accelerator accelerate must be told so, or
    it takes each of several processes for the only one.
    """
    return PartialState(
        cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    )


def accelerator_for(config: FitConfig) -> Accelerator:
    """accelerate as `config` wants it; ValueError for what this machine or these checkpoints cannot."""
    if config.precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("precision fp16 needs a CUDA device; use bf16 or fp32")
    started = int(os.environ.get("WORLD_SIZE", 1))  # among which the loaders share the data
    if (joined := this_process().num_processes) != started:
        raise ValueError(
            f"WORLD_SIZE is {started}, but accelerate trains with {joined} process(es), so each would be on its own; "
            "start one process, or set ACCELERATE_USE_CPU=1"
        )
    accelerator = Accelerator(
        mixed_precision={"fp32": "no"}.get(config.precision, config.precision),
        log_with=available_trackers(config.trackers) or None,
        project_config=ProjectConfiguration(config.output, logging_dir=f"{config.output}/logs"),
    )
    if accelerator.distributed_type in (
        DistributedType.FSDP,
        DistributedType.DEEPSPEED,
        DistributedType.MEGATRON_LM,
    ):
        raise ValueError(
            f"{accelerator.distributed_type.value} shards the weights, which these checkpoints cannot; use DDP"
        )
    return accelerator
