"""How a manipulated picture was made, as JSON types that its PNG can hold, and how it is made again from them."""

from __future__ import annotations

import base64
import binascii
import io
import json
import warnings
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import Tensor

from unclip.config import parse, to_dict
from unclip.diffusion.inversion import InversionOptions
from unclip.diffusion.repaint import PaintOptions
from unclip.image_io import open_image
from unclip.pipelines.base import decode_array, encode_array
from unclip.pipelines.unclip.latent import Latent
from unclip.types import GenerationResult, UnCLIPOptions

if TYPE_CHECKING:
    from unclip.pipelines.unclip.manipulations import UnCLIPManipulations

LATENT_OPERATIONS = ("reconstruct", "vary", "interpolate", "text_diff")
CANVAS_OPERATIONS = ("inpaint", "outpaint", "image_to_image")
CODE_OPERATIONS = ("complete", "variations")  # of DALL-E
MOST_PIXELS = 4_000_000  # of a picture in metadata
LARGEST = (
    16_000_000  # characters of a picture in metadata; readers of PNG refuse texts beyond 64 MB
)


def edited_source(picture: Image.Image, mask: Image.Image | None = None) -> dict[str, Any]:
    """Of an edit; a warning if it is too large for metadata."""
    kept = {
        "picture": encode_picture(picture),
        **({} if mask is None else {"mask": encode_picture(mask)}),
    }
    if None in kept.values():
        size = f"{picture.width} x {picture.height} px"
        told = f"a picture of {size} is too large for metadata: what is drawn of it cannot be drawn again"
        warnings.warn(told, stacklevel=3)
    return kept


def image_source(picture: Image.Image, inversion: InversionOptions) -> dict[str, Any]:
    """Of the latent of a picture."""
    return {"picture": encode_picture(picture), "inversion": asdict(inversion)}


def random_source(image_emb: Tensor, seed: int) -> dict[str, Any]:
    """Of the latent of an embedding (D,) and noise."""
    return {"image_emb": encode_array(image_emb), "seed": seed}


def repeat(
    pipe: UnCLIPManipulations,
    metadata: dict[str, Any],
    options: UnCLIPOptions,
    progress: bool,
    latents: dict[str, Latent] | None = None,
) -> GenerationResult:
    """Draws a manipulated picture again. `latents` keeps what was inverted for those that follow."""
    operation, arguments = metadata["operation"], dict(metadata.get("arguments", {}))
    if operation not in (*LATENT_OPERATIONS, *CANVAS_OPERATIONS, *CODE_OPERATIONS) or not hasattr(
        pipe, operation
    ):
        raise ValueError(
            f"the metadata tells of an unknown operation {operation!r}; the picture cannot be drawn again"
        )
    if metadata.get("seed") is not None:
        arguments["seed"] = metadata["seed"]
    arguments |= {"options": options, "progress": progress}
    if "painting" in arguments:
        arguments["painting"] = parse(
            PaintOptions, arguments["painting"], "painting in the metadata"
        )
    if operation in (*CANVAS_OPERATIONS, *CODE_OPERATIONS):
        pictures = [
            decode_picture(metadata.get(name)) for name in ("picture", "mask") if name in metadata
        ]
        return getattr(pipe, operation)(*pictures, **arguments)
    sources = metadata.get("sources")
    if not sources:
        raise ValueError(
            "the metadata does not tell what was manipulated; the picture cannot be drawn again"
        )
    latents = {} if latents is None else latents
    parts = []
    for source in sources:
        under = options
        if "options" in source:  # of the latent, where the picture was drawn under others
            under = parse(UnCLIPOptions, source["options"], "options of a source in the metadata")
        key = json.dumps([source, to_dict(under)], sort_keys=True)
        if key not in latents:
            latents[key] = _latent(pipe, source, under, progress)
        parts.append(latents[key])
    return getattr(pipe, operation)(Latent.cat(parts), **arguments)


def _latent(
    pipe: UnCLIPManipulations, source: dict[str, Any], options: UnCLIPOptions, progress: bool
) -> Latent:
    if "picture" in source:
        inversion = parse(
            InversionOptions, source.get("inversion", {}), "inversion in the metadata"
        )
        return pipe.invert(
            decode_picture(source["picture"]),
            options=options,
            inversion=inversion,
            progress=progress,
        )
    if not {"image_emb", "seed"} <= source.keys():
        raise ValueError(
            f"the metadata tells of a source with {', '.join(source)}; expected a picture or an embedding"
        )
    return pipe.random_latent(
        decode_array(source["image_emb"])[None], seed=source["seed"], options=options
    )


def encode_picture(picture: Image.Image) -> str | None:
    """A picture as base64 of a PNG; None if that is too large for metadata."""
    if picture.width * picture.height > MOST_PIXELS:
        return None
    file = io.BytesIO()
    picture.save(file, "PNG")
    text = base64.b64encode(file.getvalue()).decode()
    return text if len(text) <= LARGEST else None


def decode_picture(text: str | None) -> Image.Image:
    if text is None:
        raise ValueError(
            "the picture that it was drawn from is too large for metadata; it cannot be drawn again"
        )
    try:
        return open_image(Image.open(io.BytesIO(base64.b64decode(text))))
    except (binascii.Error, OSError, ValueError) as error:
        raise ValueError(
            f"a picture in the metadata is damaged ({error}); it cannot be drawn again"
        ) from None
