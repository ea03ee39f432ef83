"""Images with a part to paint, in the square windows that a model paints."""

# n images of each canvas, H W height and width of a canvas, S size of the model's images

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from unclip.diffusion.repaint import fill
from unclip.image_io import open_mask, to_pil, to_tensor
from unclip.pipelines.provenance import edited_source
from unclip.pipelines.request import Images, open_images

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

    @cached_property
    def windows(self) -> list[Window]:
        """The windows to paint, in order. ValueError if there are too many."""
        return list(windows_over(self.hole, self.side))


def marked_canvases(image: Images, mask: Mask | Sequence[Mask]) -> list[Canvas]:
    """Open the images and masks of `inpaint`, one mask of the same size for each image.

    Warns the caller of `inpaint` if nothing or everything is marked.
    """
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
            warnings.warn("nothing is marked in the mask: the image stays as it is", stacklevel=4)
        elif hole.all():
            warnings.warn("everything is marked in the mask: nothing is kept", stacklevel=4)
        metadata = {"operation": "inpaint", **edited_source(source, marked, stacklevel=5)}
        canvases.append(Canvas(source, np.asarray(source), hole, metadata))
    return canvases


def paint(
    canvases: Sequence[Canvas], n: int, paint_window: Callable[[list[View]], Tensor]
) -> list[Image.Image]:
    """Paint n images of each canvas, window by window.

    paint_window: returns the painted images of a window of each canvas, n for each, (B, 3, S, S).
    """
    painted = [Painted.of(canvas, n) for canvas in canvases]
    for window in zip_longest(*(canvas.windows for canvas in canvases), fillvalue=(0, 0)):
        views = [one.view(at) for one, at in zip(painted, window, strict=True)]
        for view, new in zip(views, paint_window(views).split(n), strict=True):
            paste_window(*view, new)
    return [Image.fromarray(pixels) for one in painted for pixels in one.pixels]


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


def windows_over(hole: np.ndarray, side: int) -> Iterator[Window]:
    """Yield squares that together cover the hole (H, W) bool, in an order that shows known pixels.

    ValueError if there would be more than MAX_WINDOWS.
    """
    hole, found = hole.copy(), 0
    while area := int(hole.sum()):
        check_windows(found, area, side)
        left, top = window = _next_window(hole, side)
        hole[top : top + side, left : left + side] = False
        found += 1
        yield window


def check_windows(found: int, area: int, side: int) -> None:
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


def views_to_model(views: Sequence[View], size: int, keep: bool = False) -> tuple[Tensor, Tensor]:
    """Resize views of n images each for the model; see `to_model`.

    -> known (B, 3, size, size) in [-1, 1] and hole (B, 1, size, size) bool.
    """
    known, holes = zip(*(to_model(*view, size, keep) for view in views), strict=True)
    n = len(known[0])
    return torch.cat(known), torch.cat(holes).repeat_interleave(n, dim=0)


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


def reduce_view(known: Tensor, hole: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Reduce the output of `views_to_model` to the size of a stage, a divisor of its own.

    A pixel is in the hole if any of those that it covers is.
    """
    factor = known.shape[-1] // size
    return F.avg_pool2d(known, factor), F.max_pool2d(hole.float(), factor) > 0


def _shrink(pixels: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BOX))
