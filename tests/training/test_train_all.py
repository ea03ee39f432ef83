"""train/all.sh: the order of the networks, resuming, and a real run at toy size."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from scripts import ROOT, write_shape_images

import unclip

# If the command contains $STOP, trains up to step 2 of 4, as with a time limit; if it contains
# $SKIP, without the last validation.
FAKE = """#!/bin/sh
case "$*" in -c*) exec "$PYTHON" "$@";; esac
echo "$*" >> commands.txt
steps=4 pending=
case "$*" in
  *"$FAIL"*) exit 3;;
  *"$STOP"*) steps=2;;
  *"$SKIP"*) pending='"validation"';;
  *train/bundle.py*) exit;;
esac
run="runs/tiny/$(basename "$4" .yaml)"
checkpoint="$run/checkpoints/step-000000$steps"
mkdir -p "$run/model" "$checkpoint"
echo '{"step": '$steps', "pending": ['$pending']}' > "$checkpoint/state.json"
echo '{"fit": {"steps": 4}}' > "$run/config.json"
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with the scripts and configs of the repository."""
    for name in ("train", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    write_shape_images(tmp_path / "data/tiny")
    return tmp_path


def run_all(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "train/all.sh", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def run_fakes(folder) -> Callable[..., subprocess.CompletedProcess]:
    """Run all.sh with fake training scripts, which stop or fail at the one given."""
    for name in ("accelerate", "python"):
        fake = folder / f"bin/{name}"
        fake.parent.mkdir(exist_ok=True)
        fake.write_text(FAKE)
        fake.chmod(fake.stat().st_mode | stat.S_IXUSR)

    def run(*arguments: str, stop: str = "none", skip: str = "none", fail: str = "none"):
        (folder / "commands.txt").unlink(missing_ok=True)
        path = f"{folder}/bin:{os.environ['PATH']}"
        variables = {"PATH": path, "PYTHON": sys.executable}
        variables |= {"STOP": stop, "SKIP": skip, "FAIL": fail}
        return run_all(folder, "configs/tiny", *arguments, **variables)

    return run


def commands(folder: Path) -> dict[str, str]:
    """Return the command lines of the last run, by script."""
    lines = (folder / "commands.txt").read_text().splitlines()
    return {line.split("train/")[1].split(".py")[0]: line for line in lines}


def test_finished_networks_are_skipped(folder, run_fakes):
    assert run_fakes("--set", "fit.steps=4", fail="decoder.py").returncode == 3
    assert run_fakes().returncode == 0
    lines = commands(folder)
    assert list(lines) == ["decoder", "upsampler", "bundle"]
    assert not any("--resume" in line for line in lines.values())


@pytest.mark.parametrize("interruption", ["stop", "skip"])
def test_an_interrupted_network_is_continued_before_the_next_one(folder, run_fakes, interruption):
    stopped = run_fakes(**{interruption: "prior.py"})
    assert (stopped.returncode, list(commands(folder))) == (1, ["clip", "prior"])
    assert stopped.stderr == (
        "runs/tiny/prior is not complete; run the same command again to continue\n"
    )
    assert run_fakes().returncode == 0
    lines = commands(folder)
    assert list(lines)[:2] == ["prior", "layout"] and list(lines)[-1] == "bundle"
    assert [name for name, line in lines.items() if "--resume latest" in line] == ["prior"]


def test_a_network_without_checkpoints_is_finished(folder, run_fakes):
    run_fakes(fail="prior.py")
    shutil.rmtree(folder / "runs/tiny/clip/checkpoints")  # to free disk space
    assert run_fakes().returncode == 0
    assert "clip" not in commands(folder)


def test_the_usage_is_shown():
    result = run_all(ROOT)
    assert result.returncode != 0 and "usage: train/all.sh CONFIGS" in result.stderr


@pytest.mark.nightly
def test_a_model_of_toy_size_is_trained(folder):
    arguments = ["configs/tiny", "--set", "fit.steps=2"]
    stopped = run_all(folder, *arguments, "--set", "fit.max_hours=1.0e-9", LAUNCH="python")
    assert (stopped.returncode, os.listdir(folder / "runs/tiny")) == (1, ["clip"])
    result = run_all(folder, *arguments, LAUNCH="python")
    assert result.returncode == 0, result.stderr
    pipe = unclip.load(folder / "runs/tiny/model")
    assert pipe("a red circle", seed=0, progress=False).images[0].size == (32, 32)
