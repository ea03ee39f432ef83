"""Runs the training scripts as the command line does, but in this process, which has torch imported already."""

from __future__ import annotations

import importlib.util
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

from PIL import Image, ImageDraw

ROOT = Path(__file__).parent.parent
SHAPES = {"circle": ImageDraw.ImageDraw.ellipse, "square": ImageDraw.ImageDraw.rectangle}
COLOURS = ("red", "green", "blue", "orange", "purple", "black")


def load_script(name: str) -> ModuleType:
    """train/<name>.py as a module."""
    module = f"train_{name}"
    if module not in sys.modules:
        spec = importlib.util.spec_from_file_location(module, ROOT / "train" / f"{name}.py")
        sys.modules[module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[module])
    return sys.modules[module]


def run_script(script: Path, *arguments: str) -> None:
    """Runs a file as `python FILE ARGUMENTS...`; a SystemExit with a code other than 0 is raised."""
    with mock.patch.object(sys, "argv", [str(script), *arguments]):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as stop:
            if stop.code:
                raise


def run_in_two_processes(script: Path | str, *arguments: str) -> str:
    """Runs a file as `torchrun` does on a machine without an accelerator; what it printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        f"--master_port={port}",
    ]
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    done = subprocess.run(
        [*launcher, str(script), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def draw_pictures(folder: Path, size: int = 32) -> list[str]:
    """Captioned pictures of simple shapes, `name.png` beside `name.txt`; returns their captions."""
    folder.mkdir(parents=True)
    captions = [f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES]
    for i, caption in enumerate(captions):
        _, colour, shape = caption.split()
        picture = Image.new("RGB", (size, size), "white")
        SHAPES[shape](
            ImageDraw.Draw(picture),
            (size // 4, size // 4, size * 3 // 4, size * 3 // 4),
            fill=colour,
        )
        picture.save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    return captions
