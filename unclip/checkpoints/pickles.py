"""Reader for files of torch.save that executes nothing in them.

A pickle is a program that names callables and their arguments. This reader never imports a name:
the names that tensors are made of map to functions defined here (`_ALLOWED`), every other name
becomes a class that only records its arguments.
"""

from __future__ import annotations

import io
import mmap
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

# First object in a file of PyTorch before 1.6, which is a sequence of pickles and raw storages.
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_VERSION = 1001
# Lengths of the name and extra field of a zip entry, which precede its data.
LOCAL_HEADER = struct.Struct("<26xHH")


def read_checkpoint(file: str | Path) -> Any:
    """Return the object in a file of torch.save (zip or older), a TorchScript archive or a pickle.

    Tensors and containers are returned as such, an object of any other class as a `Stub`. Tensors
    are mapped from the file if possible (copy on write): the file must not change while they are in
    use. ValueError for a file that is truncated or of another format.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"no checkpoint at {file}")
    try:
        with file.open("rb") as stream:
            return _read(stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY))
    except Exception as error:  # a damaged file can raise anything in the unpickler
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{file} is truncated or not a PyTorch checkpoint ({reason}); download it again"
        ) from None


def read_state(file: str | Path) -> dict[str, Tensor]:
    """Return the state dict of a checkpoint: itself, its "state_dict" or that of a module."""
    content = read_checkpoint(file)
    if isinstance(content, dict):
        content = content.get("state_dict", content)
    state = module_state(content) if isinstance(content, Stub) else content
    if isinstance(state, dict) and state and all(isinstance(x, Tensor) for x in state.values()):
        return state
    raise ValueError(f"{file} holds {_describe(content)}; expected a state dict (name -> tensor)")


class Stub:
    """An object of a class that was not imported: its class name, arguments and state."""

    type_name = ""  # "module.Class"
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    state: Any  # its attributes, usually a dict
    items: list[Any]  # of a list or set: elements; of a mapping: (key, value) pairs

    def __new__(cls, *args: Any, **kwargs: Any) -> Stub:
        self = super().__new__(cls)
        self.args, self.kwargs = args, kwargs
        self.state, self.items = {}, []
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def append(self, item: Any) -> None:
        self.items.append(item)

    def extend(self, items: Iterable[Any]) -> None:
        self.items.extend(items)

    add = append

    def __repr__(self) -> str:
        return f"<{self.type_name}, not loaded>"


def module_state(module: Stub) -> dict[str, Tensor]:
    """Return the state dict of a pickled nn.Module, or of the module in a TorchScript archive.

    TorchScript does not distinguish buffers from plain attributes: all its tensors are included.
    """
    return dict(_named_tensors(module, "", ()))


def _named_tensors(
    module: Stub, prefix: str, inside: tuple[Stub, ...]
) -> Iterator[tuple[str, Tensor]]:
    name = prefix.rstrip(".") or "the checkpoint"
    if not isinstance(module, Stub) or not isinstance(module.state, dict):
        raise ValueError(f"{name} is {_describe(module)}; expected a module")
    if module in inside:
        raise ValueError(f"{name} contains itself; expected a module")
    attributes = module.state
    if "_parameters" in attributes:  # an nn.Module
        transient = attributes.get("_non_persistent_buffers_set", ())
        buffers = {n: x for n, x in attributes.get("_buffers", {}).items() if n not in transient}
        attributes = {**attributes["_parameters"], **buffers, **attributes.get("_modules", {})}
    for name, value in attributes.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, Stub):
            yield from _named_tensors(value, f"{prefix}{name}.", (*inside, module))


def _describe(value: Any) -> str:
    if isinstance(value, Stub):
        return f"a {value.type_name}"
    keys = f" of {', '.join(map(str, list(value)[:4]))}" if isinstance(value, dict) else ""
    return f"a {type(value).__name__}{keys}"


class _Dict(dict):
    """OrderedDict without its attributes (`_metadata` of a state dict)."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


