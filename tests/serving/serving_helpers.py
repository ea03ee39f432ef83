"""Servers of models with random weights: in this process, and on a socket."""

from __future__ import annotations

import contextlib
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

import uvicorn
from starlette.testclient import TestClient

from unclip.serving.app import create_app
from unclip.serving.config import ServerConfig
from unclip.serving.server import Protocol, Server

LOCAL = "http://127.0.0.1"
GENERATIONS = "/v1/images/generations"
BODY = {"prompt": "a red apple", "response_format": "b64_json"}
CONFIG = ServerConfig(models=("tiny", "tiny-dalle"), batch_seconds=0.02)


@pytest.fixture(scope="session")
def load(tiny_pipe, tiny_dalle) -> Callable[..., Any]:
    pipes = {"tiny": tiny_pipe, "tiny-dalle": tiny_dalle}
    return lambda name, device, dtype: pipes[name]


@contextlib.contextmanager
def client_of(load: Callable[..., Any], **changes: Any) -> Iterator[TestClient]:
    """Yield a client of an application that is ready."""
    app = create_app(replace(CONFIG, **changes), load)
    with TestClient(app, base_url=LOCAL, raise_server_exceptions=False) as client:
        wait_until(lambda: app.state.engine.ready)
        yield client


@pytest.fixture(scope="module")
def client(load) -> Iterator[TestClient]:
    with client_of(load) as client:
        yield client


@pytest.fixture(scope="module")
def server(load) -> Iterator[str]:
    """The address of a server on a socket."""
    with serving(create_app(CONFIG, load)) as url:
        yield url


class ThreadServer(Server):
    capture_signals = uvicorn.Server.capture_signals  # none outside the main thread


@contextlib.contextmanager
def serving(app: Any) -> Iterator[str]:
    """Serve an application on a free port, in a thread; yield its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = uvicorn.Config(app, http=Protocol, port=port, log_config=None, lifespan="on")
    server = ThreadServer(settings, app.state.engine, drain_seconds=60)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started and app.state.engine.ready)
    yield f"{LOCAL}:{port}"
    server.should_exit = True
    thread.join(timeout=20)


def wait_until(condition: Callable[[], Any], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.005)


def png(size: int = 16, mode: str = "RGB", kind: str = "PNG", seed: int = 0) -> bytes:
    """Encode an image of random pixels; with alpha, its upper half is transparent."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    image = Image.fromarray(pixels)
    if mode == "RGBA":
        image = image.convert("RGBA")
        image.paste((0, 0, 0, 0), (0, 0, size, size // 2))
    file = io.BytesIO()
    image.convert(mode).save(file, kind)
    return file.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(opened(data).convert("RGB")).astype(int)


class Gate:
    """A loader of pipelines that wait in every call until the gate is open."""

    def __init__(self, load, delay=0.0):
        self.load, self.open, self.waiting, self.delay = load, threading.Event(), 0, delay

    def __call__(self, name, device, dtype):
        time.sleep(self.delay)
        pipe, gate = self.load(name, device, dtype), self

        class Waiting:
            def __getattr__(self, name):
                return getattr(pipe, name)

            def __call__(self, *args, **kwargs):
                gate.waiting += 1
                assert gate.open.wait(20)
                return pipe(*args, **kwargs)

        return Waiting()


def connect(url: str, job: str | None = None, **fields: Any) -> socket.socket:
    """Send a request for images, and return the connection."""
    body = json.dumps({**BODY, **fields}).encode()
    connection = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=20)
    head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n"
    head += f"X-Unclip-Job: {job}\r\n" if job else ""
    head += "Connection: close\r\nContent-Type: application/json\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


def received(connection: socket.socket) -> bytes:
    with connection, connection.makefile("rb") as file:
        return file.read()
