"""The arguments of a call: prompts, images, seeds, batches and progress."""

from __future__ import annotations

import contextlib
import math
import random
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from unclip.files import shorten
from unclip.image_io import open_image, to_pil
from unclip.tokenizer import BPETokenizer, PromptWarning
from unclip.types import (
    BatchReporter,
    CodeOptions,
    OnStep,
    Progress,
    Prompt,
    StageOptions,
    UnCLIPOptions,
    stages_of,
)

# P prompts, K texts in a mixture, N images of each prompt, B images, H W height and width

MAX_GUIDANCE = 50

Seed = int | Sequence[int] | None  # numpy's integers and arrays too
Mixture = Mapping[str, float]  # texts and their relative weights
ImageInput = Image.Image | str | Path | Tensor  # a tensor is (3, H, W) or (B, 3, H, W) in [-1, 1]
Images = ImageInput | Sequence[ImageInput]


@dataclass(frozen=True)
class Request:
    """The arguments that every call takes: image k (prompts in order) has the seed `seed` + k."""

    num_images: int = 1  # of each prompt
    seed: Seed = None  # None = random; several: one for each image
    on_step: OnStep | None = None
    batch_size: int = 16
    progress: bool = True  # show a progress bar
    options: Any = None  # sampling options of the pipeline; None = the model's own

    def __post_init__(self) -> None:
        for name in ("num_images", "batch_size"):
            check_count(name, getattr(self, name))
            object.__setattr__(self, name, int(getattr(self, name)))  # numpy's would overflow

    def seeds(self, num_prompts: int) -> list[int]:
        """Return one seed for each image."""
        return seeds_from(self.seed, num_prompts * self.num_images)

    def batches(self, num_prompts: int, num_steps: int) -> Iterator[Batch]:
        """Iterate over batches of num_steps sampling steps each, under one progress bar."""
        seeds = self.seeds(num_prompts)
        batches = list(split_batches(num_prompts, self.num_images, self.batch_size))
        with self.track(len(batches) * num_steps) as on_step:
            for rows, n in batches:
                count = n * len(range(num_prompts)[rows])
                yield Batch(rows, n, seeds[:count], BatchReporter(on_step, count))
                seeds = seeds[count:]

    def rows(self, count: int) -> list[slice]:
        """Return slices of range(count) of at most batch_size items."""
        return list(batches_of(count, self.batch_size))

    def track(self, num_steps: int) -> contextlib.AbstractContextManager[OnStep]:
        """Show a progress bar of num_steps; see `progress_bar`."""
        return progress_bar(num_steps, self.progress, self.on_step)


@dataclass(frozen=True)
class Batch:
    """Images of a call that are sampled together."""

    prompts: slice  # of the call's prompts
    num_images: int  # of each of these
    seeds: list[int]  # of all images
    on_step: BatchReporter

    @cached_property
    def generators(self) -> list[torch.Generator]:
        """One generator for each image."""
        return generators_from(self.seeds)


@contextlib.contextmanager
def progress_bar(num_steps: int, show: bool, on_step: OnStep | None) -> Iterator[OnStep]:
    """Yield a callback that advances one bar over all steps of a call, and calls `on_step`."""
    with tqdm(total=num_steps, disable=not show, unit="step", leave=False) as bar:

        def report(progress: Progress) -> None:
            bar.set_description(progress.stage, refresh=False)
            bar.update()
            if on_step is not None:
                on_step(progress)

        yield report


def split_batches(
    num_prompts: int, num_images: int, batch_size: int
) -> Iterator[tuple[slice, int]]:
    """Yield (prompts, images of each) of at most batch_size images, in the order of the seeds."""
    if num_images <= batch_size:
        at_once = batch_size // num_images
        yield from ((slice(i, i + at_once), num_images) for i in range(0, num_prompts, at_once))
        return
    for i in range(num_prompts):
        for k in range(0, num_images, batch_size):
            yield slice(i, i + 1), min(batch_size, num_images - k)


def batches_of(count: int, batch_size: int) -> Iterator[slice]:
    """Yield slices of range(count)."""
    return (slice(start, start + batch_size) for start in range(0, count, batch_size))


