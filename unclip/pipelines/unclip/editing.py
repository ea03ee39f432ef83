"""Inpainting, outpainting and image-to-image, on any decoder, whether it was trained for it or not."""

from __future__ import annotations

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

from unclip.diffusion.repaint import PaintOptions, fill, paste, repaint
from unclip.diffusion.samplers import randn
from unclip.image_io import open_mask
from unclip.models.unclip.decoder import masked_image
from unclip.pipelines.base import (
    ImageInput,
    check_count,
    generators_from,
    progress_bar,
    seeds_from,
    to_pil,
)
from unclip.pipelines.provenance import edited_source
from unclip.pipelines.unclip.bound_stage import UnCLIPRuns, batches_of, several, to_tensor
from unclip.types import GenerationResult, OnStep, TextEncoding, UnCLIPOptions

# B pictures, H W height and width of the canvas, S size of the model's pictures, s of a stage's

ONCE = PaintOptions(
    resamples=1, trained=False
)  # for upsamplers: what they enlarge is in harmony already
KNOWN = 0.25  # of a window should be known when it is painted
MOST_WINDOWS = 64

Window = tuple[int, int]  # left, top


@dataclass(frozen=True)
class Canvas:
    """A picture and what is to be painted of it."""

    picture: Image.Image  # that the canvas was made of
    pixels: np.ndarray  # (H, W, 3) uint8
    hole: np.ndarray  # (H, W) bool
    side: int  # of the square windows that it is painted through
    recipe: dict[str, Any]  # how it was made, for the metadata


