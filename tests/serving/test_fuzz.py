"""Malformed requests: no server error, no traceback in the log, no growing memory."""

from __future__ import annotations

import base64
import http.client
import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
from scripts import ROOT
from serving_helpers import png, wait_until

PATHS = [f"/v1/images/{name}" for name in ("generations", "edits", "variations")]
FIELDS = (
    "prompt model n size response_format user image images mask stream partial_images "
    "output_format "
    "output_compression background seed steps guidance sampler negative_prompt num_candidates "
    "embedding prior_steps prior_guidance prior_candidates "
    "strength image_embedding weights return_embedding indexed_partials quality x"
).split()
VALUES = [
    None,
    True,
    False,
    0,
    -1,
    3,
    99,
    10**30,
    1.5,
    -1e300,
    "",
    "a",
    "1",
    "-1",
    "nan",
    "1e400",
    "é" * 50,
    "\x00",
    "a" * 40_000,
    "256x256",
    "x" * 300,
    "1x1",
    "99999x99999",
    "png",
    "url",
    "b64_json",
    "auto",
    [],
    [1],
    ["a"],
    [[]],
    {},
    {"a": 1},
    [{"image_url": "http://x/"}],
    [{"image_url": {"url": 3}}],
    "data:image/png;base64,AAAA",
    "data:,",
    "http://127.0.0.1/",
    "file:///etc/passwd",
    "AAAA",
]
MODES = {"PNG": ["RGB", "RGBA", "L", "P", "1", "I;16"], "JPEG": ["RGB", "CMYK"], "WEBP": ["RGB"]}
IMAGES = [png(16, mode, kind) for kind, modes in MODES.items() for mode in modes]


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Cut, flip, repeat or insert bytes."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        how = rng.randrange(5)
        if how == 0:
            del data[at:]
        elif how == 1 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif how == 2:
            data[at:at] = rng.randbytes(rng.randint(1, 30))
        elif how == 3:
            data[at:at] = data[at : at + 50]
        else:
            data[at : at + 4] = rng.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff"])
    return bytes(data)


def json_body(rng):
    fields = {name: rng.choice(VALUES) for name in rng.sample(FIELDS, rng.randint(0, 8))}
    if rng.random() < 0.5:
        fields["image"] = base64.b64encode(damaged(rng.choice(IMAGES), rng)).decode()
    body = json.dumps(fields).encode()
    if rng.random() < 0.5:
        body = damaged(body, rng)
    if rng.random() < 0.02:
        body = b"[" * rng.randint(1, 100_000)
    return body, rng.choice(["application/json", "", "text/plain", "application/json; charset=x"])


def form_body(rng):
    boundary = rng.choice(["x", "----abc", "\\", 'a"b', "x" * 80])
    parts = []
    for _ in range(rng.randint(0, 6)):
        name, extra = rng.choice([*FIELDS, "image[]", "mask", '"', "a\r\nb", ""]), ""
        value = rng.choice([value for value in VALUES if isinstance(value, str)]).encode()
        if rng.random() < 0.5:
            name = rng.choice(["image", "image[]", "mask"])
            extra, value = '; filename="a.png"\r\nContent-Type: image/png', rng.choice(IMAGES)
            value = damaged(value, rng) if rng.random() < 0.8 else value
        head = f'Content-Disposition: form-data; name="{name}"{extra}\r\n\r\n'
        parts.append(f"--{boundary}\r\n{head}".encode() + value + b"\r\n")
    body = b"".join(parts) + f"--{boundary}--\r\n".encode()
    if rng.random() < 0.3:
        body = damaged(body, rng)
    kind = rng.choice([f"multipart/form-data; boundary={boundary}"] * 5 + ["multipart/form-data"])
    return body, kind


def send(connection, rng):
    """Send one malformed request; return its status."""
    body, kind = rng.choice([json_body, form_body, form_body])(rng)
    method, path = "POST", rng.choice(PATHS)
    if rng.random() < 0.1:
        method = rng.choice(["GET", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "BREW"])
        path = rng.choice(
            [*PATHS, "/v1/models/%00", "/v1/files/..%2f..", "/page/%ff", "/v1//", "/%c3"]
        )
    headers = {"content-type": kind} if kind else {}
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    response.read()
    return response.status


def memory(pid: int) -> float:
    """Return the resident memory of a process in MB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024


def attack(port: int, count: int, seed: int) -> Counter:
    rng, statuses = random.Random(seed), Counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    for _ in range(count):
        try:
            statuses[send(connection, rng)] += 1
        except (ConnectionError, http.client.HTTPException):  # closed by the server after an answer
            statuses["closed"] += 1
            connection.close()
    return statuses


@pytest.fixture(scope="module")
def process(tiny_folder, tmp_path_factory):
    """A server in a process of its own, with its port and its log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "log"
    command = [sys.executable, "-m", "unclip", "serve", "--port", str(port)]
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [*command, "--model", str(tiny_folder)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=errors,
        )

    def ready():
        connection = http.client.HTTPConnection("127.0.0.1", port)
        try:
            connection.request("GET", "/readyz")
            return connection.getresponse().status == 200
        except OSError:
            return False

    try:
        wait_until(ready, 180)
        yield process, port, log
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()


def run_attack(process, count, threads):
    results = []
    share = [
        threading.Thread(target=lambda k=k: results.append(attack(process[1], count, k)))
        for k in range(threads)
    ]
    for thread in share:
        thread.start()
    for thread in share:
        thread.join()
    return sum(results, Counter())


def check(process, statuses):
    server, _, log = process
    assert server.poll() is None
    assert not [status for status in statuses if isinstance(status, int) and status >= 500], (
        statuses
    )
    text = log.read_text()
    assert "Traceback" not in text and '"level": "error"' not in text, text[-3000:]


@pytest.mark.parametrize("name", ["", " ", " a ", "\t", "é", "a" * 2000, ",", "\r\nx: y"])
def test_any_field_name_can_be_ignored(process, name):
    connection = http.client.HTTPConnection("127.0.0.1", process[1], timeout=60)
    body = json.dumps({"prompt": "a", name: 1})
    connection.request("POST", PATHS[0], body, {"content-type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200
    assert response.headers["x-unclip-ignored"]
    check(process, Counter())


def test_a_long_prompt_is_not_logged(process):
    connection = http.client.HTTPConnection("127.0.0.1", process[1], timeout=60)
    body = json.dumps({"prompt": "secret " * 200})
    connection.request("POST", PATHS[0], body, {"content-type": "application/json"})
    assert connection.getresponse().status == 200
    assert "secret" not in process[2].read_text()


def test_malformed_requests(process):
    statuses = run_attack(process, count=200, threads=2)
    check(process, statuses)
    assert statuses[400] > 200 and statuses["closed"] < 8, statuses


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_10000_malformed_requests_leave_memory_alone(process):
    run_attack(process, count=500, threads=4)  # caches fill up
    before = memory(process[0].pid)
    statuses = run_attack(process, count=2500, threads=4)
    grown = memory(process[0].pid) - before
    print(dict(statuses), f"memory grew by {grown:.1f} MB from {before:.0f} MB")
    check(process, statuses)
    assert grown < 50
