"""Rows of JSON Lines, CSV and TSV files, each with its line."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any

from unclip.data.text import MAX_JSON, check_content, parse_bounded
from unclip.files import shorten

TABLES = (".jsonl", ".csv", ".tsv")  # suffixes

Row = Mapping[str, Any] | ValueError  # an error if the line cannot be read


def read_rows(table: Path) -> Iterator[tuple[int, Row]]:
    """Yield (number of the first line, row) for each row that is not blank.

    The names of columns are stripped of blanks. Raises ValueError for a file that is not a table.
    """
    with table.open("rb") as file:
        try:
            check_content(file.read(256))
        except ValueError as error:
            raise ValueError(f"{table}: {error}") from None
    return _read_json_lines(table) if table.suffix.lower() == ".jsonl" else _read_csv(table)


def read_columns(table: Path) -> list[str]:
    """Return the names of the columns of a CSV or TSV file; [] if it has no readable header."""
    with _open_csv(table) as file:
        try:
            return _names(csv.reader(file, delimiter=_delimiter(file, table)))
        except csv.Error:
            return []


def _read_json_lines(table: Path) -> Iterator[tuple[int, Row]]:
    with table.open("rb") as file:
        lines = iter(lambda: file.readline(MAX_JSON + 1), b"")
        for number, line in enumerate(lines, start=1):
            if len(line) > MAX_JSON:
                raise ValueError(f"{table}: line {number} has more than {MAX_JSON:,} bytes")
            if not line.strip():
                continue
            try:
                entry = parse_bounded(line)
                if not isinstance(entry, dict):
                    raise ValueError(f"expected an object, got {shorten(entry)}")
            except ValueError as error:
                entry = error
            yield number, entry


def _read_csv(table: Path) -> Iterator[tuple[int, Row]]:
    latest = ""

    def line_of(file: IO[str]) -> str:
        nonlocal latest
        latest = file.readline()
        return latest

    with _open_csv(table) as file:
        lines = iter(partial(line_of, file), "")
        rows, last = csv.reader(lines, delimiter=_delimiter(file, table)), 0
        try:
            names = _names(rows)
            last = rows.line_num
            for row in rows:
                if row:
                    # csv accepts a quote without end: the field then has all further lines.
                    if "\n" in row[-1] and not latest.rstrip().endswith('"'):
                        raise csv.Error("a quote is opened and never closed")
                    yield last + 1, dict(zip(names, row, strict=False))
                last = rows.line_num
        except csv.Error as error:
            raise ValueError(f"{table}: line {last + 1}: {error}") from None


def _open_csv(table: Path) -> IO[str]:
    # Bytes that are not UTF-8 become surrogates: valid in file names, errors in captions.
    return table.open(encoding="utf-8-sig", errors="surrogateescape", newline="")


def _delimiter(file: IO[str], table: Path) -> str:
    header = file.readline(MAX_JSON)
    file.seek(0)
    return "\t" if table.suffix.lower() == ".tsv" else max(",;\t", key=header.count)


def _names(rows: Iterator[list[str]]) -> list[str]:
    return [name.strip() for name in next(rows, [])]
