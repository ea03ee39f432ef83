"""Paths of data: patterns, and the files of a folder without hidden and foreign ones."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path

# Files that operating systems and tools add to folders and archives, besides hidden ones.
FOREIGN = {"__macosx", "@eadir", "thumbs.db", "desktop.ini", "icon\r"}
WILDCARDS = "*?[{"
MAX_RANGE = 1_000_000


def is_foreign(name: str) -> bool:
    """Return whether a component of a path is hidden or was added by an operating system."""
    return any(
        (part.startswith(".") and part not in (".", "..")) or part.lower() in FOREIGN
        for part in name.split("/")
    )


def list_files(folder: Path) -> tuple[list[str], list[str]]:
    """Return the regular files below `folder` and everything else but folders, sorted.

    Names are relative to `folder`, with forward slashes. Symbolic links to folders are followed,
    except to one that contains them. Hidden and foreign names are skipped.
    """
    files: list[str] = []
    others: list[str] = []
    pending: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", (_identity(folder),))]
    while pending:
        prefix, above = pending.pop()
        with os.scandir(folder / prefix) as entries:
            for entry in entries:
                name = prefix + entry.name
                if is_foreign(entry.name):
                    continue
                if entry.is_dir():
                    if (identity := _identity(entry.path)) not in above:
                        pending.append((f"{name}/", (*above, identity)))
                elif entry.is_file():
                    files.append(name)
                else:
                    others.append(name)
    by_parts = [sorted(names, key=lambda name: name.split("/")) for names in (files, others)]
    return by_parts[0], by_parts[1]


def _identity(folder: str | Path) -> tuple[int, int]:
    info = os.stat(folder)
    return info.st_dev, info.st_ino


def expand(pattern: str) -> list[Path]:
    """Return the files of a pattern with wildcards, {a,b} and {00..09}, in order.

    A path that exists is not a pattern, and neither are the folders at its start that exist.
    Raises FileNotFoundError if an alternative in braces matches nothing.
    """
    start, rest = _split_existing(pattern)
    found, missing = [], []
    for alternative in expand_braces(rest):
        existing, wildcards = _split_existing(start + alternative)
        paths = sorted(glob.glob(glob.escape(existing) + wildcards))
        found += [Path(path) for path in paths if not is_foreign(Path(path).name)]
        missing += [] if paths else [start + alternative]
    if found and missing:
        raise FileNotFoundError(f"{pattern}: {len(missing)} missing, e.g. {missing[0]}")
    return found


def _split_existing(pattern: str) -> tuple[str, str]:
    """Split a path into the longest start that exists and the rest."""
    if os.path.lexists(pattern):
        return pattern, ""
    parts = pattern.split("/")
    starts = ("".join(f"{part}/" for part in parts[:n]) for n in range(len(parts) - 1, 0, -1))
    start = next((start for start in starts if os.path.isdir(start)), "")
    return start, pattern[len(start) :]


def expand_braces(pattern: str) -> Iterator[str]:
    """Yield the strings that "a-{x,y}" or "a-{000..002}" stands for; other braces are kept."""
    for match in re.finditer(r"\{([^{}]*)\}", pattern):
        content = match[1]
        if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", content):
            first, last = numbers.groups()
            if int(last) - int(first) >= MAX_RANGE:
                raise ValueError(f"{{{content}}} has more than {MAX_RANGE:,} numbers")
            choices = [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
        elif "," in content:
            choices = content.split(",")
        else:
            continue
        head, tail = pattern[: match.start()], pattern[match.end() :]
        for choice in choices:
            yield from expand_braces(f"{head}{choice}{tail}")
        return
    yield pattern
