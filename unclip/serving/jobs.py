"""The asyncio side of jobs: events from the engine's threads, deadlines, disconnected clients."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from unclip.serving.engine import Done, Engine, Event, Started, Step
from unclip.serving.errors import APIError, failed, queue_full, unavailable
from unclip.serving.queue import Job, QueueFull
from unclip.serving.tasks import Task

log = logging.getLogger("unclip.serving")

PING_SECONDS = 10.0
POSITION_SECONDS = 1.0
STEP_SECONDS = 0.1  # between comments about steps


class ClientGone(Exception):
    """The client has closed its connection."""


def submit(engine: Engine, task: Task, client: str, steps: bool, partials: int) -> RunningJob:
    """Queue a task. APIError if the server is full or shutting down.

    steps: whether events about sampling steps are wanted.
    """
    if engine.closing:
        engine.metrics.rejections.labels("closing").inc()
        raise unavailable("The server is shutting down.", 5)
    loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

    def notify(event: Event) -> None:  # from any thread
        if steps or not isinstance(event, Step):
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(events.put_nowait, event)

    job = Job(task, client, notify, partials)
    try:
        engine.submit(job)
    except QueueFull:
        raise rejection(engine) from None
    return RunningJob(engine, job, events)


def rejection(engine: Engine) -> APIError:
    """Return the 429 of a full queue."""
    engine.metrics.rejections.labels("queue_full").inc()
    return queue_full(engine.retry_after())


class RunningJob:
    """A queued job and its events, for the request that waits for it."""

    def __init__(self, engine: Engine, job: Job, events: asyncio.Queue[Event]) -> None:
        self.engine, self.job, self._events = engine, job, events
        self.started = False
        self.deadline = time.monotonic() + engine.config.queue_seconds

    async def events(
        self, receive: Receive, tick: float | None = None
    ) -> AsyncGenerator[Event | None, None]:
        """Iterate over events, up to the result or an error; None every `tick` seconds without one.

        ClientGone if the client disconnects; the job is cancelled then.
        """
        gone = asyncio.ensure_future(disconnect(receive))
        getter = asyncio.ensure_future(self._events.get())
        try:
            while True:
                timeout = self._timeout(tick)
                await asyncio.wait({getter, gone}, timeout=timeout, return_when="FIRST_COMPLETED")
                if getter.done():
                    event = getter.result()
                    self.started |= isinstance(event, Started)
                    yield event
                    if isinstance(event, (Done, APIError)):
                        return
                    getter = asyncio.ensure_future(self._events.get())
                elif gone.done():
                    raise ClientGone
                elif not self.started and time.monotonic() >= self.deadline:
                    if self.engine.queue.remove(self.job):
                        self.job.cancelled = True
                        self.engine.metrics.rejections.labels("deadline").inc()
                        yield unavailable(
                            "The request waited too long in the queue.", self.engine.retry_after()
                        )
                        return
                    self.started = True  # it has just left the queue
                else:
                    yield None
        finally:
            gone.cancel()
            getter.cancel()
            event = getter.result() if getter.done() and not getter.cancelled() else None
            if not isinstance(event, (Done, APIError)):
                self.engine.cancel(self.job)

    def _timeout(self, tick: float | None) -> float | None:
        if self.started:
            return tick
        left = max(0.0, self.deadline - time.monotonic())
        return left if tick is None else min(tick, left)


async def disconnect(receive: Receive) -> None:
    """Return when the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events; the headers are sent with the first one."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: Callable[[Receive], AsyncIterator[bytes]],
        headers: dict[str, str],
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
                raise
            except APIError as error:  # the images cannot be stored
                await put(error_event(error), True)
            except Exception:  # the images cannot be encoded
                log.exception("stream_failed")
                await put(error_event(failed()), True)
            await put(b"", False)


async def stream(
    job: RunningJob,
    receive: Receive,
    prefix: str,
    preview: Callable[[Step], Awaitable[list[dict[str, Any]]]],
    complete: Callable[[Done], Awaitable[list[dict[str, Any]]]],
) -> AsyncIterator[bytes]:
    """Encode the events of a job. prefix: of event types, "image_generation"."""
    last_sent = last_step = time.monotonic()
    stage = ""
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
                    for fields in await preview(event):
                        chunk += sse(f"{prefix}.partial_image", fields)
            elif isinstance(event, Done):
                for fields in await complete(event):
                    yield sse(f"{prefix}.completed", fields)
            elif isinstance(event, APIError):
                chunk = error_event(event)
            if chunk:
                last_sent = now
                yield chunk


def sse(kind: str, fields: dict[str, Any]) -> bytes:
    """Encode an event."""
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode()


def error_event(error: APIError) -> bytes:
    """Encode an error."""
    return b"data: " + json.dumps(error.body()).encode() + b"\n\n"


def comment(fields: dict[str, Any]) -> bytes:
    """Encode a comment line, which SDKs skip."""
    return f": {json.dumps(fields)}\n\n".encode()
