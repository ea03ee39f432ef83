"""Contenders that take turns in one process: A B, B A, A B, ... and what a row of the table tells of them."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm import tqdm

from unclip.evaluation.bench import BenchConfig, machine_peak
from unclip.evaluation.bench.clock import Stage, Steps, timed
from unclip.evaluation.bench.processes import host
from unclip.evaluation.bench.stages import machine, where

THEIRS, OURS = "reference", "unclip"

Turns = dict[str, list[Steps[Any]]]  # by contender


@dataclass(frozen=True)
class Comparison:
    """A row of the table: seconds in each turn."""

    what: str
    theirs: list[float]
    ours: list[float]
    composed: bool = False  # put together from what was measured, not run as a whole
    flops: tuple[float, float] | None = None  # theirs, ours
    difference: float | None = None  # between the answers, the largest
    unit: str = "standard deviations at most"  # of the difference
    made: tuple[int, str] | None = None  # in that time, for the speed

    @property
    def ratio(self) -> float:
        """How many times as fast as the reference: the ratio of the medians."""
        return statistics.median(self.theirs) / statistics.median(self.ours)

    @property
    def ratios(self) -> list[float]:
        """Turn by turn."""
        return [theirs / ours for theirs, ours in zip(self.theirs, self.ours, strict=True)]

    def plain(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio, "ratios": self.ratios}


@dataclass(frozen=True)
class Contender:
    """One side, and how many of its steps are run in a turn (None = all)."""

    call: Stage[Any]
    most: int | None = None


def begin(config: BenchConfig, against: str) -> dict[str, Any]:
    """The head of the results: what is compared, where, and what the machine can do at best."""
    here = {**host(), **machine(*where(config))}
    return {
        **asdict(config),
        "against": against,
        "machine": here,
        "machine_peak": machine_peak(here),
        "rows": [],
    }


def take_turns(
    contenders: dict[str, Contender], device: torch.device, repeat: int, about: str, progress: bool
) -> Turns:
    """Each contender `repeat` times: in order, then in reverse order, then in order, ..."""
    turns: Turns = {name: [] for name in contenders}
    with tqdm(total=repeat * len(contenders), disable=not progress, leave=False) as bar:
        for i in range(repeat):
            for name in list(contenders)[:: -1 if i % 2 else 1]:
                bar.set_description(f"{about}: {name}")
                turns[name].append(timed(contenders[name].call, device, contenders[name].most))
                bar.update()
    return turns


def wholes(turns: list[Steps[Any]], num_steps: int) -> list[float]:
    """Of each turn, what all steps take."""
    return [turn.whole(num_steps) for turn in turns]


def images(count: int) -> str:
    return f"{count} image{'s' * (count > 1)}"
