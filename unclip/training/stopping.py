"""Orderly stops of a run: signals, the end of the launcher, a time limit."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from unclip.training.multiprocess import lost_connection

SIGNALS = [
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGHUP")  # Windows has no SIGHUP
    if hasattr(signal, name)
]
START = time.monotonic()  # approximate start of this process, after some imports
PARENT = os.getppid()


class Interrupted(Exception):
    """Raised inside `StopRequest.interruptible` by a request to stop."""


class StopRequest:
    """Inside `with`, `requested` becomes true when the run has to save and exit.

    It does so after the first SIGTERM, Ctrl-C (a second Ctrl-C interrupts) or SIGHUP (unless nohup
    ignores it), when the launcher has ended without a signal to this process, and `max_hours` after
    the start of the process.
    """

    def __init__(self, max_hours: float | None = None) -> None:
        self._deadline = START + 3600 * max_hours if max_hours else float("inf")
        self._signalled = self._interruptible = False
        self._handlers: dict[signal.Signals, Any] = {}
        self._left = threading.Event()

    @property
    def requested(self) -> bool:
        return self._signalled or time.monotonic() > self._deadline

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # only it may set handlers
            for number in SIGNALS:
                if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                    self._handlers[number] = signal.signal(number, self._on_signal)
            if launched():
                threading.Thread(target=self._watch_launcher, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        self._left.set()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._handlers and error is not None and lost_connection(error):
            # torchrun now terminates this process too, but it must first report the error.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let a signal raise Interrupted at once, in code without side effects."""
        self._interruptible = True
        try:
            if self._signalled:
                raise Interrupted
            yield
        finally:
            self._interruptible = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signalled and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signalled = True
        if self._interruptible:
            self._interruptible = False
            raise Interrupted

    def _watch_launcher(self) -> None:
        """Request a stop when the launcher ends: accelerate does not forward SIGTERM."""
        while os.getppid() == PARENT and not _adopted():
            if self._left.wait(0.5):
                return
        os.kill(os.getpid(), signal.SIGTERM)


def launched() -> bool:
    """Return whether accelerate or torchrun started this process."""
    return not {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"}.isdisjoint(os.environ)


def _adopted() -> bool:
    """Return whether the launcher, a Python process, ended before this module was imported."""
    return PARENT == 1 and "python" not in psutil.Process(1).name()


def _parent_command() -> list[str]:
    try:
        return psutil.Process(PARENT).cmdline()
    except psutil.Error:
        return []


_COMMANDS = {  # of modules that are launchers
    "accelerate.commands.launch": ["accelerate", "launch"],
    "torch.distributed.run": ["torchrun"],
}
_LAUNCHER = _parent_command() if launched() else []  # read now: it may end before this process


def resume_command(launcher: Sequence[str] = _LAUNCHER) -> str:
    """Return the command line that started this run, with --resume latest.

    launcher: the command line of the parent process.
    """
    words = iter(sys.argv)
    arguments = []
    for word in words:
        if word in ("--resume", "--init"):
            next(words, None)
        elif not word.startswith(("--resume=", "--init=")):
            arguments.append(word)
    prefix = list(launcher[: -len(sys.argv)])
    if not prefix or list(launcher[-len(sys.argv) :]) != sys.argv:
        prefix = ["accelerate", "launch"] if launched() else ["python"]
    elif len(prefix) > 1 and Path(prefix[1]).name in ("accelerate", "torchrun"):
        prefix = [Path(prefix[1]).name, *prefix[2:]]  # without the interpreter of the script
    elif prefix[1:2] == ["-m"] and (command := _COMMANDS.get(prefix[2])):
        prefix = [*command, *prefix[3:]]
    return shlex.join([*prefix, *arguments, "--resume", "latest"])
