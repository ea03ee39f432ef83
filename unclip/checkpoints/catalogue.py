"""Which models there are, where they lie and what they hold; reads no weights and never imports torch."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from unclip.checkpoints import diffusers_layout
from unclip.checkpoints.diffusers_layout import weight_files
from unclip.files import read_json

MODEL_FILE, OPTIONS_FILE, CONFIG_FILE, SCHEDULE_FILE = "model.json", "options.json", "config.json", "schedule.json"
WEIGHTS_FILE = "model.safetensors"
FORMAT, VERSION = "unclip", 1

# What is fetched of a repository on the Hub. A prior's may hold far larger encoders, which are not wanted.
MODEL_FILES = ("*.safetensors", "*.json", "*.txt", "README.md")
VARIANTS = ("*.fp16.*", "*.fp16-*")  # of weights that are there in full precision too
PRIOR_FILES = ("prior*", "*_stats.th", "scheduler/*", "model_index.json", "model.*", CONFIG_FILE, SCHEDULE_FILE)

_NAMES = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16", "torch.int64": "I64"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PACKAGE = Path(__file__).parent.parent


def bundled_models() -> dict[str, Path]:
    """Name -> folder of the models that come with the package, from a wheel or a checkout."""
    for assets in (_PACKAGE / "assets", _PACKAGE.parent / "assets"):
        if found := {file.parent.name: file.parent for file in sorted(assets.glob(f"*/{MODEL_FILE}"))}:
            return found
    return {}


def locate(name_or_path: str | Path, files: Sequence[str] = MODEL_FILES) -> Path:
    """The folder of a bundled model, a local path, or a Hub id "org/name" (its `files` fetched once, then cached)."""
    bundled = bundled_models()
    if str(name_or_path) in bundled:
        return bundled[str(name_or_path)]
    if (path := Path(name_or_path)).exists():
        return path
    known = f"bundled models: {', '.join(bundled) or 'none'}"
    if isinstance(name_or_path, str) and _HUB_ID.fullmatch(name_or_path):
        return _fetch(name_or_path, files, known)
    raise ValueError(f"unknown model {str(name_or_path)!r}; {known}; or give a model folder or a Hub id 'org/name'")


def _fetch(hub_id: str, files: Sequence[str], known: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        if files != MODEL_FILES:
            return Path(snapshot_download(hub_id, allow_patterns=list(files)))
        folder = Path(snapshot_download(hub_id, allow_patterns=list(files), ignore_patterns=list(VARIANTS)))
        components = (file.parent for file in sorted(folder.glob(f"*/{CONFIG_FILE}")))
        if bare := [component.name for component in components if not any(component.glob("*.safetensors"))]:
            last = [f"{name}/*{ending}" for name in bare for ending in (".safetensors", ".bin")]
            snapshot_download(hub_id, allow_patterns=last)
        return folder
    except RepositoryNotFoundError:
        reason = "the Hub has no such model, or it is private"
    except LocalEntryNotFoundError:
        reason = "the Hub cannot be reached and nothing of it is cached"
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
    raise ValueError(f"model {hub_id!r} is no local folder and could not be fetched: {reason}; {known}")


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


@dataclass(frozen=True)
class ModelInfo:
    """What a model folder, ours or diffusers', says of itself."""

    name: str
    kind: str
    licence: str  # "" = not told
    components: list[ComponentInfo]
    options: dict[str, Any]  # how to sample, unless the caller says otherwise


def summary(folder: Path) -> ModelInfo:
    """Read from JSON and from the headers of the weights."""
    if diffusers_layout.recognise(folder):
        name, licence = diffusers_layout.name(folder), diffusers_layout.licence(folder)
        options = json.loads(json.dumps(asdict(diffusers_layout.KARLO_OPTIONS)))
        return ModelInfo(name, "unclip", licence, describe(folder), options)
    model = read_model_json(folder)
    return ModelInfo(model["name"], model["kind"], model["licence"], describe(folder), read_json(folder / OPTIONS_FILE))


def describe(folder: Path) -> list[ComponentInfo]:
    """The components of a model folder, as the headers of their weights tell."""
    if diffusers_layout.recognise(folder):
        names = [name for name in diffusers_layout.read_index(folder) if (folder / name / CONFIG_FILE).is_file()]
    else:
        names = [name for name in read_model_json(folder)["components"] if name != "tokenizer"]
    return [_describe(folder / name) for name in names]


def _describe(folder: Path) -> ComponentInfo:
    files = weight_files(folder)
    tensors = [tensor for file in files for tensor in _header(file)]
    return ComponentInfo(
        name=folder.name,
        parameters=sum(math.prod(tensor["shape"]) for tensor in tensors),
        size=sum(file.stat().st_size for file in files),
        dtypes=tuple(sorted({tensor["dtype"] for tensor in tensors})),
    )


def _header(file: Path) -> list[dict[str, Any]]:
    """dtype and shape of each tensor of a file of weights."""
    if file.suffix != ".safetensors":
        from unclip.checkpoints.pickles import read_state  # late: it imports torch

        return [{"dtype": _NAMES.get(str(x.dtype), str(x.dtype)), "shape": x.shape} for x in read_state(file).values()]
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
