"""Bounded reading of untrusted files, and folders that are written atomically.

Files may be damaged or hostile: `open_regular` refuses pipes and devices, which may block or never
end, `parse_json` limits memory, and `printable` keeps a text from a file on one line of a message.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import re
import shutil
import stat
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open

MAX_TEXT = 4 * 2**20  # bytes of a text file; an index or header of 30,000 tensors has 3 MB
MAX_NESTED = 100_000  # objects and arrays in a JSON text, which take 20 times its size in memory
LFS_POINTER = b"version https://git-lfs"
LONGEST = 500  # characters that a message shows of a file's content
# Control characters, line separators, marks that reorder text, and lone surrogates.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object, most: int = LONGEST) -> str:
    """Escape what breaks a line or controls a terminal, as "\\n" and "\\x1b"; shorten the text."""
    text = str(text)
    text = text if len(text) <= most else f"{text[:most]}..."
    return _UNPRINTABLE.sub(lambda x: x[0].encode("unicode_escape").decode(), text)


def shorten(value: object) -> str:
    """Return the repr of a value for a message, in at most 80 printable characters."""
    try:
        text = printable(repr(value))
    except (ValueError, RecursionError):  # an integer of thousands of digits, a deep list
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."


def error_text(error: object) -> str:
    """Return the lines of an error or a warning, which may quote a file, each printable."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        error = f"{error.filename}: {error.strerror}"  # without the number of the error
    return "\n".join(printable(line, 4 * LONGEST) for line in str(error).split("\n"))


def out_of_memory(error: Exception) -> str:
    """Describe a lack of memory in one line. Any other error is raised again."""
    lines = error_text(error).splitlines()[:1]  # torch's errors have more
    if not isinstance(error, MemoryError) and not re.search(
        "can't allocate memory|out of memory", " ".join(lines)
    ):
        raise error
    return f"out of memory ({lines[0]})" if lines else "out of memory"


@contextlib.contextmanager
def exit_on_error(interrupted: str = "interrupted") -> Iterator[None]:
    """Turn a user's error, a full disk or Ctrl-C into one line, and exit."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error_text(error)}") from None
    except (MemoryError, RuntimeError) as error:
        raise SystemExit(f"error: {out_of_memory(error)}") from None
    except KeyboardInterrupt:
        raise SystemExit(interrupted) from None


def open_regular(file: str | os.PathLike[str], max_bytes: int | None = None) -> BinaryIO:
    """Open a file for reading.

    Raises FileNotFoundError if it does not exist, and ValueError for a folder, a pipe or a device
    (which may block or never end), for a Git LFS pointer, and for more than `max_bytes`.
    """
    try:
        status = os.stat(file)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{file} does not exist") from None
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
        raise ValueError(f"{file} is {kind}; expected a file")
    if max_bytes is not None and status.st_size > max_bytes:
        limit = f"expected at most {max_bytes:,}"
        raise ValueError(f"{file} is too large: {status.st_size:,} bytes; {limit}")
    stream = open(file, "rb")
    if stream.peek(len(LFS_POINTER)).startswith(LFS_POINTER):
        stream.close()
        raise ValueError(f"{file} is a pointer of Git LFS, not the file itself; run `git lfs pull`")
    return stream


def read_bytes(file: str | Path, max_bytes: int | None = MAX_TEXT) -> bytes:
    """Read a whole file; errors as in `open_regular`."""
    with open_regular(file, max_bytes) as stream:
        return stream.read()


def read_text(file: str | Path, max_bytes: int = MAX_TEXT) -> str:
    """Read UTF-8 text without its byte order mark; errors as in `open_regular`, or ValueError."""
    try:
        return read_bytes(file, max_bytes).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not UTF-8 text: {error.reason} at byte {error.start}"
        ) from None


def read_gzip(file: str | Path, max_bytes: int = MAX_TEXT) -> bytes:
    """Read a gzip file. Raises ValueError above `max_bytes`, compressed or decompressed."""
    with open_regular(file, max_bytes) as stream, gzip.open(stream) as content:
        try:
            data = content.read(max_bytes + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{file} is not a gzip file: {error}") from None
    if len(data) > max_bytes:
        raise ValueError(f"{file} is too large: it expands to more than {max_bytes:,} bytes")
    return data


def parse_json(text: str | bytes) -> Any:
    """Parse JSON. Raises ValueError, without a file name, if it is invalid or nested too much."""
    brackets = (b"[", b"{") if isinstance(text, bytes) else ("[", "{")
    if (nested := sum(map(text.count, brackets))) > MAX_NESTED:  # type: ignore[arg-type]
        raise ValueError(f"{nested:,} objects and arrays; expected at most {MAX_NESTED:,}")
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError as error:
        raise ValueError(printable(error)) from None


def read_json(file: Path, max_bytes: int = MAX_TEXT) -> dict[str, Any]:
    """Read a JSON object. Raises FileNotFoundError or ValueError that names the file."""
    try:
        text = read_text(file, max_bytes)
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} is missing") from None
    try:
        data = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{file} holds a {type(data).__name__}; expected a JSON object")
    return data


def sha256(file: Path) -> str:
    """Return the hash of a file's bytes, in hexadecimal."""
    total = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def open_safetensors(file: str | Path, framework: str = "pt") -> safe_open:
    """Open a safetensors file; its header is validated, and no tensor is read.

    Raises FileNotFoundError, or ValueError if the file is truncated or of another format.
    """
    with open_regular(file) as stream:
        header = int.from_bytes(stream.read(8), "little")
    advice = "download or export it again"
    if header > MAX_TEXT:
        raise ValueError(f"{file} is not a safetensors file: its header is too long; {advice}")
    try:
        return safe_open(file, framework)
    except Exception as error:  # SafetensorError, and others for odd headers
        reason = f"truncated or not a safetensors file ({printable(error)})"
        raise ValueError(f"{file} is {reason}; {advice}") from None


