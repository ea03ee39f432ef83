"""Measure a server under load: batching on and off, a full queue, and a single client.

    python tests/serving/measure_load.py [--model emoji] [--seconds 20] [--rounds 2]

Servers run in processes of their own; rounds with batching on and off take turns.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
CLIENTS, CROWD = 8, 200


@contextlib.contextmanager
def running(*flags: str) -> Iterator[int]:
    """Run `unclip serve`; yield its port when it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "unclip", "serve", "--port", str(port), *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=environment, stderr=log)
        while get(port, "/readyz") != 200:
            if process.poll() is not None:
                raise RuntimeError("the server has ended")
            time.sleep(0.2)
        yield port
        process.send_signal(signal.SIGTERM)
        process.wait()


def get(port: int, path: str) -> int:
    with contextlib.suppress(OSError), contextlib.closing(connect(port)) as connection:
        connection.request("GET", path)
        return connection.getresponse().status
    return 0


def connect(port: int) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", port, timeout=300)


def generate(
    connection: http.client.HTTPConnection, prompt: str
) -> tuple[int, float, dict[str, str]]:
    """Request an image; return status, seconds and headers."""
    body = json.dumps({"prompt": prompt, "response_format": "b64_json", "seed": 1})
    started = time.perf_counter()
    headers = {"content-type": "application/json"}
    connection.request("POST", "/v1/images/generations", body, headers)
    response = connection.getresponse()
    response.read()
    return response.status, time.perf_counter() - started, dict(response.getheaders())


def closed_loop(port: int, clients: int, seconds: float) -> float:
    """Return images per second of `clients` clients that send one request after another."""
    finished: list[float] = []
    start = time.perf_counter()
    end = start + seconds

    def client(k: int) -> None:
        with contextlib.closing(connect(port)) as connection:
            while time.perf_counter() < end:
                status, _, _ = generate(connection, f"a red apple, number {k}")
                assert status == 200, status
                finished.append(time.perf_counter())

    in_parallel(client, clients)
    return len(finished) / (max(finished) - start)


def crowd(port: int, clients: int) -> tuple[Counter[int], float]:
    """Return the statuses of simultaneous requests, and the p99 seconds of those with status 429.

    All connections are opened first. A time is measured from the request to the status line.
    """
    answers = asyncio.run(ask_at_once(port, clients))
    refused = sorted(seconds for status, seconds in answers if status == 429)
    p99 = refused[min(len(refused) - 1, int(0.99 * len(refused)))] if refused else 0.0
    return Counter(status for status, _ in answers), p99


async def ask_at_once(port: int, clients: int) -> list[tuple[int, float]]:
    connections = [await asyncio.open_connection("127.0.0.1", port) for _ in range(clients)]

    async def ask(k: int) -> tuple[int, float]:
        reader, writer = connections[k]
        body = json.dumps({"prompt": f"a blue fish, number {k}"})
        head = f"POST /v1/images/generations HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        started = time.perf_counter()
        writer.write((head + body).encode())
        status = await reader.readline()
        seconds = time.perf_counter() - started
        writer.close()
        return int(status.split()[1]), seconds

    return await asyncio.gather(*map(ask, range(clients)))


def in_parallel(client, count: int) -> None:
    threads = [threading.Thread(target=client, args=(k,)) for k in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def single(port: int, count: int) -> tuple[float, float]:
    """Return the median latency of one client, and the part that the server adds."""
    latencies, added = [], []
    with contextlib.closing(connect(port)) as connection:
        for _ in range(count):
            status, seconds, headers = generate(connection, "a green tree")
            assert status == 200
            latencies.append(seconds)
            added.append(seconds - float(headers["x-unclip-pipeline-ms"]) / 1000)
    return statistics.median(latencies), statistics.median(added)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    model = ("--model", args.model)
    with running(*model) as batched, running(*model, "--max-batch", "1") as unbatched:
        for port in (batched, unbatched):
            single(port, 1)
        rates: dict[int, list[float]] = {batched: [], unbatched: []}
        for _ in range(args.rounds):
            for port, found in rates.items():
                found.append(closed_loop(port, CLIENTS, args.seconds))
        on, off = (statistics.mean(rates[port]) for port in (batched, unbatched))
        print(f"{args.model}, {CLIENTS} clients: {on:.2f} images/s, without batching {off:.2f}")
        print(f"ratio {on / off:.2f} (rounds: {rates[batched]}, {rates[unbatched]})")
        latency, added = single(batched, 10)
        print(f"one client: {latency:.3f} s, of which the server adds {1000 * added:.1f} ms")
        print(f"  = {100 * added / (latency - added):.1f} % of the pipeline's time")
    with running(*model, "--max-queue", "16") as port:
        single(port, 1)
        statuses, p99 = crowd(port, CROWD)
        print(f"{CROWD} clients: {dict(statuses)}, p99 of the 429s {1000 * p99:.0f} ms")
        assert set(statuses) <= {200, 429, 503}


if __name__ == "__main__":
    main()
