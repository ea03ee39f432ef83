"""Summaries for `unclip info` and `unclip models`; torch is imported only where it is needed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from unclip.checkpoints.diffusers import layout as diffusers
from unclip.checkpoints.folders import (
    CONFIG_FILE,
    FORMAT_NAME,
    MODEL_FILE,
    OPTIONS_FILE,
    card_licence,
    component_folders,
    folder_name,
    read_model_json,
    shared_from,
    weight_files,
)
from unclip.files import open_safetensors, read_json

_DTYPES = {
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.int64": "I64",
}


@dataclass(frozen=True)
class ComponentInfo:
    """One network of a model, from the headers of its weight files."""

    name: str
    parameters: int  # stored numbers, buffers included
    size: int  # bytes
    dtypes: tuple[str, ...]  # as safetensors names them: F16, BF16, F32
    shared_from: str | None = None  # the bundled model that holds it, if it is another one


@dataclass(frozen=True)
class ModelInfo:
    """A model as its files describe it."""

    name: str
    kind: str
    licence: str  # "" if unknown
    components: list[ComponentInfo]
    options: dict[str, Any]  # default sampling options; {} if the files hold none
    format: str = FORMAT_NAME  # name of the `Format`


def summary(path: Path) -> ModelInfo:
    """Summarise what `load`, `load_codec` or `load_prior` accepts, else raise ValueError.

    Our own and diffusers' folders are read from JSON and the headers of their weights alone.
    """
    if (path / MODEL_FILE).is_file():
        model, options = read_model_json(path), read_json(path / OPTIONS_FILE)
        return ModelInfo(model["name"], model["kind"], model["licence"], describe(path), options)
    if diffusers.recognise(path) and not diffusers.is_prior_only(path):
        options = json.loads(json.dumps(asdict(diffusers.KARLO_OPTIONS)))
        name, licence = folder_name(path), card_licence(path)
        return ModelInfo(name, "unclip", licence, describe(path), options, "diffusers")
    return _probe(path)


def _probe(path: Path) -> ModelInfo:
    """Summarise a path from the tensors in its files; no network is built."""
    from unclip.checkpoints.registry import CODECS, MODELS, PRIORS  # late: imports torch

    formats = [format for format in (*MODELS, *CODECS, *PRIORS) if format.probe is not None]
    for format in formats:
        if format.probe is not None and format.recognise(path):
            components = []
            for name, state in format.probe(path).items():
                tensors = [(str(x.dtype), x.shape) for x in state.values()]
                size = sum(x.nbytes for x in state.values())
                components.append(_component(name, tensors, size))
            licence = card_licence(path if path.is_dir() else path.parent)
            return ModelInfo(folder_name(path), format.kind, licence, components, {}, format.name)
    if path.is_file():  # a damaged file is reported as such, and so are weights without a config
        tensors = len(_header(path))
        raise ValueError(f"{path} has {tensors} tensors of no known model; give a model's folder")
    names = ", ".join(dict.fromkeys(format.name for format in formats))
    raise ValueError(f"{path} is not a model, codec or prior of a known format ({names})")


def describe(folder: Path) -> list[ComponentInfo]:
    """Describe the components of our own or a diffusers folder from the headers of weights."""
    if diffusers.recognise(folder):
        folders = {name: folder / name for name in diffusers.read_index(folder)}
        folders = {name: part for name, part in folders.items() if (part / CONFIG_FILE).is_file()}
        shared = {}
    else:
        folders, shared = component_folders(folder), shared_from(folder)
        folders.pop("tokenizer", None)
    return [replace(_describe(path), shared_from=shared.get(n)) for n, path in folders.items()]


def _describe(folder: Path) -> ComponentInfo:
    files = weight_files(folder)
    tensors = [(tensor["dtype"], tensor["shape"]) for file in files for tensor in _header(file)]
    return _component(folder.name, tensors, sum(file.stat().st_size for file in files))


def _component(name: str, tensors: Iterable[tuple[str, Sequence[int]]], size: int) -> ComponentInfo:
    """Summarise tensors, given as dtype (as named by safetensors or torch) and shape."""
    tensors = list(tensors)
    dtypes = {_DTYPES.get(dtype, dtype) for dtype, _ in tensors}
    parameters = sum(math.prod(shape) for _, shape in tensors)
    return ComponentInfo(name, parameters, size, tuple(sorted(dtypes)))


def _header(file: Path) -> list[dict[str, Any]]:
    """Return dtype and shape of each tensor in a weight file."""
    if file.suffix != ".safetensors":
        from unclip.checkpoints.states import read_state  # late: imports torch

        return [{"dtype": str(x.dtype), "shape": x.shape} for x in read_state(file).values()]
    opened = open_safetensors(file, "numpy")
    slices = map(opened.get_slice, opened.keys())
    return [{"dtype": x.get_dtype(), "shape": x.get_shape()} for x in slices]
