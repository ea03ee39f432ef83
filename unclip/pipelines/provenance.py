"""The metadata from which an image can be regenerated, as JSON types for its PNG."""

from __future__ import annotations

import base64
import io
import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unclip.config import parse, to_dict
from unclip.diffusion.inversion import InversionOptions
from unclip.diffusion.repaint import PaintOptions
from unclip.files import printable
from unclip.image_io import open_image
from unclip.pipelines.base import Pipeline
from unclip.pipelines.unclip.latent import Latent
from unclip.types import GenerationResult, UnCLIPOptions

LATENT_OPERATIONS = ("reconstruct", "vary", "interpolate", "text_diff")
# Operations on an image, for each kind of pipeline.
IMAGE_OPERATIONS = {
    "unclip": ("inpaint", "outpaint", "image_to_image"),
    "dalle": ("complete", "variations", "inpaint"),
    "glide": ("inpaint",),
}
MAX_PIXELS = 4_000_000  # of an image in metadata
MAX_TEXT = 16_000_000  # characters of an image in metadata; PNG readers refuse more than 64 MB


def edited_source(
    image: Image.Image, mask: Image.Image | None = None, stacklevel: int = 4
) -> dict[str, Any]:
    """Return the metadata of the source of an edit; warns if it is too large."""
    entries = {"picture": encode_image(image)}
    if mask is not None:
        entries["mask"] = encode_image(mask)
    if None in entries.values():
        size = f"{image.width} x {image.height} px"
        warnings.warn(
            f"the image of {size} is too large for metadata: results cannot be regenerated",
            stacklevel=stacklevel,
        )
    return entries


def operation_metadata(
    about: Sequence[dict[str, Any]],
    prompts: Sequence[str | None],
    negative: Sequence[str] | None = None,
    **arguments: Any,
) -> list[dict[str, Any]]:
    """Return the metadata of an operation on images that is conditioned on prompts.

    about: the operation and the image. arguments: others of the call.
    """
    entries = []
    for i, (entry, text) in enumerate(zip(about, prompts, strict=True)):
        texts = {"prompt": text} | ({} if negative is None else {"negative_prompt": negative[i]})
        shown = {} if text is None else {"prompt": text}
        entries.append({**shown, **entry, "arguments": {**texts, **arguments}})
    return entries


def image_source(image: Image.Image, inversion: InversionOptions) -> dict[str, Any]:
    """Return the metadata of the latent of an image."""
    return {"picture": encode_image(image), "inversion": asdict(inversion)}


def random_source(image_emb: Tensor, seed: int) -> dict[str, Any]:
    """Return the metadata of a latent of an embedding (D,) and noise."""
    return {"image_emb": encode_array(image_emb), "seed": seed}


def regenerate(
    pipe: Pipeline,
    metadata: dict[str, Any],
    progress: bool = True,
    latents: dict[str, Latent] | None = None,
) -> GenerationResult:
    """Generate an image again from the metadata in its file.

    latents: a cache of inverted latents, to share between calls. ValueError for metadata that is
    incomplete, damaged or of another kind of model.
    """
    try:
        return _regenerate(pipe, metadata, progress, {} if latents is None else latents)
    except (TypeError, LookupError, AttributeError, OverflowError) as error:
        raise _incomplete(f"damaged metadata: {printable(error)}") from error


def _regenerate(
    pipe: Pipeline, metadata: dict[str, Any], progress: bool, latents: dict[str, Latent]
) -> GenerationResult:
    if missing := {"seed", "options"} - metadata.keys():
        raise _incomplete(f"the metadata has no {' and no '.join(sorted(missing))}")
    if _is_of_another_kind(pipe, metadata):
        made_by = f"made by another kind of model: {metadata.get('model', 'unknown')}"
        raise ValueError(f"{pipe.name} is of kind {pipe.kind}, but the image was {made_by}")
    options = parse(type(pipe.options), metadata["options"], "options in the metadata")
    if "operation" in metadata:
        return _repeat(pipe, metadata, options, progress, latents)
    arguments = {"seed": metadata["seed"], "options": options, "progress": progress}
    texts = ("prompt", "negative_prompt")
    arguments |= {name: metadata[name] for name in texts if metadata.get(name) is not None}
    arrays = ("image_emb", "layout")
    given = [name for name in arrays if metadata.get(name) is not None]
    if "image_emb" in given:
        arguments |= {name: decode_array(metadata[name])[None] for name in given}
        return pipe.variations(**arguments)
    if "prompt" not in arguments:
        raise _incomplete("the metadata has neither a prompt nor an image embedding")
    return pipe(**arguments)


