"""Queue, batches, cancellation, errors and memory of the engine."""

from __future__ import annotations

import copy
import threading
import time
import weakref
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from serving_helpers import CONFIG, load, opened, png, wait_until

from unclip.serving.engine import Done, Engine, Started, Step
from unclip.serving.errors import APIError
from unclip.serving.metrics import Metrics
from unclip.serving.queue import Job, JobQueue, QueueFull
from unclip.serving.tasks import Settings, Task, generate

TASK = Task("generations", "tiny", n=1, seed=0, prompt="a red apple")


class Recorder:
    """A pipeline that records its calls, and can fail or wait in them."""

    def __init__(self, pipe):
        self.pipe, self.calls, self.fail, self.gate = pipe, [], None, None
        self.kind, self.name, self.options = pipe.kind, pipe.name, pipe.options
        self.decoder, self.upsamplers, self.clip = pipe.decoder, pipe.upsamplers, pipe.clip
        self.encode_image, self.inpainter = pipe.encode_image, pipe.inpainter

    def __call__(self, prompts, **arguments):
        self.calls.append(prompts)
        if self.gate is not None:
            assert self.gate.wait(20)
        if self.fail is not None:
            self.fail(prompts, arguments)
        return self.pipe(prompts, **arguments)

    def inpaint(self, images, masks, prompts, **arguments):
        self.calls.append(prompts)
        return self.pipe.inpaint(images, masks, prompts, **arguments)

    def variations(self, images=None, *, image_emb=None, **arguments):
        self.calls.append(images or image_emb)
        return self.pipe.variations(images, image_emb=image_emb, **arguments)


class Client:
    """Submits jobs and collects their events."""

    def __init__(self, engine):
        self.engine, self.events = engine, {}

    def submit(self, task=TASK, key="", partials=0, **changes):
        events = []
        job = Job(replace(task, **changes), key, events.append, partials)
        self.events[job] = events
        self.engine.submit(job)
        return job

    def outcome(self, job):
        wait_until(lambda: self.final(job))
        return self.final(job)

    def final(self, job):
        finals = [event for event in self.events[job] if isinstance(event, (Done, APIError))]
        assert len(finals) <= 1
        return finals[0] if finals else None

    def image(self, job):
        outcome = self.outcome(job)
        assert isinstance(outcome, Done), outcome
        return np.asarray(outcome.result.images[0]).astype(int)


@pytest.fixture
def recorder(tiny_pipe):
    return Recorder(tiny_pipe)


@pytest.fixture
def make(recorder):
    engines = []

    def make(**changes):
        config = replace(CONFIG, models=("tiny",), **changes)
        engine = Engine(config, Metrics(), lambda name, device, dtype: recorder)
        engines.append(engine)
        engine.start()
        wait_until(lambda: engine.ready)
        return Client(engine)

    yield make
    if recorder.gate is not None:
        recorder.gate.set()
    for engine in engines:
        engine.stop()


def blocked(client, recorder):
    """Start a job that waits in its call, so that others queue up."""
    recorder.gate = threading.Event()
    job = client.submit(prompt="first")
    wait_until(lambda: recorder.calls)
    return job


# -- batches


def test_equal_requests_are_generated_together_and_equal_those_alone(make, recorder, tiny_pipe):
    client = make()
    blocked(client, recorder)
    jobs = [client.submit(prompt=text, seed=7 * i, n=1 + i % 3) for i, text in enumerate("abcd")]
    other = client.submit(settings=Settings(steps=2))
    recorder.gate.set()
    for i, (job, text) in enumerate(zip(jobs, "abcd", strict=True)):
        result = client.outcome(job).result
        alone = tiny_pipe(text, num_images=1 + i % 3, seed=7 * i, progress=False)
        assert len(result) == len(alone)
        for ours, theirs in zip(result.images, alone.images, strict=True):
            assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs)).max() <= 2
        assert result.seeds == alone.seeds
    client.outcome(other)
    assert recorder.calls == [["first"], [*"abbcccd"], ["a red apple"]]


def image_of(k, size=16):
    return opened(png(size, seed=k))


EDIT = {"operation": "edits", "mask": Image.new("L", (16, 16), 255)}
EDIT["mask"].paste(0, (0, 0, 9, 16))


@pytest.mark.parametrize("changes", [EDIT, {"operation": "variations", "prompt": None}])
def test_edits_and_variations_are_generated_together(make, recorder, changes):
    client = make()
    blocked(client, recorder)
    jobs = [client.submit(images=(image_of(k),), seed=k, n=1 + k, **changes) for k in range(3)]
    wide = client.submit(**{**EDIT, "mask": EDIT["mask"].resize((32, 16))}, images=(
        image_of(3).resize((32, 16)),
    ))  # fmt: skip
    recorder.gate.set()
    together = [client.outcome(job).result for job in [*jobs, wide]]
    assert [len(call) for call in recorder.calls] == [1, 6, 1]  # wide images need several windows
    for job, result in zip(jobs, together, strict=False):
        (alone,) = generate(recorder, [job.task], lambda _: None, 16)
        assert alone.seeds == result.seeds
        for ours, theirs in zip(result.images, alone.images, strict=True):
            assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs)).max() <= 2


