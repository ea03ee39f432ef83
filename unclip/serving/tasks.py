"""Tasks of requests, and their generation in joint calls of a pipeline."""

# T tasks, n images of each, D CLIP embedding width

from __future__ import annotations

import base64
import binascii
import itertools
import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from unclip.config import parse, to_dict
from unclip.diffusion.repaint import PaintOptions
from unclip.embeddings import mix, slerp
from unclip.pipelines.request import check_upsamplers
from unclip.serving.errors import bad_request
from unclip.types import GenerationResult, OnStep, update_options

SETTINGS = {  # that change the options of each kind of pipeline, except unclip, which has all
    "dalle": {"guidance", "options"},
    "glide": {"steps", "guidance", "sampler", "options"},
}
LIMITS = {"steps": 1000, "candidates": 64, "prior_candidates": 64, "resamples": 64}
OPERATIONS = {  # of each kind of pipeline
    "unclip": ("generations", "edits", "variations", "mix"),
    "dalle": ("generations", "edits", "variations"),
    "glide": ("generations", "edits"),
}


@dataclass(frozen=True)
class Settings:
    """Sampling options that a request changes; None = the model's own."""

    steps: int | None = None
    guidance: float | None = None
    sampler: str | None = None
    embedding: str | None = None
    prior_steps: int | None = None
    prior_guidance: float | None = None
    prior_candidates: int | None = None
    # JSON of the pipeline's options or some of them, of edits also "painting"; applied first
    options: str | None = None


@dataclass(frozen=True, eq=False)
class Task:
    """The images that one request asks for."""

    operation: str  # "generations", "edits" or "variations"
    model: str
    n: int
    seed: int  # of the first image
    settings: Settings = Settings()
    prompt: str | None = None
    negative: str | None = None
    candidates: int | None = None
    images: tuple[Image.Image, ...] = ()
    mask: Image.Image | None = None  # mode L, 255 = paint
    weights: tuple[float, ...] | None = None  # of the images
    embedding: tuple[float, ...] | None = None  # in place of prompt or images
    layout: tuple[float, ...] | None = None  # of the image with this embedding
    strength: float | None = None

    @property
    def cost(self) -> int:
        """Images to sample."""
        return self.candidates or self.n

    @property
    def batch_key(self) -> Hashable:
        """Tasks with equal keys can be generated together."""
        kind: Hashable = self.operation
        if self.embedding is not None:
            kind = "embedding", self.layout is None
        if self.operation == "edits":
            (image,) = self.images
            if image.width != image.height:  # it may need several windows
                return id(self)
            kind = self.operation, self.mask is None, self.strength
        elif kind == "variations":  # only those of one image may have a layout
            kind = self.operation, len(self.images) == 1
        selection = None if self.candidates is None else (self.candidates, self.n)
        return (
            kind,
            self.model,
            self.settings,
            selection,
            self.prompt is None,
            self.negative is None,
        )

    def alone(self, k: int) -> Task:
        """Return the task of image k only."""
        return replace(self, n=1, seed=self.seed + k)


def generate(
    pipe: Any, tasks: Sequence[Task], on_step: OnStep, batch_size: int
) -> list[GenerationResult]:
    """Generate the images of tasks with equal batch keys in one call; return one result for each.

    ValueError if the model does not support the operation; APIError if it lacks its settings.
    """
    first = tasks[0]
    if first.operation not in operations(pipe):
        raise ValueError(f"The model '{first.model}' does not support {first.operation}.")
    options = change_options(pipe, first.settings, paints=first.operation == "edits")
    shared: dict[str, Any] = {
        "options": options, "on_step": on_step, "batch_size": batch_size, "progress": False,
    }  # fmt: skip
    # Tasks with the same n share the encoding of a prompt among its images.
    same = len({task.n for task in tasks}) == 1
    inputs = [task for task in tasks for _ in range(1 if same else task.n)]
    shared["num_images"] = first.n if same else 1
    shared["seed"] = [task.seed + k for task in tasks for k in range(task.cost)]
    if first.operation == "edits":
        result = _edit(pipe, inputs, shared)
    elif first.embedding is not None or first.operation == "variations":
        result = _vary(pipe, inputs, shared)
    else:
        result = _imagine(pipe, inputs, shared)
    ends = itertools.accumulate(task.n for task in tasks)
    return [result.pick(range(end - task.n, end)) for task, end in zip(tasks, ends, strict=True)]


