"""Reader for files of torch.save that executes nothing in them.

A pickle is a program that names callables and their arguments. This reader never imports a name:
the names that tensors are made of map to functions defined here (`_ALLOWED`), every other name
becomes a class that only records its arguments. Time and memory are bounded by the file's size: see
`_Budget`.
"""

from __future__ import annotations

import io
import math
import mmap
import pickle
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from unclip.files import MAX_TEXT, open_regular, printable

Data = mmap.mmap | bytearray
# First object in a file of PyTorch before 1.6, which is a sequence of pickles and raw storages.
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_VERSION = 1001
# Lengths of the name and extra field of a zip entry, which precede its data.
LOCAL_HEADER = struct.Struct("<26xHH")
MAX_PICKLE = 16 * 2**20  # bytes of data.pkl
MAX_OPCODES = 600_000  # 55 for a tensor, 170 with the two averages of its optimizer
MAX_LINE = 2**16  # bytes of a number or name
MAX_AXES = 64  # of a tensor, as in NumPy
MAX_NUMBERS = 2**20  # of an expanded tensor, which may be larger than its storage


def read_checkpoint(file: str | Path) -> Any:
    """Return the object in a file of torch.save (zip or older), a TorchScript archive or a pickle.

    Tensors and containers are returned as such, an object of any other class as a `Stub`. Tensors
    are mapped from the file if possible (copy on write): the file must not change while they are in
    use. Raises ValueError if the file is truncated or of another format.
    """
    if not Path(file).exists():
        raise FileNotFoundError(f"no checkpoint at {file}")
    with open_regular(file) as stream:
        try:
            data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
            return _read(stream, data, _Budget.of(len(data)))
        except Exception as error:  # a damaged file can raise anything in the unpickler
            reason = printable((str(error).strip() or type(error).__name__).splitlines()[0])
            raise ValueError(
                f"{file} is truncated or not a PyTorch checkpoint ({reason}); download it again"
            ) from None


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


class _Dict(dict):
    """OrderedDict without its attributes (`_metadata` of a state dict)."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


class _Call:
    """One of our functions in place of one of PyTorch's; a file can call no others."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


