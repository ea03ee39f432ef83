"""A pipeline over many captions, in batches with a bar; of unCLIP's stages each result is kept for the next."""

from __future__ import annotations

import contextlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from unclip.clip import CLIP
from unclip.pipelines.base import TextToImage, generators_from, progress_bar, to_pil
from unclip.pipelines.dalle.pipeline import DallePipeline
from unclip.pipelines.unclip.bound_stage import to_tensor
from unclip.pipelines.unclip.pipeline import UnCLIPPipeline
from unclip.types import CodeOptions, OnStep, TextEncoding, UnCLIPOptions

# N captions, D CLIP embedding width, s side of the pictures that are measured


@dataclass(frozen=True)
class Imagined:
    """What the prior gives for N captions."""

    captions: list[str]
    text: TextEncoding
    image_emb: Tensor | None  # (N, D); None: the decoder gets the captions alone
    generators: list[torch.Generator]  # as the prior left them: the decoder goes on from there


@dataclass(frozen=True)
class Drawn:
    """Pictures of N captions, at the size that they are measured at."""

    captions: list[str]
    images: Tensor  # (N, 3, s, s) in [-1, 1]
    generators: Sequence[
        torch.Generator
    ] = ()  # as unCLIP's decoder left them: the upsamplers go on from there


class Drawer(ABC):
    """Draws picture k from the seed `seed` + k, as `pipe(captions, seed=seed)` does."""

    pipe: TextToImage
    size: int  # s

    def __init__(
        self, pipe: TextToImage, options: Any = None, batch_size: int = 32, progress: bool = True
    ) -> None:
        """options: the pipeline's own, unless others are given."""
        self.pipe, self.options, self.batch_size, self.progress = (
            pipe,
            options or pipe.options,
            batch_size,
            progress,
        )

    @abstractmethod
    def draw(self, captions: Sequence[str], seed: int) -> Drawn:
        """A picture of each caption."""

    @abstractmethod
    def enlarge(self, drawn: Drawn, rows: Sequence[int] | None = None) -> list[Image.Image]:
        """All pictures or some, at the size that the model gives."""

    @property
    def clip(self) -> CLIP:
        return self.pipe.clip

    @torch.inference_mode()
    def encode_text(self, captions: Sequence[str]) -> TextEncoding:
        """Captions through CLIP; those that are longer than its context are cut."""
        with no_cut_warnings():
            return self.clip.encode_text(list(captions)).to(dtype=torch.float32)

    @torch.inference_mode()
    def embed(self, images: Tensor) -> Tensor:
        """CLIP's embeddings (N, D) of pictures (N, 3, s, s), uint8 or in [-1, 1]."""
        parts = []
        for part in self.batches(len(images), "CLIP", 256):
            some = images[part]
            some = some.float().div(127.5).sub(1) if some.dtype == torch.uint8 else some
            parts.append(self.clip.encode_image(some).float().cpu())
        return torch.cat(parts)

    def batches(self, count: int, name: str = "", batch_size: int | None = None) -> Iterator[slice]:
        """Slices of range(count); with a name, under a bar."""
        size = batch_size or self.batch_size
        for start in tqdm(
            range(0, count, size), name, disable=not (self.progress and name), leave=False
        ):
            yield slice(start, start + size)


class DalleDrawer(Drawer):
    """Pictures as DALL-E draws them."""

    pipe: DallePipeline
    options: CodeOptions

    @property
    def size(self) -> int:
        return self.pipe.codec.image_size

    def draw(self, captions: Sequence[str], seed: int) -> Drawn:
        return self._drawn(captions, 1, seed, self.batch_size)

    def candidates(self, caption: str, count: int, seed: int) -> Drawn:
        """So many pictures of one caption."""
        return self._drawn([caption], count, seed, 2 * self.batch_size)

    def enlarge(self, drawn: Drawn, rows: Sequence[int] | None = None) -> list[Image.Image]:
        return to_pil(drawn.images if rows is None else drawn.images[list(rows)])

    def _drawn(self, captions: Sequence[str], count: int, seed: int, batch_size: int) -> Drawn:
        drawing = {"options": self.options, "batch_size": batch_size, "progress": self.progress}
        with no_cut_warnings():
            result = self.pipe(list(captions), num_images=count, seed=seed, **drawing)
        return Drawn(result.prompts, to_tensor(result.images))


class UnCLIPDrawer(Drawer):
    """A stage at a time; pictures are measured as the decoder draws them."""

    pipe: UnCLIPPipeline
    options: UnCLIPOptions

    @property
    def size(self) -> int:
        return self.pipe.decoder.config.image_size

    def imagine(self, captions: Sequence[str], seed: int) -> Imagined:
        """Captions through the prior."""
        text = self.encode_text(captions)
        generators = generators_from(range(seed, seed + len(captions)))
        options, candidates = self.options.prior, self.options.prior_candidates
        with self._bar(len(captions), self.pipe.prior_steps(options)) as on_step:
            parts = [
                self.pipe.sample_prior(
                    text[part],
                    generators=generators[part],
                    options=options,
                    candidates=candidates,
                    on_step=on_step,
                ).cpu()
                for part in self.batches(len(captions))
            ]
        return Imagined(list(captions), text, torch.cat(parts), generators)

    def decode(self, imagined: Imagined) -> Drawn:
        """Embeddings and captions through the decoder."""
        options, generators = self.options.decoder, _copies(imagined.generators)
        with self._bar(len(imagined.captions), options.steps) as on_step:
            parts = [
                self.pipe.decode(
                    None if imagined.image_emb is None else imagined.image_emb[part],
                    imagined.text[part],
                    generators=generators[part],
                    options=options,
                    on_step=on_step,
                ).cpu()
                for part in self.batches(len(imagined.captions))
            ]
        return Drawn(imagined.captions, torch.cat(parts), generators)

    def draw(self, captions: Sequence[str], seed: int) -> Drawn:
        return self.decode(self.imagine(captions, seed))

    def enlarge(self, drawn: Drawn, rows: Sequence[int] | None = None) -> list[Image.Image]:
        """Through the upsamplers."""
        rows = range(len(drawn.captions)) if rows is None else rows
        generators = _copies([drawn.generators[row] for row in rows])
        images: list[Image.Image] = []
        for part in self.batches(len(rows), "upsampler", 8):  # of 16 times as many pixels
            small = drawn.images[list(rows[part])]
            images += to_pil(
                self.pipe.upsample(
                    small, generators=generators[part], options=self.options.upsamplers
                )
            )
        return images

    def _bar(self, count: int, steps: int) -> contextlib.AbstractContextManager[OnStep]:
        return progress_bar(-(-count // self.batch_size) * steps, self.progress, None)


def _copies(generators: Sequence[torch.Generator]) -> list[torch.Generator]:
    """Generators in the same state, so that a stage can be drawn again from where the last one ended."""
    copies = [torch.Generator() for _ in generators]
    for copy, generator in zip(copies, generators, strict=True):
        copy.set_state(generator.get_state())
    return copies


@contextlib.contextmanager
def no_cut_warnings() -> Iterator[None]:
    """A warning for each caption that is longer than CLIP's context would hide all else."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the prompt .*this part was cut")
        yield
