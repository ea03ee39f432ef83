"""Start of a training script: command line, accelerate, one-line errors."""

from __future__ import annotations

import argparse
import os
import platform
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, ProjectConfiguration, parse_flag_from_env

from unclip.config import load_config
from unclip.files import error_text
from unclip.tokenizer import TruncationWarning
from unclip.training import sharding
from unclip.training.estimate import describe_sharded
from unclip.training.lock import check_unlocked
from unclip.training.log import Trackers, available_trackers
from unclip.training.multiprocess import fail, lost_connection, rank, world_size

C = TypeVar("C")

UNSUPPORTED = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


@dataclass(frozen=True)
class Run(Generic[C]):
    """The config and command-line options of one start of a training script."""

    config: C
    resume: str | None = None  # "latest" or the folder of a checkpoint
    init: str | None = None  # initial weights, with a new optimizer: a safetensors file or a folder
    dry_run: bool = False
    traceback: bool = False
    pretended: int | None = None  # number of processes to describe in a dry run without data

    @property
    def device(self) -> torch.device:
        """The training device of this process, for the frozen networks of a loss."""
        device = this_process().device
        assert device is not None
        return device


def setup(cls: type[C], description: str | None, argv: Sequence[str] | None = None) -> Run[C]:
    """Parse the command line and the config; `cls` is a dataclass with a field `fit: FitConfig`."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="YAML file with all settings")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override: optim.lr=1e-4")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--resume", metavar="latest|FOLDER", help="continue a run from a checkpoint")
    start.add_argument("--init", metavar="PATH", help="initial weights: safetensors file or folder")
    cost = "print parameters, memory and FLOPs, then exit; with PROCESSES: sharded over this many"
    add("--dry-run", nargs="?", type=int, const=0, metavar="PROCESSES", help=cost)
    add("--traceback", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    config: Any = load_config(args.config, cls, args.set)
    torch.manual_seed(config.fit.seed)  # initial weights; `fit` seeds each process again
    dry_run = args.dry_run is not None
    return Run(config, args.resume, args.init, dry_run, args.traceback, args.dry_run or None)


def launch(
    main: Callable[[Run[C]], Any],
    cls: type[C],
    description: str | None,
    argv: Sequence[str] | None = None,
) -> None:
    """Run a script's `main`. User errors, a full disk, NaN and Ctrl-C exit with one line, code 1.

    If there are several processes, only the first one that fails prints its message.
    """
    run: Run[Any] | None = None
    standard, warnings.formatwarning = warnings.formatwarning, _one_line
    try:
        run = setup(cls, description, argv)
        if run.pretended:
            print(describe_sharded(run.config, run.pretended))
            return
        if not run.dry_run and rank() == 0:  # which holds the lock later
            check_unlocked(Path(run.config.fit.output))
        with warnings.catch_warnings():
            # Long captions are counted once at the start, by `report_long_captions`.
            warnings.simplefilter("ignore", TruncationWarning)
            main(run)
    except KeyboardInterrupt:  # outside the loop of `fit`, which saves, or twice inside it
        fail("interrupted; nothing was saved after the last checkpoint")
    except Exception as error:
        if run is not None and run.traceback:
            raise
        if isinstance(error, (ValueError, OSError, FloatingPointError, MemoryError)):
            fail(error_text(error) or "out of memory")
        if lost_connection(error):
            reason = " ".join(str(error).split())
            fail(f"process {rank()} lost the connection to another one ({reason})", wait=2.0)
        if world_size() > 1:
            fail(f"process {rank()}: {traceback.format_exc()}")
        raise
    finally:
        warnings.formatwarning = standard


def _one_line(message: Warning | str, *where: Any) -> str:
    """Format a warning for users, without the line of code that issued it."""
    return f"warning: {error_text(message)}\n"


def this_process() -> PartialState:
    """Return accelerate's state of this process: device, index, number of processes.

    The first call fixes it until the process ends. Without an accelerator it must be created with
    cpu=True: otherwise each of several processes assumes that it is alone.
    """
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=cpu)


def make_accelerator(precision: str, trackers: Trackers, output: str) -> Accelerator:
    """Create the Accelerator of a run; ValueError for what is not supported here."""
    if precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("precision fp16 needs a CUDA device; use bf16 or fp32")
    # WORLD_SIZE is used by the loaders to split the data
    if (joined := this_process().num_processes) != world_size():
        fault = f"WORLD_SIZE is {world_size()}, but accelerate trains with {joined} process(es)"
        raise ValueError(f"{fault}; start one process, or set ACCELERATE_USE_CPU=1")
    log_with: list[Any] = [*available_trackers(trackers)]
    if precision == "fp16" and sharding.requested():
        raise ValueError("precision fp16 does not work with FSDP; use bf16 or fp32")
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps != "1":  # accelerate would divide the gradients once more
        given = f"gradient_accumulation_steps is {steps}"
        raise ValueError(f"accelerate's {given}; expected 1; set fit.accumulate instead")
    accelerator = Accelerator(
        mixed_precision={"fp32": "no"}.get(precision, precision),
        log_with=log_with or None,
        project_config=ProjectConfiguration(output, logging_dir=f"{output}/logs"),
    )
    if accelerator.distributed_type in UNSUPPORTED:
        raise ValueError(f"{accelerator.distributed_type.value} is not supported; use FSDP2 or DDP")
    if precision == "bf16" and accelerator.device.type == "cpu" and emulates_bf16():
        warnings.warn(
            "this CPU has no bfloat16 instructions: fit.precision fp32 is faster than bf16",
            stacklevel=2,
        )
    return accelerator


def default_precision() -> Literal["fp32", "bf16"]:
    """bf16; fp32 on a CPU without bfloat16 instructions"""
    return "fp32" if not torch.accelerator.is_available() and emulates_bf16() else "bf16"


def emulates_bf16() -> bool:
    """Return whether this is an x86 CPU that emulates bfloat16, which is many times slower."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    return not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
