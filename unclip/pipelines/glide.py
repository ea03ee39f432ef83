"""Text -> pictures without CLIP (GLIDE, 2112.10741)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unclip.checkpoints.formats import Bundle
from unclip.checkpoints.store import save_bundle
from unclip.diffusion.samplers import Denoise, Estimator, randn, sample
from unclip.diffusion.schedules import Schedule, ScheduleConfig
from unclip.models.published.glide import GLIDE
from unclip.models.unclip.decoder import DecoderContext
from unclip.pipelines.base import (
    about_drawing,
    check_prompts,
    in_batches,
    inferring,
    random_generators,
    to_pil,
    with_named_sampler,
)
from unclip.pipelines.inference import prepare_for_inference
from unclip.pipelines.runtime import Placement
from unclip.tokenizer import GPT2Tokenizer
from unclip.types import GenerationResult, GLIDEOptions, OnStep, Progress, Prompt, StageOptions

# B batch, L text slots, s picture size


class GLIDEPipeline(Placement):
    """A network that draws from a caption, and any number that enlarge; each reads the caption by itself.

    `generators` are one for each picture; each draws the first noise and the steps' of stage after stage.
    """

    kind = "glide"

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
        """schedules: of "decoder", "upsampler_0", ...; cosine for the rest. source: for the pictures' metadata."""
        self.tokenizer, self.decoder, self.upsamplers = tokenizer, decoder, tuple(upsamplers)
        self.options = options or GLIDEOptions(
            upsamplers=(StageOptions(steps=27),) * len(self.upsamplers)
        )
        self.name, self.licence, self.source = name, licence, source or name
        schedules = dict(schedules or {})
        self.schedules = {
            stage: Schedule(schedules.pop(stage, ScheduleConfig())) for stage in self.networks()
        }
        if schedules:
            raise ValueError(
                f"schedules of {', '.join(schedules)}; the model has {', '.join(self.schedules)}"
            )
        self._check_fit()
        self._check_options(self.options)
        for network in self.networks().values():
            prepare_for_inference(network)

    @classmethod
    def from_bundle(cls, bundle: Bundle, source: str | None = None) -> GLIDEPipeline:
        """A pipeline of what a checkpoint holds."""
        if bundle.kind != cls.kind:
            raise ValueError(
                f"{bundle.name} is a model of kind {bundle.kind!r}; expected {cls.kind!r}"
            )
        if missing := {"tokenizer", "decoder"} - bundle.components.keys():
            raise ValueError(f"{bundle.name} has no {' and no '.join(sorted(missing))}")
        parts, told = (
            bundle.components,
            {"name": bundle.name, "licence": bundle.licence, "source": source},
        )
        upsamplers = [parts[f"upsampler_{i}"] for i in range(len(parts) - 2)]
        schedules, options = bundle.schedules, bundle.options
        return cls(
            parts["tokenizer"], parts["decoder"], upsamplers, options, schedules=schedules, **told
        )

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes a model folder, weights in `dtype` if given; the folder that was there is replaced only at the end."""
        for stage in (self.options.decoder, *self.options.upsamplers):
            if not isinstance(stage.sampler, str):
                raise ValueError(
                    f"options hold a {type(stage.sampler).__name__}; only samplers with a name are saved"
                )
        self._check_whole()
        schedules = {stage: schedule.config for stage, schedule in self.schedules.items()}
        parts = {"tokenizer": self.tokenizer, **self.networks()}
        save_bundle(
            Bundle(self.kind, parts, schedules, self.options, self.name, self.licence),
            folder,
            dtype,
        )

    def networks(self) -> dict[str, GLIDE]:
        """Every network under the name of its stage."""
        return {
            "decoder": self.decoder,
            **{f"upsampler_{i}": up for i, up in enumerate(self.upsamplers)},
        }

    def __call__(
        self,
        prompt: Prompt,
        *,
        num_images: int = 1,
        seed: int | None = None,
        options: GLIDEOptions | None = None,
        on_step: OnStep | None = None,
        batch_size: int = 16,
        progress: bool = True,
    ) -> GenerationResult:
        """Draws `num_images` pictures of each prompt; picture k has the seed `seed` + k (random if None).

        on_step is called after every step of every batch of at most `batch_size` pictures.
        """
        prompts, options = check_prompts(prompt), options or self.options
        self._check_options(options)
        steps = sum(stage.steps for stage in (options.decoder, *options.upsamplers))
        parts = []
        for batch in in_batches(
            len(prompts), num_images, seed, batch_size, steps, progress, on_step
        ):
            captions = [
                caption for caption in prompts[batch.prompts] for _ in range(batch.num_images)
            ]
            drawing = {"generators": batch.generators, "on_step": batch.on_step}
            x = self.decode(captions, options=options.decoder, **drawing)
            images = to_pil(self.upsample(x, captions, options=options.upsamplers, **drawing))
            metadata = self._metadata(captions, batch.seeds, options)
            parts.append(GenerationResult(images, batch.seeds, captions, metadata=metadata))
        return GenerationResult.cat(parts)

    def variations(
        self, image: Any = None, *, image_emb: Tensor | None = None, **drawing: Any
    ) -> GenerationResult:
        """Not with this model: it has no CLIP."""
        raise ValueError(
            f"{self.name} knows no image embeddings and cannot vary a picture; give it a prompt"
        )

    @inferring
    def decode(
        self,
        captions: Sequence[str],
        *,
        generators: Sequence[torch.Generator] | None = None,
        options: StageOptions | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """B captions -> pictures (B, 3, s, s) in [-1, 1]."""
        generators = generators or random_generators(len(captions))
        return self._draw("decoder", captions, generators, options or self.options.decoder, on_step)

    @inferring
    def upsample(
        self,
        images: Tensor,
        captions: Sequence[str],
        *,
        generators: Sequence[torch.Generator] | None = None,
        options: Sequence[StageOptions] | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Pictures (B, 3, s, s) in [-1, 1] and their captions -> (B, 3, S, S), one upsampler for each of `options`."""
        generators = generators or random_generators(len(images))
        for i, stage in enumerate(self.options.upsamplers if options is None else options):
            low_res = (
                (images.to(self.device) + 1) * 127.5
            ).round() / 127.5 - 1  # trained on pictures of 8 bits
            images = self._draw(f"upsampler_{i}", captions, generators, stage, on_step, low_res)
        return images

    def _draw(
        self,
        stage: str,
        captions: Sequence[str],
        generators: Sequence[torch.Generator],
        options: StageOptions,
        on_step: OnStep | None,
        low_res: Tensor | None = None,
    ) -> Tensor:
        network = self.networks()[stage]
        self._use(network)
        context, size = self._context(network, captions, low_res), network.config.image_size

        def given(context: DecoderContext) -> Denoise:
            return lambda x_t, t: network.denoise(x_t, t, context)

        denoise_both = None
        if options.guidance != 1.0:
            null = self._context(network, [""], None if low_res is None else low_res[:1])
            null = replace(
                null.repeat_interleave(len(captions)), extra_channels=context.extra_channels
            )
            denoise_both = given(DecoderContext.cat([context, null]))
        estimate = Estimator(
            given(context),
            self.schedules[stage],
            options,
            "eps",
            True,
            1.0,
            denoise_both,
            dtype=self.dtype,
        )

        def report(step: int, num_steps: int, x_0: Tensor) -> None:
            on_step(Progress(stage, step, num_steps, x_0))

        return sample(
            estimate,
            randn((len(captions), 3, size, size), generators, self.device).to(
                memory_format=torch.channels_last
            ),
            self.schedules[stage],
            options,
            generators=generators,
            on_step=report if on_step else None,
        ).clamp(-1, 1)

    def _context(
        self, network: GLIDE, captions: Sequence[str], low_res: Tensor | None
    ) -> DecoderContext:
        ids, mask = self.tokenizer(captions)
        return network.condition(ids.to(self.device), mask.to(self.device), low_res)

    def _metadata(
        self, captions: Sequence[str], seeds: Sequence[int], options: GLIDEOptions
    ) -> list[dict[str, Any]]:
        upsamplers = tuple(map(with_named_sampler, options.upsamplers))
        named = replace(options, decoder=with_named_sampler(options.decoder), upsamplers=upsamplers)
        shared = about_drawing(self, named)
        return [
            {"prompt": text, "seed": seed, **shared}
            for text, seed in zip(captions, seeds, strict=True)
        ]

    def _check_fit(self) -> None:
        """Networks that were not trained for one another are refused."""
        size, tokenizer = None, self.tokenizer
        for stage, network in self.networks().items():
            config = network.config
            if config.low_size != size:
                start = "noise alone" if size is None else f"pictures of {size} px"
                raise ValueError(
                    f"{stage} must start from {start}, but its low_size is {config.low_size}"
                )
            if (config.text.vocab_size, config.text.context_length) != (
                tokenizer.vocab_size,
                tokenizer.context_length,
            ):
                raise ValueError(
                    f"{stage} reads {config.text.context_length} of {config.text.vocab_size} tokens, "
                    f"but the tokenizer gives {tokenizer.context_length} of {tokenizer.vocab_size}"
                )
            size = config.image_size

    def _check_options(self, options: GLIDEOptions) -> None:
        if not isinstance(options, GLIDEOptions):
            raise ValueError(
                f"options is a {type(options).__name__}; expected GLIDEOptions, such as pipe.options"
            )
        if len(options.upsamplers) > len(self.upsamplers):
            have = len(self.upsamplers)
            raise ValueError(
                f"options for {len(options.upsamplers)} upsamplers, but the model has {have}; start from pipe.options"
            )
        if any(stage.cache_interval > 1 for stage in (options.decoder, *options.upsamplers)):
            raise ValueError(
                "cache_interval is above 1, which this kind of model does not support; set it to 1"
            )
