"""Runs the application: logs, signals and graceful shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from unclip.serving.app import create_app
from unclip.serving.config import ServerConfig
from unclip.serving.engine import Engine
from unclip.serving.logs import configure_logs, log_warning

# Thread switch interval; with Python's default of 5 ms, responses wait for the engine's steps.
SWITCH_SECONDS = 0.0005
MAX_HEAD = 2**16  # bytes of a request before its body
HEAD_SECONDS = 60.0  # for all of them
PROBE_SECONDS = 0.25

log = logging.getLogger("unclip.serving")


class Protocol(HttpToolsProtocol):
    """HTTP with limits on the size and time of a request's head, and for half-closed connections.

    The head is the URL and the headers. uvicorn has no limit for it, and drops a client that
    closes its side after a request.
    """

    _in_head, _head = False, 0
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head = True, 0

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_head_timer()
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        headers = self.headers
        super().data_received(data)
        if self._in_head and self.headers is headers:  # a request that an earlier call began
            self._head += len(data)
            if self._head > MAX_HEAD and not self.transport.is_closing():
                self.send_400_response(f"The headers are longer than {MAX_HEAD} bytes.")
        if self._head_timer is None and (self._in_head or not self._response_due):
            self._start_head_timer()

    def eof_received(self) -> Any:
        """Keep a half-closed connection open while a response is due, and close it then."""
        if (
            not self._response_due
            or self.cycle.more_body
            or self.cycle.scope["http_version"] < "1.1"
        ):
            return False
        self.cycle.keep_alive = False
        self._probe()
        return True

    @property
    def _response_due(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _probe(self) -> None:
        """Send interim responses until the final one: they fail if the client has gone."""
        if not self.cycle.response_started and not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.loop.call_later(PROBE_SECONDS, self._probe)

    def _start_head_timer(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_SECONDS, self._on_head_timeout)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _on_head_timeout(self) -> None:
        if self._response_due:  # of the request before
            self._start_head_timer()
        else:
            self.transport.close()


class Server(uvicorn.Server):
    """A server that exits with status 0 after SIGTERM, when all jobs are done or abandoned."""

    def __init__(self, config: uvicorn.Config, engine: Engine, drain_seconds: float) -> None:
        super().__init__(config)
        self.engine, self.drain_seconds = engine, drain_seconds
        self._draining: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        yield

    async def on_tick(self, counter: int) -> bool:
        """Return whether to stop, also if the default model cannot be loaded."""
        return await super().on_tick(counter) or self.engine.failure is not None

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer the requests that are not finished with 503, and close all connections."""
        self.engine.abandon()
        await super().shutdown(sockets)

    def _on_signal(self) -> None:
        if self._draining is not None:  # the second signal
            self.should_exit = self.force_exit = True
            return
        log.info("draining")
        self.engine.drain()
        self._draining = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        """Finish accepted requests, for at most drain_seconds; then exit."""
        end = time.monotonic() + self.drain_seconds
        while not self.engine.idle and time.monotonic() < end:
            await asyncio.sleep(0.05)
        self.should_exit = True


def configure_process() -> None:
    """Configure logs and thread switching of a process that runs only the application."""
    configure_logs()
    warnings.showwarning = log_warning
    sys.setswitchinterval(SWITCH_SECONDS)


def bind(host: str, port: int) -> list[socket.socket]:
    """Bind a port on all addresses of a host. OSError if it is taken, or not permitted."""

    async def bound() -> list[socket.socket]:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(asyncio.Protocol, host, port, start_serving=False)
        sockets = [one.dup() for one in server.sockets]
        server.close()
        return sockets

    try:
        return asyncio.run(bound())
    except OSError as error:
        reason = str(error.strerror).rpartition(": ")[2]
        advice = "choose another address (--host, --port)"
        raise OSError(f"cannot listen on {host}:{port}: {reason}; {advice}") from None


def serve(config: ServerConfig) -> None:
    """Serve until SIGTERM or SIGINT. OSError, before a model is loaded, if the port is taken."""
    configure_process()
    app = create_app(config)
    settings = uvicorn.Config(
        app,
        http=Protocol,
        host=config.host,
        port=config.port,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=10,
        lifespan="on",
    )
    sockets = bind(config.host, config.port)
    log.info("listening", extra={"host": config.host, "port": config.port, "models": config.models})
    server = Server(settings, app.state.engine, config.drain_seconds)
    server.run(sockets)
    if app.state.engine.failure is not None:
        raise ValueError(app.state.engine.failure)
