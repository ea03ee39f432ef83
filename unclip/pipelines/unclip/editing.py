"""Inpainting, outpainting and image-to-image, with any decoder, trained for it or not.

The public functions are methods of `UnCLIPPipeline`. They return `num_images` images of each input;
image k has the seed `seed` + k. Known pixels are kept bit for bit. The prompt, one for all or one
for each, describes the whole image; without a prompt, the CLIP embedding of the input is used.
negative_prompt, also one for all or one for each, replaces the null of guidance.

An image of any size is painted in square windows as wide as its shorter side, which are resized to
the size of the model's images. A model with an inpainter uses it, unless painting.trained is False.
"""

# P inputs, n images of each, B batch (P * n), H W height and width of a canvas, S size of the
# model's images, s of a stage's

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unclip.diffusion.repaint import ONCE, PaintOptions, paste
from unclip.models.unclip.decoder import masked_image
from unclip.pipelines.canvas import (
    Canvas,
    Mask,
    View,
    check_windows,
    marked_canvases,
    paint,
    reduce_view,
    views_to_model,
)
from unclip.pipelines.provenance import edited_source
from unclip.pipelines.request import (
    Batch,
    ImageInput,
    Images,
    Request,
    Seed,
    check_guided,
    is_whole,
    open_images,
    prompt_for_each,
)
from unclip.pipelines.unclip.stages import (
    EncodedPrompts,
    StagedPipeline,
    bind_stage,
    check_stages,
    stage_sizes,
)
from unclip.types import GenerationResult, OnStep, Prompt, UnCLIPOptions, image_steps


