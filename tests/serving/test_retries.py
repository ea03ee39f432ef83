"""The middleware of Ray's HTTP proxy, around applications that act like Ray with dead replicas."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("fastapi")

from starlette.responses import PlainTextResponse, Response
from starlette.testclient import TestClient

from unclip.serving import retries
from unclip.serving.errors import queue_full

OURS = {"openai-version": "2020-10-01", "x-request-id": "req_1"}


class Proxy:
    """Serve each attempt with the next of `attempts`; the last one is repeated."""

    def __init__(self, *attempts):
        self.attempts, self.bodies = list(attempts), []

    async def __call__(self, scope, receive, send):
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        self.bodies.append(body)
        attempt = self.attempts.pop(0) if len(self.attempts) > 1 else self.attempts[0]
        if isinstance(attempt, Exception):
            raise attempt
        if attempt is not None:  # else Ray ends without a response
            await attempt(scope, receive, send)


async def dying_stream(scope, receive, send):
    headers = [(b"content-type", b"text/event-stream"), (b"openai-version", b"2020-10-01")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b": ping\n\n", "more_body": True})


@pytest.fixture
def ask(monkeypatch):
    monkeypatch.setattr(retries, "FIRST_DELAY", 0.001)

    def ask(proxy, path="/v1/images/generations"):
        client = TestClient(retries.RetryElsewhere(proxy), raise_server_exceptions=False)
        return client.post(path, content=b"the body")

    return ask


@pytest.mark.parametrize(
    "death", [None, ConnectionError("dead"), PlainTextResponse("Internal Server Error", 500)]
)
def test_a_request_of_a_dead_replica_is_sent_again(ask, death):
    proxy = Proxy(death, death, Response("image", headers=OURS))
    response = ask(proxy)
    assert (response.status_code, response.text) == (200, "image")
    assert proxy.bodies == [b"the body"] * 3
    assert response.headers["x-request-id"] == "req_1"


@pytest.mark.parametrize("status", [200, 404, 429, 500, 503])
def test_answers_of_replicas_are_passed_on(ask, status):
    proxy = Proxy(Response("answer", status, {**OURS, "X-Request-ID": "of Ray"}))
    response = ask(proxy)
    assert (response.status_code, response.text) == (status, "answer")
    assert len(proxy.bodies) == 1


def test_errors_of_the_queue_are_passed_on(ask):
    response = ask(Proxy(queue_full(7).response()))
    assert (response.status_code, response.headers["retry-after"]) == (429, "7")


@pytest.mark.parametrize("death", [None, PlainTextResponse("no replicas", 503)])
def test_without_replicas_the_answer_is_an_error_of_openai(ask, death):
    proxy = Proxy(death)
    response = ask(proxy)
    assert response.status_code == 503 and int(response.headers["retry-after"]) > 0
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert len(proxy.bodies) == retries.ATTEMPTS


def test_a_stream_of_a_dead_replica_ends_with_an_error(ask):
    proxy = Proxy(dying_stream)
    *_, last, end = ask(proxy).text.split("\n\n")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "unavailable" and not end
    assert len(proxy.bodies) == 1


def test_large_bodies_are_not_kept(ask, monkeypatch):
    monkeypatch.setattr(retries, "MAX_KEPT", 3)
    proxy = Proxy(None)
    assert ask(proxy).status_code == 503
    assert proxy.bodies == [b"the body"]


def test_routes_of_ray_are_left_alone(ask):
    assert ask(Proxy(PlainTextResponse("unhealthy", 503)), "/-/healthz").text == "unhealthy"
