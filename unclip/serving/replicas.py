"""Replicas of the server on Ray Serve, on one machine or many."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from fastapi import FastAPI

from unclip.serving import retries
from unclip.serving.app import create_app, load_pipeline
from unclip.serving.config import ServerConfig
from unclip.serving.server import configure_process

NAME = "unclip"  # of the application and its deployment
PROXY_CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"


@dataclass(frozen=True)
class ReplicaConfig:
    """The number of replicas, which depends on the load, and the resources of each."""

    min_replicas: int = 1
    max_replicas: int = 1
    num_cpus: float = 1.0
    num_gpus: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.min_replicas <= self.max_replicas:
            raise ValueError(
                f"replicas are {self.min_replicas} to {self.max_replicas}; "
                f"expected 1 <= minimum <= maximum"
            )


def build(
    config: ServerConfig,
    replicas: ReplicaConfig,
    load: Callable[[str, Any, Any], Any] = load_pipeline,
) -> Any:
    """Return an application for `ray.serve.run`: the server of `create_app` in each replica."""
    serve: Any = import_module("ray.serve")  # not in the type checker's environment
    if replicas.max_replicas > 1 and config.storage is None:
        raise ValueError(
            "several replicas share their results, but storage is None; give a folder that all "
            "machines have, or an fsspec URL (--storage)"
        )
    scaling = {
        "min_replicas": replicas.min_replicas,
        "max_replicas": replicas.max_replicas,
        # Requests per replica: one full batch in progress, and one that waits.
        "target_ongoing_requests": 2 * config.max_batch,
    }

    def make_app() -> FastAPI:  # in the replica: an application cannot be pickled
        configure_process()
        return create_app(config, load)

    @serve.deployment(
        name=NAME,
        autoscaling_config=scaling,
        # Above the queue of the engine, which refuses requests in OpenAI's form.
        max_ongoing_requests=4 * (config.max_queue + config.max_batch),
        ray_actor_options={"num_cpus": replicas.num_cpus, "num_gpus": replicas.num_gpus},
        graceful_shutdown_timeout_s=config.drain_seconds,
        health_check_period_s=2,
    )
    @serve.ingress(make_app)
    class Replica:
        """The server; its engine starts and stops with the replica."""

    return Replica.bind()


def serve(config: ServerConfig, replicas: ReplicaConfig) -> None:
    """Serve until SIGTERM or SIGINT."""
    ray, ray_serve = import_module("ray"), import_module("ray.serve")
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    start(config)
    ray_serve.run(build(config, replicas), name=NAME, route_prefix="/")
    stop.wait()
    ray_serve.delete(NAME)  # finishes accepted requests
    ray.shutdown()


def start(config: ServerConfig, **options: Any) -> None:
    """Start Ray, or join the cluster of this machine, with the HTTP proxy of `retries`.

    options: of `ray.init`.
    """
    ray, ray_serve = import_module("ray"), import_module("ray.serve")
    ray.init(runtime_env={"env_vars": {PROXY_CALLBACK: retries.CALLBACK}}, **options)
    ray_serve.start(http_options={"host": config.host, "port": config.port})
