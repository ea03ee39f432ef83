"""Damaged and hostile files are refused: a short form of the command in hostile_files.py."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("resource", reason="Windows has no forks")
pytest.importorskip("pyarrow")

from hostile_files import Kind, examine, hostile_files, kinds, run_command

KINDS = {kind.name: kind for kind in kinds()}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_few_files_of_each_kind(tmp_path: Path, kind: Kind) -> None:
    # Four times the limit, because other tests share the caches of the cores.
    assert examine(kind, 12, tmp_path, seed=1, limit=4.0).faults == []


@pytest.mark.nightly
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_many_files_of_each_kind(tmp_path: Path, kind: Kind) -> None:
    assert examine(kind, 250, tmp_path).faults == []
    if kind.command:
        content = list(hostile_files(kind, 40, seed=2))[-1]
        assert run_command(kind, content, tmp_path) == ""
