"""The stages of a pipeline as calls that can be timed one by one: each is given what the one before would answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unclip.evaluation.bench.clock import Stage
from unclip.pipelines.base import generators_from
from unclip.pipelines.unclip.pipeline import UnCLIPPipeline
from unclip.types import OnStep, TextEncoding, UnCLIPOptions

# P prompts, N images of each, B batch (P * N), s decoder's picture side


@dataclass(frozen=True)
class Work:
    """A pipeline's stages as calls that can be timed one by one."""

    calls: dict[str, Stage[Tensor]]
    steps: dict[str, int]  # of those that are sampled
    size: int  # pixels of a picture's side


@dataclass(frozen=True)
class Inputs:
    """What the stages are given; how long they take does not depend on the values."""

    prompts: list[str]
    num_images: int
    text: TextEncoding  # P rows
    image_emb: Tensor  # (B, D)
    small: Tensor  # (B, 3, s, s) in [-1, 1]

    @classmethod
    def make(cls, pipe: UnCLIPPipeline, prompts: Sequence[str], num_images: int = 1) -> Inputs:
        text = pipe.encode_text(list(prompts))
        side, batch = pipe.decoder.config.image_size, len(prompts) * num_images
        small = torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
        return cls(
            list(prompts), num_images, text, text.emb.repeat_interleave(num_images, dim=0), small
        )

    def generators(self) -> list[torch.Generator]:
        return generators_from(range(len(self.image_emb)))


def stage_calls(
    pipe: UnCLIPPipeline, inputs: Inputs, options: UnCLIPOptions
) -> dict[str, Stage[Tensor]]:
    """By name; those of the networks that the pipeline has."""

    def prior(on_step: OnStep) -> Tensor:
        return pipe.sample_prior(
            inputs.text,
            num_images=inputs.num_images,
            generators=inputs.generators(),
            options=options.prior,
            candidates=options.prior_candidates,
            on_step=on_step,
        )

    def decoder(on_step: OnStep) -> Tensor:
        text = inputs.text.repeat_interleave(inputs.num_images)
        given = {"generators": inputs.generators(), "options": options.decoder, "on_step": on_step}
        return pipe.decode(inputs.image_emb, text, **given)

    def upsampler(on_step: OnStep) -> Tensor:
        given = {
            "generators": inputs.generators(),
            "options": options.upsamplers,
            "on_step": on_step,
        }
        return pipe.upsample(inputs.small, **given)

    calls: dict[str, Stage[Tensor]] = {"text": lambda on_step: pipe.encode_text(inputs.prompts).emb}
    if pipe.prior is not None:
        calls["prior"] = prior
    calls["decoder"] = decoder
    if options.upsamplers:
        calls["upsampler"] = upsampler
    return calls


def stage_steps(options: UnCLIPOptions) -> dict[str, int]:
    """Sampling steps of each stage, of a prior that has a choice; the text has none."""
    upsampler = sum(stage.steps for stage in options.upsamplers)
    return {
        "text": 0,
        "prior": options.prior.steps,
        "decoder": options.decoder.steps,
        "upsampler": upsampler,
    }


def picture_work(
    pipe: UnCLIPPipeline, prompt: str, num_images: int, options: UnCLIPOptions
) -> Work:
    """For pictures of one prompt."""
    calls = stage_calls(pipe, Inputs.make(pipe, [prompt], num_images), options)
    steps = stage_steps(options)
    if pipe.prior is not None:
        steps["prior"] = pipe.prior_steps(options.prior)
    steps = {name: count for name, count in steps.items() if count}
    last = (
        pipe.upsamplers[len(options.upsamplers) - 1].config.high_size
        if options.upsamplers
        else None
    )
    return Work(calls, steps, last or pipe.decoder.config.image_size)
