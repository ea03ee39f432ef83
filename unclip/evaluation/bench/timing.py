"""Timing of sampling stages step by step, their operations, and the peak rate of the machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, TypeVar

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from unclip.training.dry_run import CPU_ATTENTION
from unclip.types import OnStep

T = TypeVar("T")
Stage = Callable[[OnStep], T]  # runs a stage and calls back after each step
PEAK_SECONDS, PEAK_RUNS = 0.5, 3  # of each operation at least


class Clock:
    """Time stamps in the order of the device's work: CUDA events, or host time on other devices."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._events: list[torch.cuda.Event] = []
        self._times: list[float] = []
        self.synchronize()

    def stamp(self) -> None:
        if self.device.type == "cuda":
            self._events.append(torch.cuda.Event(enable_timing=True))
            self._events[-1].record()
        else:
            self.synchronize()
            self._times.append(time.perf_counter())

    def synchronize(self) -> None:
        """Wait until the device has finished all its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def seconds(self) -> list[float]:
        """Return the seconds between successive stamps."""
        self.synchronize()
        if self.device.type == "cuda":
            return [start.elapsed_time(end) / 1000 for start, end in pairwise(self._events)]
        return [end - start for start, end in pairwise(self._times)]


@dataclass(frozen=True)
class StepCosts(Generic[T]):
    """Seconds or operations of a stage: of all steps, or (without `result`) of the first steps."""

    steps: list[float]  # the first includes what is computed once per call
    rest: float  # after the last step
    result: T | None

    @property
    def step(self) -> float:
        """The median of a step; the first counts only if it is the only one."""
        return statistics.median(self.steps[1:] or self.steps)

    def total(self, num_steps: int) -> float:
        """Return the cost of the call; if it was stopped, extrapolate to `num_steps` steps."""
        if self.result is not None:
            return sum(self.steps) + self.rest
        return max(self.steps[0] - self.step, 0) + num_steps * self.step


def time_stage(stage: Stage[T], device: torch.device, max_steps: int | None = None) -> StepCosts[T]:
    """Time a stage, or its first `max_steps` steps."""
    clock = Clock(device)
    clock.stamp()
    result = _run(stage, clock.stamp, max_steps)
    clock.stamp()
    *steps, rest = clock.seconds()
    return StepCosts(steps, rest, result)


def count_operations(stage: Stage[T], max_steps: int | None = None) -> StepCosts[T]:
    """Count the floating-point operations of a stage; a multiply-add counts as two.

    Only convolutions, matrix products and attention are counted, and only in eager networks.
    """
    totals = [0]
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        result = _run(stage, lambda: totals.append(counter.get_total_flops()), max_steps)
    totals.append(counter.get_total_flops())
    *steps, rest = (float(end - start) for start, end in pairwise(totals))
    return StepCosts(steps, rest, result)


class _Stop(Exception):
    """The requested number of steps is done."""


def _run(stage: Stage[T], after_step: Callable[[], None], max_steps: int | None) -> T | None:
    done = 0

    def on_step(_: object) -> None:
        nonlocal done
        after_step()
        done += 1
        if done == max_steps:
            raise _Stop

    try:
        return stage(on_step)
    except _Stop:
        return None


def interleave(
    candidates: Mapping[str, Callable[[int], T]],
    repeat: int,
    on_run: Callable[[str], None] = lambda name: None,
) -> dict[str, list[T]]:
    """Run each candidate `repeat` times in the order A B, B A, A B, ... and collect the results.

    Each candidate gets the number of the round. Drifts in clock rate affect all alike.
    """
    results: dict[str, list[T]] = {name: [] for name in candidates}
    for i in range(repeat):
        for name in list(candidates)[:: -1 if i % 2 else 1]:
            on_run(name)
            results[name].append(candidates[name](i))
    return results


def measure_peak(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Return operations per second of a "convolution" and a "matmul" with shapes of Karlo."""
    batch = 64 if device.type == "cuda" else 1
    convolution = 0.0
    for channels, side in ((320, 64), (640, 32)):
        flops = 2 * batch * 9 * (channels * side) ** 2
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(batch, channels, side, side, device=device)
            weight = torch.randn(channels, channels, 3, 3, device=device)
            x, weight = (y.to(dtype, memory_format=memory_format) for y in (x, weight))
            seconds = _best_time(
                lambda x=x, weight=weight: F.conv2d(x, weight, padding=1), device, PEAK_SECONDS / 2
            )
            convolution = max(convolution, flops / seconds)
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    matmul = 2 * n**3 / _best_time(lambda: F.linear(a, b), device, PEAK_SECONDS)
    return {"convolution": convolution, "matmul": matmul}


@torch.inference_mode()
def _best_time(compute: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Return the shortest of all runs within `seconds` (at least PEAK_RUNS), after a warm-up."""
    compute()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < PEAK_RUNS or time.perf_counter() < end:
        clock = Clock(device)
        clock.stamp()
        compute()
        clock.stamp()
        times += clock.seconds()
    return min(times)