def test_a_batch_is_bounded_by_images(make, recorder):
    client = make(max_batch=4)
    blocked(client, recorder)
    jobs = [client.submit(n=n) for n in (3, 2, 1, 10)]
    recorder.gate.set()
    for job in jobs:
        client.outcome(job)
    assert [len(call) for call in recorder.calls] == [1, 4, 1, 1]  # 3 + 1, 2, 10 of one prompt


def test_deterministic_images_are_generated_alone(make, recorder, tiny_pipe):
    client = make(deterministic=True)
    blocked(client, recorder)
    jobs = [client.submit(n=2), client.submit(n=1)]
    recorder.gate.set()
    (first, second), (third,) = (client.outcome(job).result.images for job in jobs)
    assert [len(call) for call in recorder.calls] == [1, 1, 1, 1]
    for image, seed in ((first, 0), (second, 1), (third, 0)):
        (alone,) = tiny_pipe("a red apple", seed=seed, progress=False).images
        assert (np.asarray(image) == np.asarray(alone)).all()


def test_returning_clients_are_awaited(make, recorder):
    client = make(batch_seconds=2.0)
    blocked(client, recorder)
    for _ in range(2):
        client.submit()
    recorder.fail = lambda *_: time.sleep(0.5)  # so that a tenth of it is worth waiting
    recorder.gate.set()
    wait_until(lambda: len(recorder.calls) == 2)
    wait_until(lambda: client.engine.idle)
    late = [client.submit()]
    time.sleep(0.01)
    late.append(client.submit())
    for job in late:
        client.outcome(job)
    assert [len(call) for call in recorder.calls] == [1, 2, 2]


# -- the queue


def job_of(key, cost=1, queued=0.0, **changes):
    return Job(replace(TASK, n=cost, **changes), key, print, queued=time.monotonic() + queued)


def test_the_queue_is_bounded_by_images():
    queue = JobQueue(4, 10)
    queue.put(job_of("a", 3))
    with pytest.raises(QueueFull):
        queue.put(job_of("b", 2))
    queue.put(job_of("b", 1))
    assert queue.full
    empty = JobQueue(4, 10)
    empty.put(job_of("a", 10))  # would never fit otherwise


def test_keys_take_turns():
    queue = JobQueue(100, 10)
    for key in "aaaabbc":
        queue.put(job_of(key))
    order = [queue.take(1)[0].key for _ in range(7)]
    assert order == [*"abcabaa"]
    assert queue.images == 0


def test_an_overdue_job_is_next():
    queue = JobQueue(100, ageing_seconds=10)
    for key, queued in (("a", -1), ("b", -30), ("c", -20)):
        queue.put(job_of(key, queued=queued))
    assert [queue.take(1)[0].key for _ in range(3)] == ["b", "c", "a"]


def test_batches_take_from_all_keys_in_turn():
    queue = JobQueue(100, 10)
    for key in "aaabb":
        queue.put(job_of(key))
    queue.put(job_of("c", settings=Settings(steps=2)))
    assert Counter(job.key for job in queue.take(4)) == {"a": 2, "b": 2}
    assert [job.key for job in queue.take(4)] == ["c"]


def test_positions_count_older_jobs():
    queue = JobQueue(100, 10)
    jobs = [job_of(key) for key in "abc"]
    for job in jobs:
        queue.put(job)
    assert [queue.position(job) for job in jobs] == [1, 2, 3]
    assert queue.remove(jobs[0]) and not queue.remove(jobs[0])
    assert [queue.position(job) for job in jobs] == [None, 1, 2]


# -- cancellation


def test_a_cancelled_job_stops_within_one_step(make, recorder):
    client = make()
    steps = []
    job = Job(replace(TASK, settings=Settings(steps=900)), "", lambda event: stop(event))

    def stop(event):
        if isinstance(event, Step):
            steps.append(event)
            client.engine.cancel(job)

    client.engine.submit(job)
    wait_until(lambda: steps and client.engine.idle)
    assert len(steps) == 1
    assert client.image(client.submit()) is not None  # the next one succeeds


def test_cancelling_one_of_a_batch_leaves_the_pixels_of_the_others(make, recorder, tiny_pipe):
    client = make()
    blocked(client, recorder)
    kept = [client.submit(prompt="a", seed=1), client.submit(prompt="c", seed=3)]
    events = []

    def cancel(event):
        events.append(event)
        if isinstance(event, Step):
            client.engine.cancel(gone)

    gone = Job(replace(TASK, prompt="b", seed=2), "", cancel)
    client.engine.submit(gone)
    rows, unet = [], tiny_pipe.decoder.unet
    hook = unet.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    recorder.gate.set()
    client.outcome(kept[1])
    hook.remove()
    steps = tiny_pipe.options.decoder.steps
    assert rows[-steps:] == [4] * steps  # two of three images, with guidance: `gone` left its place
    for job, text, seed in zip(kept, "ac", (1, 3), strict=True):
        (alone,) = tiny_pipe(text, seed=seed, progress=False).images
        assert np.abs(client.image(job) - np.asarray(alone)).max() <= 2
    assert len(recorder.calls[1]) == 3
    assert sum(isinstance(event, Step) for event in events) == 1
    assert not any(isinstance(event, Done) for event in events[2:])