def is_whole(value: Any) -> bool:
    """Return whether a value is an integer, Python's or numpy's, and not a bool."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def check_count(name: str, value: int) -> None:
    """Raise ValueError unless `value` is an integer of at least 1."""
    if not is_whole(value) or value < 1:
        raise ValueError(f"{name} is {value!r}; expected a whole number of at least 1")


def check_options(options: Any, expected: type, num_upsamplers: int | None = None) -> None:
    """Raise ValueError for options of another kind of model, or for too many upsamplers."""
    if not isinstance(options, expected):
        kinds = f"a {type(options).__name__}; expected {expected.__name__}"
        raise ValueError(f"options is {kinds}, as in pipe.options")
    warn_of_options(options)
    if num_upsamplers is not None:
        check_upsamplers(options.upsamplers, num_upsamplers)


def warn_of_options(options: Any) -> None:
    """Warn about a guidance scale that cannot give useful images."""
    stages = [options] if isinstance(options, CodeOptions) else stages_of(options).values()
    for stage in stages:
        if not 0 <= stage.guidance <= MAX_GUIDANCE:
            expected = f"images are useful from about 1 to {MAX_GUIDANCE}"
            warnings.warn(f"guidance is {stage.guidance:g}; {expected}", stacklevel=4)


def warn_of_unknown(prompts: Iterable[str], tokenizer: Any) -> None:
    """Warn about prompts without any word of the model's vocabulary."""
    if not isinstance(tokenizer, BPETokenizer):
        return
    for text in dict.fromkeys(prompts):
        if not tokenizer.knows_a_word_of(text):
            advice = "use words of the captions that the model was trained on"
            message = f"the model knows no word of the prompt {shorten(text)}; {advice}"
            warnings.warn(message, PromptWarning, stacklevel=4)


def check_upsamplers(options: Sequence[StageOptions], available: int) -> None:
    """Raise ValueError for more options than upsamplers. With fewer, images stay smaller."""
    if len(options) > available:
        given = f"options for {len(options)} upsamplers, but the model has {available}"
        raise ValueError(f"{given}; start from pipe.options")


def seeds_from(seed: Seed, count: int) -> list[int]:
    """Return `count` seeds: seed, seed + 1, ..., or the given list; None = start at random."""
    if seed is None:
        seed = random.SystemRandom().randrange(2**31)
    if isinstance(seed, Sequence | np.ndarray) and not isinstance(seed, str):
        if np.ndim(seed) != 1:
            raise ValueError(f"seed is {seed!r}; expected a whole number, or one for each image")
        if len(seed) != count:
            raise ValueError(f"got {len(seed)} seeds for {count} images; expected one for each")
        return [seeds_from(one, 1)[0] for one in seed]
    if not is_whole(seed) or not 0 <= int(seed) <= 2**63 - count:
        images = "1 image" if count == 1 else f"{count} images"
        expected = f"a whole number from 0 to 2**63 - {count} for {images}"
        raise ValueError(f"seed is {seed!r}; expected {expected}")
    return list(range(int(seed), int(seed) + count))


