"""Probes, metrics, a full queue, deadlines, disconnecting clients, and the command."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from dataclasses import replace

import pytest
from scripts import ROOT
from serving_helpers import (
    BODY,
    CONFIG,
    GENERATIONS,
    Gate,
    client_of,
    load,
    serving,
    wait_until,
)

from unclip.cli.main import main
from unclip.serving import middleware
from unclip.serving import server as server_module
from unclip.serving.app import create_app
from unclip.serving.server import PROBE_SECONDS


def in_background(client, results, **fields):
    def post():
        results.append(client.post(GENERATIONS, json={**BODY, **fields}))

    thread = threading.Thread(target=post)
    thread.start()
    return thread


def test_readiness(load):
    gate = Gate(load, delay=0.3)
    app = create_app(CONFIG, gate)
    from starlette.testclient import TestClient

    with TestClient(app, base_url="http://127.0.0.1") as client:
        loading = client.get("/readyz")
        assert (loading.status_code, loading.json()) == (503, {"status": "loading"})
        assert client.get("/healthz").status_code == 200
        wait_until(lambda: client.get("/readyz").status_code == 200)
        app.state.engine.drain()
        assert client.get("/readyz").json() == {"status": "draining"}
        refused = client.post(GENERATIONS, json=BODY)
        assert refused.status_code == 503 and refused.headers["retry-after"]


def test_a_full_queue_is_429(load):
    gate = Gate(load)
    with client_of(gate, max_queue=2) as client:
        results = []
        threads = [in_background(client, results)]
        wait_until(lambda: gate.waiting)
        threads += [in_background(client, results, n=2)]
        wait_until(lambda: client.app.state.engine.queue.images == 2)
        refused = client.post(GENERATIONS, json=BODY)
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        gate.open.set()
        for thread in threads:
            thread.join()
        assert [response.status_code for response in results] == [200, 200]


def test_waiting_too_long_is_503(load):
    gate = Gate(load)
    with client_of(gate, queue_seconds=0.2) as client:
        results = []
        thread = in_background(client, results)
        wait_until(lambda: gate.waiting)
        late = client.post(GENERATIONS, json=BODY)
        assert (late.status_code, late.json()["error"]["type"]) == (503, "server_error")
        assert 1 <= int(late.headers["retry-after"]) <= 60
        streamed = client.post(GENERATIONS, json={**BODY, "stream": True})
        assert '"code": "unavailable"' in streamed.text
        assert client.app.state.engine.metrics.cancellations._value.get() == 0
        gate.open.set()
        thread.join()
        assert results[0].status_code == 200


def test_metrics(load):
    with client_of(load) as client:
        client.post(GENERATIONS, json={**BODY, "n": 2})
        client.get("/nothing")
        text = client.get("/metrics").text
    for line in (
        'unclip_requests_total{route="/v1/images/generations",status="200"} 1.0',
        'unclip_requests_total{route="other",status="404"} 1.0',
        'unclip_images_total{model="tiny",operation="generations"} 2.0',
        'unclip_batch_images_bucket{le="2.0"} 1.0',
        "unclip_queue_images 0.0",
    ):
        assert line in text, text
    assert 'unclip_stage_seconds_total{stage="upsampler_0"}' in text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("started", [False, True])
def test_a_client_that_disconnects_cancels_its_job(load, stream, started):
    gate = Gate(load)
    app = create_app(CONFIG, gate)
    with serving(app) as url:
        engine = app.state.engine
        if not started:
            other = threading.Thread(target=post, args=(url, BODY))
            other.start()
            wait_until(lambda: gate.waiting == 1)
        body = json.dumps({**BODY, "stream": stream}).encode()
        connection = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])))
        head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n"
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        wait_until(lambda: gate.waiting == 1 and engine.queue.images == (0 if started else 1))
        connection.close()
        wait_until(lambda: engine.metrics.cancellations._value.get() == 1)
        assert engine.queue.images == 0
        gate.open.set()
        wait_until(lambda: engine.idle)
        if not started:
            other.join()
        assert engine.metrics.images.labels("tiny", "generations")._value.get() == (not started)
        assert post(url, BODY) == 200


def test_a_client_that_closes_its_side_gets_the_responses(load):
    gate = Gate(load)
    with serving(create_app(CONFIG, gate)) as url:
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
            body = json.dumps(BODY).encode()
            head = "Host: 127.0.0.1\r\nContent-Type: application/json\r\n"
            connection.sendall(
                f"POST {GENERATIONS} HTTP/1.1\r\n{head}Content-Length: {len(body)}\r\n\r\n".encode()
                + body
                + f"GET /healthz HTTP/1.1\r\n{head}\r\n".encode()
            )
            connection.shutdown(socket.SHUT_WR)
            wait_until(lambda: gate.waiting == 1)
            time.sleep(2 * PROBE_SECONDS)
            gate.open.set()
            with connection.makefile("rb") as file:
                received = file.read()
    assert received.count(b"HTTP/1.1 200 OK") == 2
    assert b'"b64_json"' in received and b'{"status":"ok"}' in received


@pytest.mark.parametrize(
    "sent", [b"", b"GET /healthz HT", b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n\r\nGET"]
)
def test_a_connection_without_a_whole_request_is_closed(load, monkeypatch, sent):
    monkeypatch.setattr(server_module, "HEAD_SECONDS", 0.3)
    with serving(create_app(CONFIG, load)) as url:
        address = "127.0.0.1", int(url.rpartition(":")[2])
        with socket.create_connection(address, timeout=20) as connection:
            connection.sendall(sent)
            with connection.makefile("rb") as file:
                assert file.read().count(b"HTTP/1.1 200") == sent.count(b"\r\n\r\n")


@pytest.mark.parametrize(("length", "status"), [(1000, 408), (2**30, 413)])
def test_a_body_that_comes_slowly_ends_the_request(load, monkeypatch, length, status):
    monkeypatch.setattr(middleware, "BODY_SECONDS", 0.5)
    monkeypatch.setattr(middleware, "DISCARD_SECONDS", 0.5)
    with serving(create_app(CONFIG, load)) as url:
        address = "127.0.0.1", int(url.rpartition(":")[2])
        with socket.create_connection(address, timeout=20) as connection:
            head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {length}\r\n"
            connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode())
            started, received = time.monotonic(), []
            with connection.makefile("rb") as file:
                reader = threading.Thread(target=lambda: received.append(file.read()))
                reader.start()
                while reader.is_alive() and time.monotonic() < started + 10:
                    with contextlib.suppress(OSError):  # once it is closed
                        connection.sendall(b" ")
                    reader.join(0.1)
    (response,) = received
    assert response.startswith(f"HTTP/1.1 {status}".encode())
    error = json.loads(response.partition(b"\r\n\r\n")[2])["error"]
    assert error["type"] == "invalid_request_error" and {*error} >= {"message", "param", "code"}
    assert ("slowly" if status == 408 else "larger") in error["message"]


def test_jobs_that_outlast_the_shutdown_are_answered_with_503(load):
    gate = Gate(load)
    app = create_app(replace(CONFIG, max_batch=1), gate)
    threads, answers = [], {}

    def send(key, **fields):
        answers[key] = answer(url, {**BODY, **fields})

    def open_gate():
        for thread in threads:
            thread.join()
        gate.open.set()

    with serving(app) as url:
        for key, fields in (("running", {}), ("waiting", {}), ("streamed", {"stream": True})):
            threads.append(threading.Thread(target=send, args=(key,), kwargs=fields))
            threads[-1].start()
            wait_until(lambda: gate.waiting and app.state.engine.queue.images == len(threads) - 1)
        threading.Thread(target=open_gate).start()
    for key in ("running", "waiting"):
        status, retry_after, text = answers[key]
        assert (status, retry_after) == (503, "5")
        assert json.loads(text)["error"]["message"] == "The server is shutting down."
    assert "The server is shutting down." in answers["streamed"][2]


def answer(url, body):
    """Return status, Retry-After and text of the response."""
    request = urllib.request.Request(
        url + GENERATIONS, json.dumps(body).encode(), {"content-type": "application/json"}
    )
    try:
        response = urllib.request.urlopen(request, timeout=20)
    except urllib.error.HTTPError as error:
        response = error
    with response:
        return response.status, response.headers["retry-after"], response.read().decode()


def post(url, body):
    return answer(url, body)[0]


def test_waiting_streams_tell_their_position(load):
    gate = Gate(load)
    with client_of(gate) as client:
        threads = [in_background(client, [])]
        wait_until(lambda: gate.waiting)
        threading.Timer(1.5, gate.open.set).start()
        text = client.post(GENERATIONS, json={**BODY, "stream": True}).text
        assert ': {"queue_position": 1}' in text
        for thread in threads:
            thread.join()


# -- the command


def test_the_command_checks_its_arguments(capsys):
    assert main(["serve", "--host", "0.0.0.0"]) == 2
    assert "--api-key" in capsys.readouterr().err
    assert main(["serve", "--model", "no-such-model"]) == 2
    assert "no-such-model" in capsys.readouterr().err
    assert main(["serve", "--model", "emoji", "--model", "emoji=emoji-dalle1"]) == 2
    assert (
        "two models have the id emoji; choose ids with --model ID=NAME" in capsys.readouterr().err
    )
    for model in ("x=", "=emoji"):
        assert main(["serve", "--model", model]) == 2
        assert f"--model is {model!r}; expected a model, or ID=NAME" in capsys.readouterr().err
    assert main(["serve", "--port", "99999"]) == 2
    assert "'99999' is not a port; expected a number from 1 to 65535" in capsys.readouterr().err
    for flag in ("--replicas", "--num-cpus", "--num-gpus"):
        assert main(["serve", flag, "2"]) == 2
        assert f"{flag} needs --ray" in capsys.readouterr().err


def test_a_taken_port_is_one_line_and_no_model_is_loaded(tiny_folder, monkeypatch, capsys):
    loaded = []
    monkeypatch.setattr("unclip.serving.server.configure_process", lambda: None)  # it is this one
    monkeypatch.setattr("unclip.pipelines.load", lambda *where: loaded.append(where))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", "--port", port, "--model", str(tiny_folder)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: cannot listen on 127.0.0.1:{port}: address already in")
    assert not loaded


@pytest.mark.parametrize("size", [1000, 2**20])
def test_only_the_headers_of_a_request_are_limited(load, size):
    """Long bodies, and short requests in one piece, are not."""
    with serving(create_app(CONFIG, load)) as url:
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
            head = f"POST /nowhere HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {size}\r\n\r\n"
            last = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
            connection.sendall((head.encode() + b"a" * size) * 20 + last)
            with connection.makefile("rb") as file:
                received = file.read()
    assert received.count(b"HTTP/1.1 404") == 20 and received.count(b"HTTP/1.1 200") == 1


def test_sigterm_drains_and_exits_with_0(tiny_folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "unclip", "serve", "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--model", str(tiny_folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    url = f"http://127.0.0.1:{port}"

    def ready():
        try:
            with urllib.request.urlopen(f"{url}/readyz") as response:
                return response.status == 200
        except OSError:
            return False

    try:
        wait_until(ready, 180)
        # One connection cannot fill the memory with headers, not even without a key.
        with socket.create_connection(("127.0.0.1", port), timeout=20) as endless:
            endless.sendall(b"GET / HTTP/1.1\r\nX: ")
            with pytest.raises(OSError):
                for _ in range(100):
                    endless.sendall(b"a" * 2**20)
        assert ready()
        statuses = []
        body = {**BODY, "n": 4, "steps": 50}
        thread = threading.Thread(target=lambda: statuses.append(post(url, body)))
        thread.start()
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
        thread.join()
    finally:
        process.kill()
    assert process.returncode == 0, errors
    assert statuses == [200]
    events = [json.loads(line)["event"] for line in errors.splitlines()]
    assert "draining" in events and "Traceback" not in errors
