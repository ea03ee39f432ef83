"""Tensors in and out of safetensors files: strict, complete, and never a pickle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def read_tensors(file: str | Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, memory-mapped; ValueError if the file is truncated or of another format."""
    if not Path(file).is_file():
        raise FileNotFoundError(f"no weights at {file}; expected a safetensors file")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated or is no safetensors file ({error}); fetch or export it again") from None


def write_tensors(module: nn.Module, file: str | Path, dtype: torch.dtype | None = None) -> None:
    """Writes a module's parameters and buffers; floating-point ones in `dtype` if it is given."""
    tensors = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
        for name, tensor in module.state_dict().items()
    }
    save_file(tensors, file)


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Puts `tensors` in place of the module's own, each in the dtype that the module has for it.

    The module may stand on the meta device. A missing, unexpected or mis-shaped tensor is a ValueError that names it.
    """
    own = module.state_dict()
    shapes = {name: (tuple(tensors[name].shape), tuple(own[name].shape)) for name in own if name in tensors}
    misshaped = [f"{name} is {given}, expected {wanted}" for name, (given, wanted) in shapes.items() if given != wanted]
    missing = [name for name in own if name not in tensors]
    unexpected = [name for name in tensors if name not in own]
    if missing or unexpected or misshaped:
        raise fit_error(source, missing, unexpected, misshaped)
    module.load_state_dict({name: tensors[name].to(own[name].dtype) for name in own}, assign=True)


def fit_error(source: str | Path, missing: list[str], unexpected: list[str], misshaped: list[str]) -> ValueError:
    """The error of weights that do not fit, with both sides of it."""
    faults = {"missing": missing, "unexpected": unexpected, "of another shape": misshaped}
    told = "; ".join(f"{fault}: {_some(names)}" for fault, names in faults.items() if names)
    return ValueError(f"{source} does not fit: {told}")


def _some(names: list[str], most: int = 8) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
