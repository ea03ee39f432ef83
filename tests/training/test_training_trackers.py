"""fit.trackers: several trackers by name, with their options."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from fitting import fit_config, run_fit


class RecordingTracker(GeneralTracker):
    """A tracker that accelerate does not know, and that needs an option."""

    name, requires_logging_directory = "recording", False
    rows: list[tuple[str, str, int | None, set[str]]] = []

    def __init__(self, run_name: str, *, team: str) -> None:
        super().__init__()
        self.run_name, self.team = run_name, team

    tracker = None

    def store_init_configuration(self, values: dict) -> None:
        self.rows.append((self.run_name, self.team, None, set(values)))

    def log(self, values: dict, step: int | None, **kwargs: object) -> None:
        self.rows.append((self.run_name, self.team, step, set(values)))


def test_several_trackers_with_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "recording", RecordingTracker)
    trackers = {"recording": {"team": "a"}, "tensorboard": {"filename_suffix": ".mine"}}
    run_fit(fit_config(tmp_path / "run", 2, log_every=1, trackers=trackers))
    assert [row[:3] for row in RecordingTracker.rows] == [
        ("run", "a", None),
        ("run", "a", 1),
        ("run", "a", 2),
    ]
    assert {"loss", "lr"} <= RecordingTracker.rows[-1][3]
    assert list((tmp_path / "run/logs").rglob("events.*.mine"))
    trackers = {"recording": {"team": "a", "room": 1}}
    with pytest.raises(ValueError, match="recording, did not start .*TypeError: .*'room'"):
        run_fit(fit_config(tmp_path / "other", trackers=trackers))
