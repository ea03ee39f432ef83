"""Injected exceptions and out-of-memory errors: every request has an answer, the next one works."""

from __future__ import annotations

import json
import random
import threading
import urllib.error
import urllib.request
from collections import Counter

import pytest
import torch
from serving_helpers import serving

from unclip.serving.app import create_app
from unclip.serving.config import ServerConfig

ERRORS = [
    RuntimeError("broken"),
    KeyError("x"),
    AssertionError(),
    ZeroDivisionError(),
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
    SystemExit(1),
    RecursionError(),
]


class Faulty:
    """A pipeline in which every other call fails."""

    def __init__(self, pipe):
        self.pipe, self.rng, self.faults, self.active = pipe, random.Random(0), 0, True

    def __getattr__(self, name):
        return getattr(self.pipe, name)

    def __call__(self, *args, **kwargs):
        if self.active and self.rng.random() < 0.5:
            self.faults += 1
            error = self.rng.choice(ERRORS)
            if self.rng.random() < 0.5:  # in the middle of sampling
                kwargs["on_step"] = lambda progress: fail(error)
            else:
                fail(error)
        return self.pipe(*args, **kwargs)


def fail(error):
    raise error


def post(url, body):
    request = urllib.request.Request(
        f"{url}/v1/images/generations",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.parametrize("faults", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_the_server_survives_faults(tiny_pipe, faults):
    faulty = Faulty(tiny_pipe)
    app = create_app(ServerConfig(models=("tiny",)), lambda *_: faulty)
    answers, lock = [], threading.Lock()

    def client(k):
        while faulty.faults < faults:
            answer = post(
                url, {"prompt": f"apple {k}", "n": 1 + k % 3, "response_format": "b64_json"}
            )
            with lock:
                answers.append(answer)

    with serving(app) as url:
        threads = [threading.Thread(target=client, args=(k,)) for k in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        faulty.active = False
        for _ in range(3):
            status, body = post(url, {"prompt": "apple", "response_format": "b64_json"})
            assert status == 200, body
    statuses = Counter(status for status, _ in answers)
    print(f"{faulty.faults} faults: {dict(statuses)}")
    assert set(statuses) <= {200, 500} and statuses[200]
    assert all("data" in body or body["error"]["type"] == "server_error" for _, body in answers)
