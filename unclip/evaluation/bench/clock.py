"""Times of a stage's steps on the device's own clock, and the operations that they take."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode

from unclip.training.dry_run import CPU_ATTENTION
from unclip.types import OnStep

T = TypeVar("T")
Stage = Callable[[OnStep], T]  # draws, and calls back after every step


class _Enough(Exception):
    """As many steps as were wanted are done."""


class Clock:
    """Marks in the order of the device's work: CUDA events, which nothing waits for until the end; else host time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[torch.cuda.Event | float] = []

    def mark(self) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self.wait()
            self._marks.append(time.perf_counter())

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        if self.device.type in ("cuda", "mps"):
            getattr(torch, self.device.type).synchronize()

    def seconds(self) -> list[float]:
        """Between each mark and the next."""
        self.wait()
        pairs = pairwise(self._marks)
        if self.device.type == "cuda":
            return [before.elapsed_time(after) / 1000 for before, after in pairs]
        return [after - before for before, after in pairs]


@dataclass(frozen=True)
class Steps(Generic[T]):
    """Seconds, or operations, of a stage: of all its steps, or of the first ones, and then `result` is None."""

    each: list[float]  # the first has with it all that is computed once a call
    rest: float  # after the last step
    result: T | None

    @property
    def step(self) -> float:
        """The median of a step; the first only counts where it is the only one."""
        return statistics.median(self.each[1:] or self.each)

    def whole(self, num_steps: int) -> float:
        """The call as it was; or, if it was stopped, what is computed once and `num_steps` steps."""
        if self.result is not None:
            return sum(self.each) + self.rest
        return max(self.each[0] - self.step, 0) + num_steps * self.step


def timed(stage: Stage[T], device: torch.device, most: int | None = None) -> Steps[T]:
    """The seconds of a stage, or of its first `most` steps."""
    clock = Clock(device)
    clock.wait()
    clock.mark()
    result = _run(stage, clock.mark, most)
    clock.mark()
    *steps, rest = clock.seconds()
    return Steps(steps, rest, result)


def counted(stage: Stage[T], most: int | None = None) -> Steps[T]:
    """The floating-point operations of a stage, or of its first `most` steps; a multiply-add is two.

    Convolutions, matrix products and attention are counted, nothing else. Compiled networks hide theirs.
    """
    totals = [0]
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        result = _run(stage, lambda: totals.append(counter.get_total_flops()), most)
    totals.append(counter.get_total_flops())
    *steps, rest = (after - before for before, after in pairwise(totals))
    return Steps(steps, rest, result)


def _run(stage: Stage[T], after_step: Callable[[], None], most: int | None) -> T | None:
    done = 0

    def on_step(_: object) -> None:
        nonlocal done
        after_step()
        done += 1
        if done == most:
            raise _Enough

    try:
        return stage(on_step)
    except _Enough:
        return None
