"""`unclip serve`: OpenAI's Images API, with a web page."""

from __future__ import annotations

import os
from argparse import ArgumentTypeError, Namespace
from importlib import import_module
from pathlib import Path
from typing import Any

from unclip.cli.arguments import COUNT, DEFAULT_MODEL, DTYPES, add_command, add_dtype
from unclip.extras import install

KEY_VARIABLE = "UNCLIP_API_KEY"


def add_commands(commands: Any) -> None:
    about = "serve OpenAI's Images API, as for dall-e-2, and a web page"
    parser = add_command(commands, serve, about)
    about = (
        f"bundled name, folder or Hub id, also as ID=NAME to choose its id in the API; may be "
        f"repeated, the first is the default (default: {DEFAULT_MODEL})"
    )
    parser.add_argument("--model", action="append", dest="models", metavar="NAME", help=about)
    about = "cpu, cuda, cuda:1, mps; repeated: one engine for each (default: the fastest)"
    parser.add_argument("--device", action="append", dest="devices", metavar="DEVICE", help=about)
    add_dtype(parser, "data type of the networks (default: half precision on CUDA, else fp32)")
    about = "address to bind; any but a loopback address needs an API key (default: 127.0.0.1)"
    parser.add_argument("--host", default="127.0.0.1", help=about)
    parser.add_argument("--port", type=_port, default=8000, help="default: 8000")
    about = f"key that clients must send; may be repeated (default: ${KEY_VARIABLE}, or none)"
    parser.add_argument("--api-key", action="append", dest="keys", metavar="KEY", help=about)
    about = "base of the URLs in responses (default: the Host header, on loopback only)"
    parser.add_argument("--public-base-url", metavar="URL", help=about)
    about = "web site whose pages may call the API, such as https://shop.example; may be repeated"
    parser.add_argument(
        "--allow-origin", action="append", default=[], dest="origins", metavar="URL", help=about
    )
    about = "Python function that returns False for prompts to refuse, called for each request"
    parser.add_argument("--prompt-filter", metavar="MODULE:FUNCTION", help=about)
    about = "folder or fsspec URL for results (default: memory)"
    parser.add_argument("--storage", metavar="DIR|URL", help=about)
    about = "reject unsupported fields, as dall-e-2 did, instead of ignoring them"
    parser.add_argument("--strict", action="store_true", help=about)
    about = "generate each image alone: equal seeds give equal bytes under any load"
    parser.add_argument("--deterministic", action="store_true", help=about)
    about = "leave prompt and options out of image files"
    parser.add_argument("--no-metadata", action="store_true", help=about)
    parser.add_argument("--log-prompts", action="store_true", help="write prompts to the log")
    about = "number of images generated at a time (default: 16)"
    parser.add_argument("--max-batch", default=16, help=about, **COUNT)
    about = "number of images that wait; more are refused (default: 64)"
    parser.add_argument("--max-queue", default=64, help=about, **COUNT)
    about = "run replicas on Ray Serve, on this machine or on the cluster it belongs to"
    parser.add_argument("--ray", action="store_true", help=about)
    about = "with --ray: number of replicas, grows with the load from A to B (default: 1)"
    parser.add_argument("--replicas", type=_replicas, metavar="A[:B]", help=about)
    about = "with --ray: CPUs of each replica (default: 1)"
    parser.add_argument("--num-cpus", type=float, metavar="N", help=about)
    about = "with --ray: GPUs of each replica (default: 0)"
    parser.add_argument("--num-gpus", type=float, metavar="N", help=about)


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise ArgumentTypeError(f"{text!r} is not a port; expected a number from 1 to 65535")
    return int(text)


def _replicas(text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    if not (low.isdecimal() and (high or low).isdecimal()):
        raise ArgumentTypeError(f"{text!r} is not a number of replicas, such as 2 or 1:4")
    return int(low), int(high or low)


def _model(text: str) -> tuple[str, str]:
    """Return the id and the source of a model; a folder is called by its own name."""
    if Path(text).is_dir():
        return Path(text).resolve().name, text
    name, separator, source = text.partition("=")
    if separator and not (name and source):
        raise ValueError(f"--model is {text!r}; expected a model, or ID=NAME with both parts")
    return (name, source) if separator else (text, text)


def serve(args: Namespace) -> None:
    names = ("replicas", "num_cpus", "num_gpus")
    of_ray = {name: value for name in names if (value := getattr(args, name)) is not None}
    if of_ray and not args.ray:
        raise ValueError(f"--{next(iter(of_ray)).replace('_', '-')} needs --ray")
    extra = "ray" if args.ray else "serve"
    try:
        from unclip.serving.server import serve as run

        if args.ray:
            import_module("ray.serve")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("unclip"):
            raise
        raise ValueError(f"unclip serve needs {error.name}: {install(extra)}") from None
    from unclip.checkpoints.folders import locate
    from unclip.serving.config import ServerConfig

    sources: dict[str, str] = {}
    for name, source in map(_model, args.models or (DEFAULT_MODEL,)):
        if name in sources:
            raise ValueError(f"two models have the id {name}; choose ids with --model ID=NAME")
        sources[name] = source
    for name in sources.values():
        locate(name)  # a wrong name fails at once
    variable = os.environ.get(KEY_VARIABLE)
    config = ServerConfig(
        models=tuple(sources),
        sources=tuple(sources.items()),
        devices=tuple(args.devices or (None,)),
        dtype=DTYPES.get(args.dtype, args.dtype),
        host=args.host,
        port=args.port,
        api_keys=tuple(args.keys or ([variable] if variable else ())),
        public_base_url=args.public_base_url,
        allow_origins=tuple(args.origins),
        prompt_filter=args.prompt_filter,
        storage=args.storage,
        strict=args.strict,
        deterministic=args.deterministic,
        metadata=not args.no_metadata,
        log_prompts=args.log_prompts,
        max_batch=args.max_batch,
        max_queue=args.max_queue,
    )
    if not args.ray:
        return run(config)
    from unclip.serving.replicas import ReplicaConfig
    from unclip.serving.replicas import serve as run_replicas

    low, high = of_ray.pop("replicas", (1, 1))
    run_replicas(config, ReplicaConfig(low, high, **of_ray))
