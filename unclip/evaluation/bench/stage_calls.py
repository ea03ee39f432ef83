"""The stages of a pipeline as separate calls that can be timed.

Each stage gets random inputs of the right shape; its time does not depend on their values.
"""

# P prompts, n images of each, B batch (P * n), D CLIP embedding width, s decoder's image size

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unclip.evaluation.bench.timing import Stage
from unclip.models.dalle.sampling import sample_codes
from unclip.pipelines.dalle.pipeline import DallePipeline
from unclip.pipelines.request import generators_from
from unclip.pipelines.unclip.pipeline import UnCLIPPipeline
from unclip.types import CodeOptions, OnStep, Progress, TextEncoding, UnCLIPOptions, image_steps


@dataclass(frozen=True)
class StageCalls:
    """The stages of a pipeline by name."""

    calls: dict[str, Stage[Tensor]]
    steps: dict[str, int]  # of the sampled stages
    size: int  # of an image


@dataclass(frozen=True)
class Inputs:
    """Inputs of all stages of an unCLIP pipeline."""

    prompts: list[str]
    num_images: int
    text: TextEncoding  # P rows
    image_emb: Tensor  # (B, D)
    low_res: Tensor  # (B, 3, s, s) in [-1, 1]

    @classmethod
    def random(cls, pipe: UnCLIPPipeline, prompts: Sequence[str], num_images: int = 1) -> Inputs:
        text = pipe.encode_text(list(prompts))
        size, batch = pipe.decoder.config.image_size, len(prompts) * num_images
        low_res = torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
        image_emb = text.emb.repeat_interleave(num_images, dim=0)
        return cls(list(prompts), num_images, text, image_emb, low_res * 2 - 1)

    def generators(self) -> list[torch.Generator]:
        return generators_from(range(len(self.image_emb)))


def unclip_calls(
    pipe: UnCLIPPipeline, inputs: Inputs, options: UnCLIPOptions
) -> dict[str, Stage[Tensor]]:
    """Return the stages of the networks that the pipeline has."""

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
        return pipe.decode(
            inputs.image_emb,
            inputs.text.repeat_interleave(inputs.num_images),
            generators=inputs.generators(),
            options=options.decoder,
            on_step=on_step,
        )

    def upsampler(on_step: OnStep) -> Tensor:
        return pipe.upsample(
            inputs.low_res,
            generators=inputs.generators(),
            options=options.upsamplers,
            on_step=on_step,
        )

    calls: dict[str, Stage[Tensor]] = {"text": lambda on_step: pipe.encode_text(inputs.prompts).emb}
    if pipe.prior is not None:
        calls["prior"] = prior
    calls["decoder"] = decoder
    if options.upsamplers:
        calls["upsampler"] = upsampler
    return calls


def sampling_steps(options: UnCLIPOptions) -> dict[str, int]:
    """Return the sampling steps of each stage of an unCLIP pipeline with a diffusion prior."""
    decoder, *upsamplers = image_steps(options)
    prior, upsampler = options.prior.steps, sum(upsamplers)
    return {"text": 0, "prior": prior, "decoder": decoder, "upsampler": upsampler}


def unclip_stages(
    pipe: UnCLIPPipeline, prompt: str, num_images: int, options: UnCLIPOptions
) -> StageCalls:
    """Return the stages that generate images of one prompt."""
    calls = unclip_calls(pipe, Inputs.random(pipe, [prompt], num_images), options)
    steps = sampling_steps(options)
    if pipe.prior is not None:
        steps["prior"] = pipe.prior_steps(options.prior)
    size = pipe.decoder.config.image_size
    if options.upsamplers:
        size = pipe.upsamplers[len(options.upsamplers) - 1].config.high_size
    return StageCalls(calls, {name: count for name, count in steps.items() if count}, size)


def dalle_stages(
    pipe: DallePipeline, prompt: str, num_images: int, options: CodeOptions
) -> StageCalls:
    """Return the stages that generate images of one prompt; a step samples one code of each.

    All candidates are sampled; their selection by CLIP is part of no stage.
    """
    dalle, codec, num_codes = pipe.dalle, pipe.codec, pipe.dalle.config.num_codes
    num_images *= options.candidates
    tokens = dalle.tokens(*pipe.tokenizer([prompt]))
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(codec.vocab_size, (num_images, *codec.grid), generator=generator)
    with torch.inference_mode():
        prefix = dalle.condition(tokens)
        null = None if options.guidance == 1 else dalle.condition(dalle.null_tokens(1))

    @torch.inference_mode()
    def text(on_step: OnStep) -> Tensor:
        return dalle.condition(tokens).logits

    def sample(on_step: OnStep) -> Tensor:
        return sample_codes(
            dalle,
            prefix.repeat_interleave(num_images),
            generators_from(range(num_images)),
            options,
            null=null,
            on_code=lambda n, codes: on_step(Progress("dalle", n, num_codes)),
            compiled_step=pipe.step,
        )

    calls: dict[str, Stage[Tensor]] = {
        "text": text,
        "codes": sample,
        "codec": lambda on_step: pipe.decode(codes),
    }
    return StageCalls(calls, {"codes": num_codes}, codec.image_size)
