"""Members of a tar file, also of one that is damaged or has several archives in a row.

A damaged header loses its own member only. Reading continues after it and after end marks, up to
the end of the file.
"""

from __future__ import annotations

import mmap
import os
import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from unclip.data.text import readable

if TYPE_CHECKING:
    from typing_extensions import Self

BLOCK = tarfile.BLOCKSIZE
MAGIC, MAGIC_AT = b"ustar", 257
EXTENDED = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, *tarfile.GNU_TYPES[:2])
MAX_EXTENDED = 1 << 20  # bytes of a long name or of pax headers
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
# The first bytes of images, at offset 0, and of AVIF, at offset 4.
SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")
AVIF = b"ftypavif"
SHORT = 4  # bytes
CHUNK = 1 << 20  # bytes


class Member(NamedTuple):
    """The data of a regular file in a tar; links, devices and sparse files have the size -1."""

    name: str
    offset: int
    size: int


class Loss(NamedTuple):
    """Consecutive damaged headers of `count` members; 0 for data that belongs to no member."""

    offset: int  # of the first byte
    count: int


class EndMark(NamedTuple):
    """The end of an archive; another may follow."""

    offset: int


def read_members(path: Path) -> Iterator[Member | Loss | EndMark]:
    """Yield the members, losses and end marks in the order of the file.

    Raises ValueError if the file is not an uncompressed tar, or ends without an end mark,
    since the amount of missing data is then unknown.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file")
    with path.open("rb") as file:
        head = file.read(8)
        for signature, name in COMPRESSED.items():
            if head.startswith(signature):
                raise ValueError(f"{path} is compressed with {name}; decompress it")
        size = os.fstat(file.fileno()).st_size
        if size < BLOCK:
            raise ValueError(f"{path} is not a tar: it has {size} bytes")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            end, found = 0, False
            for info, start, stop in _headers(file, data):
                if stop > size:
                    raise ValueError(f"{path} is cut off in {readable(info.name)}; copy it again")
                if start > end:
                    yield from _between(data, end, start)
                regular = info.isreg() and not info.issparse()
                if not info.isdir():
                    yield Member(info.name, info.offset_data, info.size if regular else -1)
                end, found = stop, True
            is_empty = size <= tarfile.RECORDSIZE and not data[:].strip(b"\0")  # only an end mark
            if not found and not is_empty:
                raise ValueError(f"{path} is not a tar: it has no valid header")
            rest = list(_between(data, end, size))
            if not any(isinstance(item, EndMark) for item in rest):
                fault = f"{path} is cut off at byte {size:,}: the end mark is missing"
                raise ValueError(f"{fault}; copy it again")
            yield from rest


class _Info(tarfile.TarInfo):
    """A header with a plausible size; others match their checksum by accident, or are hostile.

    A checksum of 0 belongs to a block with few bytes, whose signed sum may be 0 by accident.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        info = super().frombuf(buf, encoding, errors)
        too_large = info.type in EXTENDED and info.size > MAX_EXTENDED
        if info.chksum == 0 or info.size < 0 or too_large:
            raise tarfile.InvalidHeaderError("size")  # pyright: ignore[reportAttributeAccessIssue]
        return info


def _headers(file: BinaryIO, data: mmap.mmap) -> Iterator[tuple[tarfile.TarInfo, int, int]]:
    """Yield each valid header with the first byte of its member and the byte after it."""
    position = 0
    while 0 <= position < len(data):
        file.seek(position)
        try:
            tar = tarfile.TarFile(
                fileobj=file,
                tarinfo=_Info,
                ignore_zeros=True,
                encoding="utf-8",
                errors="surrogateescape",
            )
            while (info := tar.next()) and tar.offset > info.offset:
                tar.members = []  # pyright: ignore[reportAttributeAccessIssue]  # to save memory
                yield info, info.offset, tar.offset
                position = tar.offset
            if info is None:
                position = _find_header(data, position)
            else:
                position = info.offset_data
        except (tarfile.TarError, ValueError, LookupError, OverflowError):
            # An extended header without the one that it extends, or with damaged contents.
            position = max(position + BLOCK, file.tell())