class _Call:
    """One of our functions in place of one of PyTorch's: a file can call it, and nothing else."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it modifies a function")


def _tensor(
    flat: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> Tensor:
    """torch._utils._rebuild_tensor and _rebuild_tensor_v2; as_strided checks the bounds."""
    return flat.as_strided(size, stride, offset)


def _tensor_of_dtype(
    flat: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *more: Any
) -> Tensor:
    """torch._utils._rebuild_tensor_v3: an untyped storage with a dtype."""
    _grad, _hooks, dtype, *_ = more
    return flat.view(dtype).as_strided(size, stride, offset)


def _of_type(call: _Call, type_: Any, args: tuple[Any, ...], state: Any) -> Any:
    """torch._tensor._rebuild_from_type_v2: the plain tensor of a Tensor subclass."""
    if not isinstance(call, _Call):
        raise pickle.UnpicklingError(f"it builds a tensor with {call}")
    return call(*args)


def _encode(text: str, encoding: str) -> bytes:
    """_codecs.encode: bytes in protocol 2."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"it encodes text as {encoding!r}")
    return text.encode("latin1")


def _load_from_bytes(data: bytes) -> Any:
    """torch.storage._load_from_bytes: in a plain pickle, a storage is an embedded file."""
    return _read(io.BytesIO(data), bytearray(data))


def _first(value: Any, *_: Any) -> Any:
    return value


_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype)
}
_STORAGES = (
    "Double:float64 Float:float32 Half:float16 BFloat16:bfloat16 Long:int64 Int:int32 Short:int16 "
    "Char:int8 Byte:uint8 Bool:bool ComplexDouble:complex128 ComplexFloat:complex64 Untyped:uint8"
)
_BUILTINS = {"set": set, "frozenset": frozenset, "complex": complex}
_ALLOWED: dict[str, Any] = {
    **{f"torch.{name}": dtype for name, dtype in _DTYPES.items()},
    **{
        f"{home}{kind}Storage": _DTYPES[dtype]
        for kind, dtype in (pair.split(":") for pair in _STORAGES.split())
        for home in ("torch.", "torch.storage.")
    },
    **{
        f"{home}.{name}": _Call(kind)
        for name, kind in _BUILTINS.items()
        for home in ("builtins", "__builtin__")
    },
    **{
        f"torch.jit._pickle.build_{kind}list": _Call(_first)
        for kind in ("int", "double", "bool", "tensor")
    },
    "torch.jit._pickle.restore_type_tag": _Call(_first),
    "collections.OrderedDict": _Call(_Dict),
    "_codecs.encode": _Call(_encode),
    "torch.Size": _Call(tuple),
    "torch.device": _Call(lambda *args: ":".join(map(str, args))),
    "torch._utils._rebuild_tensor": _Call(_tensor),
    "torch._utils._rebuild_tensor_v2": _Call(_tensor),
    "torch._utils._rebuild_tensor_v3": _Call(_tensor_of_dtype),
    "torch._utils._rebuild_parameter": _Call(_first),
    "torch._utils._rebuild_parameter_with_state": _Call(_first),
    "torch._tensor._rebuild_from_type_v2": _Call(_of_type),
    "torch.storage._load_from_bytes": _Call(_load_from_bytes),
}