class UnCLIPEditing(UnCLIPRuns):
    """Draws `num_images` pictures; picture k has the seed `seed` + k. What is kept is kept bit for bit.

    The prompt tells what the whole picture shows; without one, it is to mean what it means now. A picture of any size
    is painted through square windows of its shorter side, which the model sees at its own size.

    A model with an inpainter paints with it, unless painting.trained is False; any other with its plain decoder.
    """

    def inpaint(
        self,
        image: ImageInput,
        mask: Image.Image | str | Path,
        prompt: str | None = None,
        *,
        painting: PaintOptions | None = None,
        num_images: int = 1,
        seed: int | None = None,
        options: UnCLIPOptions | None = None,
        on_step: OnStep | None = None,
        batch_size: int = 16,
        progress: bool = True,
    ) -> GenerationResult:
        """Paints anew what is white in the mask, or transparent if it has transparent parts; it is as large as image.

        With painting.strength below 1, what is there shines through. A warning if nothing or everything is marked.
        """
        picture, marked = _one(image), open_mask(mask)
        if marked.size != picture.size:
            sizes = "{} x {} px, but the picture is {} x {}".format(*marked.size, *picture.size)
            raise ValueError(f"the mask is {sizes}; expected the same size")
        hole = np.asarray(marked) > 0
        if not hole.any():
            warnings.warn(
                "nothing is marked in the mask (black = keep): the picture stays as it is",
                stacklevel=2,
            )
        elif hole.all():
            warnings.warn(
                "everything is marked in the mask (white = paint): nothing is kept", stacklevel=2
            )
        recipe = {"operation": "inpaint", **edited_source(picture, marked)}
        canvas = Canvas(picture, np.asarray(picture), hole, min(picture.size), recipe)
        return self._paint(
            canvas, prompt, painting, num_images, seed, options, on_step, batch_size, progress
        )

    def outpaint(
        self,
        image: ImageInput,
        prompt: str | None = None,
        *,
        left: int = 0,
        top: int = 0,
        right: int = 0,
        bottom: int = 0,
        painting: PaintOptions | None = None,
        num_images: int = 1,
        seed: int | None = None,
        options: UnCLIPOptions | None = None,
        on_step: OnStep | None = None,
        batch_size: int = 16,
        progress: bool = True,
    ) -> GenerationResult:
        """Goes on with a picture beyond its borders, by so many pixels on each side."""
        borders = {"left": left, "top": top, "right": right, "bottom": bottom}
        for name, width in borders.items():
            if not isinstance(width, int) or width < 0:
                raise ValueError(f"{name} is {width!r}; expected a whole number of pixels")
        if not any(borders.values()):
            raise ValueError(
                "left, top, right and bottom are all 0; expected pixels to add on at least one side"
            )
        picture = _one(image)
        width, height = picture.width + left + right, picture.height + top + bottom
        side = min(picture.size)
        _check_windows(
            0, width * height - picture.width * picture.height, side
        )  # before they are in memory
        around = ((top, bottom), (left, right))
        pixels = np.pad(np.asarray(picture), (*around, (0, 0)))
        hole = np.pad(np.zeros(picture.size[::-1], dtype=bool), around, constant_values=True)
        recipe = {"operation": "outpaint", **edited_source(picture), "arguments": borders}
        canvas = Canvas(picture, pixels, hole, side, recipe)
        return self._paint(
            canvas, prompt, painting, num_images, seed, options, on_step, batch_size, progress
        )

    def image_to_image(
        self,
        image: ImageInput,
        prompt: str | None = None,
        *,
        strength: float = 0.6,
        num_images: int = 1,
        seed: int | None = None,
        options: UnCLIPOptions | None = None,
        on_step: OnStep | None = None,
        batch_size: int = 16,
        progress: bool = True,
    ) -> GenerationResult:
        """Draws the whole picture anew, from what noise of some strength leaves of it (SDEdit, 2108.01073).

        strength: above 0 (nearly the same) to 1 (nothing is left of it).
        """
        picture = _one(image)
        recipe = {"operation": "image_to_image", **edited_source(picture)}
        hole = np.ones(picture.size[::-1], dtype=bool)
        canvas = Canvas(picture, np.asarray(picture), hole, min(picture.size), recipe)
        painting = replace(ONCE, strength=strength)
        result = self._paint(
            canvas, prompt, painting, num_images, seed, options, on_step, batch_size, progress
        )
        for entry in result.metadata:
            entry["arguments"] = {"prompt": prompt, "strength": strength}
        return result

    def _paint(
        self,
        canvas: Canvas,
        prompt: str | None,
        painting: PaintOptions | None,
        num_images: int,
        seed: int | None,
        options: UnCLIPOptions | None,
        on_step: OnStep | None,
        batch_size: int,
        progress: bool,
    ) -> GenerationResult:
        painting = self._settled(painting or PaintOptions())
        check_count("num_images", num_images)
        check_count("batch_size", batch_size)
        options = options or self.options
        self._check_options(options)
        if any(stage.cache_interval != 1 for stage in (options.decoder, *options.upsamplers)):
            raise ValueError(
                "painting goes back and forth between steps and needs cache_interval 1"
            )
        seeds = seeds_from(seed, num_images)
        windows = list(windows_over(canvas.hole, canvas.side))
        batches = list(batches_of(num_images, batch_size))
        once = painting.resamples * painting.steps(options.decoder.steps)
        steps = len(windows) * (once + sum(stage.steps for stage in options.upsamplers))
        steps += 0 if prompt is None else self.prior_steps(options.prior)
        images, embs = [], []
        with (
            torch.inference_mode(),
            self._keeping(),
            progress_bar(len(batches) * steps, progress, on_step) as report,
        ):
            for rows in batches:
                generators = generators_from(seeds[rows])
                image_emb, text = self._content(canvas.picture, prompt, generators, options, report)
                pixels, hole = (
                    np.repeat(canvas.pixels[None], len(generators), axis=0),
                    canvas.hole.copy(),
                )
                for left, top in windows:
                    seen = np.s_[top : top + canvas.side, left : left + canvas.side]
                    through = pixels[(slice(None), *seen)]  # (B, side, side, 3), a view
                    known, marked = to_model(
                        through, hole[seen], self._sizes(options)[-1], painting.strength < 1
                    )
                    x = self._paint_square(
                        known, marked, image_emb, text, generators, options, painting, report
                    )
                    for one, drawn in zip(through, to_pil(x), strict=True):
                        drawn = drawn.resize((canvas.side,) * 2, Image.Resampling.LANCZOS)
                        one[hole[seen]] = np.asarray(drawn)[hole[seen]]
                    hole[seen] = False
                images += [Image.fromarray(one) for one in pixels]
                embs.append(image_emb.cpu())
        told = {
            **canvas.recipe.get("arguments", {}),
            "prompt": prompt,
            "painting": asdict(painting),
        }
        entries = [
            {**canvas.recipe, "arguments": told, "seed": one, **self._about(options)}
            for one in seeds
        ]
        return GenerationResult(
            images, list(seeds), [prompt] * num_images, torch.cat(embs), entries
        )

    def _settled(self, painting: PaintOptions) -> PaintOptions:
        """`painting` that says which decoder paints."""
        if painting.trained and self.inpainter is None:
            raise ValueError("this model has no inpainter: painting.trained must be False or None")
        return (
            replace(painting, trained=self.inpainter is not None)
            if painting.trained is None
            else painting
        )

    def _content(
        self,
        picture: Image.Image,
        prompt: str | None,
        generators: Sequence[torch.Generator],
        options: UnCLIPOptions,
        on_step: OnStep,
    ) -> tuple[Tensor, TextEncoding | None]:
        """What the pictures are to show: image embeddings (B, D), and the prompt for each."""
        B = len(generators)
        if prompt is None:
            return self.encode_image(picture).expand(B, -1), None
        text = self.encode_text(prompt)
        image_emb = self.sample_prior(
            text,
            num_images=B,
            generators=generators,
            options=options.prior,
            candidates=options.prior_candidates,
            on_step=on_step,
        )
        return image_emb, text.repeat_interleave(B)

    def _paint_square(
        self,
        known: Tensor,
        hole: Tensor,
        image_emb: Tensor,
        text: TextEncoding | None,
        generators: Sequence[torch.Generator],
        options: UnCLIPOptions,
        painting: PaintOptions,
        on_step: OnStep,
    ) -> Tensor:
        """Paints the hole (1, 1, S, S) of known (B, 3, S, S) at each stage's size in turn."""
        known, hole, x = known.to(self.device), hole.to(self.device), None
        for i, size in enumerate(self._sizes(options)):
            factor = known.shape[-1] // size
            picture, marked = F.avg_pool2d(known, factor), F.max_pool2d(hole.float(), factor) > 0

            def noise(shape: torch.Size = picture.shape) -> Tensor:
                return randn(shape, generators, self.device)

            how, told = ONCE, None
            if i == 0:
                how, told = painting, masked_image(picture, marked)
                image_emb = self._agreeing(image_emb, told, painting)
            run = self._run(i, options, image_emb, x, text, told if how.trained else None)
            task = run.estimate, picture, marked, run.schedule, run.timesteps, noise
            painted = repaint(*task, how, run.reporter(on_step))
            x = paste(painted, picture, marked, radius=max(1, size // 32)).clamp(-1, 1)
        return x

    def _agreeing(self, image_emb: Tensor, known: Tensor, painting: PaintOptions) -> Tensor:
        """image_emb (B, D), bent to what is known, (B, 4, s, s), if the decoder that paints is shown a layout."""
        decoder = self.inpainter if painting.trained else self.decoder
        layout = getattr(decoder, "layout", None)
        if layout is None or not painting.agreement or not known[:, 3:].any():
            return image_emb
        self._use(decoder)
        return layout.guide_embedding(image_emb.to(self.device), known, painting.agreement)


def windows_over(hole: np.ndarray, side: int) -> Iterator[Window]:
    """Squares that together cover the hole (H, W) bool, in an order in which each sees some of what is known.

    ValueError if there would be more than MOST_WINDOWS.
    """
    hole, found = hole.copy(), 0
    while area := int(hole.sum()):
        _check_windows(found, area, side)
        left, top = window = _next_window(hole, side)
        hole[top : top + side, left : left + side] = False
        found += 1
        yield window


def _check_windows(found: int, area: int, side: int) -> None:
    """ValueError unless, beside the windows found, those that `area` more pixels take at least are few enough."""
    if area > (MOST_WINDOWS - found) * side**2:
        raise ValueError(
            f"what is to be painted takes too many windows of {side} x {side} px, the picture's shorter side; "
            f"expected at most {MOST_WINDOWS} windows: paint less at a time"
        )


def _next_window(hole: np.ndarray, side: int) -> Window:
    """Around the hole, if that is small; else where most is to be painted with enough known beside it."""
    spans = []
    for marked, length in ((hole.any(axis=0), hole.shape[1]), (hole.any(axis=1), hole.shape[0])):
        first, last = np.flatnonzero(marked)[[0, -1]]
        middle = min(max(0, int(first + last + 1 - side) // 2), length - side)
        spans.append(
            (
                {middle},
                last - first < (1 - KNOWN) * side,
                {*range(0, length - side, max(1, side // 2)), length - side},
            )
        )
    (left, x_fits, lefts), (top, y_fits, tops) = spans
    places = [
        (x, y) for y in sorted(top if y_fits else tops) for x in sorted(left if x_fits else lefts)
    ]
    share = {(x, y): float(hole[y : y + side, x : x + side].mean()) for x, y in places}
    if enough := {place: found for place, found in share.items() if 0 < found <= 1 - KNOWN}:
        return max(enough, key=enough.get)
    centre = ((hole.shape[1] - side) / 2, (hole.shape[0] - side) / 2)
    return min(
        (place for place in places if share[place] > 0),
        key=lambda place: (share[place], abs(place[0] - centre[0]) + abs(place[1] - centre[1])),
    )


def to_model(pixels: np.ndarray, hole: np.ndarray, size: int, keep: bool) -> tuple[Tensor, Tensor]:
    """A window as the model sees it: (B, h, h, 3), (h, h) -> (B, 3, size, size) in [-1, 1], (1, 1, size, size) bool.

    Unless `keep`, the hole is filled with what is around it, so that nothing of it gets into the known pixels beside.
    """
    side = len(hole)
    if side > size:  # by Pillow, which makes no large floats of it
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


def _one(image: ImageInput) -> Image.Image:
    pictures = several(image)
    if len(pictures) != 1:
        raise ValueError(f"{len(pictures)} pictures were given; expected one at a time")
    return pictures[0]