def check_image_folder(path: Path, kinds: str = ".png, .jpg or .webp") -> None:
    """Raise ValueError if images would be written into a new folder that is named like a file.

    kinds: the files that may be named instead. A suffix of letters, as in "a.heic", names a file;
    "run.v2" and "out.2024" are folders.
    """
    suffix = path.suffix.lower()
    if (suffix == ".mp4" or suffix[1:].isalpha()) and not path.is_dir():
        advice = "to write into a folder of this name, create it first"
        raise ValueError(f"{path}: images are written as {kinds}; {advice}")


def check_file(path: Path) -> None:
    """Raise a ValueError if a file cannot be written at `path`; missing folders are created."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; expected a file name")
    _check_writable(path, *_follow(path).parents)


def check_folder(path: Path) -> None:
    """Raise a ValueError if no files can be written into a folder, which may not exist yet."""
    _check_writable(path, path, *path.parents)


def check_new_folder(path: Path) -> None:
    """Raise a ValueError unless `path` can be written as a folder, and is absent or empty."""
    check_folder(path)
    if path.exists() and any(path.iterdir()):
        raise ValueError(f"{path} exists; remove it or choose another folder")


def _check_writable(path: Path, *folders: Path) -> None:
    """Raise a ValueError if nothing can be written to the first of the folders that exists."""
    folder = next(folder for folder in folders if folder.exists())
    if not folder.is_dir():
        raise ValueError(f"cannot write {path}: {folder} is not a directory")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"cannot write {path}: no permission to write in {folder}")


def _follow(path: Path) -> Path:
    """Return the file that a symbolic link points to, which need not exist; else `path`."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


@contextlib.contextmanager
def write_errors(target: Path) -> Iterator[None]:
    """Name `target` in an OSError: that of a full disk has no file name."""
    try:
        yield
    except OSError as error:
        raise OSError(f"cannot write {target}: {error.strerror or error}") from None


@contextlib.contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a temporary file that replaces `target` at the end; it is removed on an error.

    The folder of `target` is created. If `target` is a symbolic link, the file that it points to is
    replaced. Several threads, processes and machines may write the same file. Raises OSError that
    names `target`.
    """
    file = _follow(target)
    part = file.with_name(f".{file.name}.{os.urandom(4).hex()}.tmp")
    with write_errors(target):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
            part.replace(file)
        finally:
            part.unlink(missing_ok=True)


def replace_text(file: Path, text: str) -> None:
    """Write a text file whose old content remains on failure. Raises OSError that names it."""
    with atomic_file(file) as part:
        part.write_text(text, encoding="utf-8")


class _NotWritten(OSError):
    """The error of `atomic_folder`, which one around it does not describe again."""


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `target` that replaces it once everything is on disk.

    On failure the temporary folder is removed and `target` stays as it was. Write errors are raised
    as OSError.
    """
    # Fixed names: what an interrupted run left is overwritten.
    temporary, replaced = (target.with_name(f".{target.name}.{end}") for end in ("new", "old"))
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            if not path.is_symlink():  # its target need not exist
                _flush(path)
        shutil.rmtree(replaced, ignore_errors=True)
        if target.exists():
            target.rename(replaced)
        temporary.rename(target)
        _flush(target.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except _NotWritten:
        raise
    except (OSError, SafetensorError) as error:
        raise _NotWritten(
            f"cannot write {target}: {error}; what was saved before is untouched"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if replaced.exists() and not target.exists():
            replaced.rename(target)


def keep_others(old: Path, new: Path, replaced: Collection[str]) -> None:
    """Copy the entries of `old`, if it exists, except `replaced`, into `new`; links stay links.

    Raises ValueError for an entry that `new` also has.
    """
    for path in old.iterdir() if old.is_dir() else ():
        if path.name in replaced:
            continue
        if (new / path.name).exists():
            raise ValueError(f"{path} would be overwritten by a new file; move it away")
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, new / path.name, symlinks=True)
        else:
            shutil.copy2(path, new, follow_symlinks=False)


def _flush(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a folder
    # Windows needs write access to flush; elsewhere the file may be read-only.
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
