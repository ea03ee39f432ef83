"""Which models there are, where they lie and what they hold; reads no weights and never imports torch."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from unclip.checkpoints import hub
from unclip.checkpoints.diffusers import layout as diffusers_layout
from unclip.checkpoints.diffusers.layout import weight_files
from unclip.checkpoints.hub import MODEL_FILE, MODEL_FILES
from unclip.files import read_json

OPTIONS_FILE, CONFIG_FILE, SCHEDULE_FILE = "options.json", "config.json", "schedule.json"
WEIGHTS_FILE = "model.safetensors"
FORMAT, VERSION = "unclip", 1

_NAMES = {
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.int64": "I64",
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PACKAGE = Path(__file__).parent.parent


def bundled_models() -> dict[str, Path]:
    """Name -> folder of the models that come with the package, from a wheel or a checkout."""
    for assets in (_PACKAGE / "assets", _PACKAGE.parent / "assets"):
        if found := {
            file.parent.name: file.parent for file in sorted(assets.glob(f"*/{MODEL_FILE}"))
        }:
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
    raise ValueError(
        f"unknown model {str(name_or_path)!r}; {known}; or give a model folder or a Hub id 'org/name'"
    )


def _fetch(hub_id: str, files: Sequence[str], known: str) -> Path:
    try:
        return hub.fetch(hub_id, files)
    except ValueError as error:
        fault = f"model {hub_id!r} is no local folder and could not be fetched: {error}; {known}"
        raise ValueError(fault) from None


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
            raise ValueError(
                f"{folder / MODEL_FILE}: {key} is {model.get(key)!r}; expected a {kind.__name__}"
            )
    return model


def lenders(folder: Path) -> dict[str, str]:
    """Components that a model folder leaves to a bundled model: their names -> the model's."""
    borrowed = read_model_json(folder).get("borrowed", {})
    if not isinstance(borrowed, dict) or not all(
        isinstance(name, str) for name in borrowed.values()
    ):
        raise ValueError(
            f"{folder / MODEL_FILE}: borrowed is {borrowed!r}; expected names of components and models"
        )
    return borrowed


def component_folders(folder: Path) -> dict[str, Path]:
    """Where each component of a model folder lies; ValueError if it is borrowed from a model that is not there."""
    found, bundled = {}, bundled_models()
    for name, lender in lenders(folder).items():
        if lender not in bundled or name not in read_model_json(bundled[lender])["components"]:
            there = ", ".join(bundled) or "none"
            raise ValueError(
                f"{folder / MODEL_FILE} borrows {name} from {lender!r}, which is no bundled model that has it; "
                f"bundled models: {there}"
            )
        found[name] = bundled[lender] / name
    return found | {name: folder / name for name in read_model_json(folder)["components"]}


@dataclass(frozen=True)
class ComponentInfo:
    """One network of a model folder, as the headers of its weights files tell."""

    name: str
    parameters: int  # numbers stored, buffers included
    size: int  # bytes
    dtypes: tuple[str, ...]  # as safetensors names them: F16, BF16, F32
    lender: str | None = None  # the bundled model whose it is, where that is another one


@dataclass(frozen=True)
class ModelInfo:
    """What a model's files say of it."""

    name: str
    kind: str
    licence: str  # "" = not told
    components: list[ComponentInfo]
    options: dict[
        str, Any
    ]  # how to sample, unless the caller says otherwise; empty if the files don't tell
    format: str = FORMAT  # as formats.FORMATS calls it


def summary(path: Path) -> ModelInfo:
    """Of ours and diffusers' folders, from JSON and the headers of the weights; of other formats, from the tensors."""
    if (path / MODEL_FILE).is_file():
        model = read_model_json(path)
        options = read_json(path / OPTIONS_FILE)
        return ModelInfo(model["name"], model["kind"], model["licence"], describe(path), options)
    if diffusers_layout.recognise(path) and not diffusers_layout.is_prior_only(path):
        name, licence = diffusers_layout.name(path), diffusers_layout.licence(path)
        options = json.loads(json.dumps(asdict(diffusers_layout.KARLO_OPTIONS)))
        return ModelInfo(name, "unclip", licence, describe(path), options, "diffusers")

    from unclip.checkpoints.probe import foreign_summary  # late: it imports torch

    return foreign_summary(path)


def describe(folder: Path) -> list[ComponentInfo]:
    """The components of a model folder, as the headers of their weights tell."""
    if diffusers_layout.recognise(folder):
        names = [
            name
            for name in diffusers_layout.read_index(folder)
            if (folder / name / CONFIG_FILE).is_file()
        ]
        return [_describe(folder / name) for name in names]
    borrowed, places = lenders(folder), component_folders(folder)
    return [
        _describe(place, borrowed.get(name))
        for name, place in places.items()
        if name != "tokenizer"
    ]


def _describe(folder: Path, lender: str | None = None) -> ComponentInfo:
    files = weight_files(folder)
    tensors = [(tensor["dtype"], tensor["shape"]) for file in files for tensor in _header(file)]
    return replace(
        tensors_info(folder.name, tensors, sum(file.stat().st_size for file in files)),
        lender=lender,
    )


def tensors_info(
    name: str, tensors: Iterable[tuple[str, Sequence[int]]], size: int
) -> ComponentInfo:
    """Of tensors of these dtypes, as safetensors or torch calls them, and shapes."""
    tensors = list(tensors)
    dtypes = {_NAMES.get(dtype, dtype) for dtype, _ in tensors}
    return ComponentInfo(
        name, sum(math.prod(shape) for _, shape in tensors), size, tuple(sorted(dtypes))
    )


def _header(file: Path) -> list[dict[str, Any]]:
    """dtype and shape of each tensor of a file of weights."""
    if file.suffix != ".safetensors":
        from unclip.checkpoints.pickles import read_state  # late: it imports torch

        return [{"dtype": str(x.dtype), "shape": x.shape} for x in read_state(file).values()]
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
    if (
        8 + length + max((tensor["data_offsets"][1] for tensor in tensors), default=0)
        != file.stat().st_size
    ):
        raise fault
    return tensors