def test_a_waiting_job_that_is_cancelled_is_never_started(make, recorder):
    client = make()
    blocked(client, recorder)
    job = client.submit()
    client.engine.cancel(job)
    recorder.gate.set()
    wait_until(lambda: client.engine.idle)
    assert client.events[job] == []
    assert len(recorder.calls) == 1


# -- errors


def test_after_an_error_jobs_are_tried_one_by_one(make, recorder):
    def fail(prompts, _):
        if "bad" in prompts:
            raise RuntimeError("broken")

    client = make()
    blocked(client, recorder)
    recorder.fail = fail
    jobs = [client.submit(prompt=text) for text in ("good", "bad", "fine")]
    recorder.gate.set()
    good, bad, fine = map(client.outcome, jobs)
    assert isinstance(good, Done) and isinstance(fine, Done)
    assert (bad.status, bad.headers["x-should-retry"]) == (500, "false")
    assert "broken" not in bad.message
    assert isinstance(client.outcome(client.submit()), Done)


def test_a_value_error_is_the_clients(make, recorder):
    def fail(prompts, _):
        raise ValueError("guidance is 1")

    client = make()
    recorder.fail = fail
    outcome = client.outcome(client.submit())
    assert (outcome.status, outcome.message) == (400, "guidance is 1")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_halves_the_batch(make, recorder, error):
    def fail(prompts, arguments):
        if min(len(prompts) * arguments["num_images"], arguments["batch_size"]) > 2:
            raise error

    client = make()
    blocked(client, recorder)
    recorder.fail = fail
    jobs = [client.submit(prompt=text) for text in "abcdefgh"] + [client.submit(n=5, prompt="z")]
    recorder.gate.set()
    for job in jobs:
        assert isinstance(client.outcome(job), Done)
    calls = len(recorder.calls)
    for outcome in [client.outcome(client.submit(n=4))]:
        assert len(outcome.result) == 4
    assert len(recorder.calls) == calls + 1  # the limit is remembered


def test_a_single_image_without_memory_is_an_error(make, recorder):
    def fail(*_):
        raise MemoryError

    client = make()
    recorder.fail = fail
    outcome = client.outcome(client.submit())
    assert outcome.status == 500 and "memory" in outcome.message
    recorder.fail = None
    assert isinstance(client.outcome(client.submit()), Done)


# -- models


def test_models_are_loaded_when_used_and_offloaded_when_idle(tiny_pipe):
    loads = []
    config = replace(CONFIG, models=("tiny", "other"), idle_seconds=0.2)

    def load(name, device, dtype):
        loads.append(name)
        if name == "other" and loads.count("other") == 3:
            raise ValueError("damaged")
        return tiny_pipe

    engine = Engine(config, Metrics(), load)
    engine.start()
    client = Client(engine)
    try:
        for _ in range(2):
            assert isinstance(client.outcome(client.submit(model="other")), Done)
            time.sleep(1.0)
        assert loads == ["tiny", "other", "other"]
        assert client.outcome(client.submit(model="other")).status == 500
        assert isinstance(client.outcome(client.submit()), Done)
        assert loads == ["tiny", "other", "other", "other"]
    finally:
        engine.stop()


def test_a_stopped_engine_answers_all_jobs_with_503(make, recorder):
    client = make()
    jobs = [blocked(client, recorder), client.submit()]
    threading.Timer(0.1, recorder.gate.set).start()
    client.engine.stop()
    assert [client.outcome(job).status for job in jobs] == [503, 503]
    assert client.engine.idle and not client.engine.ready


def test_previews_follow_the_rows_of_a_batch(make, recorder):
    client = make()
    blocked(client, recorder)
    jobs = [client.submit(prompt=text, n=n, partials=2) for text, n in (("a", 1), ("b", 2))]
    recorder.gate.set()
    for job in jobs:
        client.outcome(job)
        previews = [
            event.preview
            for event in client.events[job]
            if isinstance(event, Step) and event.preview is not None
        ]
        assert [len(preview) for preview in previews] == [job.task.n] * 2
        assert isinstance(client.events[job][0], Started)


def test_an_unloaded_model_is_freed_even_if_it_refers_to_itself(tiny_pipe):
    config = replace(CONFIG, models=("tiny", "other"), idle_seconds=0.2)
    references = []

    def load(name, device, dtype):
        if name == "tiny":
            return tiny_pipe
        pipe = copy.copy(tiny_pipe)
        pipe.itself = pipe
        references.append(weakref.ref(pipe))
        return pipe

    engine = Engine(config, Metrics(), load)
    engine.start()
    client = Client(engine)
    try:
        assert isinstance(client.outcome(client.submit(model="other")), Done)
        wait_until(lambda: references[0]() is None, seconds=10)
    finally:
        engine.stop()
