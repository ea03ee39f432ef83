"""Processes that load batches: a killed one is an error, and Ctrl-C does not reach them."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader


def load_in_workers(loader: DataLoader[Any]) -> Iterator[Any]:
    """Iterate over what workers load. Raises ChildProcessError if one of them is killed.

    torch raises this from a signal handler, at any point of the program. Here the handler is in
    place only while a batch is awaited.
    """
    with _child_handler(None):  # restores the handler that torch replaces
        batches: Any = iter(loader)
    workers = batches._workers

    def check(*_: Any) -> None:
        for worker in workers:
            if worker.exitcode:
                code = worker.exitcode
                fault = f"was killed (signal {-code})" if code < 0 else f"ended (exit code {code})"
                remedy = "perhaps for lack of memory; lower data.workers or data.batch_size"
                raise ChildProcessError(f"a data worker {fault}, {remedy}")

    while True:
        try:
            with _child_handler(check):
                check()  # of a worker that was killed since the last batch
                batch = next(batches)
        except StopIteration:
            return
        except (RuntimeError, EOFError, OSError):
            time.sleep(0.5)  # the connections of a killed process end before the process does
            check()
            raise
        yield batch


@contextlib.contextmanager
def _child_handler(handler: Callable[..., None] | None) -> Iterator[None]:
    """Call `handler` when a child process ends, and restore the previous handler afterwards.

    Like torch's handler, it does nothing outside of the main thread and on Windows.
    """
    if os.name == "nt" or threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.getsignal(signal.SIGCHLD)
    try:
        if handler is not None:
            signal.signal(signal.SIGCHLD, handler)
        yield
    finally:
        signal.signal(signal.SIGCHLD, previous or signal.SIG_DFL)


def own_process_group(worker: int) -> None:
    """Shield a worker from Ctrl-C, so that the training process still gets its last batch."""
    if os.name != "nt":
        os.setpgrp()