def generators_from(seeds: Sequence[int]) -> list[torch.Generator]:
    """Return CPU generators, so that a seed gives the same noise on every device."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def random_generators(count: int) -> list[torch.Generator]:
    """Return generators with random seeds."""
    return generators_from(seeds_from(None, count))


# -- prompts


def check_prompts(prompt: Prompt) -> list[str]:
    """Return one prompt or several as a list. ValueError if one is not valid text."""
    if isinstance(prompt, str):
        prompts = [prompt]
    elif isinstance(prompt, Sequence) and not isinstance(prompt, bytes | bytearray):
        prompts = list(prompt)
    else:
        kind = type(prompt).__name__
        raise ValueError(f"prompt is of type {kind}; expected a string or a list of strings")
    if not prompts:
        raise ValueError("the list of prompts is empty; expected at least one string")
    for i, text in enumerate(prompts):
        if not isinstance(text, str):
            given = f"prompt {i} is {shorten(text)}, of type {type(text).__name__}"
            raise ValueError(f"{given}; expected a string")
        # Bytes of a command line that are not UTF-8 are surrogates.
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError(f"prompt {i} is {text!r}, not valid Unicode; expected UTF-8")
    return prompts


def prompt_for_each(
    prompt: Prompt | None, count: int, kind: str = "prompts", of: str = "images"
) -> list[str] | None:
    """Return a prompt for each of `count` images, from one for all or one for each; None if None.

    kind, of: the names of the prompts and the images in messages.
    """
    if prompt is None:
        return None
    prompts = check_prompts(prompt)
    if len(prompts) not in (1, count):
        given = f"{len(prompts)} {kind} for {count} {of}"
        raise ValueError(f"{given}; expected one for each, or one for all")
    return prompts * (count // len(prompts))


def check_guided(stages: Mapping[str, StageOptions | CodeOptions]) -> None:
    """Raise ValueError if a negative prompt has no effect, because no stage uses guidance."""
    if all(stage.guidance == 1 for stage in stages.values()):
        raise ValueError(
            f"negative_prompt replaces the null of guidance, but guidance is 1 in "
            f"{' and '.join(stages)}; set it higher in {' or '.join(stages)}"
        )


@dataclass(frozen=True)
class PromptBatch:
    """P prompts or mixtures of prompts, and optionally P negative prompts."""

    prompts: list[str | dict[str, float]]
    negative: list[str] | None = None

    @classmethod
    def of(
        cls, prompt: Prompt | Mixture | Sequence[str | Mixture], negative: Prompt | None = None
    ) -> PromptBatch:
        """Check the arguments of a call. A single negative prompt applies to all prompts."""
        prompts: list[Any]
        if isinstance(prompt, Mapping):
            prompts = [_check_mixture(prompt)]
        elif isinstance(prompt, Sequence) and any(isinstance(one, Mapping) for one in prompt):
            check_prompts(["" if isinstance(one, Mapping) else one for one in prompt])
            prompts = [_check_mixture(one) if isinstance(one, Mapping) else one for one in prompt]
        else:
            prompts = [*check_prompts(prompt)]  # type: ignore[arg-type]
        return cls(prompts, prompt_for_each(negative, len(prompts), "negative prompts", "prompts"))

    def check(self, options: UnCLIPOptions) -> None:
        """Raise ValueError if there are negative prompts but no stage uses guidance."""
        stages = {"decoder": options.decoder}
        if options.embedding == "prior":
            stages = {"prior": options.prior, **stages}
        if self.negative is not None:
            check_guided(stages)

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, rows: slice) -> PromptBatch:
        negative = None if self.negative is None else self.negative[rows]
        return replace(self, prompts=self.prompts[rows], negative=negative)

    @property
    def texts(self) -> list[str]:
        """The first text of each of the P prompts, then the second, ...: K * P texts."""
        by_prompt = (texts for texts, _ in self._mixtures())
        return [text for by_position in zip(*by_prompt, strict=True) for text in by_position]

    @property
    def weights(self) -> Tensor | None:
        """Weights (K, P) whose columns sum to 1; None if every prompt is a single text."""
        if all(isinstance(prompt, str) for prompt in self.prompts):
            return None
        return torch.tensor([weights for _, weights in self._mixtures()]).T.contiguous()

    def metadata(self) -> list[dict[str, Any]]:
        """Return the metadata entries of each prompt."""
        if self.negative is None:
            return [{"prompt": prompt} for prompt in self.prompts]
        return [
            {"prompt": prompt, "negative_prompt": negative}
            for prompt, negative in zip(self.prompts, self.negative, strict=True)
        ]

    def _mixtures(self) -> list[tuple[list[str], list[float]]]:
        """Return K texts and weights of each prompt; shorter mixtures are padded with weight 0."""
        mixtures = [{prompt: 1.0} if isinstance(prompt, str) else prompt for prompt in self.prompts]
        K, padded = max(map(len, mixtures)), []
        for mixture in mixtures:
            missing, total = K - len(mixture), sum(mixture.values())
            weights = [*(weight / total for weight in mixture.values()), *[0.0] * missing]
            padded.append(([*mixture, *[next(iter(mixture))] * missing], weights))
        return padded


def describe_prompt(prompt: str | Mixture) -> str:
    """Return a prompt or a mixture in one line."""
    if isinstance(prompt, str):
        return prompt
    return " + ".join(f"{weight:g} {text}" for text, weight in prompt.items())


def _check_mixture(mixture: Mixture) -> dict[str, float]:
    texts = check_prompts(list(mixture))
    weights = [mixture[text] for text in texts]
    real = all(isinstance(one, Real) and not isinstance(one, bool) for one in weights)
    if not real or not all(map(math.isfinite, weights)) or sum(weights) <= 0:
        raise ValueError(
            f"weights of the mixture are {weights}; expected numbers with a sum above 0"
        )
    return {text: float(weight) for text, weight in mixture.items()}


# -- images


def open_images(images: Images) -> list[Image.Image]:
    """Open all images as upright RGB."""
    return [open_image(image) for image in list_images(images)]


def list_images(images: Images) -> list[Image.Image | str | Path]:
    """Return one entry per image for `open_image`, so that images can be opened one by one."""
    if isinstance(images, Tensor):
        return [*to_pil(check_images(images))]
    single: Any = images
    if not isinstance(images, Sequence) or isinstance(images, str | bytes | bytearray):
        return [single]
    if not images:
        raise ValueError("the list of images is empty; expected at least one image")
    return [
        entry
        for image in images
        for entry in (list_images(image) if isinstance(image, Tensor) else [image])
    ]


def check_images(images: Tensor) -> Tensor:
    """Return one image (3, H, W) or several as (B, 3, H, W). Values must be in [-1, 1]."""
    if images.ndim not in (3, 4) or images.shape[-3] != 3 or not images.numel():
        shape = tuple(images.shape)
        raise ValueError(f"image is of shape {shape}; expected (3, H, W) or (B, 3, H, W)")
    if not images.is_floating_point():
        raise ValueError(f"image is of {images.dtype}; expected floating-point values in [-1, 1]")
    if not (images.abs() <= 1).all():
        low, high = (value.item() for value in images.aminmax())
        raise ValueError(f"image has values from {low:g} to {high:g}; expected them in [-1, 1]")
    return images if images.ndim == 4 else images[None]
