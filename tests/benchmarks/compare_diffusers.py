"""Compare the speed of unclip to diffusers' unCLIP (Karlo) on the same weights.

python tests/benchmarks/compare_diffusers.py --dtype bfloat16             single stages
python tests/benchmarks/compare_diffusers.py --dtype bfloat16 --whole     whole images
"""

from __future__ import annotations

import gc
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import diffusers
import diffusers_reference as reference
import numpy as np
from comparison import (
    OURS,
    REFERENCE,
    Candidate,
    Comparison,
    Timings,
    add_arguments,
    bench_config,
    count_images,
    run,
    time_interleaved,
    totals,
)

import unclip
from unclip.checkpoints.diffusers.export import reasons_against
from unclip.checkpoints.diffusers.layout import KARLO_OPTIONS
from unclip.checkpoints.formats import Bundle
from unclip.evaluation import STAGES
from unclip.evaluation.bench import DALLE, KARLO, PROMPT, BenchConfig
from unclip.evaluation.bench.stage_calls import Inputs, sampling_steps, unclip_calls
from unclip.evaluation.bench.timing import StepCosts, count_operations, time_stage
from unclip.evaluation.bench.worker import open_model
from unclip.image_io import to_pil
from unclip.pipelines.request import generators_from
from unclip.pipelines.unclip.pipeline import UnCLIPPipeline
from unclip.types import UnCLIPOptions

FAST = "unclip fast"
FEW_STEPS = {"prior": 2, "decoder": 3, "upsampler": 1}  # per round, where all would take minutes
SEVERAL = 4  # images of one prompt, in the second row of the prior


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add_arguments(parser, KARLO[0])
    about = f"some of {','.join(STAGES['unclip'])} (default: all)"
    parser.add_argument(
        "--stages", type=lambda text: tuple(text.split(",")), metavar="A,B", help=about
    )
    about = "apply torch.compile to the networks of diffusers"
    parser.add_argument("--compile-reference", action="store_true", help=about)
    about = "generate whole images rather than a few steps of each stage"
    parser.add_argument("--whole", action="store_true", help=about)
    args = parser.parse_args(argv)
    config = bench_config(args, args.stages)
    run(
        config,
        lambda: compare(config, args.compile_reference, args.whole, not args.quiet),
        args.json,
    )


def compare(
    config: BenchConfig, compiled: bool, whole: bool, progress: bool
) -> tuple[str, Iterator[Comparison]]:
    """Return name and version of the reference, and the rows."""
    if config.model in DALLE:
        raise ValueError(f"{config.model} is not an unCLIP model; expected one, as in diffusers")
    name = f"diffusers {diffusers.__version__}{', compiled' if compiled else ''}"
    return name, (compare_whole if whole else compare_stages)(config, compiled, progress)


def compare_stages(
    config: BenchConfig, compiled: bool, progress: bool = True
) -> Iterator[Comparison]:
    """Compare stage by stage, one stage in memory at a time; then the sum of the stages.

    compiled: torch.compile the reference, too. Both sides use Karlo's options.
    """
    images = count_images(config.batch)
    prompts = "one prompt" if config.batch == 1 else f"each of {config.batch} prompts"
    steps = sampling_steps(KARLO_OPTIONS)
    timings: dict[str, Timings] = {}
    for stage in ("prior", "decoder", "upsampler"):
        if stage not in (config.stages or STAGES["unclip"]):
            continue
        comparison = StageComparison(stage, config, compiled, progress)
        timings[stage] = comparison.time(comparison.candidates())
        if stage == "prior":
            timings["text"] = comparison.time(comparison.text_candidates())
            name = f"prior, {steps[stage]} steps, {images}"
            yield comparison.row(name, timings[stage], all_steps=True)
            several = comparison.candidates(SEVERAL)
            del several[FAST]
            name = f"prior, {SEVERAL} images of {prompts}"
            yield comparison.row(name, comparison.time(several), SEVERAL, all_steps=True)
        else:
            yield comparison.row(f"{stage} step, {images}", timings[stage])
        del comparison
        gc.collect()
    if timings.keys() == set(STAGES["unclip"]):
        for side, kind in {OURS: "exact", FAST: "fast"}.items():
            seconds = []
            for name in (REFERENCE, side):
                stages = (totals(timings[stage][name], steps[stage]) for stage in timings)
                seconds.append([sum(round_) for round_ in zip(*stages, strict=True)])
            name, produced = f"whole pipeline, {kind}, {images}", (config.batch, "images")
            yield Comparison(name, *seconds, extrapolated=True, produced=produced)


