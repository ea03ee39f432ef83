"""The application: OpenAI's Images API over an engine, and a page."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from pkgutil import resolve_name
from typing import Any, get_args

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from unclip import __version__
from unclip.serving.config import ServerConfig, is_loopback
from unclip.serving.delivery import Responder, describe, header_text
from unclip.serving.engine import Engine
from unclip.serving.errors import APIError, bad_request, not_found
from unclip.serving.jobs import JOB_ID, Jobs
from unclip.serving.metrics import Metrics
from unclip.serving.middleware import Guard, host_name
from unclip.serving.page import router as page
from unclip.serving.requests import (
    BODIES,
    FILES,
    Sampler,
    content_hash,
    model_not_found,
    parse,
    read_body,
)
from unclip.serving.storage import Storage, open_storage

log = logging.getLogger("unclip.serving")

SWEEP_SECONDS = 60.0
DECODERS = 4  # requests whose images are decoded at the same time
CREATED = int(time.time())
ENTRIES = {"type": "array", "items": {"type": "object"}, "minItems": 1}  # in the OpenAPI schema


def load_pipeline(name: str, device: Any, dtype: Any) -> Any:
    """Load a model; see `unclip.load`."""
    from unclip.pipelines import load

    return load(name, device, dtype)


def create_app(
    config: ServerConfig | None = None,
    load: Callable[[str, Any, Any], Any] = load_pipeline,
) -> FastAPI:
    """Make the application; its engine starts and stops with it."""
    config, metrics = config or ServerConfig(), Metrics()
    engine = Engine(config, metrics, load)
    jobs = Jobs(engine)
    storage = open_storage(config.storage, config.result_seconds, config.memory_bytes)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        sweeper = asyncio.create_task(_sweep(storage))
        yield
        sweeper.cancel()
        await run_in_threadpool(engine.stop)

    app = FastAPI(
        title="unclip", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.state.config, app.state.engine, app.state.storage = config, engine, storage
    app.state.jobs = jobs
    app.state.decoding = asyncio.Semaphore(DECODERS)
    app.state.prompt_filter = config.prompt_filter and load_prompt_filter(config.prompt_filter)
    app.add_middleware(Guard, jobs=jobs)
    if config.allow_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.allow_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["*"],
        )
    app.add_exception_handler(APIError, _handle_api_error)
    app.add_exception_handler(HTTPException, _handle_http_error)
    app.add_exception_handler(RequestValidationError, _handle_validation_error)
    for operation in BODIES:
        app.add_api_route(
            f"/v1/images/{operation}",
            _images_route(operation),
            methods=["POST"],
            name=operation,
            openapi_extra=_schema(operation),
        )

    app.add_api_route("/v1/jobs/{id}", cancel_job, methods=["DELETE"], status_code=204)

    def add_get(path: str, endpoint: Callable[..., Any], **about: Any) -> None:
        app.add_api_route(path, endpoint, **about)
        app.add_api_route(path, endpoint, methods=["HEAD"], include_in_schema=False)

    missing: dict[int | str, dict[str, Any]] = {404: {"description": "Not found"}}
    add_get("/v1/models", list_models, name="models")
    add_get("/v1/models/{name:path}", get_model, name="model", responses=missing)
    about = {"responses": missing, "response_class": Response}
    add_get("/v1/files/{name:path}", get_file, name="file", **about)
    add_get("/healthz", healthz)
    add_get("/readyz", readyz)
    add_get("/metrics", get_metrics, response_class=PlainTextResponse)
    app.include_router(page)
    return app


def load_prompt_filter(name: str) -> Callable[[str], Any]:
    """Import "module:function", which returns true for allowed prompts. ValueError on failure.

    It is called in a thread, for several prompts at a time.
    """
    try:
        function = resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"prompt_filter is {name!r}: {error}; expected module:function, on PYTHONPATH"
        ) from None
    if not callable(function):
        raise ValueError(f"prompt_filter is {name!r}, which is not a function")
    return function


async def _sweep(storage: Storage) -> None:
    while True:
        await asyncio.sleep(SWEEP_SECONDS)
        try:
            await run_in_threadpool(storage.sweep)
        except Exception:
            log.exception("sweep_failed")


# -- images


def _images_route(operation: str) -> Callable[..., Any]:
    async def images(request: Request) -> Response:
        state = request.app.state
        arrival = state.jobs.arrive(request.state.client, request.headers.get(JOB_ID))
        fields, files = await read_body(request, state.config.strict)
        if files or operation != "generations":
            async with state.decoding:
                parsed = await run_in_threadpool(parse, operation, fields, files, state.config)
        else:
            parsed = parse(operation, fields, files, state.config)
        task, delivery = parsed
        allowed, prompt = state.prompt_filter, task.prompt
        if allowed and prompt is not None and not await run_in_threadpool(allowed, prompt):
            raise bad_request(
                "The prompt was refused by this server's filter.",
                code="content_policy_violation",
            )
        base_url = _base_url(request) if delivery.url else None
        request.state.log = describe(task)
        if state.config.log_prompts:
            request.state.log["prompt"] = task.prompt
        content = 0 if arrival.id is None else content_hash(operation, fields, files)
        job = state.jobs.submit(arrival, task, content, delivery.stream, delivery.partials)
        responder = Responder(request, task, delivery, job, base_url)
        return responder.stream() if delivery.stream else await responder.respond()

    return images


def _base_url(request: Request) -> str:
    """Return the base of URLs in responses. APIError if it is unknown."""
    config: ServerConfig = request.app.state.config
    if config.public_base_url is not None:
        return config.public_base_url.rstrip("/")
    host = request.headers.get("host", "")
    if is_loopback(config.host) and is_loopback(host_name(host)):
        return f"http://{host}"
    raise bad_request(
        "response_format 'url' needs a server with --public-base-url; use 'b64_json'.",
        "response_format",
    )


# -- models, files, operation


async def list_models(request: Request) -> Any:
    """List the models that are served."""
    state = request.app.state
    return {
        "object": "list",
        "data": [_describe_model(state.engine, name) for name in state.config.models],
    }


async def get_model(request: Request, name: str) -> Any:
    """Describe a model."""
    state = request.app.state
    if name not in state.config.models:
        raise model_not_found(name)
    return _describe_model(state.engine, name)


def _describe_model(engine: Engine, name: str) -> dict[str, Any]:
    model = {"id": name, "object": "model", "created": CREATED, "owned_by": "unclip"}
    known = engine.known.get(name)
    unknown = dict.fromkeys(
        ("kind", "size", "operations", "steps", "guidance", "samplers", "options")
    )
    if known is None:
        return {**model, **unknown, "loaded": False}
    kind, options = known["kind"], known["options"]
    sampling = options if kind == "dalle" else options["decoder"]
    return {
        **model,
        "kind": kind,
        "size": known["size"],
        "operations": known["operations"],
        "steps": sampling.get("steps"),  # DALL-E has none
        "guidance": sampling["guidance"],
        "samplers": [] if kind == "dalle" else list(get_args(Sampler)),
        "options": options,
        "loaded": True,
    }


async def cancel_job(request: Request, id: str) -> None:
    """Cancel the job that was submitted with this id; without one, do nothing."""
    request.app.state.jobs.cancel(request.state.client, id)


async def get_file(request: Request, name: str) -> Response:
    """Return a result."""
    found = await run_in_threadpool(request.app.state.storage.get, name)
    if found is None:
        raise not_found("The file does not exist, or has expired.")
    data, media_type = found
    headers = {
        "cache-control": "private, max-age=3600",
        "content-security-policy": "default-src 'none'; sandbox",
    }
    return Response(data, media_type=media_type, headers=headers)


async def healthz() -> Any:
    """Report that the process is alive."""
    return {"status": "ok"}


async def readyz(request: Request) -> Response:
    """Report whether requests are served now."""
    engine: Engine = request.app.state.engine
    status = "ready" if engine.ready else "draining" if engine.closing else "loading"
    if engine.failure is not None:
        status = "failed"
    return JSONResponse({"status": status}, 200 if status == "ready" else 503)


async def get_metrics(request: Request) -> Response:
    """Return metrics for Prometheus."""
    return PlainTextResponse(request.app.state.engine.metrics.render())


# -- errors


def _no_route(request: Request) -> APIError:
    path = header_text(request.url.path[:200])
    return not_found(f"Invalid URL ({request.method} {path})")


async def _handle_api_error(_: Request, error: Any) -> Response:
    return error.response()


async def _handle_http_error(request: Request, error: Any) -> Response:
    if error.status_code == 404:
        return _no_route(request).response()
    if error.status_code == 405:
        path = header_text(request.url.path[:200])
        message = f"Not allowed to {request.method} on {path} (HINT: see the documentation)"
        return APIError(405, message, headers=error.headers).response()
    return APIError(error.status_code, str(error.detail)).response()


async def _handle_validation_error(_: Request, error: Any) -> Response:
    return bad_request("The request is invalid.").response()


def _schema(operation: str) -> dict[str, Any]:
    """Return the OpenAPI schema of a call's body."""
    json_schema = BODIES[operation].model_json_schema()
    content = {"application/json": {"schema": json_schema}}
    if operation != "generations":
        file = {"type": "string", "format": "binary"}
        names = FILES if operation == "edits" else FILES[:1]
        form = {**json_schema, "properties": {**json_schema["properties"]}}
        form["properties"].pop("images", None)
        form["properties"] |= dict.fromkeys(names, file)
        content["multipart/form-data"] = {"schema": form}
    images = {
        "application/json": {"schema": _object(created={"type": "integer"}, data=ENTRIES)},
        "text/event-stream": {"schema": _object(data={"type": "string"})},  # of each event
    }
    fields = _object(message={"type": "string"}, type={"type": "string"}, param={}, code={})
    error = {
        "description": "An error in OpenAI's form",
        "content": {"application/json": {"schema": _object(error=fields)}},
    }
    statuses = ("400", "401", "403", "404", "408", "409", "413", "429", "500", "503")
    responses = {"200": {"description": "Images, or events", "content": images}}
    return {
        "requestBody": {"required": True, "content": content},
        "responses": responses | dict.fromkeys(statuses, error),
    }


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}
