"""A bounded queue of jobs: round robin over API keys, with ageing, taken in batches."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

from unclip.serving.tasks import Task


class QueueFull(Exception):
    """The queue has no room for the images of a job."""


@dataclass(eq=False)
class Job:
    """A task on its way through the engine."""

    task: Task
    key: str  # of the client, for round robin
    notify: Callable[[Any], None]  # receives the events of engine.py, from any thread
    partials: int = 0  # partial images
    cancelled: bool = False
    queued: float = field(default_factory=time.monotonic)
    started: float | None = None

    @property
    def cost(self) -> int:
        return self.task.cost


class JobQueue:
    """Waiting jobs, counted by their images; all methods may be called from any thread."""

    def __init__(self, max_images: int, ageing_seconds: float) -> None:
        self.max_images, self.ageing_seconds = max_images, ageing_seconds
        self._by_key: OrderedDict[str, deque[Job]] = OrderedDict()  # the next key first
        self._images = 0
        self._changed = threading.Condition()
        self._closed = False

    @property
    def images(self) -> int:
        """Number of waiting images."""
        return self._images

    @property
    def full(self) -> bool:
        """Whether there is no room for another image."""
        return self._images >= self.max_images

    def put(self, job: Job) -> None:
        """Append a job. QueueFull if its images do not fit; a job always fits an empty queue."""
        with self._changed:
            if self._images and self._images + job.cost > self.max_images:
                raise QueueFull
            self._by_key.setdefault(job.key, deque()).append(job)
            self._images += job.cost
            self._changed.notify_all()

    def remove(self, job: Job) -> bool:
        """Remove a job that still waits; return whether it did."""
        with self._changed:
            jobs = self._by_key.get(job.key, ())
            if job not in jobs:
                return False
            self._drop(job)
            return True

    def position(self, job: Job) -> int | None:
        """Return the position of a job by age, from 1; None if it does not wait."""
        with self._changed:
            jobs = [one for jobs in self._by_key.values() for one in jobs]
            if job not in jobs:
                return None
            return sum(one.queued <= job.queued for one in jobs)

    def wait(self, timeout: float) -> bool:
        """Wait until there is a job, or the queue is closed; return whether there is one."""
        with self._changed:
            self._changed.wait_for(lambda: self._images or self._closed, timeout)
            return bool(self._images)

    def wait_for_images(self, count: int, timeout: float) -> None:
        """Wait until `count` images are queued, for at most `timeout` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._images >= count or self._closed, timeout)

    def take(self, max_images: int) -> list[Job]:
        """Remove the next job, and others that can be generated with it, up to max_images."""
        with self._changed:
            lead = self._next()
            if lead is None:
                return []
            batch, room = [lead], max_images - lead.cost
            self._drop(lead)
            while (other := self._next(lead.task.batch_key, room)) is not None:
                self._drop(other)
                batch.append(other)
                room -= other.cost
            return batch

    def close(self) -> list[Job]:
        """Wake all threads that wait, and remove and return all jobs."""
        with self._changed:
            jobs = [job for jobs in self._by_key.values() for job in jobs]
            self._by_key.clear()
            self._images, self._closed = 0, True
            self._changed.notify_all()
            return jobs

    def _next(self, batch_key: Hashable | None = None, room: int | None = None) -> Job | None:
        """Return the oldest job that is overdue, or the first one of the next key that matches."""

        def matches(job: Job) -> bool:
            fits = room is None or job.cost <= room
            return fits and (batch_key is None or job.task.batch_key == batch_key)

        found = [
            job
            for jobs in self._by_key.values()
            if (job := next(filter(matches, jobs), None)) is not None
        ]
        overdue = time.monotonic() - self.ageing_seconds
        aged = [job for job in found if job.queued < overdue]
        if aged:
            return min(aged, key=lambda job: job.queued)
        return found[0] if found else None

    def _drop(self, job: Job) -> None:
        jobs = self._by_key[job.key]
        jobs.remove(job)
        self._images -= job.cost
        if jobs:
            self._by_key.move_to_end(job.key)
        else:
            del self._by_key[job.key]
