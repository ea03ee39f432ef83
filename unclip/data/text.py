"""Captions, weights and names from files of unknown origin, checked before they are used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unclip.config import config
from unclip.files import LFS_POINTER, parse_json, printable, shorten

MAX_TEXT = 1 << 20  # bytes of a caption file
MAX_JSON = 1 << 24  # bytes of a JSON object
MAX_WEIGHT = 10_000  # occurrences of a sample in an epoch


@config
class ColumnNames:
    """Names of columns in tables, and of keys in JSON and metadata; null: the usual names."""

    image: str | None = None  # file_name
    caption: str | None = None  # text, caption or captions
    weight: str | None = None  # null: "weight" in JSON and metadata; none in CSV and TSV


def readable(name: str) -> str:
    """Escape control characters and what UTF-8 cannot encode, such as bytes of a file name."""
    return printable(name, len(name))


def check_content(data: bytes) -> None:
    """Raise ValueError for a file that must first be fetched, or saved in another format."""
    if data.startswith(LFS_POINTER):
        raise ValueError("this is a Git LFS pointer, not the file; run `git lfs pull`")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError("this is UTF-16 text; save it as UTF-8")


def decode_text(data: bytes) -> str:
    """Decode UTF-8, with or without a byte order mark."""
    check_content(data)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = f"byte {data[error.start]:#x} at position {error.start}"
        raise ValueError(f"{byte} is not UTF-8; save the file as UTF-8") from None


def parse_bounded(data: bytes) -> Any:
    """Parse JSON of at most MAX_JSON bytes."""
    if len(data) > MAX_JSON:
        raise ValueError(f"JSON of more than {MAX_JSON:,} bytes")
    text = decode_text(data)
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"not valid JSON: {error}") from None


def check_caption(value: Any) -> str:
    """Return a caption. Raises ValueError unless it is a string that UTF-8 can encode."""
    if not isinstance(value, str):
        raise ValueError(f"the caption is {shorten(value)}; expected a string")
    if "\0" in value:
        raise ValueError(f"the caption is {shorten(value)}; expected text without NUL characters")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        character = f"character {error.start} of the caption is {ascii(value[error.start])}"
        raise ValueError(f"{character}, which is not valid Unicode; save it as UTF-8") from None
    return value


def caption_list(value: Any, needed: bool = True) -> list[str]:
    """Strip captions and drop empty ones.

    If none is left: [""], or a ValueError if captions are `needed`.
    """
    values = value if isinstance(value, list) else [value]
    captions = [text for v in values if v is not None and (text := check_caption(v).strip())]
    if needed and not captions:
        raise ValueError("no caption")
    return captions or [""]


def first_of(meta: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """Return the first value that is not empty, or None."""
    return next((meta[name] for name in names if meta.get(name)), None)


def sample_weight(meta: Mapping[str, Any], name: str | None = "weight") -> float:
    """Return the weight in a sample's metadata, or 1 without a name or a value.

    Raises ValueError unless it is a number from 0 to MAX_WEIGHT.
    """
    if name is None or name not in meta:
        return 1.0
    try:
        weight = float(meta[name])
    except (TypeError, ValueError, OverflowError):
        weight = -1.0
    if not 0 <= weight <= MAX_WEIGHT:
        raise ValueError(
            f"{name} is {shorten(meta[name])}; expected a number from 0 to {MAX_WEIGHT:,}"
        )
    return weight