def compare_whole(
    config: BenchConfig, compiled: bool, progress: bool = True
) -> Iterator[Comparison]:
    """Compare whole images of both sides, from the same seeds."""
    pipe = open_model(config)
    assert isinstance(pipe, UnCLIPPipeline)
    pipe.options = KARLO_OPTIONS
    check_comparable(pipe, config)
    stages = {name: stage(pipe) for name, stage in reference.REFERENCES.items()}
    if config.compile:
        unclip.compile(pipe)
    if compiled:
        for stage in stages.values():
            reference.compile_networks(stage.networks)
    prompts, seeds = [PROMPT] * config.batch, range(config.batch)

    def ours(options: UnCLIPOptions) -> Candidate:
        return Candidate(
            lambda _: (
                pipe(
                    prompts,
                    seed=seeds[0],
                    options=options,
                    batch_size=len(prompts),
                    progress=False,
                ).images
            )
        )

    def theirs(_: Any) -> Any:
        return to_pil(reference.generate(stages, prompts, generators_from(seeds), pipe.options))

    candidates = {
        REFERENCE: Candidate(theirs),
        OURS: ours(pipe.options),
        FAST: ours(pipe.preset("fast")),
    }
    if compiled or pipe.device.type != "cpu":
        for candidate in candidates.values():
            time_stage(candidate.call, pipe.device)
    timings = time_interleaved(candidates, pipe.device, config.repeat, "whole images", progress)
    for side, kind in {OURS: "exact", FAST: "fast"}.items():
        seconds = [totals(timings[name], 0) for name in (REFERENCE, side)]
        images = [np.stack(timings[name][0].result).astype(float) for name in (REFERENCE, side)]
        yield Comparison(
            f"whole pipeline, {kind}, {count_images(config.batch)}",
            *seconds,
            difference=float(np.abs(images[0] - images[1]).mean()) / 255,
            unit="of the pixel range on average",
            produced=(config.batch, "images"),
        )


class StageComparison:
    """The networks of one stage on both sides, with the same weights."""

    def __init__(self, stage: str, config: BenchConfig, compiled: bool, progress: bool) -> None:
        self.stage, self.config, self.progress = stage, config, progress
        pipe = open_model(replace(config, stages=(stage,)))
        assert isinstance(pipe, UnCLIPPipeline)
        self.pipe = pipe
        upsamplers = KARLO_OPTIONS.upsamplers[: len(pipe.upsamplers)]
        pipe.options = replace(KARLO_OPTIONS, upsamplers=upsamplers)
        self.steps = sampling_steps(pipe.options)[stage]
        check_comparable(pipe, config)
        self.reference = reference.REFERENCES[stage](pipe)
        self.difference = reference.difference(self.reference, self._inputs(1))
        # All steps are run where they take seconds, or the first ones differ from the rest.
        self.all_steps = compiled or pipe.device.type != "cpu"
        # Counted before compilation, since compiled networks hide their operations.
        self.flops = {n: self._count(n) for n in ((1, SEVERAL) if stage == "prior" else (1,))}
        if config.compile:
            unclip.compile(pipe)
        if compiled:
            reference.compile_networks(self.reference.networks)

    def candidates(self, num_images: int = 1) -> dict[str, Candidate]:
        """Return the reference, ours with the same options, and ours with the preset "fast"."""
        inputs, few = self._inputs(num_images), None if self.all_steps else FEW_STEPS[self.stage]
        exact, fast = (
            unclip_calls(self.pipe, inputs, options)[self.stage]
            for options in (self.pipe.options, self.pipe.preset("fast"))
        )
        reference_steps = 1 if few and num_images > 1 else few
        return {
            REFERENCE: Candidate(self.reference.call(inputs), reference_steps),
            OURS: Candidate(exact, None if self.stage == "prior" else few),
            FAST: Candidate(fast),
        }

    def text_candidates(self) -> dict[str, Candidate]:
        """Return text encoding by our CLIP; the reference also encodes the empty prompt."""
        encode, prompts = self.pipe.encode_text, self._inputs(1).prompts
        ours = Candidate(lambda _: encode(prompts))
        theirs = Candidate(lambda _: (encode(prompts), encode([""] * len(prompts))))
        return {REFERENCE: theirs, OURS: ours, FAST: ours}

    def time(self, candidates: dict[str, Candidate]) -> Timings:
        if self.all_steps:
            for candidate in candidates.values():
                time_stage(candidate.call, self.pipe.device)
        repeat = self.config.repeat
        return time_interleaved(candidates, self.pipe.device, repeat, self.stage, self.progress)

    def row(
        self, name: str, timings: Timings, num_images: int = 1, all_steps: bool = False
    ) -> Comparison:
        """Return the seconds of one step, or of all steps."""

        def amounts(costs: list[StepCosts[Any]]) -> list[float]:
            return totals(costs, self.steps) if all_steps else [one.step for one in costs]

        reference_flops, our_flops = amounts(self.flops[num_images])
        return Comparison(
            name,
            amounts(timings[REFERENCE]),
            amounts(timings[OURS]),
            extrapolated=all_steps and timings[REFERENCE][0].result is None,
            flops=(reference_flops, our_flops),
            difference=self.difference,
        )

    def _inputs(self, num_images: int) -> Inputs:
        return Inputs.random(self.pipe, [PROMPT] * self.config.batch, num_images)

    def _count(self, num_images: int) -> list[StepCosts[Any]]:
        """Count the operations of the reference, whose steps are equal, and of ours."""
        candidates = self.candidates(num_images)
        theirs, ours = (candidates[side].call for side in (REFERENCE, OURS))
        if self.stage != "upsampler":
            time_stage(ours, self.pipe.device, max_steps=1)  # fill what is cached between calls
        return [count_operations(theirs, 1), count_operations(ours, FEW_STEPS[self.stage])]


def check_comparable(pipe: UnCLIPPipeline, config: BenchConfig) -> None:
    """Raise ValueError for a model that diffusers' classes cannot express."""
    if config.model in KARLO:
        return
    schedules = {stage: schedule.config for stage, schedule in pipe.schedules.items()}
    parts = {"clip": pipe.clip, **pipe.networks()}
    bundle = Bundle(pipe.kind, parts, schedules, pipe.options, pipe.name, pipe.licence)
    if reasons := reasons_against(bundle):
        raise ValueError(f"diffusers cannot express {config.model}: {'; '.join(reasons)}")


if __name__ == "__main__":
    main()
