"""diffusers' unCLIP and ours on the same weights, taking turns in one process: A B, B A, A B, ..."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import diffusers
import numpy as np

import unclip
from unclip.checkpoints.diffusers.export import reasons_against
from unclip.checkpoints.diffusers.layout import KARLO_OPTIONS
from unclip.checkpoints.formats import Bundle
from unclip.evaluation import STAGES
from unclip.evaluation.bench import DALLE, KARLO, MEGA, PROMPT, BenchConfig, reference
from unclip.evaluation.bench.calls import Inputs, stage_calls, stage_steps
from unclip.evaluation.bench.clock import Steps, counted, timed
from unclip.evaluation.bench.stages import open_model
from unclip.evaluation.bench.turns import (
    OURS,
    THEIRS,
    Comparison,
    Contender,
    Turns,
    images,
    take_turns,
    wholes,
)
from unclip.pipelines.base import generators_from, to_pil
from unclip.pipelines.unclip.pipeline import UnCLIPPipeline
from unclip.types import UnCLIPOptions

# B batch, S image size

FAST = "unclip fast"
SHOWN = {
    "prior": 2,
    "decoder": 3,
    "upsampler": 1,
}  # steps in a turn, where all of them would take minutes
SEVERAL = 4  # images of one prompt, in the second row of the prior


def compare(
    config: BenchConfig, compiled: bool, whole: bool, progress: bool
) -> tuple[str, Iterator[Comparison]]:
    """The reference's name and version, and the rows."""
    if config.model in (*DALLE, *MEGA):
        raise ValueError(f"{config.model} is no unCLIP model, and diffusers has only those")
    rows = compare_whole if whole else compare_stages
    return f"diffusers {diffusers.__version__}{', compiled' if compiled else ''}", rows(
        config, compiled, progress
    )


def compare_stages(
    config: BenchConfig, compiled: bool, progress: bool = True
) -> Iterator[Comparison]:
    """Stage by stage, with one stage's networks in memory at a time; then the whole, as the sum of its stages.

    compiled: the reference's networks too go through torch.compile. Both sides sample with Karlo's options.
    """
    count, of = (
        images(config.batch),
        "one prompt" if config.batch == 1 else f"each of {config.batch} prompts",
    )
    steps = stage_steps(KARLO_OPTIONS)
    turns: dict[str, Turns] = {}
    for stage in ("prior", "decoder", "upsampler"):
        if stage not in (config.stages or STAGES):
            continue
        arena = Arena(stage, config, compiled, progress)
        turns[stage] = arena.take_turns(arena.contenders())
        if stage == "prior":
            turns["text"] = arena.take_turns(arena.text())
            yield arena.row(f"prior, {steps[stage]} steps, {count}", turns[stage], whole=True)
            several = arena.contenders(SEVERAL)
            del several[FAST]
            yield arena.row(
                f"prior, {SEVERAL} images of {of}", arena.take_turns(several), SEVERAL, whole=True
            )
        else:
            yield arena.row(f"{stage} step, {count}", turns[stage])
        del arena
        gc.collect()
    if turns.keys() == {"text", "prior", "decoder", "upsampler"}:
        for name, what in {OURS: "exact", FAST: "fast"}.items():
            seconds = {
                side: [
                    sum(parts)
                    for parts in zip(
                        *(wholes(turns[s][side], steps[s]) for s in turns), strict=True
                    )
                ]
                for side in (THEIRS, name)
            }
            made = config.batch, "images"
            yield Comparison(
                f"whole pipeline, {what}, {count}",
                seconds[THEIRS],
                seconds[name],
                composed=True,
                made=made,
            )