def inpaint(
    pipe: StagedPipeline,
    image: Images,
    mask: Mask | Sequence[Mask],
    prompt: Prompt | None = None,
    *,
    negative_prompt: Prompt | None = None,
    painting: PaintOptions | None = None,
    num_images: int = 1,
    seed: Seed = None,
    options: UnCLIPOptions | None = None,
    on_step: OnStep | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> GenerationResult:
    """Paint the white part of a mask of the same size, or the transparent part if it has one.

    Several images need a mask each. With painting.strength below 1, the old content remains
    partly visible. Warns if nothing or everything is marked.
    """
    request = Request(num_images, seed, on_step, batch_size, progress, options)
    canvases = marked_canvases(image, mask)
    texts = prompt, negative_prompt
    return _paint(pipe, canvases, texts, painting or PaintOptions(), request)


def outpaint(
    pipe: StagedPipeline,
    image: ImageInput,
    prompt: str | None = None,
    *,
    negative_prompt: str | None = None,
    left: int = 0,
    top: int = 0,
    right: int = 0,
    bottom: int = 0,
    painting: PaintOptions | None = None,
    num_images: int = 1,
    seed: Seed = None,
    options: UnCLIPOptions | None = None,
    on_step: OnStep | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> GenerationResult:
    """Extend an image by a number of pixels on each side."""
    request = Request(num_images, seed, on_step, batch_size, progress, options)
    borders = {"left": left, "top": top, "right": right, "bottom": bottom}
    for name, width in borders.items():
        if not is_whole(width) or width < 0:
            raise ValueError(f"{name} is {width!r}; expected a whole number of pixels")
    if not any(borders.values()):
        raise ValueError("left, top, right and bottom are all 0; expected one above 0")
    source = _open_one(image)
    width, height = source.width + left + right, source.height + top + bottom
    added = width * height - source.width * source.height
    check_windows(0, added, min(source.size))  # before allocation
    around = ((top, bottom), (left, right))
    pixels = np.pad(np.asarray(source), (*around, (0, 0)))
    hole = np.pad(np.zeros(source.size[::-1], dtype=bool), around, constant_values=True)
    metadata = {"operation": "outpaint", **edited_source(source), "arguments": borders}
    canvas = Canvas(source, pixels, hole, metadata)
    return _paint(pipe, [canvas], (prompt, negative_prompt), painting or PaintOptions(), request)


def image_to_image(
    pipe: StagedPipeline,
    image: Images,
    prompt: Prompt | None = None,
    *,
    negative_prompt: Prompt | None = None,
    strength: float = 0.6,
    num_images: int = 1,
    seed: Seed = None,
    options: UnCLIPOptions | None = None,
    on_step: OnStep | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> GenerationResult:
    """Repaint whole images from their noised versions (SDEdit, 2108.01073).

    strength: in (0, 1]; near 0 little changes, at 1 nothing of the image is kept.
    """
    request = Request(num_images, seed, on_step, batch_size, progress, options)
    canvases = []
    for source in open_images(image):
        metadata = {"operation": "image_to_image", **edited_source(source)}
        hole = np.ones(source.size[::-1], dtype=bool)
        canvases.append(Canvas(source, np.asarray(source), hole, metadata))
    texts = prompt, negative_prompt
    result = _paint(pipe, canvases, texts, replace(ONCE, strength=strength), request)
    for entry in result.metadata:
        del entry["arguments"]["painting"]
        entry["arguments"]["strength"] = strength
    return result


def _paint(
    pipe: StagedPipeline,
    canvases: Sequence[Canvas],
    texts: tuple[Prompt | None, Prompt | None],
    painting: PaintOptions,
    request: Request,
) -> GenerationResult:
    """Paint the holes of canvases window by window, each at the size of the model's images.

    texts: the prompts and the negative prompts.
    """
    options = request.options or pipe.options
    painting = _check_painting(pipe, options, painting)
    prompts = prompt_for_each(texts[0], len(canvases))
    negative = prompt_for_each(texts[1], len(canvases), "negative prompts")
    if negative is not None:
        guided = {} if prompts is None else {"prior": options.prior}
        check_guided({**guided, "decoder": options.decoder})
    steps = painting.resamples * painting.steps(options.decoder.steps)
    steps += sum(image_steps(options)[1:])
    steps *= max(len(canvas.windows) for canvas in canvases)
    if prompts is not None and pipe.prior_stage is not None:
        steps += pipe.prior_stage.steps(options.prior)
    results = []
    for batch in request.batches(len(canvases), steps):
        part = canvases[batch.prompts]
        said, avoided = (x if x is None else x[batch.prompts] for x in (prompts, negative))
        with torch.inference_mode():
            text = EncodedPrompts.of(pipe.encode_text, said, avoided)
            image_emb = _embed(pipe, part, text, batch, options)
            text = text.repeat_interleave(batch.num_images)
            paint_window = partial(
                _paint_window,
                pipe,
                image_emb=image_emb,
                text=text,
                batch=batch,
                options=options,
                painting=painting,
            )
            images = paint(part, batch.num_images, paint_window)
        entries = _metadata(pipe, part, said, avoided, batch, options, painting)
        names = [entry["arguments"]["prompt"] for entry in entries]
        results.append(GenerationResult(images, [*batch.seeds], names, image_emb.cpu(), entries))
    return GenerationResult.cat(results)


def _check_painting(
    pipe: StagedPipeline, options: UnCLIPOptions, painting: PaintOptions
) -> PaintOptions:
    """Return the options with `trained` set; ValueError if the model does not support them."""
    has_inpainter = pipe.inpainter_stage is not None
    if painting.trained and not has_inpainter:
        raise ValueError("this model has no inpainter: painting.trained must be False or None")
    check_stages(pipe, options)
    if any(stage.cache_interval != 1 for stage in (options.decoder, *options.upsamplers)):
        raise ValueError("cache_interval is above 1; expected 1 for painting, which repeats steps")
    return replace(painting, trained=has_inpainter) if painting.trained is None else painting


def _metadata(
    pipe: StagedPipeline,
    canvases: Sequence[Canvas],
    prompts: list[str] | None,
    negative: list[str] | None,
    batch: Batch,
    options: UnCLIPOptions,
    painting: PaintOptions,
) -> list[dict[str, Any]]:
    """Return the metadata of each image of a batch."""
    about, entries = pipe.describe(options), []
    for k, seed in enumerate(batch.seeds):
        i = k // batch.num_images
        own = {"prompt": None if prompts is None else prompts[i]}
        if negative is not None:
            own["negative_prompt"] = negative[i]
        metadata = canvases[i].metadata
        arguments = {**metadata.get("arguments", {}), **own, "painting": asdict(painting)}
        entries.append({**metadata, "arguments": arguments, "seed": seed, **about})
    return entries


def _embed(
    pipe: StagedPipeline,
    canvases: Sequence[Canvas],
    prompts: EncodedPrompts,
    batch: Batch,
    options: UnCLIPOptions,
) -> Tensor:
    """Return image embeddings (B, D) of the prompts, or of the images if there are none."""
    if prompts.text is None:
        image_emb = pipe.encode_image([canvas.image for canvas in canvases])
        return image_emb.repeat_interleave(batch.num_images, dim=0)
    return pipe.sample_prior(
        prompts.text,
        num_images=batch.num_images,
        generators=batch.generators,
        options=options.prior,
        candidates=options.prior_candidates,
        on_step=batch.on_step,
        negative=prompts.negative,
    )


def _paint_window(
    pipe: StagedPipeline,
    views: Sequence[View],
    image_emb: Tensor,
    text: EncodedPrompts,
    batch: Batch,
    options: UnCLIPOptions,
    painting: PaintOptions,
) -> Tensor:
    """Paint the hole of one window of each canvas, at each stage's size in turn: (B, 3, S, S)."""
    sizes = stage_sizes(pipe, options)
    inputs = views_to_model(views, sizes[-1], keep=painting.strength < 1)
    known, hole = (x.to(pipe.runtime.device) for x in inputs)
    x = None
    for i, size in enumerate(sizes):
        image, marked = reduce_view(known, hole, size)
        if i == 0:
            decoder, masked, how = pipe.decoder_stage, masked_image(image, marked), painting
            if painting.trained:
                assert pipe.inpainter_stage is not None
                decoder = pipe.inpainter_stage
            emb = decoder.guide_embedding(image_emb, masked, painting.agreement)
            stage = decoder.bind(
                emb, text, options.decoder, known=masked if painting.trained else None
            )
        else:
            stage, how = bind_stage(pipe, i, options, image_emb, x), ONCE
        painted = stage.repaint(image, marked, batch.generators, how, batch.on_step)
        x = paste(painted, image, marked)
    assert x is not None
    return x


def _open_one(image: ImageInput) -> Image.Image:
    images = open_images(image)
    if len(images) != 1:
        raise ValueError(f"got {len(images)} images; expected one at a time")
    return images[0]