def operations(pipe: Any) -> list[str]:
    """Return the operations that a pipeline supports."""
    supported = OPERATIONS.get(pipe.kind, ("generations",))
    inpaints = pipe.kind != "glide" or pipe.decoder.config.inpaints
    return [name for name in supported if name != "edits" or inpaints]


def default_options(pipe: Any) -> dict[str, Any]:
    """Return what a request may change by its `options`."""
    painting = {}
    if pipe.kind == "unclip":
        trained = pipe.inpainter is not None
        painting = {"painting": to_dict(PaintOptions(trained=trained))}
    return to_dict(pipe.options) | painting


def change_options(pipe: Any, settings: Settings, paints: bool = False) -> Any:
    """Return the options of a pipeline with the settings of a request.

    paints: leave the options of painting to `paint_options`. APIError for settings that the
    pipeline lacks, and for wrong `options`.
    """
    given = {name: value for name, value in vars(settings).items() if value is not None}
    if unknown := given.keys() - SETTINGS.get(pipe.kind, given.keys()):
        names = sorted(unknown)
        message = f"{pipe.name} is of kind {pipe.kind}, which has no {' and no '.join(names)}"
        raise bad_request(message, names[0])
    options = pipe.options
    if (changes := given.pop("options", None)) is not None:
        try:
            changes = json.loads(changes)
            if paints and pipe.kind == "unclip":
                changes.pop("painting", None)
            options = update_options(options, changes, "options")
            _check_limits(to_dict(options))
            if pipe.kind != "dalle":
                check_upsamplers(options.upsamplers, len(pipe.upsamplers))
        except ValueError as error:
            raise bad_request(str(error), "options") from None
    if pipe.kind == "dalle":
        return replace(options, **given)
    whole = {k: given.pop(k) for k in ("embedding", "prior_candidates") if k in given}
    prior = {k.removeprefix("prior_"): given.pop(k) for k in [*given] if k.startswith("prior_")}
    for name, changes in {"prior": prior, "decoder": given}.items():
        if changes:
            stage = getattr(options, name)
            whole[name] = stage.with_steps(changes.pop("steps", stage.steps), **changes)
    return replace(options, **whole)


def paint_options(task: Task) -> PaintOptions:
    """Return the options of painting of an edit. APIError if they are wrong."""
    given = json.loads(task.settings.options or "{}").get("painting")
    try:
        options = PaintOptions() if given is None else parse(PaintOptions, given, "painting")
        _check_limits(to_dict(options))
        if given is not None and task.mask is None:
            raise ValueError("painting needs a mask; send one, or leave painting out")
    except ValueError as error:
        raise bad_request(f"options: {error}", "options") from None
    return options if task.strength is None else replace(options, strength=task.strength)


def _check_limits(options: Any) -> None:
    """Raise a ValueError for options that cost too much."""
    parts = options if isinstance(options, list) else options.values()
    for part in parts:
        if isinstance(part, (dict, list)):
            _check_limits(part)
    for name, value in options.items() if isinstance(options, dict) else ():
        if name in LIMITS and value > LIMITS[name]:
            raise ValueError(f"{name} is {value}; expected at most {LIMITS[name]} - 'options'")


def _imagine(pipe: Any, tasks: Sequence[Task], shared: dict[str, Any]) -> GenerationResult:
    extra = _negative(pipe, tasks)
    if tasks[0].candidates is not None:
        if pipe.kind == "glide":
            raise ValueError(f"num_candidates is not supported by the model '{tasks[0].model}'")
        extra["num_candidates"] = tasks[0].candidates
    return pipe([task.prompt for task in tasks], **extra, **shared)


def _negative(pipe: Any, tasks: Sequence[Task]) -> dict[str, Any]:
    """Return the argument for negative prompts, if there are any."""
    if tasks[0].negative is None:  # and so of all, by `batch_key`
        return {}
    return {"negative_prompt": [task.negative for task in tasks]}


