"""What every text-to-image pipeline shares: its interface, its seeds, its progress bar and its pictures."""

from __future__ import annotations

import base64
import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from unclip import __version__
from unclip.config import parse, to_dict
from unclip.types import GenerationResult, OnStep, Progress, Prompt, StageOptions, TextEncoding

if TYPE_CHECKING:
    from unclip.pipelines.runtime import Placement  # which builds on this module

# B batch, D CLIP embedding width, S image size

ImageInput = Image.Image | str | Path | Tensor  # a tensor is (3, H, W) or (B, 3, H, W) in [-1, 1]

P = ParamSpec("P")
Answer = TypeVar("Answer", Tensor, TextEncoding)


def inferring(stage: Callable[P, Answer]) -> Callable[P, Answer]:
    """A stage in inference mode; from outside of it, its answer is a copy that the caller may compute with."""

    @wraps(stage)
    def run(*args: P.args, **kwargs: P.kwargs) -> Answer:
        if torch.is_inference_mode_enabled():
            return stage(*args, **kwargs)
        with torch.inference_mode():
            answer = stage(*args, **kwargs)
        return answer.clone()

    return run


class TextToImage(Protocol):
    """What `unclip.load` gives, whatever the kind of model.

    A call with seed s gives picture k (prompts in order, `num_images` for each) the seed s + k, and that picture does
    not depend on the others: drawn alone under its own seed it is the same, to the tolerance of batched arithmetic.
    """

    kind: str
    name: str
    licence: str
    options: Any  # the defaults of this model, a frozen dataclass

    def __call__(
        self,
        prompt: Prompt,
        *,
        num_images: int = 1,
        seed: int | None = None,
        options: Any = None,
        on_step: OnStep | None = None,
        batch_size: int = 16,
        progress: bool = True,
    ) -> GenerationResult: ...

    def variations(
        self,
        image: ImageInput | Sequence[ImageInput] | None = None,
        *,
        image_emb: Tensor | None = None,
        num_images: int = 1,
        seed: int | None = None,
        options: Any = None,
        on_step: OnStep | None = None,
        batch_size: int = 16,
        progress: bool = True,
    ) -> GenerationResult: ...

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None: ...

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> TextToImage: ...


def redraw(
    pipe: TextToImage,
    metadata: dict[str, Any],
    progress: bool = True,
    latents: dict[str, Any] | None = None,
) -> GenerationResult:
    """Draws a picture again from the metadata in its PNG.

    latents: a dictionary that keeps what had to be inverted; given to several calls, nothing is inverted twice.
    """
    if missing := {"seed", "options"} - metadata.keys():
        raise ValueError(
            f"the metadata lacks {' and '.join(sorted(missing))}; the picture cannot be drawn again"
        )
    if _of_another_kind(pipe, metadata):
        raise ValueError(
            f"{pipe.name} is of kind {pipe.kind}, but the picture was drawn by another kind of model; draw it again "
            f"with {metadata.get('model', 'the one that drew it')}"
        )
    options = parse(type(pipe.options), metadata["options"], "options in the metadata")
    if "operation" in metadata:
        from unclip.pipelines.provenance import repeat  # which builds on this module

        return repeat(pipe, metadata, options, progress, latents)
    chosen: dict[str, Any] = {"seed": metadata["seed"], "options": options, "progress": progress}
    if metadata.get("prompt") is not None:
        if metadata.get("negative_prompt") is not None:
            chosen["negative_prompt"] = metadata["negative_prompt"]
        return pipe(metadata["prompt"], **chosen)
    if metadata.get("image_emb") is None:
        raise ValueError(
            "the metadata holds neither a prompt nor an image embedding; the picture cannot be drawn again"
        )
    return pipe.variations(image_emb=decode_array(metadata["image_emb"])[None], **chosen)


def _of_another_kind(pipe: TextToImage, metadata: dict[str, Any]) -> bool:
    """Whether another kind of model drew it; where the metadata does not tell, no option that it holds is known."""
    options, known = metadata["options"], {option.name for option in fields(pipe.options)}
    if "kind" in metadata:
        return metadata["kind"] != pipe.kind
    return isinstance(options, dict) and options != {} and known.isdisjoint(options)


def find_device(device: torch.device | str | None = None) -> torch.device:
    """The device asked for, or the fastest there is; ValueError if there is no such device here."""
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if device is None:
        return torch.device(next(name for name, available in there.items() if available))
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"unknown device {device!r}; expected cpu, cuda, cuda:1 or mps") from None
    if not there.get(found.type, False) or (
        found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count()
    ):
        available = ", ".join(name for name, available in there.items() if available)
        raise ValueError(f"there is no device {device} here; available: {available}")
    return found


def default_dtype(device: torch.device) -> torch.dtype:
    """Half precision where it is fast: bfloat16 before float16, whose range is small."""
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def check_prompts(prompt: Prompt) -> list[str]:
    """One prompt or several as a list; ValueError if there is none, or one is no string or no valid Unicode."""
    prompts = (
        [prompt]
        if isinstance(prompt, str)
        else list(prompt)
        if isinstance(prompt, Sequence)
        else None
    )
    if prompts is None:
        raise ValueError(
            f"prompt is a {type(prompt).__name__}; expected a string or a list of strings"
        )
    if not prompts:
        raise ValueError("the list of prompts is empty; expected at least one string")
    for i, text in enumerate(prompts):
        if not isinstance(text, str):
            raise ValueError(f"prompt {i} is {text!r}, a {type(text).__name__}; expected a string")
        if any(
            "\ud800" <= letter <= "\udfff" for letter in text
        ):  # a shell's bytes that are not UTF-8 become these
            raise ValueError(f"prompt {i} is {text!r}, which is no valid Unicode; expected UTF-8")
    return prompts