def compare_whole(
    config: BenchConfig, compiled: bool, progress: bool = True
) -> Iterator[Comparison]:
    """Whole pictures through all of both sides, from the same seeds."""
    pipe = open_model(config)
    pipe.options = KARLO_OPTIONS
    check_comparable(pipe, config)
    theirs = {name: stage(pipe) for name, stage in reference.REFERENCES.items()}
    if config.compile:
        unclip.compile(pipe)
    if compiled:
        reference.compile_networks(
            network for stage in theirs.values() for network in stage.networks
        )
    prompts, seeds = [PROMPT] * config.batch, range(config.batch)

    def draw(options: UnCLIPOptions) -> Contender:
        drawing = {
            "seed": seeds[0],
            "options": options,
            "batch_size": len(prompts),
            "progress": False,
        }
        return Contender(lambda on_step: pipe(prompts, **drawing).images)

    contenders = {
        THEIRS: Contender(
            lambda _: to_pil(reference.draw(theirs, prompts, generators_from(seeds), pipe.options))
        ),
        OURS: draw(pipe.options),
        FAST: draw(pipe.preset("fast")),
    }
    if compiled or pipe.device.type != "cpu":
        for contender in contenders.values():
            timed(contender.call, pipe.device)
    turns = take_turns(contenders, pipe.device, config.repeat, "whole pictures", progress)
    for name, what in {OURS: "exact", FAST: "fast"}.items():
        seconds = [wholes(turns[side], 0) for side in (THEIRS, name)]
        pictures = [np.stack(turns[side][0].result).astype(float) for side in (THEIRS, name)]
        difference = float(np.abs(pictures[0] - pictures[1]).mean()) / 255
        what, made = f"whole pipeline, {what}, {images(config.batch)}", (config.batch, "images")
        yield Comparison(
            what, *seconds, difference=difference, unit="of the pixels' range on average", made=made
        )


class Arena:
    """The networks of one stage on both sides, on the same weights."""

    def __init__(self, stage: str, config: BenchConfig, compiled: bool, progress: bool) -> None:
        self.stage, self.config, self.progress = stage, config, progress
        self.pipe = pipe = open_model(replace(config, stages=(stage,)))
        pipe.options = replace(
            KARLO_OPTIONS, upsamplers=KARLO_OPTIONS.upsamplers[: len(pipe.upsamplers)]
        )
        self.steps = stage_steps(pipe.options)[stage]
        check_comparable(pipe, config)
        self.reference = reference.REFERENCES[stage](pipe)
        self.difference = reference.difference(self.reference, self._inputs(1))
        # Where all steps take seconds, or the first ones are not like the rest; on the CPU `unclip.compile` is at once.
        self.in_full = compiled or pipe.device.type != "cpu"
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
            THEIRS: Contender(
                self.reference.call(inputs), most and (1 if num_images > 1 else most)
            ),
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
        return take_turns(
            contenders, self.pipe.device, self.config.repeat, self.stage, self.progress
        )

    def row(self, what: str, turns: Turns, num_images: int = 1, whole: bool = False) -> Comparison:
        """whole: the seconds of all steps, rather than of one."""

        def amounts(steps: list[Steps[Any]]) -> list[float]:
            return wholes(steps, self.steps) if whole else [one.step for one in steps]

        composed = whole and turns[THEIRS][0].result is None
        flops = tuple(amounts(self.flops[num_images]))
        return Comparison(
            what, amounts(turns[THEIRS]), amounts(turns[OURS]), composed, flops, self.difference
        )

    def _inputs(self, num_images: int) -> Inputs:
        return Inputs.make(self.pipe, [PROMPT] * self.config.batch, num_images)

    def _count(self, num_images: int) -> list[Steps[Any]]:
        """Of the reference, whose steps are alike, and ours."""
        contenders = self.contenders(num_images)
        theirs, ours = (contenders[side].call for side in (THEIRS, OURS))
        if self.stage != "upsampler":
            timed(ours, self.pipe.device, most=1)  # what it keeps from call to call is not counted
        return [counted(theirs, most=1), counted(ours, SHOWN[self.stage])]


def check_comparable(pipe: UnCLIPPipeline, config: BenchConfig) -> None:
    """ValueError for a model that diffusers' classes cannot express."""
    if config.model in KARLO:
        return
    schedules = {stage: schedule.config for stage, schedule in pipe.schedules.items()}
    parts = {"clip": pipe.clip, **pipe.networks()}
    if against := reasons_against(
        Bundle(pipe.kind, parts, schedules, pipe.options, pipe.name, pipe.licence)
    ):
        raise ValueError(f"{config.model} cannot be compared with diffusers: {'; '.join(against)}")
