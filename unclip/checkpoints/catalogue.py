"""Which models there are, where they lie and what they hold; reads no weights and never imports torch."""

from __future__ import annotations

import json
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODEL_FILE, OPTIONS_FILE, CONFIG_FILE, SCHEDULE_FILE = "model.json", "options.json", "config.json", "schedule.json"
WEIGHTS_FILE = "model.safetensors"
FORMAT, VERSION = "unclip", 1

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PACKAGE = Path(__file__).parent.parent


def bundled_models() -> dict[str, Path]:
    """Name -> folder of the models that come with the package, from a wheel or a checkout."""
    for assets in (_PACKAGE / "assets", _PACKAGE.parent / "assets"):
        if found := {file.parent.name: file.parent for file in sorted(assets.glob(f"*/{MODEL_FILE}"))}:
            return found
    return {}


def locate(name_or_path: str | Path) -> Path:
    """The folder of a bundled model, a local path, or a Hub id "org/name" (fetched once, then cached)."""
    bundled = bundled_models()
    if str(name_or_path) in bundled:
        return bundled[str(name_or_path)]
    if (path := Path(name_or_path)).exists():
        return path
    known = f"bundled models: {', '.join(bundled) or 'none'}"
    if isinstance(name_or_path, str) and _HUB_ID.fullmatch(name_or_path):
        return _fetch(name_or_path, known)
    raise ValueError(f"unknown model {str(name_or_path)!r}; {known}; or give a model folder or a Hub id 'org/name'")


def _fetch(hub_id: str, known: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=["*.safetensors", "*.json", "*.txt"]))
    except RepositoryNotFoundError:
        reason = "the Hub has no such model, or it is private"
    except LocalEntryNotFoundError:
        reason = "the Hub cannot be reached and nothing of it is cached"
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
    raise ValueError(f"model {hub_id!r} is no local folder and could not be fetched: {reason}; {known}")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; FileNotFoundError or ValueError naming the file."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{file} holds a {type(data).__name__}; expected a JSON object")
    return data


def read_model_json(folder: Path) -> dict[str, Any]:
    """The checked contents of `model.json`: kind, name, licence, components."""
    if not (folder / MODEL_FILE).is_file():
        raise FileNotFoundError(f"{folder} is not a model folder: it has no {MODEL_FILE}")
    model = read_json(folder / MODEL_FILE)
    if (model.get("format"), model.get("version")) != (FORMAT, VERSION):
        raise ValueError(
            f"{folder / MODEL_FILE} is of format {model.get('format')!r} version {model.get('version')!r}; "
            f"expected {FORMAT!r} version {VERSION}"
        )
    for key, kind in {"kind": str, "name": str, "licence": str, "components": list}.items():
        if not isinstance(model.get(key), kind):
            raise ValueError(f"{folder / MODEL_FILE}: {key} is {model.get(key)!r}; expected a {kind.__name__}")
    return model


@dataclass(frozen=True)
class ComponentInfo:
    """One network of a model folder, as the headers of its weights files tell."""

    name: str
    parameters: int  # numbers stored, buffers included
    size: int  # bytes
    dtypes: tuple[str, ...]  # as safetensors names them: F16, BF16, F32


def describe(folder: Path) -> list[ComponentInfo]:
    """The components of a model folder, read from the files' headers alone."""
    return [_describe(folder / name) for name in read_model_json(folder)["components"]]


def _describe(folder: Path) -> ComponentInfo:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no safetensors file")
    tensors = [tensor for file in files for tensor in _header(file)]
    return ComponentInfo(
        name=folder.name,
        parameters=sum(math.prod(tensor["shape"]) for tensor in tensors),
        size=sum(file.stat().st_size for file in files),
        dtypes=tuple(sorted({tensor["dtype"] for tensor in tensors})),
    )


def _header(file: Path) -> list[dict[str, Any]]:
    """dtype, shape and data_offsets of each tensor of a safetensors file."""
    fault = ValueError(f"{file} is truncated or is no safetensors file; fetch or export it again")
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < length <= file.stat().st_size - 8:
            raise fault
        try:
            header = json.loads(stream.read(length))
        except ValueError:
            raise fault from None
    tensors = [tensor for name, tensor in header.items() if name != "__metadata__"]
    if 8 + length + max((tensor["data_offsets"][1] for tensor in tensors), default=0) != file.stat().st_size:
        raise fault
    return tensors
