"""Middleware of every request: key, host, body limit, request id, headers, metrics, log."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
import secrets
import time
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from unclip.serving.config import is_loopback
from unclip.serving.errors import APIError, failed, too_large, too_slow, unauthorized
from unclip.serving.jobs import JOB_ID, Jobs, rejection
from unclip.serving.requests import BODIES

log = logging.getLogger("unclip.serving")

OPENAI_VERSION = "2020-10-01"
DISCARDED = 64 * 2**20  # bytes read above the limit, so that the client sees the response
BODY_SECONDS = 60.0  # without a byte; also before BODY_RATE is required
BODY_RATE = 2**14  # bytes per second, on average
DISCARD_SECONDS = 30.0  # at most, for these bytes
PROBES = ("/healthz", "/readyz", "/metrics")
IMAGES = frozenset(f"/v1/images/{operation}" for operation in BODIES)
DEFAULT_PORTS = {"http": ":80", "https": ":443"}
SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cross-origin-resource-policy": "same-origin",
}


class Guard:
    """ASGI middleware around the application."""

    def __init__(self, app: ASGIApp, jobs: Jobs) -> None:
        self.app, self.jobs, self.engine = app, jobs, jobs.engine
        self.config, self.metrics = self.engine.config, self.engine.metrics
        self.headers = {**SECURITY_HEADERS}
        if self.config.allow_origins:  # also <img> elements of these sites
            self.headers["cross-origin-resource-policy"] = "cross-origin"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started, status = time.perf_counter(), 0
        request_id = f"req_{secrets.token_hex(16)}"
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers["openai-version"] = OPENAI_VERSION
                elapsed = 1000 * (time.perf_counter() - started)
                headers["openai-processing-ms"] = f"{elapsed:.0f}"
                for name, value in self.headers.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            try:
                self._check(scope)
                self._admit(scope)
                limited = LimitedBody(scope, receive, self.config.max_body)
                await limited.check_length()
                await self.app(scope, limited.receive, send_with_headers)
            except APIError as error:
                await error.response()(scope, receive, send_with_headers)
            except ClientDisconnect:
                status = status or 499
            except Exception:
                log.exception("unexpected_error", extra={"request_id": request_id})
                if not status:
                    await failed().response()(scope, receive, send_with_headers)
        finally:
            self._record(scope, status or 499, time.perf_counter() - started, request_id)

    def _check(self, scope: Scope) -> None:
        """Raise APIError unless the request is allowed."""
        headers = Headers(scope=scope)
        if not self.config.api_keys:
            self._check_origin(headers)
        elif not is_public(scope["path"], scope["method"]):
            scheme, _, given = headers.get("authorization", "").partition(" ")
            given = given.strip()
            if scheme.lower() != "bearer" or not given:
                raise unauthorized(None)
            # Compared by digest, so that neither timing nor length reveals the keys.
            digest = hashlib.sha256(given.encode("utf-8", "surrogateescape")).digest()
            known = [
                hmac.compare_digest(hashlib.sha256(key.encode()).digest(), digest)
                for key in self.config.api_keys
            ]
            if not any(known):
                raise unauthorized(given)
            scope["state"]["client"] = digest.hex()[:16]
        scope["state"].setdefault("client", "")

    def _admit(self, scope: Scope) -> None:
        """Raise APIError for images if the queue is full, before the body is read."""
        if scope["method"] == "POST" and scope["path"] in IMAGES and not self.engine.closing:
            known = self.jobs.get(scope["state"]["client"], Headers(scope=scope).get(JOB_ID))
            if self.engine.queue.full and known is None:
                raise rejection(self.engine)

    def _check_origin(self, headers: Headers) -> None:
        """Reject other web sites, which can reach a loopback address through the user's browser."""
        url, host = self.config.public_base_url, headers.get("host", "").lower()
        allowed = set() if url is None else {site(url)}
        foreign = {site(origin) for origin in self.config.allow_origins}
        if not is_loopback(host_name(host)) and host not in allowed:
            raise APIError(403, "The Host header is not a name of this server.", code="wrong_host")
        origin = headers.get("origin")
        if origin is not None and site(origin) not in {host, *allowed, *foreign}:
            raise APIError(
                403, "Requests from other web sites are not allowed.", code="wrong_origin"
            )

    def _record(self, scope: Scope, status: int, seconds: float, request_id: str) -> None:
        path = scope["path"]
        route = path if path in IMAGES else getattr(scope.get("route"), "path", "other")
        self.metrics.requests.labels(route, str(status)).inc()
        self.metrics.latency.labels(route).observe(seconds)
        about = scope["state"].get("log", {})
        fields = {"method": scope["method"], "route": route, "status": status}
        extra = {"request_id": request_id, **fields, "ms": round(1000 * seconds, 1), **about}
        level = logging.DEBUG if route in PROBES else logging.INFO
        log.log(level, "request", extra=extra)


class LimitedBody:
    """The body of a request, counted while it is read."""

    def __init__(self, scope: Scope, receive: Receive, limit: int) -> None:
        self.scope, self._receive, self.limit = scope, receive, limit
        self.count, self.complete = 0, False
        self._started = time.monotonic()

    async def check_length(self) -> None:
        """Raise APIError if the declared length is above the limit."""
        length = Headers(scope=self.scope).get("content-length", "")
        if length.isdecimal() and int(length) > self.limit:
            await self._reject()

    async def receive(self) -> Message:
        if self.complete:
            return await self._receive()  # waits until the client disconnects
        elapsed = time.monotonic() - self._started
        try:
            message = await self._next(min(0.0, self.count / BODY_RATE - elapsed) + BODY_SECONDS)
        except asyncio.TimeoutError:
            raise too_slow() from None
        if self.count > self.limit:
            await self._reject()
        return message

    async def _next(self, timeout: float) -> Message:
        message = await asyncio.wait_for(self._receive(), timeout)
        self.complete = message["type"] == "http.disconnect" or not message.get("more_body")
        self.count += len(message.get("body", b""))
        return message

    async def _reject(self) -> None:
        """Raise APIError, after a while: clients cut off while sending do not see the response."""
        end = time.monotonic() + DISCARD_SECONDS
        with contextlib.suppress(asyncio.TimeoutError):
            while not self.complete and self.count < self.limit + DISCARDED:
                await self._next(min(5.0, end - time.monotonic()))
        raise too_large(self.limit)


def is_public(path: str, method: str) -> bool:
    """Return whether a path needs no key: the page, probes, and results, whose names are secret."""
    if method not in ("GET", "HEAD"):
        return False
    if path.startswith("/v1/files/"):
        return True
    return not path.startswith("/v1") and path not in ("/metrics", "/openapi.json")


def site(url: str) -> str:
    """Return host and port of a URL as browsers write them: without the scheme's default port."""
    parts = urlsplit(url)
    return parts.netloc.lower().removesuffix(DEFAULT_PORTS.get(parts.scheme, ""))


def host_name(host: str) -> str:
    """Return a Host header without its port."""
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]
