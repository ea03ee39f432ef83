"""Text -> images without CLIP (GLIDE, 2112.10741)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from unclip.checkpoints.formats import Bundle
from unclip.diffusion.repaint import ONCE, paste
from unclip.diffusion.schedules import Schedule, ScheduleConfig
from unclip.models.published.glide import GLIDE
from unclip.models.unclip.decoder import DecoderContext, masked_image
from unclip.pipelines.base import Pipeline, in_inference_mode, make_schedules
from unclip.pipelines.canvas import Mask, View, marked_canvases, paint, reduce_view, views_to_model
from unclip.pipelines.diffusion_stage import BoundStage, DiffusionStage
from unclip.pipelines.provenance import operation_metadata
from unclip.pipelines.request import (
    Batch,
    Images,
    PromptBatch,
    Request,
    Seed,
    check_guided,
    check_options,
    check_prompts,
    prompt_for_each,
    random_generators,
)
from unclip.pipelines.runtime import Runtime
from unclip.tokenizer import GPT2Tokenizer
from unclip.types import (
    GenerationResult,
    GLIDEOptions,
    OnStep,
    Prompt,
    StageOptions,
    image_steps,
)

# B batch, s and S image sizes

Captions = tuple[Sequence[str], Sequence[str] | None]  # B captions, and B negative ones or None


class GLIDEPipeline(Pipeline):
    """A network conditioned on a caption, and any number of upsamplers that read it as well.

    Networks that were trained to inpaint (2.4) also generate, with nothing known.

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
        negative_prompt: Prompt | None = None,
        num_images: int = 1,
        seed: Seed = None,
        options: GLIDEOptions | None = None,
        on_step: OnStep | None = None,
        batch_size: int = 16,
        progress: bool = True,
    ) -> GenerationResult:
        """Generate `num_images` images of each prompt; image k has the seed `seed` + k.

        negative_prompt: one for all or one for each; it replaces the null of guidance. on_step is
        called after every step of every batch of at most `batch_size` images.
        """
        prompts = PromptBatch.of(check_prompts(prompt), negative_prompt)
        options = options or self.options
        check_options(options, GLIDEOptions, len(self.upsamplers))
        self._check_negative(options, prompts.negative)
        steps = sum(image_steps(options))
        request, results = Request(num_images, seed, on_step, batch_size, progress), []
        for batch in request.batches(len(prompts), steps):
            part = prompts[batch.prompts]
            captions, negative = _repeat(part.texts, part.negative, batch.num_images)
            sampling: dict[str, Any] = {
                "negative": negative, "generators": batch.generators, "on_step": batch.on_step,
            }  # fmt: skip
            x = self.decode(captions, options=options.decoder, **sampling)
            x = self.upsample(x, captions, options=options.upsamplers, **sampling)
            results.append(self.make_result(x, batch, part.metadata(), options))
        return GenerationResult.cat(results)

    def inpaint(
        self,
        image: Images,
        mask: Mask | Sequence[Mask],
        prompt: Prompt | None = None,
        *,
        negative_prompt: Prompt | None = None,
        num_images: int = 1,
        seed: Seed = None,
        options: GLIDEOptions | None = None,
        on_step: OnStep | None = None,
        batch_size: int = 16,
        progress: bool = True,
    ) -> GenerationResult:
        """Paint the white part of a mask of the same size, or the transparent part if it has one.

        The base network must have been trained to inpaint: known pixels and their mask are inputs
        of it and of upsamplers of the same kind (GLIDE 2.4). Sampling is ancestral at the timesteps
        of the options, with the known pixels in x_t. They are kept bit for bit.

        Images may have any size; they are painted in square windows as wide as the shorter side.
        Several images need a mask each. prompt: of the whole image, one for all images, one for
        each, or None. negative_prompt: one for all or one for each; it replaces the null of
        guidance. Warns if nothing or everything is marked.
        """
        if not self.decoder.config.inpaints:
            reason = "its base network has no input for known pixels; load base_inpaint.pt"
            raise ValueError(f"{self.name} cannot inpaint: {reason}")
        options = options or self.options
        check_options(options, GLIDEOptions, len(self.upsamplers))
        request = Request(num_images, seed, on_step, batch_size, progress)
        canvases = marked_canvases(image, mask)
        prompts = [*(prompt_for_each(prompt, len(canvases)) or [None] * len(canvases))]
        negative = prompt_for_each(negative_prompt, len(canvases), "negative prompts")
        self._check_negative(options, negative)
        metadata = operation_metadata([canvas.metadata for canvas in canvases], prompts, negative)
        steps = sum(image_steps(options))
        steps *= max(len(canvas.windows) for canvas in canvases)
        results = []
        for batch in request.batches(len(canvases), steps):
            rows, n = batch.prompts, batch.num_images
            said, avoided = [text or "" for text in prompts[rows]], negative and negative[rows]
            captions = _repeat(said, avoided, n)
            paint_window = partial(
                self._paint_window, captions=captions, options=options, batch=batch
            )
            with torch.inference_mode():
                images = paint(canvases[rows], n, paint_window)
            results.append(self.make_result(images, batch, metadata[rows], options))
        return GenerationResult.cat(results)

    def variations(self, image: Any = None, **arguments: Any) -> GenerationResult:
        """Raise ValueError: this model has no CLIP."""
        raise ValueError(f"{self.name} has no image embeddings to vary an image; give it a prompt")

    @in_inference_mode
    def decode(
        self,
        captions: Sequence[str],
        *,
        negative: Sequence[str] | None = None,
        generators: Sequence[torch.Generator] | None = None,
        options: StageOptions | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Sample images (B, 3, s, s) in [-1, 1] for B captions.

        negative: B captions that replace the null of guidance.
        """
        generators = generators or random_generators(len(captions))
        stage_options, texts = options or self.options.decoder, (captions, negative)
        return self._sample(self.stages[0], texts, generators, stage_options, on_step)

    @in_inference_mode
    def upsample(
        self,
        images: Tensor,
        captions: Sequence[str],
        *,
        negative: Sequence[str] | None = None,
        generators: Sequence[torch.Generator] | None = None,
        options: Sequence[StageOptions] | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Upsample images (B, 3, s, s) in [-1, 1] -> (B, 3, S, S), one stage per options.

        negative: B captions that replace the null of guidance.
        """
        generators = generators or random_generators(len(images))
        all_options = self.options.upsamplers if options is None else options
        for stage, stage_options in zip(self.stages[1:], all_options, strict=False):
            low_res = _as_8_bit(images.to(self.device))
            texts = captions, negative
            images = self._sample(stage, texts, generators, stage_options, on_step, low_res)
        return images

    def _paint_window(
        self, views: Sequence[View], captions: Captions, options: GLIDEOptions, batch: Batch
    ) -> Tensor:
        """Paint the hole of one window of each canvas, at each stage's size in turn."""
        stage_options = (options.decoder, *options.upsamplers)
        stages = list(zip(self.stages, stage_options, strict=False))
        S, x = stages[-1][0].network.config.image_size, None
        image, hole = (x.to(self.device) for x in views_to_model(views, S))
        for stage, chosen in stages:
            config = stage.network.config
            known, marked = reduce_view(image, hole, config.image_size)
            masked = masked_image(known, marked) if config.inpaints else None
            low_res = None if x is None else _as_8_bit(x)
            bound = self._bind(stage, captions, chosen, low_res, masked)
            painted = bound.repaint(known, marked, batch.generators, ONCE, batch.on_step)
            x = paste(painted, known, marked)
        assert x is not None
        return x

    def _sample(
        self,
        stage: DiffusionStage,
        captions: Captions,
        generators: Sequence[torch.Generator],
        options: StageOptions,
        on_step: OnStep | None,
        low_res: Tensor | None = None,
    ) -> Tensor:
        bound = self._bind(stage, captions, options, low_res)
        size = stage.network.config.image_size
        x_T = bound.noise((len(captions[0]), 3, size, size), generators)
        return bound.sample(x_T, generators, on_step).clamp(-1, 1)

    def _bind(
        self,
        stage: DiffusionStage,
        captions: Captions,
        options: StageOptions,
        low_res: Tensor | None,
        known: Tensor | None = None,
    ) -> BoundStage:
        """Fix captions, small images of an upsampler, and the known pixels, see `masked_image`."""
        texts, negative = captions
        if negative is not None and len(negative) != len(texts):
            given = f"{len(negative)} negative captions for {len(texts)} captions"
            raise ValueError(f"{given}; expected one for each")
        context = self._condition(stage.network, texts, low_res, known)

        def null() -> DecoderContext:
            avoided = negative or [""]
            first = None if low_res is None else low_res[: len(avoided)]
            nulls = self._condition(stage.network, avoided, first)
            nulls = nulls.repeat_interleave(len(texts) // len(avoided))
            return replace(nulls, extra_channels=context.extra_channels)

        return stage.bind(context, options, null)

    def _condition(
        self,
        network: GLIDE,
        captions: Sequence[str],
        low_res: Tensor | None,
        known: Tensor | None = None,
    ) -> DecoderContext:
        ids, mask = self.tokenizer(captions)
        self.runtime.use(network)
        return network.condition(ids.to(self.device), mask.to(self.device), low_res, known)

    def _check_negative(self, options: GLIDEOptions, negative: Sequence[str] | None) -> None:
        """Raise ValueError if there are negative prompts but no stage uses guidance."""
        if negative is not None:
            stages = (options.decoder, *options.upsamplers)
            named = zip(self.stages, stages, strict=False)  # a call may use fewer upsamplers
            check_guided({stage.name: chosen for stage, chosen in named})

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


def _repeat(captions: Sequence[str], negative: Sequence[str] | None, n: int) -> Captions:
    """Repeat each caption and each negative one n times."""
    captions = [text for text in captions for _ in range(n)]
    return captions, negative and [text for text in negative for _ in range(n)]


def _as_8_bit(images: Tensor) -> Tensor:
    """Round images in [-1, 1] to the values of 8-bit images."""
    return ((images + 1) * 127.5).round() / 127.5 - 1
