"""Reading and writing safetensors files, and loading them strictly into modules."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from unclip.files import atomic_file, open_safetensors, printable
from unclip.types import DTYPES, DType

MAX_MAPPED = 2**26  # bytes
MAX_CALLS = 50_000  # of torch's functions to build a network; Karlo's upsampler takes 5,268


class TensorFile(Mapping[str, Tensor]):
    """Tensors of a safetensors file, each read on access; opening raises as `read_tensors` does.

    mapped: return views of the file instead of copies; the file must then not change while in use.
    """

    def __init__(self, file: str | Path, mapped: bool = False) -> None:
        self.file, self.mapped = Path(file), mapped
        self._open()
        self._stored = plain_names(self._opened.keys())
        shapes = {
            name: self._opened.get_slice(key).get_shape() for name, key in self._stored.items()
        }
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.metadata: dict[str, str] = self._opened.metadata() or {}

    def _open(self) -> None:
        self._opened, self._read = open_safetensors(self.file), 0

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        if self._read > MAX_MAPPED:
            self._open()  # the pages that were read count as memory until the file is closed
        try:
            tensor = self._opened.get_tensor(self._stored[name])
        except SafetensorError as error:  # a data type that torch does not have
            raise ValueError(f"{self.file}: tensor {printable(name)}: {error}") from None
        self._read += tensor.nbytes
        return tensor if self.mapped else tensor.clone()

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows `start` to `stop` of a tensor; only these are read."""
        return self._opened.get_slice(name)[start:stop]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Return names without the prefixes that wrappers add in training -> names as stored.

    torch.compile adds "_orig_mod." to a module, DistributedDataParallel "module." to all names.
    """
    plain = {re.sub(r"(?<![^.])_orig_mod\.", "", name): name for name in names}
    while plain and all(name.startswith("module.") for name in plain):
        plain = {name.removeprefix("module."): stored for name, stored in plain.items()}
    return plain


def to_dtype(dtype: DType | None) -> torch.dtype | None:
    """Return a floating-point dtype from torch's own or a name: "bf16", "bfloat16"; None stays."""
    name = str(dtype).removeprefix("torch.")
    found = None if dtype is None else getattr(torch, DTYPES.get(name, name), dtype)
    if found is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        names = ", ".join(DTYPES)
        raise ValueError(f"dtype is {dtype!r}; expected {names} or a floating-point torch.dtype")
    return found


def read_tensors(file: str | Path) -> dict[str, Tensor]:
    """Return all tensors of a safetensors file, memory-mapped.

    Raises FileNotFoundError, or ValueError if the file is truncated or of another format.
    """
    return dict(TensorFile(file, mapped=True))


def write_tensors(module: nn.Module, file: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write a module's parameters and buffers, floating-point ones in `dtype` if it is given."""
    tensors = {
        name: x.detach().to("cpu", dtype if x.is_floating_point() else None).contiguous()
        for name, x in module.state_dict().items()
    }
    write_safetensors(tensors, file)


def write_safetensors(
    tensors: dict[str, Tensor], file: str | Path, metadata: dict[str, str] | None = None
) -> None:
    """Call `safetensors.torch.save_file`, with permissions from the umask, not owner-only."""
    path = Path(file)
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata)
    path.chmod(mode)


def save_tensors(
    tensors: Mapping[str, Tensor], file: str | Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file atomically, creating its folder. Raises OSError on failure."""
    with atomic_file(Path(file)) as part:
        try:
            write_safetensors({name: x.contiguous() for name, x in tensors.items()}, part, metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from None


class _NothingDrawn(TorchFunctionMode):
    def __init__(self, source: str | Path) -> None:
        super().__init__()
        self.source, self.calls = source, 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.calls, kwargs = self.calls + 1, kwargs or {}
        if self.calls > MAX_CALLS:
            raise ValueError(f"{self.source} describes a network of too many layers to be loaded")
        return kwargs["tensor"] if func is nn.init.normal_ else func(*args, **kwargs)


@contextlib.contextmanager
def meta_device(source: str | Path = "a config") -> Iterator[None]:
    """Build modules on the meta device, for `load_strictly`.

    Normal distributions are not drawn from: torch would do so in Python, and import its compiler,
    which takes longer than to load a small model. Raises ValueError for a network of more layers
    than any real one has, whose modules would fill the memory; it names `source`.
    """
    with torch.device("meta"), _NothingDrawn(source):
        yield


def load_strictly(
    module: nn.Module, tensors: Mapping[str, Tensor], source: str | Path, as_stored: bool = False
) -> None:
    """Replace the tensors of a module, which may be on the meta device, each cast to its dtype.

    as_stored: parameters keep the dtype of `tensors`. Raises ValueError that lists missing,
    unexpected and misshaped tensors.
    """
    own = module.state_dict()
    if isinstance(tensors, TensorFile):
        given = tensors.shapes
    else:
        given = {name: tuple(tensors[name].shape) for name in tensors}
    missing = [name for name in own if name not in given]
    unexpected = [name for name in given if name not in own]
    misshaped = [
        f"{name} is {given[name]}, expected {tuple(x.shape)}"
        for name, x in own.items()
        if name in given and given[name] != tuple(x.shape)
    ]
    if missing or unexpected or misshaped:
        raise fit_error(source, missing, unexpected, misshaped)
    uncast = {name for name, _ in module.named_parameters()} if as_stored else set()
    cast = {n: tensors[n] if n in uncast else tensors[n].to(own[n].dtype) for n in own}
    module.load_state_dict(cast, assign=True)


def fit_error(
    source: str | Path, missing: list[str], unexpected: list[str], misshaped: list[str]
) -> ValueError:
    """Return the error for weights that do not fit a network."""
    faults = {"missing": missing, "unexpected": unexpected, "of another shape": misshaped}
    text = "; ".join(f"{fault}: {_some(names)}" for fault, names in faults.items() if names)
    return ValueError(f"{source} does not fit: {text}")


def _some(names: list[str], most: int = 8) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(printable, names[:most])) + rest
