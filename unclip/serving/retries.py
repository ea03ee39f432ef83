"""Middleware of Ray Serve's HTTP proxy: a request whose replica has died goes to another one.

The proxy calls `middlewares` if RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names it, in a process
without models.
"""

from __future__ import annotations

import asyncio
import json

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from unclip.serving.errors import unavailable

CALLBACK = f"{__name__}:middlewares"
ATTEMPTS = 6
FIRST_DELAY = 0.2  # seconds, doubled each time; meanwhile Ray detects the dead replica
MAX_KEPT = 32 * 2**20  # bytes of a body that can be sent again
DIED = "The replica that served the request has died."


def middlewares() -> list[Middleware]:
    """Return the middleware for the proxy."""
    return [Middleware(RetryElsewhere)]


class RetryElsewhere:
    """Sends a request again until a replica has answered it; otherwise 503 in OpenAI's form."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith("/-/"):  # Ray's own routes
            return await self.app(scope, receive, send)
        body = KeptBody(receive)
        for attempt in range(ATTEMPTS):
            answer = Answer(send)
            again = {**scope, "headers": [*scope["headers"]]}
            try:
                await self.app(again, body.reader(), answer.send)
            except Exception:
                if answer.complete:
                    raise
            if answer.complete or body.disconnected:
                return
            if answer.started:
                return await answer.abort()
            if not body.repeatable:
                break
            await asyncio.sleep(FIRST_DELAY * 2**attempt)
        await unavailable(DIED, 5).response()(scope, receive, send)


class KeptBody:
    """The messages of a request, kept to be read again."""

    def __init__(self, receive: Receive) -> None:
        self._receive, self._bytes = receive, 0
        self._messages: list[Message] = []
        self.disconnected = False

    @property
    def repeatable(self) -> bool:
        return self._bytes <= MAX_KEPT

    def reader(self) -> Receive:
        """Return a `receive` that starts at the beginning of the body."""
        position = 0

        async def read() -> Message:
            nonlocal position
            if position == len(self._messages):
                message = await self._receive()
                self.disconnected |= message["type"] == "http.disconnect"
                self._bytes += len(message.get("body", b""))
                if not self.repeatable:
                    return message
                self._messages.append(message)
            position += 1
            return self._messages[position - 1]

        return read


class Answer:
    """The response of one attempt: passed on if it is a replica's, not if it is Ray's error."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = self.complete = self._hidden = self._events = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = Headers(raw=message["headers"])
            self._hidden = message["status"] in (500, 503) and "openai-version" not in headers
            self._events = headers.get("content-type", "").startswith("text/event-stream")
            message = {**message, "headers": without_repeated_id(message["headers"])}
        if self._hidden:
            return
        self.started = True
        self.complete = message["type"] == "http.response.body" and not message.get("more_body")
        await self._send(message)

    async def abort(self) -> None:
        """End a response whose rest is lost; an event stream ends with an error."""
        if not self._events:
            raise ConnectionError(DIED)
        error = json.dumps(unavailable(DIED, 5).body())
        await self._send({"type": "http.response.body", "body": f"data: {error}\n\n".encode()})


def without_repeated_id(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Drop the request id that Ray appends to that of the replica."""
    ids = [pair for pair in headers if pair[0].lower() == b"x-request-id"]
    return [pair for pair in headers if pair[0].lower() != b"x-request-id"] + ids[:1]
