"""train/all.sh: the order of the networks, resuming, and a real run at toy size."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest
from scripts import ROOT, write_shape_images

import unclip

FAKE = """#!/bin/sh
echo "$*" >> commands.txt
case "$*" in
  *"$FAIL"*) exit 3;;
  *train/bundle.py*) ;;
  *) mkdir -p "runs/tiny/$(basename "$4" .yaml)/model";;
esac
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


def test_finished_networks_are_skipped_and_interrupted_ones_resumed(folder):
    for name in ("accelerate", "python"):
        fake = folder / f"bin/{name}"
        fake.parent.mkdir(exist_ok=True)
        fake.write_text(FAKE)
        fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    path = f"{folder}/bin:{os.environ['PATH']}"
    failed = run_all(folder, "configs/tiny", "--set", "fit.steps=9", PATH=path, FAIL="decoder.py")
    assert failed.returncode == 3
    (folder / "runs/tiny/decoder/checkpoints/step-5").mkdir(parents=True)
    (folder / "commands.txt").unlink()
    assert run_all(folder, "configs/tiny", PATH=path, FAIL="nothing").returncode == 0
    lines = (folder / "commands.txt").read_text().splitlines()
    assert [line.split("train/")[1].split(".py")[0] for line in lines] == [
        "decoder",
        "upsampler",
        "bundle",
    ]
    assert lines[0].endswith("--resume latest") and "--resume" not in lines[1]


def test_the_usage_is_shown():
    result = run_all(ROOT)
    assert result.returncode != 0 and "usage: train/all.sh CONFIGS" in result.stderr


@pytest.mark.nightly
def test_a_model_of_toy_size_is_trained(folder):
    result = run_all(folder, "configs/tiny", "--set", "fit.steps=2", LAUNCH="python")
    assert result.returncode == 0, result.stderr
    pipe = unclip.load(folder / "runs/tiny/model")
    assert pipe("a red circle", seed=0, progress=False).images[0].size == (32, 32)