def _vary(pipe: Any, tasks: Sequence[Task], shared: dict[str, Any]) -> GenerationResult:
    shared |= _negative(pipe, tasks)
    if tasks[0].prompt is not None:
        shared["prompt"] = [task.prompt for task in tasks]
    if pipe.kind != "unclip":
        if any(len(task.images) != 1 for task in tasks):
            raise ValueError(f"The model '{tasks[0].model}' varies a single image.")
        S = model_size(pipe)
        images = [ImageOps.fit(task.images[0], (S, S), Image.Resampling.LANCZOS) for task in tasks]
        return pipe.variations(images, **shared)
    if len(tasks[0].images) == 1:  # and so of all, by `batch_key`
        return pipe.variations([task.images[0] for task in tasks], **shared)
    rows = {task: _embedding(pipe, task) for task in dict.fromkeys(tasks)}
    given = [task.layout for task in tasks if task.layout is not None]  # of all, or of none
    layout = torch.tensor(given) if given else None
    emb = torch.cat([rows[task] for task in tasks])
    return pipe.variations(image_emb=emb, layout=layout, **shared)


def _embedding(pipe: Any, task: Task) -> Tensor:
    """Return the CLIP embedding (1, D) of a task: as given, or of its image or images."""
    if task.embedding is not None:
        width = pipe.clip.emb_dim
        if len(task.embedding) != width:
            raise ValueError(
                f"image_embedding has {len(task.embedding)} numbers; "
                f"expected {width} for the model '{task.model}'"
            )
        return torch.tensor([task.embedding])
    emb = pipe.encode_image(list(task.images)).cpu()
    if len(emb) == 1:
        return emb
    weights = task.weights or (1.0,) * len(emb)
    if len(emb) == 2 and min(weights) >= 0:  # as in unCLIP 3.2
        return slerp(emb[0], emb[1], weights[1] / sum(weights))[None]
    return mix(emb, weights)[None]


def _edit(pipe: Any, tasks: Sequence[Task], shared: dict[str, Any]) -> GenerationResult:
    shared |= _negative(pipe, tasks)
    images, strength = [task.images[0] for task in tasks], tasks[0].strength
    prompts = None if tasks[0].prompt is None else [task.prompt for task in tasks]
    masks = [task.mask for task in tasks]
    if pipe.kind != "unclip":
        if tasks[0].mask is None or strength not in (None, 1):
            raise ValueError(
                f"The model '{tasks[0].model}' only inpaints; send a mask, and no strength below 1."
            )
        return pipe.inpaint(images, masks, prompts, **shared)
    painting = paint_options(tasks[0])
    if tasks[0].mask is None:
        return pipe.image_to_image(images, prompts, strength=painting.strength, **shared)
    return pipe.inpaint(images, masks, prompts, painting=painting, **shared)


def model_size(pipe: Any) -> int:
    """Return the side of a pipeline's images in pixels."""
    if pipe.kind == "dalle":
        return pipe.codec.image_size
    networks = [pipe.decoder, *pipe.upsamplers[: len(pipe.options.upsamplers)]]
    config = networks[-1].config
    return config.high_size if pipe.kind == "unclip" and len(networks) > 1 else config.image_size


def count_stages(pipe: Any) -> int:
    """Return how many stages of a pipeline make images."""
    return 1 if pipe.kind == "dalle" else 1 + len(pipe.options.upsamplers)


def decode_vector(value: str | Sequence[float]) -> tuple[float, ...]:
    """Decode a vector from a list of numbers or base64. ValueError if it is neither."""
    if isinstance(value, str):
        try:
            numbers = np.frombuffer(base64.b64decode(value, validate=True), "<f4")
        except (ValueError, binascii.Error):
            raise ValueError("it is not base64 of float32 numbers") from None
    else:
        numbers = np.asarray(value, np.float32)
    if not numbers.size or not np.isfinite(numbers).all():
        raise ValueError("it is empty or has infinite numbers")
    return tuple(numbers.tolist())
