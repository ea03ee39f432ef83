"""Errors in the form of OpenAI's API."""

from __future__ import annotations

from typing import Any

from fastapi.responses import JSONResponse

CLOSE = {"connection": "close"}  # after a body that was not read to its end


class APIError(Exception):
    """An error with an HTTP status and the four fields of OpenAI's error body."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.type = status, message, type
        self.param, self.code, self.headers = param, code, headers or {}

    def body(self) -> dict[str, Any]:
        """Return the JSON body."""
        fields = {"message": self.message, "type": self.type, "param": self.param}
        return {"error": {**fields, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, headers=self.headers)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> APIError:
    """400: the request is invalid."""
    return APIError(400, message, param=param, code=code)


def not_found(message: str, code: str | None = None, param: str | None = None) -> APIError:
    """404: no such route, model or file."""
    return APIError(404, message, code=code, param=param)


def conflict(message: str) -> APIError:
    """409: the request contradicts an earlier one."""
    return APIError(409, message, code="conflict")


def unauthorized(given: str | None) -> APIError:
    """401: a missing or wrong API key."""
    if given is None:
        message = "You didn't provide an API key. Send it in the header Authorization: Bearer KEY."
        return APIError(401, message, headers={"www-authenticate": "Bearer"})
    shown = f"{given[:3]}***{given[-4:]}" if len(given) >= 12 else "***"
    shown = shown if shown.isascii() and shown.isprintable() else "***"
    message = f"Incorrect API key provided: {shown}."
    headers = {"www-authenticate": "Bearer"}
    return APIError(401, message, code="invalid_api_key", headers=headers)


def too_large(limit: int) -> APIError:
    """413: the body is above the limit."""
    message = f"The request is larger than the limit of {limit / 2**20:g} MiB."
    return APIError(413, message, code="request_too_large", headers=CLOSE)


def too_slow() -> APIError:
    """408: the body does not arrive."""
    message = "The body of the request arrived too slowly, or not at all."
    return APIError(408, message, code="request_timeout", headers=CLOSE)


def queue_full(retry_after: int) -> APIError:
    """429: try again later."""
    return APIError(
        429,
        f"The queue is full. Please retry in {retry_after} seconds.",
        type="rate_limit_error",
        code="rate_limit_exceeded",
        headers={"retry-after": str(retry_after)},
    )


def unavailable(message: str, retry_after: int) -> APIError:
    """503: the request was not started."""
    headers = {"retry-after": str(retry_after)}
    return APIError(503, message, type="server_error", code="unavailable", headers=headers)


def failed(message: str = "The server had an error while generating the images.") -> APIError:
    """500: work was spent, so a client should not retry automatically."""
    return APIError(500, message, type="server_error", headers={"x-should-retry": "false"})
