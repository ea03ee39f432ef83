"""Generates the images of queued jobs, in batches, on one thread for each device."""

from __future__ import annotations

import gc
import itertools
import logging
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unclip.serving.config import ServerConfig
from unclip.serving.errors import APIError, bad_request, failed, unavailable
from unclip.serving.metrics import Metrics
from unclip.serving.pool import LoadedModel, ModelPool
from unclip.serving.queue import Job, JobQueue
from unclip.serving.tasks import count_stages, default_options, generate, model_size, operations
from unclip.tokenizer import PromptWarning
from unclip.types import GenerationResult, Progress

log = logging.getLogger("unclip.serving")


@dataclass(frozen=True)
class Started:
    """The job has left the queue."""


@dataclass(frozen=True)
class Step:
    """A sampling step; preview (n, 3, s, s) in [-1, 1] where a partial image is due."""

    stage: str
    step: int
    num_steps: int
    preview: Tensor | None = None
    index: int = 0  # of the partial image


@dataclass(frozen=True)
class Done:
    """The images of the job. seconds: of the pipeline's call."""

    result: GenerationResult
    seconds: float


Event = Started | Step | Done | APIError


class Cancelled(Exception):
    """Raised when all jobs of a batch are cancelled."""


class Engine:
    """A queue and a thread for each device. `submit` and `cancel` may be called from any thread."""

    def __init__(
        self, config: ServerConfig, metrics: Metrics, load: Callable[[str, Any, Any], Any]
    ) -> None:
        """load: (name, device, dtype) -> pipeline, as `unclip.load`."""
        self.config, self.metrics = config, metrics
        self.queue = JobQueue(config.max_queue, config.ageing_seconds)
        self.known: dict[str, dict[str, Any]] = {}  # about models that were loaded once
        self.seconds_per_image = 1.0  # moving average
        self.closing = False  # jobs are no longer accepted
        self.failure: str | None = None  # why the default model could not be loaded
        self._load = load
        self._lock = threading.Lock()
        self._running: dict[int, list[Job]] = {}  # of each busy device
        self._ready = {i: False for i in range(len(config.devices))}
        self._threads = [
            threading.Thread(target=self._work, args=(i,), name=f"engine-{i}", daemon=True)
            for i in range(len(config.devices))
        ]

    def start(self) -> None:
        warnings.simplefilter("ignore", PromptWarning)  # prompts are not logged
        for thread in self._threads:
            thread.start()

    @property
    def ready(self) -> bool:
        """Whether the default model is loaded on every device, and jobs are accepted."""
        return all(self._ready.values()) and not self.closing

    @property
    def idle(self) -> bool:
        with self._lock:  # held while a batch leaves the queue
            return not self.queue.images and not self._running

    def submit(self, job: Job) -> None:
        """Queue a job. QueueFull if there is no room."""
        self.queue.put(job)
        self.metrics.queue_images.set(self.queue.images)

    def cancel(self, job: Job) -> None:
        """Drop a job: its images leave a running batch at the next step."""
        if not job.cancelled:
            job.cancelled = True
            self.queue.remove(job)
            self.metrics.cancellations.inc()
            self.metrics.queue_images.set(self.queue.images)

    def retry_after(self) -> int:
        """Return the expected seconds until there is room in the queue, from 1 to 60."""
        expected = self.queue.images * self.seconds_per_image / len(self._threads) / 2
        return min(60, max(1, round(expected)))

    def drain(self) -> None:
        """Accept no more jobs; those in the queue are still generated."""
        self.closing = True

    def abandon(self) -> None:
        """Answer all jobs with 503, also those in progress, whose batches end at the next step."""
        self.closing = True
        with self._lock:
            jobs = [*self.queue.close(), *itertools.chain(*self._running.values())]
        for job in jobs:
            job.cancelled = True
            job.notify(unavailable("The server is shutting down.", 5))

    def stop(self) -> None:
        """Abandon all jobs and end all threads."""
        self.abandon()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout=10)

    # -- on the thread of a device

    def _work(self, index: int) -> None:
        config, device = self.config, self.config.devices[index]
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        pool = ModelPool(
            lambda name: self._load_model(name, device), config.models[0], config.idle_seconds
        )
        try:
            pool.get(config.models[0])
            self._ready[index] = True
        except Exception as error:
            self.failure = f"{config.models[0]} could not be loaded: {error}"
            log.exception("model_failed", extra={"model": config.models[0]})
        last_images, last_seconds = 1, 0.0
        while not (self.closing and not self.queue.images):
            if not self.queue.wait(timeout=0.5):
                if unloaded := pool.offload_idle():
                    gc.unfreeze()  # the models may be part of reference cycles
                    gc.collect()
                    gc.freeze()
                for name in unloaded:
                    log.info("model_offloaded", extra={"model": name})
                continue
            if last_images > 1:  # clients of the last batch may send their next requests
                self.queue.wait_for_images(
                    last_images, min(config.batch_seconds, last_seconds / 10)
                )
            with self._lock:
                jobs = self.queue.take(1 if config.deterministic else config.max_batch)
                if not jobs:
                    continue
                self._running[index] = jobs
            self.metrics.queue_images.set(self.queue.images)
            started = time.monotonic()
            try:
                self._run(pool, jobs)
            except Exception:  # an error in the engine itself must not end the thread
                log.exception("engine_error")
                _notify(jobs, failed())
            finally:
                with self._lock:
                    del self._running[index]
            last_images = sum(job.cost for job in jobs)
            last_seconds = time.monotonic() - started
            done = last_seconds / max(1, last_images)
            self.seconds_per_image += 0.3 * (done - self.seconds_per_image)

    def _load_model(self, name: str, device: str | None) -> Any:
        started = time.monotonic()
        dtype = None if self.config.dtype is None else getattr(torch, self.config.dtype)
        pipe = self._load(self.config.source_of(name), device, dtype)
        self.known[name] = {
            "kind": pipe.kind,
            "size": model_size(pipe),
            "operations": operations(pipe),
            "options": default_options(pipe),
        }
        gc.freeze()  # exclude the objects of torch and the model from collections
        seconds = round(time.monotonic() - started, 3)
        log.info("model_loaded", extra={"model": name, "seconds": seconds})
        return pipe

    def _run(self, pool: ModelPool, jobs: list[Job]) -> None:
        """Generate a batch; every job gets its result or an error."""
        now = time.monotonic()
        for job in jobs:
            job.started = now
            self.metrics.queue_seconds.observe(now - job.queued)
            job.notify(Started())
        try:
            model = pool.get(jobs[0].task.model)
        except Exception as error:
            if isinstance(error, ValueError):
                log.warning("model_failed", extra={"model": jobs[0].task.model})
                return _notify(jobs, failed(f"The model could not be loaded: {error}"))
            log.exception("model_failed", extra={"model": jobs[0].task.model})
            return _notify(jobs, failed("The model could not be loaded."))
        self._attempt(model, jobs)

    def _attempt(self, model: LoadedModel, jobs: list[Job]) -> None:
        """Generate jobs together; after an error one by one, without enough memory in halves."""
        jobs = [job for job in jobs if not job.cancelled]
        if not jobs:
            return
        images = sum(job.cost for job in jobs)
        if model.max_batch is not None and images > model.max_batch and len(jobs) > 1:
            return self._halve(model, jobs)
        started = time.monotonic()
        try:
            results = self._call(model, jobs)
        except Cancelled:
            return
        except BaseException as error:  # also SystemExit, which would end the thread
            error.__traceback__ = None  # which would keep the tensors of the failed call
            if is_out_of_memory(error):
                return self._without_memory(model, jobs, images)
            if len(jobs) > 1:
                self.metrics.retries.inc()
                log.warning(
                    "batch_failed", extra={"jobs": len(jobs), "error": type(error).__name__}
                )
                for job in jobs:
                    self._attempt(model, [job])
                return
            if isinstance(error, APIError):
                return jobs[0].notify(error)
            if isinstance(error, ValueError):
                return jobs[0].notify(bad_request(str(error)))
            log.error("job_failed", exc_info=error)
            return jobs[0].notify(failed())
        seconds = time.monotonic() - started
        self.metrics.batch_images.observe(images)
        self.metrics.images.labels(jobs[0].task.model, jobs[0].task.operation).inc(
            sum(job.task.n for job in jobs)
        )
        for job, result in zip(jobs, results, strict=True):
            if not job.cancelled:
                job.notify(Done(result, seconds))

    def _without_memory(self, model: LoadedModel, jobs: list[Job], images: int) -> None:
        """Halve a batch that does not fit, and remember the limit."""
        free_memory()
        batch = images if model.max_batch is None else min(images, model.max_batch)
        log.warning("out_of_memory", extra={"model": jobs[0].task.model, "batch": batch})
        self.metrics.out_of_memory.inc()
        if batch == 1:
            retry = failed("There is not enough memory for this request.")
            return _notify(jobs, retry)
        model.max_batch = max(1, batch // 2)
        if len(jobs) > 1:
            return self._halve(model, jobs)
        self._attempt(model, jobs)  # its images are split by the pipeline

    def _halve(self, model: LoadedModel, jobs: list[Job]) -> None:
        for half in (jobs[: len(jobs) // 2], jobs[len(jobs) // 2 :]):
            self._attempt(model, half)

    def _call(self, model: LoadedModel, jobs: Sequence[Job]) -> list[GenerationResult]:
        """Call the pipeline once; with `deterministic` once for each image."""
        tasks, config = [job.task for job in jobs], self.config
        batch_size = min(config.max_batch, model.max_batch or config.max_batch)
        if config.deterministic:
            (task,) = tasks
            if task.candidates is not None:
                return generate(model.pipe, tasks, self._reporter(model, jobs), 1)
            parts = [
                generate(model.pipe, [task.alone(k)], self._reporter(model, jobs, k), 1)[0]
                for k in range(task.n)
            ]
            return [GenerationResult.cat(parts)]
        # Usually one batch, so that all rows report together: `take` limits the images of jobs.
        return generate(model.pipe, tasks, self._reporter(model, jobs), batch_size)

    def _reporter(
        self, model: LoadedModel, jobs: Sequence[Job], image: int | None = None
    ) -> Callable[[Progress], None]:
        """Report steps to the jobs; drop the images of those that are cancelled.

        image: the index of the only image of this call, of the only job.
        """
        num_stages = count_stages(model.pipe)
        sent = dict.fromkeys(range(len(jobs)), 0)
        ends = list(itertools.accumulate(job.cost for job in jobs))
        last = [time.monotonic()]

        def report(progress: Progress) -> None:
            now = time.monotonic()
            self.metrics.stage_seconds.labels(progress.stage).inc(now - last[0])
            last[0] = now
            if all(job.cancelled for job in jobs):
                raise Cancelled
            if image is None:
                for job, end in zip(jobs, ends, strict=True):
                    if job.cancelled:
                        progress.dropped.update(range(end - job.cost, end))
            position = (
                stage_index(progress.stage) + progress.step / progress.num_steps
            ) / num_stages
            for i, job in enumerate(jobs):
                preview, index = None, sent[i]
                due = index < job.partials and (index + 1) / (job.partials + 1) <= position < 1
                images = progress.preview if due and image in (None, 0) else None
                # The images of an edit's window, or of a part of the batch, are not all images.
                if images is not None and len(images) == (ends[-1] if image is None else 1):
                    rows = slice(ends[i] - job.cost, ends[i] - job.cost + job.task.n)
                    preview = images[rows].float().cpu().clone()
                    sent[i] += 1
                if not job.cancelled:
                    step = Step(progress.stage, progress.step, progress.num_steps, preview, index)
                    job.notify(step)

        return report


def stage_index(stage: str) -> int:
    """Return the position of a stage among those that make images; the prior has none."""
    name, _, number = stage.rpartition("_")
    if stage == "prior":
        return -1
    return int(number) + 1 if name == "upsampler" else 0


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a call failed because memory was exhausted, on any device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def free_memory() -> None:
    """Return cached memory of an accelerator."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _notify(jobs: Sequence[Job], event: Event) -> None:
    for job in jobs:
        job.notify(event)
