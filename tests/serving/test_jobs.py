"""Jobs with an id: clients that connect again, cancel, or use an id twice."""

from __future__ import annotations

import threading
import time
import urllib.request
from dataclasses import replace

import pytest
from api_helpers import EDITS
from serving_helpers import (
    BODY,
    CONFIG,
    GENERATIONS,
    Gate,
    client,
    client_of,
    connect,
    load,
    png,
    received,
    serving,
    wait_until,
)

from unclip.serving import jobs as jobs_module
from unclip.serving import uploads
from unclip.serving.app import create_app


def delete(url, job):
    request = urllib.request.Request(f"{url}/v1/jobs/{job}", method="DELETE")
    with urllib.request.urlopen(request, timeout=20) as response:
        assert response.status == 204


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("finished", [False, True])
def test_a_client_that_connects_again_gets_the_images_of_its_job(load, stream, finished):
    gate = Gate(load)
    app = create_app(replace(CONFIG, max_queue=1), gate)
    with serving(app) as url:
        engine = app.state.engine
        first = connect(url, "mine", stream=stream)
        wait_until(lambda: gate.waiting == 1)
        waiting = connect(url)  # the queue is full
        wait_until(lambda: engine.queue.full)
        first.close()
        if finished:
            gate.open.set()
            wait_until(lambda: engine.idle)
        again = connect(url, "mine", stream=stream)
        if not finished:
            newest = connect(url, "mine", stream=stream)  # takes over
            assert b"b64_json" not in received(again)
            again = newest
        gate.open.set()
        answer = received(again)
        assert answer.startswith(b"HTTP/1.1 200") and b"b64_json" in answer
        assert b"b64_json" in received(waiting)
        assert engine.metrics.images.labels("tiny", "generations")._value.get() == 2
        assert engine.metrics.cancellations._value.get() == 0


def test_a_job_with_an_id_is_cancelled_without_its_client_or_by_a_call(load):
    gate = Gate(load)
    app = create_app(replace(CONFIG, reconnect_seconds=0.3), gate)
    with serving(app) as url:
        engine = app.state.engine
        cancelled = engine.metrics.cancellations._value.get
        running = connect(url)
        wait_until(lambda: gate.waiting == 1)
        gone = connect(url, "gone")
        wait_until(lambda: engine.queue.images == 1)
        called = connect(url, "called", stream=True)
        wait_until(lambda: engine.queue.images == 2)
        gone.close()
        wait_until(lambda: cancelled() == 1)
        for _ in range(2):
            delete(url, "called")
        assert b'"code": "cancelled"' in received(called)
        assert cancelled() == 2 and engine.queue.images == 0
        gate.open.set()
        assert b"b64_json" in received(running)


def test_a_job_belongs_to_the_key_that_submitted_it(load):
    gate = Gate(load)
    with client_of(gate, api_keys=("first", "second")) as client:
        headers = {"x-unclip-job": "one", "authorization": "Bearer first"}
        answers = []

        def send():
            answers.append(client.post(GENERATIONS, json=BODY, headers=headers))

        thread = threading.Thread(target=send)
        thread.start()
        wait_until(lambda: gate.waiting)
        other = {"authorization": "Bearer second"}
        assert client.delete("/v1/jobs/one", headers=other).status_code == 204
        assert client.delete("/v1/jobs/one").status_code == 401
        gate.open.set()
        thread.join()
        assert answers[0].status_code == 200


def test_an_id_with_another_body_is_409(load):
    gate = Gate(load)
    app = create_app(CONFIG, gate)
    body = {"options": {"decoder": {"eta": 0.5, "steps": 2}}}
    same = {"options": {"decoder": {"steps": 2, "eta": 0.5}}, "stream": True, "size": "32x32"}
    with serving(app) as url:
        first = connect(url, "mine", **body)
        wait_until(lambda: gate.waiting == 1)
        for other in (
            {"prompt": "a blue fish"},
            {"model": "tiny-dalle"},
            {"n": 2},
            {"options": {}},
        ):
            answer = received(connect(url, "mine", **{**body, **other}))
            assert answer.startswith(b"HTTP/1.1 409") and b'"code":"conflict"' in answer
        gate.open.set()
        assert b"b64_json" in received(first)
        assert b'"size": "32x32"' in received(connect(url, "mine", **same))
        assert app.state.engine.metrics.images.labels("tiny", "generations")._value.get() == 1


