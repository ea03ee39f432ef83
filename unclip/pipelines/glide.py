"""Text -> images without CLIP (GLIDE, 2112.10741)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from unclip.checkpoints.formats import Bundle
from unclip.diffusion.schedules import Schedule, ScheduleConfig
from unclip.models.published.glide import GLIDE
from unclip.models.unclip.decoder import DecoderContext
from unclip.pipelines.base import Pipeline, in_inference_mode, make_schedules
from unclip.pipelines.diffusion_stage import DiffusionStage
from unclip.pipelines.request import (
    Request,
    Seed,
    check_options,
    check_prompts,
    random_generators,
)
from unclip.pipelines.runtime import Runtime
from unclip.tokenizer import GPT2Tokenizer
from unclip.types import GenerationResult, GLIDEOptions, OnStep, Prompt, StageOptions

# B batch, s and S image sizes


class GLIDEPipeline(Pipeline):
    """A network conditioned on a caption, and any number of upsamplers that read it as well.

    `generators` holds one generator for each image, which is used for the initial noise and the
    steps of one stage after the other.
    """

    kind = "glide"
    required = ("tokenizer", "decoder")
    options: GLIDEOptions

    def __init__(
        self,
        tokenizer: GPT2Tokenizer,
        decoder: GLIDE,
        upsamplers: Sequence[GLIDE] = (),
        options: GLIDEOptions | None = None,
        *,
        schedules: Mapping[str, ScheduleConfig] | None = None,
        name: str = "unnamed",
        licence: str = "",
        source: str | None = None,
    ) -> None:
        """schedules: of "decoder", "upsampler_0", ...; cosine for those left out."""
        ups = {f"upsampler_{i}": network for i, network in enumerate(upsamplers)}
        networks = {"decoder": decoder, **ups}
        super().__init__(Runtime({**networks}), name, licence, source)
        made = make_schedules(schedules, list(networks))
        self.tokenizer, self.decoder, self.upsamplers = tokenizer, decoder, tuple(upsamplers)
        self.stages = [
            DiffusionStage(stage, network, made[stage], self.runtime, "eps", True)
            for stage, network in networks.items()
        ]
        self.options = options or GLIDEOptions(upsamplers=GLIDEOptions().upsamplers * len(ups))
        self._check_compatible()
        check_options(self.options, GLIDEOptions, len(ups))

    @classmethod
    def from_bundle(cls, bundle: Bundle, source: str | None = None) -> GLIDEPipeline:
        """Make a pipeline from the components of a checkpoint."""
        cls.check_bundle(bundle)
        parts = bundle.components
        return cls(
            parts["tokenizer"],
            parts["decoder"],
            [parts[f"upsampler_{i}"] for i in range(len(parts) - 2)],
            bundle.options,
            schedules=bundle.schedules,
            name=bundle.name,
            licence=bundle.licence,
            source=source,
        )

    def components(self) -> dict[str, Any]:
        """Return the parts of a checkpoint by name."""
        return {"tokenizer": self.tokenizer, **self.networks()}

    @property
    def schedules(self) -> dict[str, Schedule]:
        """The noise schedule of each stage."""
        return {stage.name: stage.schedule for stage in self.stages}

    def __call__(
        self,
        prompt: Prompt,
        *,
        num_images: int = 1,
        seed: Seed = None,
        options: GLIDEOptions | None = None,
        on_step: OnStep | None = None,
        batch_size: int = 16,
        progress: bool = True,
    ) -> GenerationResult:
        """Generate `num_images` images of each prompt; image k has the seed `seed` + k.

        on_step is called after every step of every batch of at most `batch_size` images.
        """
        prompts, options = check_prompts(prompt), options or self.options
        check_options(options, GLIDEOptions, len(self.upsamplers))
        steps = sum(stage.steps for stage in (options.decoder, *options.upsamplers))
        request, results = Request(num_images, seed, on_step, batch_size, progress), []
        for batch in request.batches(len(prompts), steps):
            part = prompts[batch.prompts]
            captions = [text for text in part for _ in range(batch.num_images)]
            sampling: dict[str, Any] = {"generators": batch.generators, "on_step": batch.on_step}
            x = self.decode(captions, options=options.decoder, **sampling)
            x = self.upsample(x, captions, options=options.upsamplers, **sampling)
            entries = [{"prompt": text} for text in part]
            results.append(self.make_result(x, batch, entries, options))
        return GenerationResult.cat(results)

    def variations(self, image: Any = None, **arguments: Any) -> GenerationResult:
        """Raise ValueError: this model has no CLIP."""
        raise ValueError(f"{self.name} has no image embeddings to vary an image; give it a prompt")

    @in_inference_mode
    def decode(
        self,
        captions: Sequence[str],
        *,
        generators: Sequence[torch.Generator] | None = None,
        options: StageOptions | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Sample images (B, 3, s, s) in [-1, 1] for B captions."""
        generators = generators or random_generators(len(captions))
        stage_options = options or self.options.decoder
        return self._sample(self.stages[0], captions, generators, stage_options, on_step)

    @in_inference_mode
    def upsample(
        self,
        images: Tensor,
        captions: Sequence[str],
        *,
        generators: Sequence[torch.Generator] | None = None,
        options: Sequence[StageOptions] | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Upsample images (B, 3, s, s) in [-1, 1] -> (B, 3, S, S), one stage per options."""
        generators = generators or random_generators(len(images))
        all_options = self.options.upsamplers if options is None else options
        for stage, stage_options in zip(self.stages[1:], all_options, strict=False):
            low_res = ((images.to(self.device) + 1) * 127.5).round() / 127.5 - 1  # as 8-bit images
            images = self._sample(stage, captions, generators, stage_options, on_step, low_res)
        return images

    def _sample(
        self,
        stage: DiffusionStage,
        captions: Sequence[str],
        generators: Sequence[torch.Generator],
        options: StageOptions,
        on_step: OnStep | None,
        low_res: Tensor | None = None,
    ) -> Tensor:
        context = self._condition(stage.network, captions, low_res)

        def null() -> DecoderContext:
            one = self._condition(stage.network, [""], None if low_res is None else low_res[:1])
            nulls = one.repeat_interleave(len(captions))
            return replace(nulls, extra_channels=context.extra_channels)

        bound, size = stage.bind(context, options, null), stage.network.config.image_size
        x_T = bound.noise((len(captions), 3, size, size), generators)
        return bound.sample(x_T, generators, on_step).clamp(-1, 1)

    def _condition(
        self, network: GLIDE, captions: Sequence[str], low_res: Tensor | None
    ) -> DecoderContext:
        ids, mask = self.tokenizer(captions)
        self.runtime.use(network)
        return network.condition(ids.to(self.device), mask.to(self.device), low_res)

    def _check_compatible(self) -> None:
        """Raise ValueError for networks that were not trained for each other."""
        size, tokenizer = None, self.tokenizer
        for stage in self.stages:
            config = stage.network.config
            if config.low_size != size:
                start = "noise" if size is None else f"images of {size} px"
                given = f"its low_size is {config.low_size}"
                raise ValueError(f"{stage.name} must start from {start}, but {given}")
            expected = config.text.context_length, config.text.vocab_size
            if expected != (tokenizer.context_length, tokenizer.vocab_size):
                gives = f"{tokenizer.context_length} of {tokenizer.vocab_size}"
                reads = f"{stage.name} reads {expected[0]} of {expected[1]} tokens"
                raise ValueError(f"{reads}, but the tokenizer gives {gives}")
            size = config.image_size
