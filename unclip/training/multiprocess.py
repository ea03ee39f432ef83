"""The processes of a run: joint decisions, and one error message for a failure."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

T = TypeVar("T")


def on_main(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """Call a function in the main process; return its result, or raise its error, in all."""
    if accelerator.num_processes == 1:
        return function()
    outcome: list[tuple[T | None, Exception | None]] = [(None, None)]
    if accelerator.is_main_process:
        try:
            outcome = [(function(), None)]
        except (ValueError, OSError) as error:
            outcome = [(None, error)]
    broadcast_object_list(outcome)
    result, error = outcome[0]
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def any_process(accelerator: Accelerator, *flags: bool | torch.Tensor) -> list[bool]:
    """Return for each flag whether it is set in any process; one synchronisation for all."""
    if accelerator.num_processes == 1:
        return [bool(flag) for flag in flags]
    values = [torch.as_tensor(flag, device=accelerator.device).float() for flag in flags]
    return [total > 0 for total in accelerator.reduce(torch.stack(values)).tolist()]  # type: ignore


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def fail(message: str, wait: float = 0.0) -> NoReturn:
    """Exit with code 1 and one line, which only the first process of a job that fails prints.

    wait: seconds in which a process that knows the cause can print first.
    """
    if world_size() > 1:
        time.sleep(wait)
        message = message if _first_to_fail() else ""
    if message and not dist.is_initialized():
        sys.exit(f"error: {message}")
    if message:
        print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(1)  # without the clean-up of NCCL, which would wait for the other processes


def lost_connection(error: BaseException) -> bool:
    """Return whether an error only says that another process is gone."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and "onnection" in str(error)


def _first_to_fail() -> bool:
    """Return whether no other process of the job has called this."""
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        socket.create_connection((address, port), timeout=2).close()  # torch logs what it tries
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=5))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return store.add(f"unclip/failures/{attempt}", 1) == 1
    except (RuntimeError, KeyError, OSError):  # the process that keeps the store is gone
        return True
