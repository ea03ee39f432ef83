"""Killed runs equal uninterrupted ones: a few kills of the command in kills.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from kills import CASES, Case, survive


@pytest.mark.parametrize("case", [Case("prior"), Case("codec", async_save=True)], ids=str)
def test_a_killed_run_equals_an_uninterrupted_one(tmp_path: Path, case: Case) -> None:
    outcome = survive(case, 3, tmp_path)
    assert outcome.kills >= 3 and outcome.different == 0


@pytest.mark.nightly
@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_network_survives_kills(tmp_path: Path, case: Case) -> None:
    outcome = survive(case, 6, tmp_path)
    assert outcome.kills >= 6 and outcome.different == 0
