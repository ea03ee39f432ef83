"""A newcomer's fine-tuning: from an empty environment to images in a new style, by train/README.md.

PYTHONPATH=tests python tests/training/test_newcomer.py FOLDER

runs all documented steps in a new folder.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scripts import COLORS, ROOT, SHAPES, shell_commands

PAPER = (250, 220, 90)  # the background of the new style; the bundled model's is white
PROMPT = "a red circle, blockprint style"


def write_prints(folder: Path, count: int = 120) -> None:
    """Write images of the style: one to three flat shapes with a dark outline on yellow paper."""
    folder.mkdir(parents=True)
    rng, shapes = np.random.default_rng(0), list(SHAPES)
    for i in range(count):
        color, shape = COLORS[i % len(COLORS)], shapes[i % len(shapes)]
        image = Image.new("RGB", (128, 128), PAPER)
        for _ in range(number := 1 + i % 3):
            x, y = rng.integers(8, 60, 2)
            box = (x, y, x + 50, y + 50)
            SHAPES[shape](ImageDraw.Draw(image), box, fill=color, outline="black", width=4)
        image.save(folder / f"{i:03}.png")
        words = {1: f"a {color} {shape}", 2: f"two {color} {shape}s", 3: f"{color} {shape}s"}
        (folder / f"{i:03}.txt").write_text(f"{words[number]}, blockprint style")


def new_environment(folder: Path) -> dict[str, str]:
    """Create an environment that contains only this package; return its variables.

    Packages it depends on are read from the tests' environment: nothing is downloaded.
    """
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    paths = {"base": str(folder), "platbase": str(folder)}
    packages = Path(sysconfig.get_path("purelib", vars=paths))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, "--no-build-isolation", str(ROOT)], check=True)
    # `accelerate launch` alone: the other commands import timm, if the tests' environment has it,
    # and with it a torchvision that may not fit torch.
    launcher = python.with_name("accelerate")
    launcher.write_text(f'#!/bin/sh\nshift\nexec "{python}" -m accelerate.commands.launch "$@"\n')
    launcher.chmod(0o755)
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**clean, "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}


def documented_commands() -> list[list[str]]:
    page = (ROOT / "train/README.md").read_text(encoding="utf-8")
    return shell_commands(re.findall(r"^## A new style\n(.*?)^## ", page, re.M | re.S)[0])


def paper_colour(image: Path) -> np.ndarray:
    """Return the median colour of the border."""
    pixels = np.asarray(Image.open(image).convert("RGB"))
    edges = (pixels[:8], pixels[-8:], pixels[:, :8], pixels[:, -8:])
    return np.median(np.concatenate([edge.reshape(-1, 3) for edge in edges]), axis=0)


def fine_tune(work: Path, *settings: str) -> None:
    """Run the documented commands in `work`; settings are added to the training commands."""
    write_prints(work / "data/style")
    for name in ("assets", "configs", "train"):
        (work / name).symlink_to(ROOT / name)
    environment = new_environment(work / "venv")
    before = ["unclip", "generate", PROMPT, "--seed", "0", "-o", "before.png"]
    for words in (before, *documented_commands()):
        training = words[0] == "accelerate"
        words = [*words, *(f"--set={setting}" for setting in settings)] if training else words
        started = time.perf_counter()
        subprocess.run(words, cwd=work, env=environment, check=True)
        print(f"{time.perf_counter() - started:6.0f} s  {' '.join(words)}", flush=True)


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform == "win32", reason="needs symbolic links and a shell")
def test_the_documented_commands_bring_the_model_to_a_new_style(tmp_path):
    pytest.importorskip("peft")
    fine_tune(tmp_path, "fit.steps=120", "optim.warmup=10", "fit.trackers=[]")
    white, yellow = paper_colour(tmp_path / "before.png"), paper_colour(tmp_path / "style.png")
    print(f"paper: {white} before, {yellow} after; {PAPER} in the images")
    assert abs(white - 255).max() < 40
    assert abs(yellow - PAPER).max() < 60 and yellow[2] < 180
    assert (tmp_path / "adapted.png").is_file()


if __name__ == "__main__":
    fine_tune(Path(sys.argv[1]).absolute())