def _tensor(
    flat: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> Tensor:
    """Replace torch._utils._rebuild_tensor and _rebuild_tensor_v2; as_strided checks the bounds."""
    if len(size) > MAX_AXES or math.prod(size) > max(flat.numel(), MAX_NUMBERS):
        raise pickle.UnpicklingError("a tensor is larger than its storage")
    return flat.as_strided(size, stride, offset)


def _tensor_of_dtype(
    flat: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *more: Any
) -> Tensor:
    """Replace torch._utils._rebuild_tensor_v3, for an untyped storage with a dtype."""
    _grad, _hooks, dtype, *_ = more
    return _tensor(flat.view(dtype), offset, size, stride)


def _of_type(call: _Call, type_: Any, args: tuple[Any, ...], state: Any) -> Any:
    """Replace torch._tensor._rebuild_from_type_v2; return a Tensor subclass as a plain tensor."""
    if not isinstance(call, _Call):
        raise pickle.UnpicklingError(f"it builds a tensor with a {type(call).__name__}")
    return call(*args)


def _encode(text: str, encoding: str) -> bytes:
    """Replace _codecs.encode, which protocol 2 uses for bytes."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError("it encodes text as something other than latin1")
    return text.encode("latin1")


def _hashable(items: Iterable[Any]) -> list[Any]:
    """Check that keys, or elements of a set, are quick to hash: no deep tuples or huge numbers."""
    items = list(items)
    for key in items:
        for part in key if isinstance(key, tuple) and len(key) <= 8 else (key,):
            is_huge = isinstance(part, int) and part.bit_length() > 64
            if is_huge or isinstance(part, (tuple, frozenset)):
                raise pickle.UnpicklingError("a key is too large")
    return items


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
_BUILTINS: dict[str, Callable[..., Any]] = {
    "set": lambda items=(): set(_hashable(items)),
    "frozenset": lambda items=(): frozenset(_hashable(items)),
    "complex": complex,
}
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
    "collections.OrderedDict": _Call(lambda items=(): _Dict(_pairs(items))),
    "_codecs.encode": _Call(_encode),
    "torch.Size": _Call(tuple),
    "torch.device": _Call(lambda *args: ":".join(map(str, args))),
    "torch._utils._rebuild_tensor": _Call(_tensor),
    "torch._utils._rebuild_tensor_v2": _Call(_tensor),
    "torch._utils._rebuild_tensor_v3": _Call(_tensor_of_dtype),
    "torch._utils._rebuild_parameter": _Call(_first),
    "torch._utils._rebuild_parameter_with_state": _Call(_first),
    "torch._tensor._rebuild_from_type_v2": _Call(_of_type),
}


@dataclass
class _Budget:
    """Limits of the cost of reading one file, against decompression bombs."""

    opcodes: int  # of all its pickles; each may make an object
    copied: int  # bytes

    @classmethod
    def of(cls, size: int) -> _Budget:
        return cls(min(150_000 + size // 64, MAX_OPCODES), 2 * size)

    def spend(self, opcodes: int = 0, copied: int = 0) -> None:
        self.opcodes -= opcodes
        self.copied -= copied
        if self.opcodes < 0 or self.copied < 0:
            raise pickle.UnpicklingError("it makes too many objects for its size")


class _Stream:
    """A file with a limit on the length of a line, and of `most` bytes for one read."""

    def __init__(self, stream: BinaryIO, most: int) -> None:
        self.stream, self.most = stream, most
        self.seek, self.tell = stream.seek, stream.tell

    def read(self, n: int = -1) -> bytes:
        if n > self.most:
            raise ValueError(f"{n:,} bytes at once; expected at most {self.most:,}")
        return self.stream.read(n)

    def readline(self) -> bytes:
        line = self.stream.readline(MAX_LINE)
        if not line.endswith(b"\n"):
            raise EOFError("a line does not end")
        return line


class _Opcodes(dict[int, Callable[..., None]]):
    """Opcode -> method of the unpickler; counts how often it is used."""

    def __init__(self, methods: Any, budget: _Budget) -> None:
        super().__init__(methods)
        self.budget = budget

    def __getitem__(self, code: int) -> Callable[..., None]:
        self.budget.opcodes -= 1
        if self.budget.opcodes < 0:
            self.budget.spend()
        return super().__getitem__(code)

    def __missing__(self, code: int) -> Any:
        raise pickle.UnpicklingError(f"it has the unknown opcode {code}")


class _Unpickler(pickle._Unpickler):
    """Resolves names to `_ALLOWED` or stubs, and references to storages to flat tensors.

    This is the implementation in Python, not the one in C: its memo is a dict rather than an array
    of any size, and its methods can be replaced. They call and change only objects defined here.
    """

    stack: list[Any]  # inherited, as are the next three
    append: Callable[[Any], None]
    read: Callable[[int], bytes]
    pop_mark: Callable[[], list[Any]]

    def __init__(
        self,
        stream: BinaryIO,
        storage: Callable[[str, torch.dtype, int], Tensor],
        budget: _Budget,
    ) -> None:
        super().__init__(_Stream(stream, sys.maxsize), encoding="utf-8")
        self.storage, self.budget = storage, budget
        self.storages: dict[str, Tensor] = {}
        self.stubs: dict[str, type[Stub]] = {}
        self.dispatch: Any = _Opcodes(_METHODS, budget)  # type: ignore[misc]

    def call(self, function: Any, args: Any, kwargs: Any = None) -> Any:
        """Call one of our functions, or make a stub."""
        is_stub = isinstance(function, type) and issubclass(function, Stub)
        if not (is_stub or isinstance(function, _Call)) or not isinstance(args, tuple):
            raise pickle.UnpicklingError(f"it calls a {type(function).__name__}")
        containers = [x for x in args if isinstance(x, (tuple, list, dict, set, frozenset))]
        texts = [x for x in args if isinstance(x, (str, bytes, bytearray))]
        self.budget.spend(8 + len(args) + sum(map(len, containers)), sum(map(len, texts)))
        return function(*args, **(kwargs or {}))

    def put(self, items: Iterable[Any], *kinds: type) -> None:
        """Add elements to the container on top of the stack."""
        target: Any = self.stack[-1]
        if not isinstance(target, (*kinds, Stub)):
            raise pickle.UnpicklingError(f"it modifies a {type(target).__name__}")
        if isinstance(target, dict):
            target.update(_pairs(items))
        elif isinstance(target, set):
            target.update(_hashable(items))
        else:
            target.extend(items)

    def load_reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self.call(self.stack[-1], args)

    load_newobj = load_reduce

    def load_newobj_ex(self) -> None:
        kwargs, args = self.stack.pop(), self.stack.pop()
        self.stack[-1] = self.call(self.stack[-1], args, kwargs)

    def _instantiate(self, klass: Any, args: Any) -> None:
        self.append(self.call(klass, tuple(args)))

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(target, (Stub, _Dict)):
            kind = "function" if isinstance(target, _Call) else type(target).__name__
            raise pickle.UnpicklingError(f"it modifies a {kind}")
        target.__setstate__(state)

    def load_append(self) -> None:
        self.put([self.stack.pop()], list)

    def load_appends(self) -> None:
        self.put(self.pop_mark(), list)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.put([(key, value)], dict)

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self.put(zip(items[::2], items[1::2], strict=True), dict)

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append(dict(_pairs(zip(items[::2], items[1::2], strict=True))))

    def load_additems(self) -> None:
        self.put(self.pop_mark(), set)

    def load_empty_set(self) -> None:
        self.budget.spend(opcodes=3)  # it takes three times the memory of a dict
        self.append(set())

    def load_frozenset(self) -> None:
        self.append(frozenset(_hashable(self.pop_mark())))

    def load_bytearray8(self) -> None:
        self.append(bytearray(self.read(*struct.unpack("<Q", self.read(8)))))

    def get_extension(self, code: int) -> None:
        raise pickle.UnpicklingError("it uses the registry of extensions")

    def load_bytes_file(self, data: bytes) -> Any:
        """torch.storage._load_from_bytes: in a plain pickle, a storage is an embedded file."""
        # A bytearray is writable, as `torch.frombuffer` expects.
        return _read(io.BytesIO(data), bytearray(data), self.budget)

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in _ALLOWED:
            return _ALLOWED[full]
        if full == "torch.storage._load_from_bytes":
            return _Call(self.load_bytes_file)
        if full not in self.stubs:
            self.budget.spend(opcodes=20)  # a class takes more memory than other objects
            self.stubs[full] = type(name, (Stub,), {"type_name": full})
        return self.stubs[full]

    def persistent_load(self, reference: Any) -> Any:
        """Return a storage, a view of one, or in older files a class with its source."""
        match reference:
            case ("module", type_, *_):
                return type_
            case (
                "storage",
                torch.dtype() as dtype,
                str() | int() as key,
                _location,
                int() as count,
                *view,
            ) if count >= 0:
                if (key := str(key)) not in self.storages:
                    self.storages[key] = self.storage(key, dtype, count)
                whole = self.storages[key]
                if not view or view[0] is None:
                    return whole
                _key, offset, size = view[0]
                return whole.as_strided((size,), (1,), offset)
        raise pickle.UnpicklingError("it refers to something other than a storage")


def _pairs(items: Iterable[Any]) -> list[tuple[Any, Any]]:
    """Return (key, value) pairs whose keys are quick to hash."""
    pairs = [(key, value) for key, value in items]
    _hashable(key for key, _ in pairs)
    return pairs


# Our methods and the inherited ones, by opcode.
_METHODS = {
    code: getattr(_Unpickler, method.__name__)
    for code, method in pickle._Unpickler.dispatch.items()
}


def _read(stream: BinaryIO, data: Data, budget: _Budget) -> Any:
    """Return the object in a file of any of PyTorch's formats; `data` are the bytes of `stream`."""
    if data[:4] == b"PK\x03\x04":
        return _read_zip(stream, data, budget)
    start = _Unpickler(stream, _no_storage, budget).load()
    is_legacy = isinstance(start, int) and start == LEGACY_MAGIC
    return _read_legacy(stream, budget) if is_legacy else start


def _read_legacy(stream: BinaryIO, budget: _Budget) -> Any:
    version, _system = (_Unpickler(stream, _no_storage, budget).load() for _ in range(2))
    if version != LEGACY_VERSION:
        raise ValueError(f"another version of PyTorch's legacy format than {LEGACY_VERSION}")

    def storage(key: str, dtype: torch.dtype, count: int) -> Tensor:
        """Return an empty storage; its values come later in the file."""
        budget.spend(copied=count * dtype.itemsize)
        return torch.empty(count, dtype=dtype)

    unpickler = _Unpickler(stream, storage, budget)
    content, storages = unpickler.load(), unpickler.storages
    keys = _Unpickler(stream, _no_storage, budget).load()
    if not isinstance(keys, list) or set(_hashable(keys)) != storages.keys():
        raise ValueError("its storages are not the ones that its tensors refer to")
    for key in keys:
        flat, (count,) = storages[key], struct.unpack("<q", stream.read(8))
        raw = bytearray(stream.read(flat.nbytes))
        if count != flat.numel() or len(raw) != flat.nbytes:
            raise EOFError(f"storage {key} is truncated")
        if count:
            flat.copy_(torch.frombuffer(raw, dtype=flat.dtype))
    return content


def _no_storage(key: str, dtype: torch.dtype, count: int) -> Tensor:
    raise pickle.UnpicklingError("a plain pickle refers to an external storage")


def _read_zip(stream: BinaryIO, data: Data, budget: _Budget) -> Any:
    directory: Any = _Stream(stream, MAX_TEXT)  # which `ZipFile` reads at once
    entries = {entry.filename: entry for entry in zipfile.ZipFile(directory).infolist()}
    found = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(found) != 1:
        raise ValueError("a zip file without data.pkl")
    root = found[0].removesuffix("data.pkl")

    def content(entry: zipfile.ZipInfo) -> slice:
        """Return where the bytes of a file are. PyTorch compresses no files, but a bomb would."""
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise ValueError(f"{entry.filename} is compressed; save it with torch.save")
        name, extra = LOCAL_HEADER.unpack_from(data, entry.header_offset)
        start = entry.header_offset + LOCAL_HEADER.size + name + extra
        if start + entry.file_size > len(data):
            raise EOFError(f"{entry.filename} is truncated")
        return slice(start, start + entry.file_size)

    order = entries.get(f"{root}byteorder")
    if order is not None and (order.file_size > 9 or data[content(order)].strip() != b"little"):
        raise ValueError("written on a big-endian machine")

    def storage(key: str, dtype: torch.dtype, count: int) -> Tensor:
        entry, size = entries.get(f"{root}data/{key}"), count * dtype.itemsize
        if entry is None or entry.file_size != size:
            there = "missing" if entry is None else f"{entry.file_size} bytes, expected {size}"
            raise EOFError(f"storage {key} is {there}")
        if not count:
            return torch.empty(0, dtype=dtype)
        where = content(entry)
        if where.start % dtype.itemsize == 0:
            return torch.frombuffer(data, dtype=dtype, count=count, offset=where.start)
        budget.spend(copied=size)
        return torch.frombuffer(bytearray(data[where]), dtype=dtype)

    pickled = entries[found[0]]
    if pickled.file_size > MAX_PICKLE:
        raise ValueError(f"data.pkl has more than {MAX_PICKLE:,} bytes")
    program = data[content(pickled)]
    if zlib.crc32(program) != pickled.CRC:
        raise ValueError("data.pkl is damaged")
    return _Unpickler(io.BytesIO(program), storage, budget).load()
