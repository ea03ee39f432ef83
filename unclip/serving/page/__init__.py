"""The web page at `/`: static files, served under a strict content security policy."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
FILES = {path.name: path for path in Path(__file__).parent.iterdir() if path.suffix in MEDIA_TYPES}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-cache",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

router = APIRouter(include_in_schema=False)  # these routes need no API key


@router.api_route("/", methods=["GET", "HEAD"])
def index() -> Response:
    return page_file("index.html")


@router.api_route("/page/{name}", methods=["GET", "HEAD"])
def page_file(name: str) -> Response:
    """Return a file of the page; only the names of existing files are known."""
    path = FILES.get(name)
    if path is None:
        error = {"message": "The page has no such file.", "type": "invalid_request_error"}
        return JSONResponse({"error": {**error, "param": None, "code": None}}, 404)
    return Response(path.read_bytes(), headers=HEADERS, media_type=MEDIA_TYPES[path.suffix])