def _is_of_another_kind(pipe: Pipeline, metadata: dict[str, Any]) -> bool:
    """Compare kinds; old metadata without a kind must share an option with the pipeline."""
    options, known = metadata["options"], {option.name for option in fields(pipe.options)}
    if "kind" in metadata:
        return metadata["kind"] != pipe.kind
    return isinstance(options, dict) and options != {} and known.isdisjoint(options)


def _repeat(
    pipe: Pipeline,
    metadata: dict[str, Any],
    options: Any,
    progress: bool,
    latents: dict[str, Latent],
) -> GenerationResult:
    """Repeat a manipulation or an edit."""
    operation, arguments = metadata["operation"], dict(metadata.get("arguments", {}))
    on_images = IMAGE_OPERATIONS[pipe.kind]
    on_latents = LATENT_OPERATIONS if pipe.kind == "unclip" else ()
    if operation not in (*on_images, *on_latents):
        raise _incomplete(f"the metadata has an unknown operation {operation!r}")
    if metadata.get("seed") is not None:
        arguments["seed"] = metadata["seed"]
    arguments |= {"options": options, "progress": progress}
    if "painting" in arguments:
        where = "painting in the metadata"
        arguments["painting"] = parse(PaintOptions, arguments["painting"], where)
    method = getattr(pipe, operation)
    if operation in on_images:
        images = [metadata.get(name) for name in ("picture", "mask") if name in metadata]
        return method(*map(decode_image, images), **arguments)
    sources = metadata.get("sources")
    if not sources:
        raise _incomplete("the metadata has no sources")
    parts = []
    for source in sources:
        source_options = options
        if "options" in source:  # of the latent, if the image was decoded with others
            where = "options of a source in the metadata"
            source_options = parse(UnCLIPOptions, source["options"], where)
        key = json.dumps([source, to_dict(source_options)], sort_keys=True)
        if key not in latents:
            latents[key] = _latent(pipe, source, source_options, progress)
        parts.append(latents[key])
    return method(Latent.cat(parts), **arguments)


def _latent(pipe: Any, source: dict[str, Any], options: UnCLIPOptions, progress: bool) -> Latent:
    """Recreate the latent of a source; pipe: an `UnCLIPPipeline`."""
    if "picture" in source:
        where = "inversion in the metadata"
        inversion = parse(InversionOptions, source.get("inversion", {}), where)
        image = decode_image(source["picture"])
        return pipe.invert(image, options=options, inversion=inversion, progress=progress)
    if not {"image_emb", "seed"} <= source.keys():
        keys = ", ".join(source)
        raise ValueError(f"a source in the metadata has {keys}; expected an image or an embedding")
    image_emb = decode_array(source["image_emb"])[None]
    return pipe.random_latent(image_emb, seed=source["seed"], options=options)


def encode_array(values: Tensor) -> str:
    """Encode a vector as base64 of little-endian float32, for metadata."""
    return base64.b64encode(values.float().cpu().numpy().astype("<f4").tobytes()).decode()


def decode_array(text: str) -> Tensor:
    """Decode the output of `encode_array`, as float32."""
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype="<f4").astype(np.float32))


def encode_image(image: Image.Image) -> str | None:
    """Encode an image as base64 of a PNG; None if it is too large for metadata."""
    if image.width * image.height > MAX_PIXELS:
        return None
    file = io.BytesIO()
    image.save(file, "PNG")
    text = base64.b64encode(file.getvalue()).decode()
    return text if len(text) <= MAX_TEXT else None


def decode_image(text: str | None) -> Image.Image:
    """Decode the output of `encode_image`."""
    if text is None:
        raise _incomplete("the source image is not stored in the metadata")
    try:
        return open_image(io.BytesIO(base64.b64decode(text)))
    except ValueError as error:  # binascii.Error is a subclass
        raise _incomplete(f"an image in the metadata is damaged ({error})") from None


def _incomplete(problem: str) -> ValueError:
    return ValueError(f"{problem}; the image cannot be regenerated")
