"""Signals to launchers, and faults of one of two processes."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import sys
import time
from pathlib import Path

import pytest
from terminations import LAUNCHERS, environment, start, terminate, write_script

from unclip.training.stopping import resume_command


def test_sigterm_to_accelerate_launch_saves_and_ends_the_trainer(tmp_path: Path) -> None:
    """The launcher ends at once, without a signal to its child."""
    assert terminate(tmp_path, "accelerate", signal.SIGTERM) < 10


def test_a_closed_terminal_saves(tmp_path: Path) -> None:
    """The process gets SIGHUP, and can no longer print."""
    command = [sys.executable, *write_script(tmp_path)]
    process, terminal = pty.fork()
    if process == 0:
        os.execve(sys.executable, command, environment())
    while not (tmp_path / "run/metrics.jsonl").is_file():
        if select.select([terminal], [], [], 0.1)[0]:
            os.read(terminal, 4096)
    os.close(terminal)
    os.waitpid(process, 0)
    (checkpoint,) = (tmp_path / "run/checkpoints").iterdir()
    assert re.match(r"step-\d+$", checkpoint.name) and (checkpoint / "manifest.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "number"), [("torchrun", signal.SIGTERM), ("torchrun", signal.SIGKILL)]
)
def test_the_end_of_torchrun_saves_once(
    tmp_path: Path, launcher: str, number: signal.Signals
) -> None:
    assert terminate(tmp_path, launcher, number) < 10


def fail(folder: Path, kind: str, process: int) -> list[str]:
    """Let one of two processes fail in its fourth batch; return the lines that both print."""
    launcher, _ = LAUNCHERS["torchrun"]
    started = start(folder, launcher, FAULT=f"{process}:e0b3i0", KIND=kind)
    assert started.wait(timeout=600) != 0
    text = (folder / "output.txt").read_text()
    return [line for line in text.splitlines() if line.startswith(("error:", "Traceback"))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "process", "message"),
    [
        (
            "nan",
            1,
            r"error: step 4: process 1: loss nan, .*not finite: image of e0b3i1\.",
        ),
        ("raise", 1, "error: this sample is impossible"),
        ("kill", 1, "error: process 0 lost the connection to another one"),
        ("kill", 0, "error: process 1 lost the connection to another one"),
    ],
)
def test_a_fault_of_one_process_ends_both_with_one_message(
    tmp_path: Path, kind: str, process: int, message: str
) -> None:
    lines = fail(tmp_path, kind, process)
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
