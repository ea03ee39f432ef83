"""State dicts in PyTorch checkpoints: plain, in a training checkpoint, or of a pickled module."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from unclip.checkpoints.pickles import Stub, read_checkpoint
from unclip.files import printable
from unclip.weights import plain_names

MAX_MODULES, MAX_DEPTH = 30_000, 100  # in a pickled module


def read_state(file: str | Path) -> dict[str, Tensor]:
    """Return the state dict of a checkpoint: itself, its "state_dict" or that of a module.

    Names are without the prefixes of wrappers (see `plain_names`).
    """
    content = read_checkpoint(file)
    if state := find_state(content):
        return state
    raise ValueError(f"{file} holds {_describe(content)}; expected a state dict (name -> tensor)")


def find_state(content: Any) -> dict[str, Tensor]:
    """Return the state dict in the content of a checkpoint, as `read_state`; {} if it has none."""
    if isinstance(content, dict):
        content = content.get("state_dict", content)
    state = module_state(content) if isinstance(content, Stub) else content
    return rename_plain(state) if is_state(state) else {}


def rename_plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict without the prefixes of wrappers in its names."""
    return {name: state[stored] for name, stored in plain_names(state).items()}


def is_state(content: Any) -> bool:
    """Return whether an object is a state dict, which has a tensor for every name."""
    if not isinstance(content, Mapping) or not content:
        return False
    return all(isinstance(n, str) and isinstance(x, Tensor) for n, x in content.items())


def module_state(module: Stub) -> dict[str, Tensor]:
    """Return the state dict of a pickled nn.Module, or of the module in a TorchScript archive.

    TorchScript does not distinguish buffers from plain attributes: all its tensors are included.
    """
    return dict(_named_tensors(module, "", itertools.count()))


def _named_tensors(
    module: Stub, prefix: str, visits: Iterator[int]
) -> Iterator[tuple[str, Tensor]]:
    where = printable(prefix.rstrip(".")) or "the checkpoint"
    attributes = module.state if isinstance(module, Stub) else None
    if isinstance(attributes, dict) and "_parameters" in attributes:  # an nn.Module
        parameters, buffers, modules = (
            attributes.get(name) or {} for name in ("_parameters", "_buffers", "_modules")
        )
        if all(isinstance(part, dict) for part in (parameters, buffers, modules)):
            transient = attributes.get("_non_persistent_buffers_set", ())
            if isinstance(transient, (set, dict)):
                buffers = {n: x for n, x in buffers.items() if n not in transient}
            attributes = {**parameters, **buffers, **modules}
    if not isinstance(attributes, dict):
        raise ValueError(f"{where} is {_describe(module)}; expected a module")
    if next(visits) > MAX_MODULES or prefix.count(".") > MAX_DEPTH:
        raise ValueError("the checkpoint contains itself or too many modules; expected a module")
    for name, value in attributes.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, Stub):
            yield from _named_tensors(value, f"{prefix}{name}.", visits)


def _describe(value: Any) -> str:
    if isinstance(value, Stub):
        return printable(f"a {value.type_name}")
    keys = f" of {', '.join(map(str, list(value)[:4]))}" if isinstance(value, dict) else ""
    return printable(f"a {type(value).__name__}{keys}")
