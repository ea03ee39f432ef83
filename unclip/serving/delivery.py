"""Delivery of images to a client: resizing, encoding, a mark as generated, and storage."""

from __future__ import annotations

import base64
import logging
from typing import Any

from PIL import Image
from torch import Tensor

from unclip.image_io import encode_image, to_pil
from unclip.pipelines.provenance import encode_array
from unclip.serving.errors import failed
from unclip.serving.requests import Delivery
from unclip.serving.storage import Storage
from unclip.serving.tasks import Task
from unclip.types import GenerationResult

log = logging.getLogger("unclip.serving")


def deliver(
    result: GenerationResult,
    delivery: Delivery,
    storage: Storage,
    base_url: str | None,
    metadata: bool,
    with_base64: bool,
) -> tuple[list[dict[str, Any]], str | None]:
    """Return an entry of the response for each image, and a note about resizing.

    base_url: of URLs, if the client wants them. with_base64: include base64 in any case. APIError
    if the images cannot be stored.
    """
    entries, note = [], None
    for k, image in enumerate(result.images):
        resized = resize(image, delivery.side)
        if resized is not image:
            sizes = f"{image.width}x{image.height}, resized to {resized.width}x{resized.height}"
            note = f"generated at {sizes}"
        about = without_images(result.metadata[k]) if metadata else None
        data = encode_image(resized, delivery.kind, delivery.quality, about)
        entry: dict[str, Any] = {}
        if base_url is not None:
            entry["url"] = f"{base_url}/v1/files/{_store(data, delivery.kind, storage)}"
        if base_url is None or with_base64:
            entry["b64_json"] = base64.b64encode(data).decode()
        entry["seed"] = result.seeds[k]
        entry["size"] = f"{resized.width}x{resized.height}"
        if result.scores is not None:
            entry["score"] = result.scores[k]
        if delivery.embedding and result.image_emb is not None:
            entry["image_embedding"] = encode_array(result.image_emb[k])
        entries.append(entry)
    return entries, note


def _store(data: bytes, kind: str, storage: Storage) -> str:
    """Store an image; return its name. APIError if there is no room, or another fault."""
    try:
        return storage.put(data, kind)
    except Exception:  # file systems of fsspec raise any type
        log.exception("storing_failed")
        advice = "response_format 'b64_json' needs no storage"
        raise failed(f"The server could not store the images; {advice}.") from None


def encode_preview(preview: Tensor, delivery: Delivery) -> list[tuple[str, str]]:
    """Return (base64, size) of partial images (n, 3, s, s) in [-1, 1]."""
    images = [resize(image, delivery.side) for image in to_pil(preview)]
    return [
        (
            base64.b64encode(encode_image(image, delivery.kind, delivery.quality)).decode(),
            f"{image.width}x{image.height}",
        )
        for image in images
    ]


def resize(image: Image.Image, side: int | None) -> Image.Image:
    """Resize to side x side; None = unchanged."""
    if side is None or image.size == (side, side):
        return image
    return image.resize((side, side), Image.Resampling.LANCZOS)


def without_images(entry: dict[str, Any]) -> dict[str, Any]:
    """Return metadata without the client's uploads."""
    return {key: None if key in ("picture", "mask") else value for key, value in entry.items()}


def describe(task: Task) -> dict[str, Any]:
    """Return the fields of a task for logs, without its prompt."""
    return {"operation": task.operation, "model": task.model, "images": task.n}
