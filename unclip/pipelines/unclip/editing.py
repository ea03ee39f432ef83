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

import itertools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from unclip.diffusion.repaint import PaintOptions, fill, paste
from unclip.image_io import open_mask, to_pil, to_tensor
from unclip.models.unclip.decoder import masked_image
from unclip.pipelines.provenance import edited_source
from unclip.pipelines.request import (
    Batch,
    ImageInput,
    Images,
    Request,
    Seed,
    check_guided,
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
from unclip.types import GenerationResult, OnStep, Prompt, UnCLIPOptions

ONCE = PaintOptions(resamples=1, trained=False)  # for upsamplers, whose input is consistent
MIN_KNOWN = 0.25  # share of a window that should be known when it is painted
MAX_WINDOWS = 64

Window = tuple[int, int]  # left, top
View = tuple[np.ndarray, np.ndarray]  # pixels (n, side, side, 3) uint8 and hole (side, side) bool
Mask = Image.Image | str | Path


@dataclass(frozen=True)
class Canvas:
    """An image and the part of it to paint."""

    image: Image.Image  # the source image
    pixels: np.ndarray  # (H, W, 3) uint8
    hole: np.ndarray  # (H, W) bool
    metadata: dict[str, Any]  # how it was made

    @property
    def side(self) -> int:
        """Side of the square windows, in pixels."""
        return min(self.image.size)


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
    sources = open_images(image)
    masks: Sequence[Any] = mask if isinstance(mask, list | tuple) else [mask]
    if len(masks) != len(sources):
        given = f"{len(masks)} masks for {len(sources)} images"
        raise ValueError(f"{given}; expected one for each")
    canvases = []
    for source, marked in zip(sources, map(open_mask, masks), strict=True):
        if marked.size != source.size:
            sizes = "{} x {} px, but the image is {} x {}".format(*marked.size, *source.size)
            raise ValueError(f"the mask is {sizes}; expected the same size")
        hole = np.asarray(marked) > 0
        if not hole.any():
            warnings.warn("nothing is marked in the mask: the image stays as it is", stacklevel=3)
        elif hole.all():
            warnings.warn("everything is marked in the mask: nothing is kept", stacklevel=3)
        metadata = {"operation": "inpaint", **edited_source(source, marked)}
        canvases.append(Canvas(source, np.asarray(source), hole, metadata))
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
        whole = isinstance(width, int | np.integer) and not isinstance(width, bool)
        if not whole or width < 0:
            raise ValueError(f"{name} is {width!r}; expected a whole number of pixels")
    if not any(borders.values()):
        raise ValueError("left, top, right and bottom are all 0; expected one above 0")
    source = _open_one(image)
    width, height = source.width + left + right, source.height + top + bottom
    added = width * height - source.width * source.height
    _check_windows(0, added, min(source.size))  # before allocation
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
    windows = [list(windows_over(canvas.hole, canvas.side)) for canvas in canvases]
    steps = painting.resamples * painting.steps(options.decoder.steps)
    steps += sum(stage.steps for stage in options.upsamplers)
    steps *= max(map(len, windows))
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
            painted = [Painted.of(canvas, batch.num_images) for canvas in part]
            for window in itertools.zip_longest(*windows[batch.prompts], fillvalue=(0, 0)):
                views = [one.view(at) for one, at in zip(painted, window, strict=True)]
                _paint_window(pipe, views, image_emb, text, batch, options, painting)
        images = [Image.fromarray(pixels) for one in painted for pixels in one.pixels]
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


@dataclass(frozen=True)
class Painted:
    """The images that are painted on one canvas."""

    pixels: np.ndarray  # (n, H, W, 3) uint8
    hole: np.ndarray  # (H, W) bool, what is still to be painted
    side: int  # of the windows

    @classmethod
    def of(cls, canvas: Canvas, n: int) -> Painted:
        return cls(np.repeat(canvas.pixels[None], n, axis=0), canvas.hole.copy(), canvas.side)

    def view(self, window: Window) -> View:
        """Return the pixels (n, side, side, 3) and the hole (side, side) in a window."""
        left, top = window
        at = np.s_[top : top + self.side, left : left + self.side]
        return self.pixels[(slice(None), *at)], self.hole[at]


def paste_window(pixels: np.ndarray, hole: np.ndarray, x: Tensor) -> None:
    """Write painted images x (n, 3, S, S) to the hole of a window, and clear the hole."""
    for pixel, new in zip(pixels, to_pil(x), strict=True):
        new = new.resize(hole.shape, Image.Resampling.LANCZOS)
        pixel[hole] = np.asarray(new)[hole]
    hole[:] = False


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
) -> None:
    """Paint the hole of one window of each canvas, at each stage's size in turn."""
    sizes, device, n = stage_sizes(pipe, options), pipe.runtime.device, batch.num_images
    keep = painting.strength < 1
    images, holes = zip(*(to_model(*view, sizes[-1], keep) for view in views), strict=True)
    known = torch.cat(images).to(device)  # (B, 3, S, S)
    hole = torch.cat(holes).repeat_interleave(n, dim=0).to(device)  # (B, 1, S, S)
    x = None
    for i, size in enumerate(sizes):
        factor = known.shape[-1] // size
        image, marked = F.avg_pool2d(known, factor), F.max_pool2d(hole.float(), factor) > 0
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
        x = paste(painted, image, marked, radius=max(1, size // 32)).clamp(-1, 1)
    assert x is not None
    for (pixels, marked), new in zip(views, x.split(n), strict=True):
        paste_window(pixels, marked, new)


def windows_over(hole: np.ndarray, side: int) -> Iterator[Window]:
    """Yield squares that together cover the hole (H, W) bool, in an order that shows known pixels.

    ValueError if there would be more than MAX_WINDOWS.
    """
    hole, found = hole.copy(), 0
    while area := int(hole.sum()):
        _check_windows(found, area, side)
        left, top = window = _next_window(hole, side)
        hole[top : top + side, left : left + side] = False
        found += 1
        yield window


def _check_windows(found: int, area: int, side: int) -> None:
    """Raise ValueError if `area` remaining pixels certainly need too many windows."""
    if area > (MAX_WINDOWS - found) * side**2:
        windows = f"windows of {side} x {side} px, the image's shorter side"
        raise ValueError(
            f"the painted part needs too many {windows}; expected at most {MAX_WINDOWS}"
        )


def _next_window(hole: np.ndarray, side: int) -> Window:
    """Centre the window on a small hole, or maximise its hole while enough pixels are known."""
    spans = []  # for x and y: the central position, whether the hole fits, all positions
    for marked, length in ((hole.any(axis=0), hole.shape[1]), (hole.any(axis=1), hole.shape[0])):
        first, last = np.flatnonzero(marked)[[0, -1]]
        middle = min(max(0, int(first + last + 1 - side) // 2), length - side)
        positions = {*range(0, length - side, max(1, side // 2)), length - side}
        spans.append(({middle}, last - first < (1 - MIN_KNOWN) * side, positions))
    (left, x_fits, lefts), (top, y_fits, tops) = spans
    share = {
        (x, y): float(hole[y : y + side, x : x + side].mean())
        for y in sorted(top if y_fits else tops)
        for x in sorted(left if x_fits else lefts)
    }
    if enough := {at: found for at, found in share.items() if 0 < found <= 1 - MIN_KNOWN}:
        return max(enough, key=lambda at: enough[at])
    centre = ((hole.shape[1] - side) / 2, (hole.shape[0] - side) / 2)
    return min(
        (at for at in share if share[at] > 0),
        key=lambda at: (share[at], abs(at[0] - centre[0]) + abs(at[1] - centre[1])),
    )


def to_model(pixels: np.ndarray, hole: np.ndarray, size: int, keep: bool) -> tuple[Tensor, Tensor]:
    """Resize a window for the model: (B, h, h, 3) uint8 and its hole (h, h) bool.

    -> (B, 3, size, size) in [-1, 1] and (1, 1, size, size) bool. Unless `keep`, the hole is filled
    with the surrounding colours, so that its content does not leak into known pixels.
    """
    side = len(hole)
    if side > size:  # Pillow needs less memory than torch
        pixels = np.stack([_shrink(one, size) for one in pixels])
        hole = _shrink(hole.astype(np.uint8) * 255, size) > 0
    known, marked = to_tensor(pixels), torch.from_numpy(hole)[None, None]
    if not keep:
        known = fill(known, marked)
    if side < size:
        known = F.interpolate(known, (size, size), mode="bicubic").clamp(-1, 1)
        marked = F.interpolate(marked.float(), (size, size)) > 0
    return known, marked


def _shrink(pixels: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BOX))


def _open_one(image: ImageInput) -> Image.Image:
    images = open_images(image)
    if len(images) != 1:
        raise ValueError(f"got {len(images)} images; expected one at a time")
    return images[0]
