"""Small hostile pickles that would exhaust a naive reader's memory, time or stack.

None carries a payload.
"""

from __future__ import annotations

import io
import struct
import zipfile

PROTO = b"\x80\x04"
EMPTY_MODULE_STATE = ("_parameters", "_buffers", "_modules")


def text(value: str) -> bytes:
    """Push a string."""
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def name(module: str, attribute: str) -> bytes:
    """Push a global."""
    return f"c{module}\n{attribute}\n".encode()


def number(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


def archive(program: bytes, kind: int = zipfile.ZIP_STORED) -> bytes:
    """Return a zip file as torch.save writes it, with one storage of 4 bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as opened:
        opened.writestr("a/data.pkl", program, kind)
        opened.writestr("a/data/x", bytes(4), kind)
    return file.getvalue()


def directory(entries: int) -> bytes:
    """Return a zip file of empty files without names."""
    entry = b"PK\1\2" + bytes(42)
    end = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 0, 0, entries * len(entry), 4, 0)
    return b"PK\3\4" + entry * entries + end


def tensor(size: bytes, stride: bytes) -> bytes:
    """Return a state dict with a view of a storage of one number; arguments push tuples."""
    storage = text("storage") + name("torch", "FloatStorage") + text("x") + text("cpu") + b"K\1"
    arguments = b"((" + storage + b"tQK\0" + size + stride + b"N}t"
    rebuild = name("torch._utils", "_rebuild_tensor_v2")
    return archive(PROTO + b"}" + text("x") + rebuild + arguments + b"Rs.")


def modules(depth: int, children: int) -> bytes:
    """Return nested nn.Modules, each of which is `children` times in the next."""
    new = name("torch.nn", "Module") + b")R}("
    new += b"".join(text(part) + b"}" for part in EMPTY_MODULE_STATE[:2]) + text("_modules") + b"}("
    program = new + b"uub"
    for i in range(depth):
        put, get = b"r" + struct.pack("<I", i) + b"0", b"j" + struct.pack("<I", i)
        program += put + new + b"".join(text(f"m{k}") + get for k in range(children)) + b"uub"
    return PROTO + program + b"."


SHARED_TUPLE = b")" + b"2\x86" * 60  # 2**60 elements, if one counts them
DEEP_TUPLE = b")" + b"\x85" * 150_000
COPY = name("_codecs", "encode") + b"h\0" + text("latin1") + b"\x86R"
NUMBERS = b"(" + b"K\1" * 50_000 + b"lq\0"
FROZENSET = name("builtins", "frozenset") + b"q\1("
MODULE = name("torch.nn", "Module") + b")Rq\0}("

BOMBS = {
    "an index of 2 billion in the memo": PROTO + b"Nr\xff\xff\xff\x7f.",
    "the same index as text": PROTO + b"Np2147483647\n.",
    "the same index in a zip file": archive(PROTO + b"Nr\xff\xff\xff\x7f."),
    "a number of a million digits": PROTO + b"L" + b"9" * 1_000_000 + b"L\n.",
    "a huge number as a key": PROTO + b"}\x8b" + struct.pack("<I", 10**6) + b"\1" * 10**6 + b"Ns.",
    "a deep tuple as a key": PROTO + b"}" + DEEP_TUPLE + b"Ns.",
    "a shared tuple as a key": PROTO + b"}" + SHARED_TUPLE + b"Ns.",
    "a shared tuple in a message": (
        PROTO + name("torch._tensor", "_rebuild_from_type_v2") + b"(" + SHARED_TUPLE + b"N)NtR."
    ),
    "deep lists": PROTO + b"]" * 1_000_000 + b"a" * 999_999 + b".",
    "only sets": PROTO + b"\x8f" * 2_000_000 + b".",
    "only dicts": archive(PROTO + b"}" * 2_000_000 + b"."),
    "copies of a text": PROTO + text("x" * 10**6) + b"q\0(" + COPY * 300 + b"t.",
    "copies of a set": PROTO + NUMBERS + FROZENSET + b"h\1h\0\x85R" * 20_000 + b"t.",
    "many classes": PROTO + b"".join(name("m", f"c{i}") + b"0" for i in range(50_000)) + b"N.",
    "many objects": PROTO + name("m", "c") + b"q\0(" + b"h\0)R" * 1_000_000 + b"t.",
    "a frame of a terabyte": PROTO + b"\x95" + struct.pack("<Q", 2**40) + b"N.",
    "a bytearray of 8 gigabytes": PROTO + b"\x96" + struct.pack("<Q", 2**33) + b"N.",
    "a compressed program": archive(PROTO + b"N" * 10**7 + b".", zipfile.ZIP_DEFLATED),
    "many entries in a zip file": directory(200_000),
    "a tensor of a terabyte": tensor(number(2**40) + b"\x85", number(0) + b"\x85"),
    "a tensor of many axes": tensor(b"(" + number(2**62) * 20_000 + b"t", b")"),
    "an exponential tree of modules": modules(60, 2),
    "deep modules": modules(2000, 1),
    "a module in itself": MODULE + text("_parameters") + b"}" + text("m") + b"h\0ub.",
}