class _Unpickler(pickle.Unpickler):
    """Resolves names to `_ALLOWED` or stubs, and references to storages to flat tensors."""

    def __init__(
        self, stream: BinaryIO, storage: Callable[[str, torch.dtype, int], Tensor]
    ) -> None:
        super().__init__(stream, encoding="utf-8")
        self.storage = storage
        self.storages: dict[str, Tensor] = {}
        self.stubs: dict[str, type[Stub]] = {}

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in _ALLOWED:
            return _ALLOWED[full]
        if full not in self.stubs:
            self.stubs[full] = type(name, (Stub,), {"type_name": full})
        return self.stubs[full]

    def persistent_load(self, reference: Any) -> Any:
        """Return a storage, a view of one, or in older files a class with its source."""
        match reference:
            case ("module", type_, *_):
                return type_
            case ("storage", torch.dtype() as dtype, key, _location, int() as count, *view) if (
                count >= 0
            ):
                if (key := str(key)) not in self.storages:
                    self.storages[key] = self.storage(key, dtype, count)
                whole = self.storages[key]
                if not view or view[0] is None:
                    return whole
                _key, offset, size = view[0]
                return whole.as_strided((size,), (1,), offset)
        raise pickle.UnpicklingError("it refers to something other than a storage")


def _read(stream: BinaryIO, data: mmap.mmap | bytearray) -> Any:
    """Return the object in a file of any of PyTorch's formats; `data` are the bytes of `stream`."""
    if data[:4] == b"PK\x03\x04":
        return _read_zip(stream, data)
    start = _Unpickler(stream, _no_storage).load()
    return _read_legacy(stream, len(data)) if start == LEGACY_MAGIC else start


def _read_legacy(stream: BinaryIO, length: int) -> Any:
    version, _system = (_Unpickler(stream, _no_storage).load() for _ in range(2))
    if version != LEGACY_VERSION:
        raise ValueError(f"version {version} of PyTorch's legacy format, expected {LEGACY_VERSION}")

    def storage(key: str, dtype: torch.dtype, count: int) -> Tensor:
        """Return an empty storage; its values come later in the file."""
        if count * dtype.itemsize > length:
            raise EOFError(f"storage {key} is truncated")
        return torch.empty(count, dtype=dtype)

    unpickler = _Unpickler(stream, storage)
    content, storages = unpickler.load(), unpickler.storages
    keys = _Unpickler(stream, _no_storage).load()
    if set(keys) != storages.keys():
        raise ValueError("its storages are not the ones that its tensors refer to")
    for key in keys:
        flat, (count,) = storages[key], struct.unpack("<q", stream.read(8))
        raw = bytearray(stream.read(count * flat.element_size()))
        if count != flat.numel() or len(raw) != count * flat.element_size():
            raise EOFError(f"storage {key} is truncated")
        if count:
            flat.copy_(torch.frombuffer(raw, dtype=flat.dtype))
    return content


def _no_storage(key: str, dtype: torch.dtype, count: int) -> Tensor:
    raise pickle.UnpicklingError("a plain pickle refers to an external storage")


def _read_zip(stream: BinaryIO, data: mmap.mmap | bytearray) -> Any:
    with zipfile.ZipFile(stream) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        found = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(found) != 1:
            raise ValueError("a zip file without data.pkl")
        root = found[0].removesuffix("data.pkl")
        if f"{root}byteorder" in entries and archive.read(f"{root}byteorder").strip() != b"little":
            raise ValueError("written on a big-endian machine")

        def storage(key: str, dtype: torch.dtype, count: int) -> Tensor:
            entry, size = entries.get(f"{root}data/{key}"), count * dtype.itemsize
            if entry is None or entry.file_size != size:
                there = "missing" if entry is None else f"{entry.file_size} bytes, expected {size}"
                raise EOFError(f"storage {key} is {there}")
            if not count:
                return torch.empty(0, dtype=dtype)
            name, extra = LOCAL_HEADER.unpack_from(data, entry.header_offset)
            start = entry.header_offset + LOCAL_HEADER.size + name + extra
            if entry.compress_type == zipfile.ZIP_STORED and start % dtype.itemsize == 0:
                return torch.frombuffer(data, dtype=dtype, count=count, offset=start)
            return torch.frombuffer(bytearray(archive.read(entry)), dtype=dtype)

        return _Unpickler(io.BytesIO(archive.read(found[0])), storage).load()
