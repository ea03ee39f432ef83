"""Settings of the server."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

DEFAULT_MODEL = "emoji"


@dataclass(frozen=True)
class ServerConfig:
    """Settings of `create_app`; the command line has a flag for most of them."""

    models: tuple[str, ...] = (DEFAULT_MODEL,)  # their ids in the API; the first is the default
    sources: tuple[tuple[str, str], ...] = ()  # (id, name or folder or Hub id) where they differ
    devices: tuple[str | None, ...] = (None,)  # an engine thread for each; None = the fastest
    dtype: str | None = None  # "float32", ...; None = by device
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()  # none: no authentication, on loopback only
    public_base_url: str | None = None  # of URLs in responses; None = the Host header, on loopback
    allow_origins: tuple[str, ...] = ()  # web sites whose pages may call the API; "*" = all
    prompt_filter: str | None = None  # "module:function"; false for prompts that are refused
    storage: str | None = None  # folder or fsspec URL of results; None = memory
    strict: bool = False  # reject what dall-e-2 rejected, instead of ignoring it
    deterministic: bool = False  # generate each image alone, so that its bytes never vary
    metadata: bool = True  # write prompt and options into images
    log_prompts: bool = False
    threads: int | None = None  # of torch on the CPU; None = torch's default

    max_batch: int = 16  # images in one pipeline call
    max_queue: int = 64  # images that wait
    queue_seconds: float = 120.0  # longest wait in the queue; then 503
    reconnect_seconds: float = 15.0  # then a job with an id is cancelled without its client
    batch_seconds: float = 0.05  # longest wait for the requests of returning clients
    ageing_seconds: float = 10.0  # then a request is served next, regardless of its key
    idle_seconds: float = 600.0  # then unused models are unloaded, except the default model
    drain_seconds: float = 60.0  # after SIGTERM, for requests to finish
    result_seconds: float = 3600.0  # lifetime of results by URL
    memory_bytes: int = 256 * 2**20  # of results in memory; the oldest are dropped
    max_body: int = 25 * 2**20  # bytes of a request
    max_upload: int = 20 * 2**20  # bytes of an image (4 MB with strict)
    max_side: int = 4096  # pixels of an uploaded image

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError("models is empty; expected at least one name")
        if not is_loopback(self.host) and not self.api_keys:
            raise ValueError(
                f"host is {self.host}, which other machines can reach; set an API key (--api-key), "
                f"or bind 127.0.0.1"
            )
        if any(not key or not key.isascii() or not key.isprintable() for key in self.api_keys):
            raise ValueError("an API key is empty or not printable ASCII")
        if self.public_base_url is not None:
            url = urlsplit(self.public_base_url)
            if url.scheme not in ("http", "https") or not url.netloc:
                raise ValueError(
                    f"public_base_url is {self.public_base_url!r}; expected http(s)://host"
                )
        if "*" in self.allow_origins and not self.api_keys:
            raise ValueError("allow_origins is '*'; set an API key (--api-key), or name the sites")
        for origin in self.allow_origins:
            if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
                raise ValueError(f"allow_origins has {origin!r}; expected http(s)://host, or '*'")
        for name in ("max_batch", "max_queue", "max_body", "max_upload", "max_side"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")

    def source_of(self, model: str) -> str:
        """Return what `unclip.load` takes for a model."""
        return dict(self.sources).get(model, model)


def is_loopback(host: str) -> bool:
    """Return whether a host name or address means this machine only."""
    host = host.strip("[]").lower()
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
