"""Processes of a run as forks of this one, so that a start costs no imports."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping

from accelerate import PartialState

from unclip.training.multiprocess import lost_connection

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP",
    "FSDP_MIN_NUM_PARAMS": "20",
}


def fork(
    function: Callable[[int], None],
    processes: int = 1,
    environment: Mapping[str, str] | None = None,
) -> list[int]:
    """Call function(rank) in new processes, connected if there are several; return their ids.

    The exit code is 0, or 3 if only the connection to another process was lost.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(processes):
        if pid := os.fork():
            pids.append(pid)
            continue
        code = 1
        try:
            os.environ |= {"ACCELERATE_USE_CPU": "true", **(environment or {})}
            PartialState._reset_state()  # this process may have trained
            if processes > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                os.environ |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            function(rank)
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
        except BaseException as error:
            code = 3 if lost_connection(error) else 1
            if code == 1:
                traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return pids


def wait(pids: list[int], seconds: float) -> list[int]:
    """Return the exit codes; TimeoutError if a process outlives `seconds`.

    When one fails, the others get SIGTERM, as from torchrun, and must end in 30 seconds.
    """
    codes: dict[int, int] = {}
    end, failed = time.monotonic() + seconds, False
    while len(codes) < len(pids):
        running = [pid for pid in pids if pid not in codes]
        for pid in running:
            if (done := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(done[1])
        running = [pid for pid in running if pid not in codes]
        if any(codes.values()) and not failed:
            failed, end = True, time.monotonic() + 30
            for pid in running:
                os.kill(pid, signal.SIGTERM)
        if running and time.monotonic() > end:
            for pid in running:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            raise TimeoutError(f"{len(running)} process(es) did not end; exit codes {codes}")
        time.sleep(0.01)
    return [codes[pid] for pid in pids]
