"""Error and speed of approximate options (`unclip evaluate-approximations`)."""

# N captions, D CLIP embedding width

from __future__ import annotations

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

from unclip.embeddings import caption_targets
from unclip.evaluation.bench.timing import interleave
from unclip.evaluation.generator import ignore_cut_warnings
from unclip.evaluation.metrics import recall
from unclip.pipelines.unclip.pipeline import UnCLIPPipeline
from unclip.types import StageOptions, UnCLIPOptions

EXACT = "exact"
OTHER_SEEDS = "exact, other seeds"  # a reference: the difference between equally good images
REPEATS = 5  # timed calls of each approximation, interleaved with exact ones


@dataclass(frozen=True)
class Approximation:
    """Changes to the exact model."""

    options: UnCLIPOptions
    dtype: torch.dtype | None = None
    quantize: str | None = None


def approximations(options: UnCLIPOptions, fast: UnCLIPOptions) -> dict[str, Approximation]:
    """Return single changes of the exact `options`, then the preset that combines some of them."""
    prior, decoder = options.prior, options.decoder

    def with_decoder(**changes: Any) -> Approximation:
        changed = decoder.with_steps(**{"steps": decoder.steps, **changes})
        return Approximation(replace(options, decoder=changed))

    def fewer(stage: StageOptions, share: float) -> int:
        return max(2, round(share * stage.steps))

    half, third, few = fewer(decoder, 1 / 2), fewer(decoder, 1 / 3), fewer(prior, 0.4)
    fast_prior = prior.with_steps(few, sampler="unipc")
    cached_upsamplers = tuple(replace(stage, cache_interval=2) for stage in options.upsamplers)
    return {
        f"prior: {few} steps of UniPC": Approximation(replace(options, prior=fast_prior)),
        f"decoder: {half} steps of DPM-Solver++": with_decoder(steps=half, sampler="dpm++"),
        f"decoder: {half} steps of UniPC": with_decoder(steps=half, sampler="unipc"),
        f"decoder: {third} steps of UniPC": with_decoder(steps=third, sampler="unipc"),
        "decoder: guidance from 0.2 T to 0.9 T only": with_decoder(guidance_interval=(0.2, 0.9)),
        "decoder: deep features at every 2nd step": with_decoder(cache_interval=2),
        "decoder: deep features at every 3rd step": with_decoder(cache_interval=3),
        "upsampler: deep features at every 2nd step": Approximation(
            replace(options, upsamplers=cached_upsamplers)
        ),
        "bfloat16": Approximation(options, dtype=torch.bfloat16),
        "int8 weights": Approximation(options, quantize="int8"),
        "preset fast": Approximation(fast),
        "preset fast, bfloat16": Approximation(fast, dtype=torch.bfloat16),
    }


class ApproximationError:
    """Images of the same captions and seeds, exact and approximate, compared by the exact CLIP."""

    def __init__(
        self,
        pipe: UnCLIPPipeline,
        captions: Sequence[str],
        reload: Callable[[torch.dtype], UnCLIPPipeline],
        *,
        seed: int = 0,
        batch_size: int = 16,
        progress: bool = True,
    ) -> None:
        """reload: function that loads another copy of the model, to be cast or quantized."""
        if len(set(captions)) < 2:
            raise ValueError("got only one distinct caption; recall needs at least 2")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected at least 1")
        self.pipe, self.captions, self.reload = pipe, list(captions), reload
        self.seed, self.batch_size, self.progress = seed, batch_size, progress

    def rows(self, done: Collection[str] = ()) -> Iterator[dict[str, Any]]:
        """Yield the results of each approximation that is not `done`, as JSON types."""
        options, fast = self.pipe.options, self.pipe.preset("fast")
        if EXACT not in done:
            yield {"name": EXACT, **self._compare(self.exact)}
        if OTHER_SEEDS not in done:
            seed = self.seed + len(self.captions)
            images = self._generate(OTHER_SEEDS, self.pipe, options, seed)
            yield {"name": OTHER_SEEDS, **self._compare(images)}
        for name, approximation in approximations(options, fast).items():
            if name not in done:
                pipe = self._apply(approximation)
                times = self._times(pipe, approximation.options)
                images = self._generate(name, pipe, approximation.options, self.seed)
                yield {"name": name, **times, **self._compare(images)}

    @cached_property
    def exact(self) -> list[Image.Image]:
        """The images of the exact model."""
        return self._generate(EXACT, self.pipe, self.pipe.options, self.seed)

    @cached_property
    def _exact_emb(self) -> Tensor:
        return self._embed(self.exact)

    @cached_property
    def _text_emb(self) -> Tensor:
        with ignore_cut_warnings():
            return self.pipe.encode_text(self.captions).emb.cpu()  # (N, D)

    def _apply(self, approximation: Approximation) -> UnCLIPPipeline:
        if approximation.dtype is None and approximation.quantize is None:
            return self.pipe
        pipe = self.reload(approximation.dtype or self.pipe.dtype)
        if approximation.quantize is not None:
            pipe.quantize(approximation.quantize)
        return pipe

    def _generate(
        self, name: str, pipe: UnCLIPPipeline, options: UnCLIPOptions, seed: int
    ) -> list[Image.Image]:
        images: list[Image.Image] = []
        with ignore_cut_warnings():
            for part in tqdm(self._batches(), name, disable=not self.progress, leave=False):
                images += pipe(
                    self.captions[part],
                    seed=seed + part.start,
                    options=options,
                    batch_size=self.batch_size,
                    progress=False,
                ).images
        return images

    def _times(self, pipe: UnCLIPPipeline, options: UnCLIPOptions) -> dict[str, list[float]]:
        """Return seconds of single images, interleaved with exact ones, after a warm-up."""

        def seconds(pipe: UnCLIPPipeline, options: UnCLIPOptions) -> float:
            start = time.perf_counter()  # the images are on the CPU when the call returns
            pipe(self.captions[0], seed=self.seed, options=options, progress=False)
            return time.perf_counter() - start

        candidates = {
            "seconds": lambda _: seconds(pipe, options),
            "exact_seconds": lambda _: seconds(self.pipe, self.pipe.options),
        }
        with ignore_cut_warnings():
            times = interleave(candidates, REPEATS + 1)
        return {name: values[1:] for name, values in times.items()}

    def _compare(self, images: list[Image.Image]) -> dict[str, float]:
        emb = self._embed(images)
        first, targets = caption_targets(self.captions)
        differences = [
            np.abs(np.asarray(image, dtype=float) - np.asarray(exact, dtype=float)).mean()
            for image, exact in zip(images, self.exact, strict=True)
        ]
        return {
            "pixels": float(np.mean(differences)),  # of 255
            "cosine": F.cosine_similarity(emb, self._exact_emb).mean().item(),
            **recall(emb, self._text_emb[first], targets, ks=(1,)),
        }

    def _embed(self, images: list[Image.Image]) -> Tensor:
        emb = [self.pipe.encode_image(images[part]).cpu() for part in self._batches()]
        return torch.cat(emb)  # (N, D)

    def _batches(self) -> list[slice]:
        count, size = len(self.captions), self.batch_size
        return [slice(start, min(start + size, count)) for start in range(0, count, size)]
