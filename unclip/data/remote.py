"""Tar shards at any fsspec URL (s3://, gs://, hf://, https://): copied once into a local cache.

The readers see local files only, so order and position in the data are as with local shards.
The cache is `$UNCLIP_CACHE`, or `~/.cache/unclip`; it may be deleted at any time between runs.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from filelock import FileLock
from tqdm import tqdm

from unclip.extras import install

THREADS = 8
ATTEMPTS = 5
FIRST_WAIT = 1.0  # seconds; doubled after each attempt
SILENCE = 30.0  # seconds without an answer of an HTTP server; a download may take any time
ABSENT = 404, 410  # HTTP status


def is_url(source: str | Path) -> bool:
    return "://" in str(source)


def find_urls(pattern: str) -> list[str]:
    """Return the sorted URLs of the tars that a URL, a pattern with `*` or a folder stands for."""
    if pattern.endswith(".tar") and "*" not in pattern or "?" in pattern:  # signed URLs have a "?"
        return [pattern]
    fs, path = _filesystem(pattern)
    path = path if "*" in path else f"{path.rstrip('/')}/*.tar"
    found = _retry(pattern, lambda: fs.glob(path))
    return sorted(fs.unstrip_protocol(name) for name in found)


def local_copies(urls: Sequence[str]) -> list[Path]:
    """Return local copies of shards, downloaded unless they are in the cache.

    Several processes may ask for the same shards. Without a network, cached shards are used as they
    are, if they are given by name or numbered range: a folder or a pattern with `*` must be listed.
    Raises OSError that names a URL that failed after several attempts.
    """
    missing = [url for url in urls if not _place(url).is_file()]
    with ThreadPoolExecutor(THREADS) as pool:
        copies = pool.map(_local_copy, urls)
        bar = tqdm(copies, "shards", len(urls), disable=not missing, leave=False, unit=" shards")
        return list(bar)


def _local_copy(url: str) -> Path:
    place = _place(url)
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{place}.lock"):
        fs, path = _filesystem(url)
        cached = place.is_file()
        try:
            size = _retry(url, lambda: fs.info(path).get("size"), 1 if cached else ATTEMPTS)
        except OSError:
            if cached:
                return place
            raise
        if not cached or size not in (None, place.stat().st_size):
            _retry(url, lambda: _download(fs, path, place, size))
    return place


def remove_copy(shard: Path) -> bool:
    """Remove a damaged shard if it is in the cache, so that the next run downloads it again."""
    if shard.parent != _cache():
        return False
    shard.unlink(missing_ok=True)
    return True


def _download(fs: Any, path: str, place: Path, size: int | None) -> None:
    part = place.with_suffix(".part")
    fs.get_file(path, str(part))  # as a stream: not every HTTP server supports ranges
    if size not in (None, part.stat().st_size):
        raise OSError(f"{part.stat().st_size:,} of {size:,} bytes were received")
    part.replace(place)


def _retry(url: str, call: Any, attempts: int = ATTEMPTS) -> Any:
    for attempt in range(attempts):
        try:
            return call()
        except Exception as error:  # storage clients raise their own types
            if isinstance(error, FileNotFoundError):
                # fsspec raises it whenever an HTTP server does not give the size.
                cause = error.__cause__
                if cause is None or getattr(cause, "status", None) in ABSENT:
                    raise FileNotFoundError(f"{url} does not exist") from None
                error = cause
            if attempt == attempts - 1:
                reason = " ".join(str(error).split()) or type(error).__name__
                raise OSError(f"{url}: {reason} ({attempts} attempts)") from None
            time.sleep(FIRST_WAIT * 2**attempt)


def _filesystem(url: str) -> tuple[Any, str]:
    try:
        return fsspec.core.url_to_fs(url, **_client_options(url))
    except (ImportError, ValueError) as error:
        reason = " ".join(str(error).split())
        advice = f" ({install('remote')})" if isinstance(error, ImportError) else ""
        raise ValueError(f"{url} cannot be opened: {reason}{advice}") from None


def _client_options(url: str) -> dict[str, Any]:
    """Return options for HTTP, whose client would end each download after five minutes."""
    if not url.startswith(("http://", "https://")):
        return {}
    timeout = import_module("aiohttp").ClientTimeout(
        total=None, sock_connect=SILENCE, sock_read=SILENCE
    )
    return {"client_kwargs": {"timeout": timeout}}


def _place(url: str) -> Path:
    name = PurePosixPath(url.partition("?")[0]).name
    return _cache() / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name}"


def _cache() -> Path:
    return Path(os.environ.get("UNCLIP_CACHE") or Path.home() / ".cache" / "unclip") / "shards"
