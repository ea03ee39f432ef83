"""How far each approximation strays from the exact result, and how much time it saves (`unclip drift`)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from unclip.evaluation.drawing import no_cut_warnings
from unclip.evaluation.metrics import recall
from unclip.evaluation.report import markdown
from unclip.pipelines.unclip.pipeline import UnCLIPPipeline
from unclip.types import StageOptions, UnCLIPOptions

# N captions, D CLIP embedding width

EXACT, OTHER_SEEDS = (
    "exact",
    "exact, other seeds",
)  # the second tells how far apart equally good pictures are
TURNS = 5  # timed pictures of an approximation, each beside an exact one


@dataclass(frozen=True)
class Approximation:
    """What is not as in the exact model."""

    options: UnCLIPOptions
    dtype: torch.dtype | None = None
    quantize: str | None = None


def approximations(options: UnCLIPOptions, fast: UnCLIPOptions) -> dict[str, Approximation]:
    """Each alone, made from the exact `options`; then the preset, which joins some of them."""
    prior, decoder = options.prior, options.decoder

    def decoded(**changes: Any) -> Approximation:
        return Approximation(replace(options, decoder=replace(decoder, **changes)))

    def upsampled(**changes: Any) -> Approximation:
        return Approximation(
            replace(options, upsamplers=tuple(replace(up, **changes) for up in options.upsamplers))
        )

    def fewer(stage: StageOptions, share: float) -> int:
        return max(2, round(share * stage.steps))

    half, third, few = fewer(decoder, 1 / 2), fewer(decoder, 1 / 3), fewer(prior, 0.4)
    return {
        f"prior: {few} steps of UniPC": Approximation(
            replace(options, prior=replace(prior, steps=few, sampler="unipc"))
        ),
        f"decoder: {half} steps of DPM-Solver++": decoded(steps=half, sampler="dpm++"),
        f"decoder: {half} steps of UniPC": decoded(steps=half, sampler="unipc"),
        f"decoder: {third} steps of UniPC": decoded(steps=third, sampler="unipc"),
        "decoder: guidance from 0.2 T to 0.9 T only": decoded(guidance_interval=(0.2, 0.9)),
        "decoder: deep features at every 2nd step": decoded(cache_interval=2),
        "decoder: deep features at every 3rd step": decoded(cache_interval=3),
        "upsampler: deep features at every 2nd step": upsampled(cache_interval=2),
        "bfloat16": Approximation(options, dtype=torch.bfloat16),
        "int8 weights": Approximation(options, quantize="int8"),
        "preset fast": Approximation(fast),
        "preset fast, bfloat16": Approximation(fast, dtype=torch.bfloat16),
    }


class Drift:
    """Pictures of the same captions and seeds, exact and approximate; the exact model's CLIP judges both."""

    def __init__(
        self,
        pipe: UnCLIPPipeline,
        captions: Sequence[str],
        reopen: Callable[[torch.dtype], UnCLIPPipeline],
        *,
        seed: int = 0,
        batch_size: int = 16,
        progress: bool = True,
    ) -> None:
        """reopen: the same model again, to be changed."""
        if len(captions) < 2:
            raise ValueError("only one caption; a recall compares at least 2")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected at least 1")
        self.pipe, self.captions, self.reopen = pipe, list(captions), reopen
        self.seed, self.batch_size, self.progress = seed, batch_size, progress

    def rows(self, done: Collection[str] = ()) -> Iterator[dict[str, Any]]:
        """For each approximation that is not `done`: its name, times, distances and recall, as JSON types."""
        if EXACT not in done:
            yield {"name": EXACT, **self._compared(self.exact)}
        if OTHER_SEEDS not in done:
            others = self._draw(
                OTHER_SEEDS, self.pipe, self.pipe.options, self.seed + len(self.captions)
            )
            yield {"name": OTHER_SEEDS, **self._compared(others)}
        for name, approximation in approximations(
            self.pipe.options, self.pipe.preset("fast")
        ).items():
            if name not in done:
                pipe, options = self._changed(approximation), approximation.options
                times = self._times(pipe, options)
                yield {
                    "name": name,
                    **times,
                    **self._compared(self._draw(name, pipe, options, self.seed)),
                }

    @cached_property
    def exact(self) -> list[Image.Image]:
        """What the others are compared with."""
        return self._draw(EXACT, self.pipe, self.pipe.options, self.seed)

    @cached_property
    def _exact_emb(self) -> Tensor:
        return self._embed(self.exact)

    @cached_property
    def _text_emb(self) -> Tensor:
        with no_cut_warnings():
            return self.pipe.encode_text(self.captions).emb.cpu()  # (N, D)

    def _changed(self, approximation: Approximation) -> UnCLIPPipeline:
        if approximation.dtype is None and approximation.quantize is None:
            return self.pipe
        pipe = self.reopen(approximation.dtype or self.pipe.dtype)
        if approximation.quantize is not None:
            pipe.quantize(approximation.quantize)
        return pipe

    def _draw(
        self, name: str, pipe: UnCLIPPipeline, options: UnCLIPOptions, seed: int
    ) -> list[Image.Image]:
        images: list[Image.Image] = []
        with (
            tqdm(self._batches(), name, disable=not self.progress, leave=False) as bar,
            no_cut_warnings(),
        ):
            for part in bar:
                some = {"options": options, "batch_size": self.batch_size, "progress": False}
                images += pipe(self.captions[part], seed=seed + part.start, **some).images
        return images

    def _times(self, pipe: UnCLIPPipeline, options: UnCLIPOptions) -> dict[str, list[float]]:
        """Seconds of single pictures, and of exact ones in between; after one of each to warm up."""
        sides = {"seconds": (pipe, options), "exact_seconds": (self.pipe, self.pipe.options)}
        times: dict[str, list[float]] = {side: [] for side in sides}
        with no_cut_warnings():
            for i in range(TURNS + 1):
                for side in list(sides)[:: -1 if i % 2 else 1]:
                    one, its_options = sides[side]
                    start = time.perf_counter()  # the pictures are on the CPU when a call returns
                    one(self.captions[0], seed=self.seed, options=its_options, progress=False)
                    times[side].append(time.perf_counter() - start)
        return {side: seconds[1:] for side, seconds in times.items()}

    def _compared(self, images: list[Image.Image]) -> dict[str, float]:
        emb, right = self._embed(images), torch.arange(len(images))
        differences = [
            np.abs(np.asarray(one, dtype=float) - np.asarray(exact, dtype=float)).mean()
            for one, exact in zip(images, self.exact, strict=True)
        ]
        return {
            "pixels": float(np.mean(differences)),  # of 255
            "cosine": F.cosine_similarity(emb, self._exact_emb).mean().item(),
            "recall@1": recall(emb, self._text_emb, right, ks=(1,))["recall@1"],
        }

    def _embed(self, images: list[Image.Image]) -> Tensor:
        return torch.cat(
            [self.pipe.encode_image(images[part]).cpu() for part in self._batches()]
        )  # (N, D)

    def _batches(self) -> list[slice]:
        count, size = len(self.captions), self.batch_size
        return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def line(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table."""
    return (
        row["name"],
        _speed(row),
        f"{row['pixels']:.2f}",
        f"{row['cosine']:.4f}",
        f"{row['recall@1']:.1%}",
    )


def table(rows: Sequence[dict[str, Any]]) -> str:
    """All rows as Markdown."""
    head = (
        "",
        "times as fast",
        "pixels, of 255",
        "CLIP cosine to the exact",
        "recall@1 of the caption",
    )
    return markdown([head, *map(line, rows)])


def _speed(row: dict[str, Any]) -> str:
    if "seconds" not in row:
        return ""
    ratios = [exact / own for own, exact in zip(row["seconds"], row["exact_seconds"], strict=True)]
    ratio = statistics.median(row["exact_seconds"]) / statistics.median(row["seconds"])
    return f"{ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