def test_an_id_with_another_upload_is_409(client):
    def edit(seed):
        files = {"image": png(mode="RGBA", seed=seed)}
        return client.post(EDITS, files=files, data=BODY, headers={"x-unclip-job": "edit"})

    assert [edit(seed).status_code for seed in (1, 1, 2)] == [200, 200, 409]


@pytest.mark.parametrize("id", ["", "a/b", "a b", "\u00e9", "a" * 129])
def test_ids_are_checked(client, id):
    headers = {"x-unclip-job": id.encode("latin-1")}
    refused = client.post(GENERATIONS, json=BODY, headers=headers)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "x-unclip-job"
    assert client.post(GENERATIONS, json=BODY, headers={"x-unclip-job": "a" * 128}).is_success


def test_a_cancelled_id_can_be_used_again(load):
    gate = Gate(load)
    app = create_app(replace(CONFIG, reconnect_seconds=0.3), gate)
    with serving(app) as url:
        first = connect(url, "mine")
        wait_until(lambda: gate.waiting == 1)
        delete(url, "mine")
        assert b'"code":"cancelled"' in received(first)
        again = connect(url, "mine")
        wait_until(lambda: app.state.engine.queue.images == 1)
        time.sleep(0.6)  # the first one expires
        gate.open.set()
        assert b"b64_json" in received(again)


def test_after_an_error_the_same_request_begins_anew(load):
    gate = Gate(load)
    with client_of(gate, queue_seconds=0.3) as client:
        thread = threading.Thread(target=client.post, args=(GENERATIONS,), kwargs={"json": BODY})
        thread.start()
        wait_until(lambda: gate.waiting)
        call = {"json": BODY, "headers": {"x-unclip-job": "mine"}}
        late = client.post(GENERATIONS, **call)
        assert late.status_code == 503 and late.headers["x-unclip-model"] == "tiny"
        gate.open.set()
        thread.join()
        assert client.post(GENERATIONS, **call).status_code == 200


def test_a_request_can_be_cancelled_while_its_image_is_decoded(load, monkeypatch):
    started, resume, decode = threading.Event(), threading.Event(), uploads.decode_image

    def slowly(*args):
        started.set()
        assert resume.wait(20)
        return decode(*args)

    monkeypatch.setattr(uploads, "decode_image", slowly)
    with client_of(load) as client:
        answers = []

        def send():
            call = {"files": {"image": png(mode="RGBA")}, "data": BODY}
            answers.append(client.post(EDITS, **call, headers={"x-unclip-job": "mine"}))

        thread = threading.Thread(target=send)
        thread.start()
        assert started.wait(20)
        assert client.delete("/v1/jobs/another").status_code == 204
        assert client.delete("/v1/jobs/mine").status_code == 204
        resume.set()
        thread.join()
        assert answers[0].json()["error"]["code"] == "cancelled"
        assert client.app.state.engine.metrics.batch_images._sum.get() == 0
        send()
        assert answers[1].status_code == 200


def test_results_without_their_clients_are_bounded_and_expire(load, monkeypatch):
    monkeypatch.setattr(jobs_module, "MAX_FINISHED", 3)
    ids = [f"job-{k}" for k in range(8)]

    def finish():
        for id in ids:
            headers = {"x-unclip-job": id}
            assert client.post(GENERATIONS, json=BODY, headers=headers).status_code == 200
        return client.app.state.jobs

    with client_of(load, reconnect_seconds=60) as client:
        jobs = finish()
        assert [id for id in ids if jobs.get("", id) is not None] == ids[4:]
    with client_of(load, reconnect_seconds=0.1) as client:
        jobs = finish()
        wait_until(lambda: all(jobs.get("", id) is None for id in ids))


def test_errors_of_a_batch_have_the_headers_of_their_own_requests(load):
    gate = Gate(load)

    def load_one(name, device, dtype):
        if name == "tiny":
            return gate(name, device, dtype)
        raise ValueError("a broken file")

    app = create_app(CONFIG, load_one)
    with serving(app) as url:
        connections = [connect(url)]
        wait_until(lambda: gate.waiting)
        connections.append(connect(url, model="tiny-dalle", foo=1))
        wait_until(lambda: app.state.engine.queue.images == 1)
        connections.append(connect(url, model="tiny-dalle"))
        wait_until(lambda: app.state.engine.queue.images == 2)
        gate.open.set()
        answers = [received(connection) for connection in connections]
        assert all(b"a broken file" in answer for answer in answers[1:])
        assert [b"x-unclip-ignored: foo" in answer for answer in answers] == [False, True, False]
