"""diffusers' unCLIP and ours on the same weights, taking turns in one process: A B, B A, A B, ..."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import diffusers
import numpy as np
import torch
from tqdm import tqdm

import unclip
from unclip.checkpoints.diffusers_export import reasons_against
from unclip.checkpoints.diffusers_layout import KARLO_OPTIONS
from unclip.checkpoints.store import Bundle
from unclip.evaluation.bench import PROMPT, RANDOM, BenchConfig, machine_peak, reference
from unclip.evaluation.bench.calls import Inputs, stage_calls, stage_steps
from unclip.evaluation.bench.clock import Stage, Steps, counted, timed
from unclip.evaluation.bench.processes import host
from unclip.evaluation.bench.stages import machine, open_model, where
from unclip.pipelines.base import generators_from, to_pil
from unclip.pipelines.unclip import UnCLIPPipeline
from unclip.types import UnCLIPOptions

# B batch, S image size

THEIRS, OURS, FAST = "diffusers", "unclip", "unclip fast"
SHOWN = {"prior": 2, "decoder": 3, "upsampler": 1}  # steps in a turn, where all of them would take minutes
SEVERAL = 4  # images of one prompt, in the second row of the prior

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


def begin(config: BenchConfig, compiled: bool) -> dict[str, Any]:
    """The head of the results: what is compared, where, and what the machine can do at best."""
    here = {**host(), **machine(*where(config))}
    return {
        **asdict(config),
        "against": f"diffusers {diffusers.__version__}{', compiled' if compiled else ''}",
        "machine": here,
        "machine_peak": machine_peak(here),
        "rows": [],
    }


def compare_stages(config: BenchConfig, compiled: bool, progress: bool = True) -> Iterator[Comparison]:
    """Stage by stage, with one stage's networks in memory at a time; then the whole, as the sum of its stages.

    compiled: the reference's networks too go through torch.compile. Both sides sample with Karlo's options.
    """
    count, of = _images(config.batch), "one prompt" if config.batch == 1 else f"each of {config.batch} prompts"
    steps = stage_steps(KARLO_OPTIONS)
    turns: dict[str, Turns] = {}
    for stage in ("prior", "decoder", "upsampler"):
        if stage not in config.stages:
            continue
        arena = Arena(stage, config, compiled, progress)
        turns[stage] = arena.take_turns(arena.contenders())
        if stage == "prior":
            turns["text"] = arena.take_turns(arena.text())
            yield arena.row(f"prior, {steps[stage]} steps, {count}", turns[stage], whole=True)
            several = arena.contenders(SEVERAL)
            del several[FAST]
            yield arena.row(f"prior, {SEVERAL} images of {of}", arena.take_turns(several), SEVERAL, whole=True)
        else:
            yield arena.row(f"{stage} step, {count}", turns[stage])
        del arena
        gc.collect()
    if turns.keys() == {"text", "prior", "decoder", "upsampler"}:
        for name, what in {OURS: "exact", FAST: "fast"}.items():
            seconds = {
                side: [sum(parts) for parts in zip(*(_wholes(turns[s][side], steps[s]) for s in turns), strict=True)]
                for side in (THEIRS, name)
            }
            yield Comparison(f"whole pipeline, {what}, {count}", seconds[THEIRS], seconds[name], composed=True)


def compare_whole(config: BenchConfig, compiled: bool, progress: bool = True) -> Iterator[Comparison]:
    """Whole pictures through all of both sides, from the same seeds."""
    pipe = open_model(config)
    pipe.options = KARLO_OPTIONS
    check_comparable(pipe, config)
    theirs = {name: stage(pipe) for name, stage in reference.REFERENCES.items()}
    if config.compile:
        unclip.compile(pipe)
    if compiled:
        reference.compile_networks(network for stage in theirs.values() for network in stage.networks)
    prompts, seeds = [PROMPT] * config.batch, range(config.batch)

    def draw(options: UnCLIPOptions) -> Contender:
        drawing = {"seed": seeds[0], "options": options, "batch_size": len(prompts), "progress": False}
        return Contender(lambda on_step: pipe(prompts, **drawing).images)

    contenders = {
        THEIRS: Contender(lambda _: to_pil(reference.draw(theirs, prompts, generators_from(seeds), pipe.options))),
        OURS: draw(pipe.options),
        FAST: draw(pipe.preset("fast")),
    }
    if config.compile or compiled or pipe.device.type == "cuda":
        for contender in contenders.values():
            timed(contender.call, pipe.device)
    turns = take_turns(contenders, pipe.device, config.repeat, "whole pictures", progress)
    for name, what in {OURS: "exact", FAST: "fast"}.items():
        seconds = [_wholes(turns[side], 0) for side in (THEIRS, name)]
        pictures = [np.stack(turns[side][0].result).astype(float) for side in (THEIRS, name)]
        difference = float(np.abs(pictures[0] - pictures[1]).mean()) / 255
        what = f"whole pipeline, {what}, {_images(config.batch)}"
        yield Comparison(what, *seconds, difference=difference, unit="of the pixels' range on average")


class Arena:
    """The networks of one stage on both sides, on the same weights."""

    def __init__(self, stage: str, config: BenchConfig, compiled: bool, progress: bool) -> None:
        self.stage, self.config, self.progress = stage, config, progress
        self.pipe = pipe = open_model(replace(config, stages=(stage,)))
        pipe.options = replace(KARLO_OPTIONS, upsamplers=KARLO_OPTIONS.upsamplers[: len(pipe.upsamplers)])
        self.steps = stage_steps(pipe.options)[stage]
        check_comparable(pipe, config)
        self.reference = reference.REFERENCES[stage](pipe)
        self.difference = reference.difference(self.reference, self._inputs(1))
        self.in_full = compiled or config.compile or pipe.device.type == "cuda"  # where all steps take seconds
        # Compiled networks hide their operations.
        self.flops = {n: self._count(n) for n in ((1, SEVERAL) if stage == "prior" else (1,))}
        if config.compile:
            unclip.compile(pipe)
        if compiled:
            reference.compile_networks(self.reference.networks)

    def contenders(self, num_images: int = 1) -> dict[str, Contender]:
        """The reference, ours with the same options, and ours with those of the preset "fast"."""
        inputs, most = self._inputs(num_images), None if self.in_full else SHOWN[self.stage]
        ours, fast = (
            stage_calls(self.pipe, inputs, options)[self.stage]
            for options in (self.pipe.options, self.pipe.preset("fast"))
        )
        return {
            THEIRS: Contender(self.reference.call(inputs), most),
            OURS: Contender(ours, None if self.stage == "prior" else most),
            FAST: Contender(fast),
        }

    def text(self) -> dict[str, Contender]:
        """The reference encodes the empty prompt beside the prompt; CLIP is ours on both sides."""
        encode, prompts = self.pipe.encode_text, self._inputs(1).prompts
        ours = Contender(lambda on_step: encode(prompts))
        return {
            THEIRS: Contender(lambda on_step: (encode(prompts), encode([""] * len(prompts)))),
            OURS: ours,
            FAST: ours,
        }

    def take_turns(self, contenders: dict[str, Contender]) -> Turns:
        if self.in_full:
            for contender in contenders.values():
                timed(contender.call, self.pipe.device)
        return take_turns(contenders, self.pipe.device, self.config.repeat, self.stage, self.progress)

    def row(self, what: str, turns: Turns, num_images: int = 1, whole: bool = False) -> Comparison:
        """whole: the seconds of all steps, rather than of one."""

        def amounts(steps: list[Steps[Any]]) -> list[float]:
            return _wholes(steps, self.steps) if whole else [one.step for one in steps]

        composed = whole and turns[THEIRS][0].result is None
        flops = tuple(amounts(self.flops[num_images]))
        return Comparison(what, amounts(turns[THEIRS]), amounts(turns[OURS]), composed, flops, self.difference)

    def _inputs(self, num_images: int) -> Inputs:
        return Inputs.make(self.pipe, [PROMPT] * self.config.batch, num_images)

    def _count(self, num_images: int) -> list[Steps[Any]]:
        contenders = self.contenders(num_images)
        timed(contenders[OURS].call, self.pipe.device, most=1)  # what it keeps from call to call is not counted
        return [counted(contenders[side].call, SHOWN[self.stage]) for side in (THEIRS, OURS)]


def check_comparable(pipe: UnCLIPPipeline, config: BenchConfig) -> None:
    """ValueError for a model that diffusers' classes cannot express."""
    if config.model in RANDOM:
        return
    schedules = {stage: schedule.config for stage, schedule in pipe.schedules.items()}
    parts = {"clip": pipe.clip, **pipe.networks()}
    if against := reasons_against(Bundle(pipe.kind, parts, schedules, pipe.options, pipe.name, pipe.licence)):
        raise ValueError(f"{config.model} cannot be compared with diffusers: {'; '.join(against)}")


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


def _wholes(turns: list[Steps[Any]], num_steps: int) -> list[float]:
    return [turn.whole(num_steps) for turn in turns]


def _images(count: int) -> str:
    return f"{count} image{'s' * (count > 1)}"
