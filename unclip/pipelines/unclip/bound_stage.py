"""A stage that is told what to draw and can be stepped through in either direction, for manipulation and editing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from unclip.diffusion.samplers import sampling_timesteps
from unclip.diffusion.schedulers import Estimate, OnSample
from unclip.diffusion.schedules import Schedule
from unclip.image_io import open_image
from unclip.models.unclip.decoder import DecoderContext
from unclip.pipelines.base import (
    ImageInput,
    about_drawing,
    check_images,
    to_pil,
    with_named_sampler,
)
from unclip.pipelines.unclip.stages import UnCLIPStages
from unclip.types import OnStep, Progress, StageOptions, TextEncoding, UnCLIPOptions

# B pictures, D CLIP embedding width, S size of a stage's pictures


@dataclass(frozen=True)
class StageRun:
    """The decoder or an upsampler with its condition and its timesteps."""

    name: str
    options: StageOptions
    estimate: Estimate
    schedule: Schedule
    timesteps: list[float]

    def reporter(self, on_step: OnStep | None) -> OnSample | None:
        """`on_step` as the loops of unclip.diffusion call it."""
        if on_step is None:
            return None
        return lambda step, num_steps, x_0: on_step(Progress(self.name, step, num_steps, x_0))


class UnCLIPRuns(UnCLIPStages):
    """Gives decoder and upsamplers, stage 0, 1, ..., as `StageRun`s."""

    def _run(
        self,
        stage: int,
        options: UnCLIPOptions,
        image_emb: Tensor,
        low_res: Tensor | None,
        text: TextEncoding | None = None,
        known: Tensor | None = None,
    ) -> StageRun:
        """The decoder (stage 0) for B embeddings and texts, or an upsampler for low_res (B, 3, s, s) in [-1, 1].

        With known (B, 4, s, s), see `known_part`, the inpainter takes the decoder's place.
        """
        if stage == 0:
            return self._decoder_run(
                options.decoder, image_emb.to(self.device, self.dtype), text, known
            )
        return self._upsampler_run(stage - 1, options.upsamplers[stage - 1], low_res)

    def _decoder_run(
        self,
        options: StageOptions,
        image_emb: Tensor,
        text: TextEncoding | None,
        known: Tensor | None,
    ) -> StageRun:
        decoder = self.decoder if known is None else self.inpainter
        name = "decoder" if decoder is self.decoder else "inpainter"
        cond = self._context(image_emb, text, known=known)

        def null() -> DecoderContext:
            if known is None:
                return self._null_context(image_emb)
            return self._context(image_emb, None, drop_image=True, known=known)

        config, schedule = decoder.config, self.schedules[name]
        denoisers = self._guided(name, decoder, cond, null, options)
        estimate = self._estimator(
            name, denoisers, options, config.prediction, config.learned_variance, 1.0
        )
        return StageRun(name, options, estimate, schedule, sampling_timesteps(options, schedule))

    def _upsampler_run(self, i: int, options: StageOptions, low_res: Tensor) -> StageRun:
        upsampler, name = self.upsamplers[i], f"upsampler_{i}"
        config, schedule, low_res = (
            upsampler.config,
            self.schedules[name],
            upsampler.condition(low_res.to(self.device)),
        )
        spaced = options
        if (
            getattr(config, "last_unet", None) is not None
        ):  # it knows t = 0 alone, where ancestral sampling ends
            spaced = replace(options, sampler="ancestral")
        estimate = self._upsampling(name, upsampler, low_res, spaced)
        return StageRun(name, options, estimate, schedule, sampling_timesteps(spaced, schedule))

    def _sizes(self, options: UnCLIPOptions) -> list[int]:
        """Sides of the pictures of the decoder and of each upsampler that is used, in pixels."""
        used = self.upsamplers[: len(options.upsamplers)]
        return [self.decoder.config.image_size, *(upsampler.config.high_size for upsampler in used)]

    def _check_options(self, options: UnCLIPOptions, of_prompts: bool = False) -> None:
        """ValueError unless pictures can be drawn under them: those of prompts alone, or others."""
        if not isinstance(options, UnCLIPOptions):
            raise ValueError(
                f"options is a {type(options).__name__}; expected UnCLIPOptions, such as pipe.options"
            )
        if options.embedding != "prior" and not of_prompts:
            raise ValueError(
                f"embedding is {options.embedding!r}, which is for pictures of prompts alone; set 'prior'"
            )
        self._check_upsampling(options.upsamplers)

    def _about(self, options: UnCLIPOptions) -> dict[str, Any]:
        """What the metadata of every picture tells of the model."""
        told = about_drawing(self, with_named_samplers(options))
        source = getattr(self.prior, "source", None)  # of a prior that is not the model's own
        return told if source is None else {**told, "prior_model": source}


def with_named_samplers(options: UnCLIPOptions) -> UnCLIPOptions:
    """For metadata, see `with_named_sampler`."""
    upsamplers = tuple(map(with_named_sampler, options.upsamplers))
    stages = {name: with_named_sampler(getattr(options, name)) for name in ("prior", "decoder")}
    return replace(options, upsamplers=upsamplers, **stages)


def several(images: ImageInput | Sequence[ImageInput]) -> list[Image.Image]:
    """Pictures as upright RGB; a tensor is one (3, H, W) or several (B, 3, H, W) in [-1, 1]."""
    return [open_image(image) for image in unopened(images)]


def unopened(images: ImageInput | Sequence[ImageInput]) -> list[ImageInput]:
    """One entry for each picture of `several`, for `open_picture`: large ones need not all be in memory at once."""
    if isinstance(images, Tensor):
        return to_pil(check_images(images))
    if not isinstance(images, Sequence) or isinstance(images, str):
        return [images]
    if not images:
        raise ValueError("the list of images is empty; expected at least one picture")
    return [
        picture
        for image in images
        for picture in (unopened(image) if isinstance(image, Tensor) else [image])
    ]


def fit(image: Image.Image, size: int) -> Image.Image:
    """The middle square of a picture at size x size pixels, as the training data is made."""
    return (
        image
        if image.size == (size, size)
        else ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    )


def to_tensor(images: Sequence[Image.Image | np.ndarray]) -> Tensor:
    """B pictures of one size -> (B, 3, H, W) in [-1, 1]."""
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return pixels.permute(0, 3, 1, 2).float().div(127.5).sub(1)


def batches_of(count: int, batch_size: int) -> Iterator[slice]:
    """Slices of range(count)."""
    return (slice(start, start + batch_size) for start in range(0, count, batch_size))
