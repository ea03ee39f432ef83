"""The asyncio side of jobs: events from the engine's threads, deadlines, disconnected clients."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from weakref import WeakSet

from starlette.types import Receive

from unclip.serving.engine import Done, Engine, Event, Started, Step
from unclip.serving.errors import APIError, bad_request, conflict, queue_full, unavailable
from unclip.serving.queue import Job, QueueFull
from unclip.serving.tasks import Task

JOB_ID = "x-unclip-job"  # header of a request whose client may connect again
VALID_ID = re.compile(r"[\w-]{1,128}", re.ASCII)
MAX_FINISHED = 64  # jobs with an id whose results are kept, for all clients


class ClientGone(Exception):
    """The client has closed its connection."""


@dataclass(eq=False)
class Arrival:
    """A request on its way to become a job; it can already be cancelled."""

    client: str
    id: str | None
    cancelled: bool = False


class Jobs:
    """Submits tasks, and finds the jobs with an id, whose clients may connect again."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._named: dict[tuple[str, str | None], RunningJob] = {}  # by client and id
        self._arrivals = WeakSet[Arrival]()

    def get(self, client: str, id: str | None) -> RunningJob | None:
        return self._named.get((client, id))

    def arrive(self, client: str, id: str | None) -> Arrival:
        """Announce a request before its body is read. APIError if its id is invalid."""
        if id is not None and not VALID_ID.fullmatch(id):
            raise bad_request(f"{JOB_ID} must have 1 to 128 letters, digits, '-' and '_'.", JOB_ID)
        arrival = Arrival(client, id)
        self._arrivals.add(arrival)
        return arrival

    def submit(
        self, arrival: Arrival, task: Task, content: int, steps: bool, partials: int
    ) -> RunningJob:
        """Queue a task, or find the job with its id. APIError if the server is full or closing.

        content: a hash; a job with the same id and another content is an APIError. steps: whether
        events about sampling steps are wanted.
        """
        client, id = arrival.client, arrival.id
        if arrival.cancelled:
            raise cancelled()
        if (job := self.get(client, id)) is not None:
            if job.content != content:
                raise conflict(f"{JOB_ID} is the id of a job with another body; use a new id.")
            return job
        if self.engine.closing:
            self.engine.metrics.rejections.labels("closing").inc()
            raise unavailable("The server is shutting down.", 5)
        try:
            job = RunningJob(self.engine, task, client, content, steps, partials)
        except QueueFull:
            raise rejection(self.engine) from None
        if id is not None:
            self._named[client, id] = job
            job.keep(self.engine.config.reconnect_seconds, lambda: self._expire(job, id))
            finished = [name for name, one in self._named.items() if one.final is not None]
            for name in finished[:-MAX_FINISHED]:
                del self._named[name]
        return job

    def _expire(self, job: RunningJob, id: str) -> None:
        job.cancel()
        if self.get(job.client, id) is job:
            del self._named[job.client, id]

    def cancel(self, client: str, id: str) -> None:
        """Cancel a job, or the request that is to become one, if there is one."""
        for arrival in self._arrivals:
            arrival.cancelled |= (arrival.client, arrival.id) == (client, id)
        if (job := self._named.pop((client, id), None)) is not None:
            job.cancel()


def cancelled() -> APIError:
    """Return the error of a job that was cancelled."""
    return bad_request("The job was cancelled.", code="cancelled")


def rejection(engine: Engine) -> APIError:
    """Return the 429 of a full queue."""
    engine.metrics.rejections.labels("queue_full").inc()
    return queue_full(engine.retry_after())


class RunningJob:
    """A queued job and its events, for the connection that waits for it."""

    def __init__(
        self, engine: Engine, task: Task, client: str, content: int, steps: bool, partials: int
    ) -> None:
        """Queue the task. QueueFull if there is no room."""
        loop = asyncio.get_running_loop()

        def notify(event: Event) -> None:  # from any thread
            if steps or not isinstance(event, Step):
                with contextlib.suppress(RuntimeError):  # the loop is closed
                    loop.call_soon_threadsafe(self._put, event)

        self.engine, self.job = engine, Job(task, client, notify, partials)
        self.client, self.content = client, content
        self.started, self.final = False, None
        self.deadline = time.monotonic() + engine.config.queue_seconds
        self._events = asyncio.Queue[Event | None]()
        self._seconds, self._expire = 0.0, self.cancel
        self._expiry: asyncio.TimerHandle | None = None
        engine.submit(self.job)

    def keep(self, seconds: float, expire: Callable[[], None]) -> None:
        """Call `expire` only after some seconds without a connection."""
        self._seconds, self._expire = seconds, expire
        self._leave()

    def cancel(self) -> None:
        if self.final is None:
            self.engine.cancel(self.job)
            self._put(cancelled())

    async def events(
        self, receive: Receive, tick: float | None = None
    ) -> AsyncGenerator[Event | None, None]:
        """Iterate over events, up to the result or an error; None every `tick` seconds without one.

        ClientGone if the client disconnects, or another connection takes over. Without one, the job
        is cancelled.
        """
        gone = asyncio.ensure_future(disconnect(receive))
        events = self._connect()
        getter = asyncio.ensure_future(events.get())
        try:
            while True:
                timeout = self._timeout(tick)
                await asyncio.wait({getter, gone}, timeout=timeout, return_when="FIRST_COMPLETED")
                if getter.done():
                    event = getter.result()
                    if event is None:
                        raise ClientGone
                    yield event
                    if event is self.final:
                        return
                    getter = asyncio.ensure_future(events.get())
                elif gone.done():
                    raise ClientGone
                elif not self.started and time.monotonic() >= self.deadline:
                    self.started = not self.engine.queue.remove(self.job)  # or it has just left
                    if not self.started:
                        self.job.cancelled = True
                        self.engine.metrics.rejections.labels("deadline").inc()
                        late = "The request waited too long in the queue."
                        self._put(unavailable(late, self.engine.retry_after()))
                else:
                    yield None
        finally:
            gone.cancel()
            getter.cancel()
            if events is self._events:
                self._leave()

    def _put(self, event: Event) -> None:
        if self.final is None:
            self.started |= isinstance(event, Started)
            self.final = event if isinstance(event, (Done, APIError)) else None
            self._events.put_nowait(event)

    def _connect(self) -> asyncio.Queue[Event | None]:
        """Return a queue of the events that were not read; the connection before ends."""
        if self._expiry is not None:
            self._expiry.cancel()
        before, self._events = self._events, asyncio.Queue()
        unread = [before.get_nowait() for _ in range(before.qsize())]
        before.put_nowait(None)
        for event in unread or ([] if self.final is None else [self.final]):
            self._events.put_nowait(event)
        return self._events

    def _leave(self) -> None:
        reported = isinstance(self.final, APIError) and self._events.empty()
        seconds = 0.0 if reported else self._seconds  # the same request may be tried again
        self._expiry = asyncio.get_running_loop().call_later(seconds, self._expire)

    def _timeout(self, tick: float | None) -> float | None:
        if self.started or self.final is not None:
            return tick
        left = max(0.0, self.deadline - time.monotonic())
        return left if tick is None else min(tick, left)


async def disconnect(receive: Receive) -> None:
    """Return when the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
