"""Responses: images resized, encoded, marked as generated and stored, as JSON or as events."""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from PIL import Image
from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from torch import Tensor

from unclip.image_io import encode_image, to_pil
from unclip.pipelines.provenance import encode_array
from unclip.serving.config import ServerConfig
from unclip.serving.engine import Done, Engine, Step
from unclip.serving.errors import APIError, failed
from unclip.serving.jobs import ClientGone, RunningJob
from unclip.serving.requests import Delivery
from unclip.serving.tasks import Task
from unclip.types import GenerationResult

log = logging.getLogger("unclip.serving")

PING_SECONDS = 10.0
POSITION_SECONDS = 1.0
STEP_SECONDS = 0.1  # between comments about steps
EVENTS = {
    "generations": "image_generation",
    "edits": "image_edit",
    "variations": "image_variation",
}
NO_TOKENS = {"image_tokens": 0, "text_tokens": 0}  # nothing is billed
USAGE = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}


class Responder:
    """Turns the events of a job into a response."""

    def __init__(
        self,
        request: Request,
        task: Task,
        delivery: Delivery,
        job: RunningJob,
        base_url: str | None,
    ) -> None:
        self.request, self.task, self.delivery = request, task, delivery
        self.job, self.base_url = job, base_url
        self.config: ServerConfig = request.app.state.config
        self.headers = {"x-unclip-model": header_text(task.model), **rate_limits(job.engine)}
        if delivery.ignored:
            self.headers["x-unclip-ignored"] = header_text(", ".join(delivery.ignored)[:1000])

    async def respond(self) -> Response:
        """Wait for the images and return them in one JSON object."""
        try:
            async with contextlib.aclosing(self.job.events(self.request.receive)) as events:
                async for event in events:
                    if isinstance(event, APIError):
                        response = event.response()  # the jobs of a batch may share the error
                        for name, value in self.headers.items():
                            response.headers.setdefault(name, value)
                        return response
                    if isinstance(event, Done):
                        entries, note = await self._deliver(event, with_base64=False)
                        note = {} if note is None else {"x-unclip-note": note}
                        body = {"created": int(time.time()), "data": entries}
                        spent = {"x-unclip-pipeline-ms": f"{1000 * event.seconds:.1f}"}
                        headers = {**self.headers, **spent, **note}
                        return Response(to_json(body), 200, headers, "application/json")
        except ClientGone:
            pass
        return Response(status_code=499)

    def stream(self) -> Response:
        """Return server-sent events."""
        side = self.delivery.side
        note = {} if side is None else {"x-unclip-note": f"resized to {side}x{side}"}
        return EventStream(self._events, {**self.headers, **note})

    async def _events(self, receive: Receive) -> AsyncIterator[bytes]:
        last_sent = last_step = time.monotonic()
        job, prefix, stage = self.job, EVENTS[self.task.operation], ""
        async with contextlib.aclosing(job.events(receive, POSITION_SECONDS)) as events:
            async for event in events:
                now, chunk = time.monotonic(), b""
                if event is None:
                    if not job.started:
                        chunk = comment({"queue_position": job.engine.queue.position(job.job) or 0})
                    elif now - last_sent >= PING_SECONDS:
                        chunk = b": ping\n\n"
                elif isinstance(event, Step):
                    if event.stage != stage or now - last_step >= STEP_SECONDS:
                        stage, last_step = event.stage, now
                        fields = {"stage": stage, "step": event.step, "num_steps": event.num_steps}
                        chunk = comment(fields)
                    if event.preview is not None:
                        for fields in await self._partial_images(event):
                            chunk += sse(f"{prefix}.partial_image", fields)
                elif isinstance(event, Done):
                    for fields in await self._completed(event):
                        yield sse(f"{prefix}.completed", fields)
                elif isinstance(event, APIError):
                    chunk = error_event(event)
                if chunk:
                    last_sent = now
                    yield chunk

    async def _partial_images(self, step: Step) -> list[dict[str, Any]]:
        assert step.preview is not None
        images = await run_in_threadpool(encode_preview, step.preview, self.delivery)
        return [
            {
                "b64_json": data,
                "partial_image_index": step.index,
                **self._about(size),
                **({"image_index": k} if self.delivery.indexed else {}),
            }
            for k, (data, size) in enumerate(images)
        ]

    async def _completed(self, done: Done) -> list[dict[str, Any]]:
        entries, _ = await self._deliver(done, with_base64=True)
        usage = {**USAGE, "input_tokens_details": NO_TOKENS}
        return [
            {**entry, **self._about(entry["size"]), "usage": usage, "image_index": k}
            for k, entry in enumerate(entries)
        ]

    def _about(self, size: str) -> dict[str, Any]:
        fields = {"created_at": int(time.time()), "size": size, "quality": "auto"}
        return {**fields, "background": "opaque", "output_format": self.delivery.kind}

    async def _deliver(
        self, done: Done, with_base64: bool
    ) -> tuple[list[dict[str, Any]], str | None]:
        self.request.state.log["pipeline_ms"] = round(1000 * done.seconds, 1)
        return await run_in_threadpool(self._entries, done.result, with_base64)

    def _entries(
        self, result: GenerationResult, with_base64: bool
    ) -> tuple[list[dict[str, Any]], str | None]:
        """Return an entry of the response for each image, and a note about resizing.

        with_base64: include base64 in any case. APIError if the images cannot be stored.
        """
        delivery, entries, note = self.delivery, [], None
        for k, image in enumerate(result.images):
            resized = resize(image, delivery.side)
            if resized is not image:
                sizes = f"{image.width}x{image.height}, resized to {resized.width}x{resized.height}"
                note = f"generated at {sizes}"
            about = without_images(result.metadata[k]) if self.config.metadata else None
            data = encode_image(resized, delivery.kind, delivery.quality, about)
            entry: dict[str, Any] = {}
            if self.base_url is not None:
                entry["url"] = f"{self.base_url}/v1/files/{self._store(data)}"
            if self.base_url is None or with_base64:
                entry["b64_json"] = base64.b64encode(data).decode()
            entry["seed"] = result.seeds[k]
            entry["size"] = f"{resized.width}x{resized.height}"
            if result.scores is not None:
                entry["score"] = result.scores[k]
            if delivery.embedding and result.image_emb is not None:
                entry["image_embedding"] = encode_array(result.image_emb[k])
            entries.append(entry)
        return entries, note

    def _store(self, data: bytes) -> str:
        """Store an image; return its name. APIError if there is no room, or another fault."""
        try:
            return self.request.app.state.storage.put(data, self.delivery.kind)
        except Exception:  # file systems of fsspec raise any type
            log.exception("storing_failed")
            advice = "response_format 'b64_json' needs no storage"
            raise failed(f"The server could not store the images; {advice}.") from None