def _find_header(data: mmap.mmap, start: int) -> int:
    """Return the next valid header that is not a multiple of BLOCK after `start`, or -1."""
    at = start
    while (at := data.find(MAGIC, at + 1)) >= 0:
        header = at - MAGIC_AT
        if header > start and (header - start) % BLOCK:
            try:
                _Info.frombuf(data[header : header + BLOCK], "utf-8", "surrogateescape")
                return header
            except tarfile.HeaderError:
                pass
    return -1


def _between(data: mmap.mmap, start: int, end: int) -> Iterator[Loss | EndMark]:
    """Yield the end marks and losses between two valid headers, or after the last one."""
    if end == len(data) or (end - start) % BLOCK == 0:
        yield from _inspect(data, start, end)
        return
    # The blocks of the following archive have another alignment.
    marks = [at for at in range(start, end, BLOCK) if not data[at : at + 2 * BLOCK].strip(b"\0")]
    split = max(marks) + 2 * BLOCK if marks else start
    yield from _inspect(data, start, split)
    yield from _inspect(data, split + (end - split) % BLOCK, end, is_marked=bool(marks))


def _inspect(
    data: mmap.mmap, start: int, end: int, is_marked: bool = False
) -> Iterator[Loss | EndMark]:
    """Yield the end marks and losses in the blocks of one archive; is_marked: after an end mark."""

    def is_zero(at: int) -> bool:
        return not data[at : min(at + BLOCK, end)].strip(b"\0")

    if all(not data[at : min(at + CHUNK, end)].strip(b"\0") for at in range(start, end, CHUNK)):
        # The padding of an archive ends with a record, or after the two blocks of its end mark.
        padded = end in (len(data), start + 2 * BLOCK) or end % tarfile.RECORDSIZE == 0
        if padded and end - start >= 2 * BLOCK:
            yield EndMark(start)
        elif start < end:
            yield Loss(start, int(end - start == BLOCK))
        return
    runs = [(zero, list(run)) for zero, run in groupby(range(start, end, BLOCK), is_zero)]
    loss = None
    for zero, run in runs:
        if not zero:
            is_first = not is_marked and not _is_header(data, run[0], end)
            loss = loss or Loss(run[0], int(is_first))
            headers = sum(_is_header(data, at, end) for at in run)
            loss = loss._replace(count=loss.count + headers)
            continue
        after = run[-1] + BLOCK
        is_header = after < end and _starts_file(data, after, end)  # the last one, of zeros
        if len(run) - is_header >= 2:
            if loss:
                yield loss
            yield EndMark(run[0])
            loss, is_marked = None, True
        if is_header or (len(run) == 1 and run[0] == start):
            loss = loss or Loss(run[-1], 0)
            loss = loss._replace(count=loss.count + 1)
    if loss:
        yield loss


def _is_header(data: mmap.mmap, at: int, end: int) -> bool:
    """Return whether the block is a damaged header: by its magic number, or by what follows."""
    if data[at + MAGIC_AT : at + MAGIC_AT + len(MAGIC)] == MAGIC:
        return True
    return at + BLOCK < end and _starts_file(data, at + BLOCK, end)


def _starts_file(data: mmap.mmap, at: int, end: int) -> bool:
    """Return whether the block is the first one of an image, or text that is padded with zeros."""
    block = data[at : at + BLOCK]
    if block.startswith(SIGNATURES) or block[4:12] == AVIF:
        return True
    if _is_text(before := data[at - BLOCK : at]):
        return False  # the text started there
    text = bytearray()
    while at < end and len(text) % BLOCK == 0 and _is_text(block := data[at : at + BLOCK]):
        text += block.rstrip(b"\0")
        at += BLOCK
    least = SHORT if before.strip(b"\0") else 1  # a few bytes may also be the end of an image
    if len(text) % BLOCK == 0 or len(text) < least:
        return False
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _is_text(block: bytes) -> bool:
    """Return whether a block has printable bytes and then only zeros."""
    text = block.rstrip(b"\0")
    return bool(text) and all(byte >= 32 or byte in b"\t\n\r" for byte in text)
