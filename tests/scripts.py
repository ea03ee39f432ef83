"""Helpers that run the training scripts and the commands of documentation pages."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

from PIL import Image, ImageDraw

ROOT = Path(__file__).parent.parent
SHAPES = {"circle": ImageDraw.ImageDraw.ellipse, "square": ImageDraw.ImageDraw.rectangle}
COLORS = ("red", "green", "blue", "orange", "purple", "black")


def load_script(name: str) -> ModuleType:
    """Import train/<name>.py as a module."""
    module = f"train_{name}"
    if module not in sys.modules:
        spec = importlib.util.spec_from_file_location(module, ROOT / "train" / f"{name}.py")
        sys.modules[module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[module])
    return sys.modules[module]


def run_script(script: Path, *arguments: str) -> None:
    """Run `python SCRIPT ARGUMENTS...` in this process; raise a SystemExit with an error code."""
    with mock.patch.object(sys, "argv", [str(script), *arguments]):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as stop:
            if stop.code:
                raise


def run_in_two_processes(script: Path | str, *arguments: str) -> str:
    """Run a script with torchrun in two CPU processes and return its output."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    done = subprocess.run(
        [*launcher, f"--master_port={port}", str(script), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def code_blocks(page: str, language: str) -> list[str]:
    """Return the fenced blocks of a Markdown page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def shell_commands(page: str) -> list[list[str]]:
    """Return the words of each line in the sh blocks of a page, without comments."""
    lines = "".join(code_blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def write_shape_images(folder: Path, size: int = 32) -> list[str]:
    """Write images of simple shapes with captions in text files, and return the captions."""
    folder.mkdir(parents=True)
    captions = [f"a {color} {shape}" for color in COLORS for shape in SHAPES]
    for i, caption in enumerate(captions):
        _, color, shape = caption.split()
        image = Image.new("RGB", (size, size), "white")
        box = (size // 4, size // 4, size * 3 // 4, size * 3 // 4)
        SHAPES[shape](ImageDraw.Draw(image), box, fill=color)
        image.save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    return captions
