"""Tensors in and out of safetensors files: strict, complete, and never a pickle."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

T = TypeVar("T")

MAPPED_AT_MOST = 2**26  # bytes


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read when it is asked for; errors are those of `read_tensors`, at once.

    mapped: views of the file, which must then stay as it is while they are in use, rather than copies.
    """

    def __init__(self, file: str | Path, mapped: bool = False) -> None:
        self.file, self.mapped = Path(file), mapped
        self._open()
        self.shapes = {
            name: tuple(self._opened.get_slice(name).get_shape()) for name in self._opened.keys()
        }  # noqa: SIM118

    def _open(self) -> None:
        self._opened, self._mapped = _told(self.file, lambda: safe_open(self.file, "pt")), 0

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        if (
            self._mapped > MAPPED_AT_MOST
        ):  # what was read of a mapped file counts as memory until the file is closed
            self._open()
        tensor = self._opened.get_tensor(name)
        self._mapped += tensor.nbytes
        return tensor if self.mapped else tensor.clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def read_tensors(file: str | Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, memory-mapped; ValueError if the file is truncated or of another format."""
    return _told(file, lambda: load_file(file))


def _told(file: str | Path, read: Callable[[], T]) -> T:
    if not Path(file).is_file():
        raise FileNotFoundError(f"no weights at {file}; expected a safetensors file")
    try:
        return read()
    except SafetensorError as error:
        raise ValueError(
            f"{file} is truncated or is no safetensors file ({error}); fetch or export it again"
        ) from None


def write_tensors(module: nn.Module, file: str | Path, dtype: torch.dtype | None = None) -> None:
    """Writes a module's parameters and buffers; floating-point ones in `dtype` if it is given."""
    tensors = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
        for name, tensor in module.state_dict().items()
    }
    write_safetensors(tensors, file)


def write_safetensors(
    tensors: dict[str, Tensor], file: str | Path, metadata: dict[str, str] | None = None
) -> None:
    """As `safetensors.torch.save_file`, which lets nobody else read the file; here the umask says who may."""
    path = Path(file)
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata)
    path.chmod(mode)


def save_tensors(
    tensors: Mapping[str, Tensor], file: str | Path, metadata: dict[str, str] | None = None
) -> None:
    """Writes a safetensors file whole or not at all; the folder it goes into is made. A failure is an OSError."""
    path = Path(file)
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_safetensors({name: x.contiguous() for name, x in tensors.items()}, part, metadata)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot write {path}: {error}") from None


def load_strictly(
    module: nn.Module, tensors: Mapping[str, Tensor], source: str | Path, as_stored: bool = False
) -> None:
    """Puts `tensors` in place of the module's own, each in the dtype that the module has for it.

    The module may stand on the meta device. A missing, unexpected or mis-shaped tensor is a ValueError that names it.
    as_stored: parameters keep the dtype that they are given in.
    """
    own = module.state_dict()
    given = getattr(tensors, "shapes", None) or {
        name: tuple(tensors[name].shape) for name in tensors
    }
    shapes = {name: (given[name], tuple(own[name].shape)) for name in own if name in given}
    misshaped = [
        f"{name} is {here}, expected {wanted}"
        for name, (here, wanted) in shapes.items()
        if here != wanted
    ]
    missing = [name for name in own if name not in given]
    unexpected = [name for name in given if name not in own]
    if missing or unexpected or misshaped:
        raise fit_error(source, missing, unexpected, misshaped)
    kept = {name for name, _ in module.named_parameters()} if as_stored else ()
    cast = {
        name: tensors[name] if name in kept else tensors[name].to(own[name].dtype) for name in own
    }
    module.load_state_dict(cast, assign=True)


def fit_error(
    source: str | Path, missing: list[str], unexpected: list[str], misshaped: list[str]
) -> ValueError:
    """The error of weights that do not fit, with both sides of it."""
    faults = {"missing": missing, "unexpected": unexpected, "of another shape": misshaped}
    told = "; ".join(f"{fault}: {_some(names)}" for fault, names in faults.items() if names)
    return ValueError(f"{source} does not fit: {told}")


def _some(names: list[str], most: int = 8) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