def check_count(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}; expected a whole number of at least 1")


def seeds_from(seed: int | Sequence[int] | None, count: int) -> list[int]:
    """Return seed, seed + 1, ..., or one seed for each as given; None = from a random start."""
    if isinstance(seed, Sequence) and not isinstance(seed, str):
        if len(seed) != count:
            raise ValueError(f"got {len(seed)} seeds for {count} images; expected one for each")
        return [seeds_from(one, 1)[0] for one in seed]
    if seed is None:
        seed = random.SystemRandom().randrange(2**31)
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63 - count:
        raise ValueError(f"seed is {seed!r}; expected a whole number from 0 to 2**63")
    return list(range(seed, seed + count))


def split_batches(
    num_prompts: int, num_images: int, batch_size: int
) -> Iterator[tuple[slice, int]]:
    """(some prompts, pictures for each) of at most batch_size pictures, in the order of their seeds."""
    if num_images <= batch_size:
        at_once = batch_size // num_images
        yield from ((slice(i, i + at_once), num_images) for i in range(0, num_prompts, at_once))
    else:
        for i in range(num_prompts):
            yield from (
                (slice(i, i + 1), min(batch_size, num_images - k))
                for k in range(0, num_images, batch_size)
            )


@dataclass(frozen=True)
class Batch:
    """Pictures of a call that are drawn together."""

    prompts: slice  # of the call's
    num_images: int  # of each of these
    seeds: list[int]  # of all pictures
    on_step: OnStep

    @cached_property
    def generators(self) -> list[torch.Generator]:
        """One for each picture."""
        return generators_from(self.seeds)


def in_batches(
    num_prompts: int,
    num_images: int,
    seed: int | None,
    batch_size: int,
    num_steps: int,
    progress: bool,
    on_step: OnStep | None,
) -> Iterator[Batch]:
    """The batches of a call, each of num_steps steps, under one progress bar."""
    check_count("num_images", num_images)
    check_count("batch_size", batch_size)
    seeds = seeds_from(seed, num_prompts * num_images)
    batches = list(split_batches(num_prompts, num_images, batch_size))
    with progress_bar(len(batches) * num_steps, progress, on_step) as report:
        for rows, n in batches:
            count = n * len(range(num_prompts)[rows])
            yield Batch(rows, n, seeds[:count], report)
            seeds = seeds[count:]


def about_drawing(pipe: Placement, options: Any) -> dict[str, Any]:
    """What the metadata of every picture tells of the model; options: a dataclass."""
    return {
        "model": pipe.source,
        "kind": pipe.kind,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        **({} if pipe.quantized is None else {"quantized": pipe.quantized}),
        "version": __version__,
        "options": to_dict(options),
    }


def check_images(images: Tensor) -> Tensor:
    """One picture (3, H, W) or several (B, 3, H, W) -> (B, 3, H, W); ValueError unless values are in [-1, 1]."""
    if images.ndim not in (3, 4) or images.shape[-3] != 3 or not images.numel():
        raise ValueError(
            f"image is of shape {tuple(images.shape)}; expected (3, H, W) or (B, 3, H, W)"
        )
    if not images.is_floating_point():
        raise ValueError(
            f"image is a tensor of {images.dtype}; expected floating-point values in [-1, 1]"
        )
    if not (images.abs() <= 1).all():
        low, high = (value.item() for value in images.aminmax())
        raise ValueError(f"image is of values from {low:g} to {high:g}; expected them in [-1, 1]")
    return images if images.ndim == 4 else images[None]


def with_named_sampler(stage: StageOptions) -> StageOptions:
    """For metadata: a scheduler object is told by its class, from which it can't be made again."""
    return (
        stage
        if isinstance(stage.sampler, str)
        else replace(stage, sampler=type(stage.sampler).__name__)
    )


def generators_from(seeds: Sequence[int]) -> list[torch.Generator]:
    """One generator for each picture, on the CPU, so that a seed gives the same noise on every device."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def random_generators(count: int) -> list[torch.Generator]:
    return generators_from(seeds_from(None, count))


@contextlib.contextmanager
def progress_bar(num_steps: int, show: bool, on_step: OnStep | None) -> Iterator[OnStep]:
    """One bar over all sampling steps of a call; yields the callback that moves it and passes the step on."""
    with tqdm(total=num_steps, disable=not show, unit="step", leave=False) as bar:

        def report(progress: Progress) -> None:
            bar.set_description(progress.stage, refresh=False)
            bar.update()
            if on_step is not None:
                on_step(progress)

        yield report


def to_pil(images: Tensor) -> list[Image.Image]:
    """(B, 3, S, S) in [-1, 1] -> B pictures; values outside are clipped."""
    pixels = images.float().mul(127.5).add(127.5).round().clamp(0, 255).byte()
    return [Image.fromarray(picture) for picture in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def encode_array(values: Tensor) -> str:
    """A vector as base64 of little-endian float32, for metadata."""
    return base64.b64encode(values.float().cpu().numpy().astype("<f4").tobytes()).decode()


def decode_array(text: str) -> Tensor:
    """What `encode_array` wrote, as float32."""
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype="<f4").astype(np.float32))
