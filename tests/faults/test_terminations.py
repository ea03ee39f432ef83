"""Signals to launchers, and faults of one of two processes."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import pytest
from terminations import LAUNCHERS, start, terminate

from unclip.training.stopping import resume_command


def test_sigterm_to_accelerate_launch_saves_and_ends_the_trainer(tmp_path: Path) -> None:
    """The launcher ends at once, without a signal to its child."""
    assert terminate(tmp_path, "accelerate", signal.SIGTERM) < 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "number"), [("torchrun", signal.SIGTERM), ("torchrun", signal.SIGKILL)]
)
def test_the_end_of_torchrun_saves_once(
    tmp_path: Path, launcher: str, number: signal.Signals
) -> None:
    assert terminate(tmp_path, launcher, number) < 10


def fail(folder: Path, kind: str) -> str:
    """Let process 1 of two fail in its fourth batch; return the lines that the processes print."""
    launcher, _ = LAUNCHERS["torchrun"]
    started = start(folder, launcher, FAULT="1:e0b3i0", KIND=kind)
    assert started.wait(timeout=600) != 0
    text = (folder / "output.txt").read_text()
    return [line for line in text.splitlines() if line.startswith(("error:", "Traceback"))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nan", r"error: step 4: process 1: loss nan, .*not finite: image of e0b3i1\. The weights"),
        ("raise", "error: this sample is impossible"),
        ("kill", "error: process 0 lost the connection to another one"),
    ],
)
def test_a_fault_of_one_process_ends_both_with_one_message(
    tmp_path: Path, kind: str, message: str
) -> None:
    lines = fail(tmp_path, kind)
    messages = [line for line in lines if line.startswith("error:")]
    assert len(messages) == 1 and re.match(message, messages[0]), lines
    metrics = tmp_path / "run/metrics.jsonl"
    assert time.time() - metrics.stat().st_mtime < 30  # since the last step
    assert metrics.read_text().count("\n") == 3


def test_the_resume_command_is_the_launch_line(monkeypatch: pytest.MonkeyPatch) -> None:
    script = ["train/prior.py", "--config", "c.yaml"]
    monkeypatch.setattr("sys.argv", [*script, "--init", "x"])
    for prefix, expected in [
        (["python3", "bin/accelerate", "launch", "-m8"], "accelerate launch -m8"),
        (["python3", "bin/torchrun", "--nnodes=2"], "torchrun --nnodes=2"),
        (["python3", "-m", "torch.distributed.run", "-q"], "torchrun -q"),
    ]:
        command = resume_command([*prefix, *script, "--init", "x"])
        assert command == f"{expected} {' '.join(script)} --resume latest"