class EventStream(Response):
    """Server-sent events; the headers are sent with the first one."""

    media_type = "text/event-stream"

    def __init__(
        self, events: Callable[[Receive], AsyncIterator[bytes]], headers: dict[str, str]
    ) -> None:
        super().__init__(
            headers={"cache-control": "no-cache", "x-accel-buffering": "no", **headers}
        )
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def put(body: bytes, more: bool) -> None:
            try:
                await send({"type": "http.response.body", "body": body, "more_body": more})
            except OSError:
                raise ClientGone from None

        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        with contextlib.suppress(ClientGone):
            try:
                async for chunk in self._events(receive):
                    await put(chunk, True)
            except ClientGone:
                pass
            except APIError as error:  # the images cannot be stored
                await put(error_event(error), True)
            except Exception:  # the images cannot be encoded
                log.exception("stream_failed")
                await put(error_event(failed()), True)
            await put(b"", False)


def sse(kind: str, fields: dict[str, Any]) -> bytes:
    """Encode an event."""
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode()


def error_event(error: APIError) -> bytes:
    """Encode an error."""
    return b"data: " + json.dumps(error.body()).encode() + b"\n\n"


def comment(fields: dict[str, Any]) -> bytes:
    """Encode a comment line, which SDKs skip."""
    return f": {json.dumps(fields)}\n\n".encode()


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


def rate_limits(engine: Engine) -> dict[str, str]:
    """Return OpenAI's rate limit headers, for images in the queue."""
    queue = engine.queue
    return {
        "x-ratelimit-limit-requests": str(queue.max_images),
        "x-ratelimit-remaining-requests": str(max(0, queue.max_images - queue.images)),
        "x-ratelimit-reset-requests": f"{engine.retry_after()}s",
    }


def header_text(text: str) -> str:
    """Replace characters that a header may not contain, and strip spaces."""
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in text).strip()
