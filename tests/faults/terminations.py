"""Terminate launchers of training runs; each run must save, exit 0 and resume.

PYTHONPATH=.:tests python tests/faults/terminations.py --count 50

A small script is started by `accelerate launch` and `torchrun`, with one and two processes. The
launcher gets SIGTERM, or SIGKILL, which it cannot pass on. The processes must end by themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from scripts import ROOT

SCRIPT = """
import os, sys, time
from dataclasses import dataclass
from fitting import OPTIM, TinyLoader, plain_loss, plain_model
from unclip.training.fit import FitConfig, fit
from unclip.training.launch import Run, launch
from unclip.training.optim import OptimConfig

@dataclass(frozen=True)
class Script:
    fit: FitConfig
    optim: OptimConfig = OPTIM

def slow_loss(model, batch):
    time.sleep(0.02)
    if os.environ.get("FAULT") == f"{os.environ.get('RANK')}:{batch['key'][0]}":
        if os.environ["KIND"] == "nan":
            batch["image"][1] = float("nan")
        elif os.environ["KIND"] == "raise":
            raise ValueError("this sample is impossible")
        else:
            os.kill(os.getpid(), 9)
    return plain_loss(model, batch)

def main(run: Run[Script]):
    ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    loader = TinyLoader(rank=ranks[0], processes=ranks[1])
    fit(plain_model(), slow_loss, loader, run.config.fit, run.config.optim, run=run)

launch(main, Script, None)
"""
LAUNCHERS = {
    "accelerate": (["-m", "accelerate.commands.launch", "--num_processes=1", "--cpu"], 1),
    "torchrun": (["-m", "torch.distributed.run", "--nproc_per_node=2"], 2),
    "torchrun, one process": (["-m", "torch.distributed.run", "--nproc_per_node=1"], 1),
}


def write_script(folder: Path, steps: int = 100_000) -> list[str]:
    """Write a training script and its config to `folder`; return the command line after Python."""
    (folder / "run.py").write_text(SCRIPT)
    fit = {"output": str(folder / "run"), "steps": steps, "log_every": 1, "trackers": []}
    fit |= {"val_every": 0, "preview_every": 0, "save_every": 0, "precision": "fp32"}
    (folder / "run.yaml").write_text(json.dumps({"fit": fit}))
    return [str(folder / "run.py"), "--config", str(folder / "run.yaml")]


def environment(**more: str) -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "tests"), *sys.path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **more}


def start(folder: Path, launcher: list[str], steps: int = 100_000, **env: str) -> subprocess.Popen:
    """Start a run in `folder`; its output goes to output.txt."""
    script = write_script(folder, steps)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, *launcher, f"--main_process_port={port}"]
    if "torch.distributed.run" in launcher:
        command[-1] = f"--master_port={port}"
    with (folder / "output.txt").open("w") as output:
        return subprocess.Popen(
            [*command, *script],
            env=environment(**env),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait_for_steps(folder: Path, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not (folder / "run/metrics.jsonl").is_file():
        assert time.monotonic() < end, (folder / "output.txt").read_text()
        time.sleep(0.05)


def trainers(launcher: psutil.Process) -> list[psutil.Process]:
    """Return the training processes of a launcher, which may be the launcher's grandchildren."""
    found = launcher.children(recursive=True)
    return [p for p in found if any(word.endswith("run.py") for word in p.cmdline())]


def terminate(folder: Path, name: str, number: signal.Signals) -> float:
    """Start a run, end its launcher and return the seconds until all its processes have ended."""
    launcher, processes = LAUNCHERS[name]
    started = start(folder, launcher)
    wait_for_steps(folder)
    running = trainers(psutil.Process(started.pid))
    assert len(running) == processes, running
    time.sleep(random.uniform(0, 0.5))
    begin = time.monotonic()
    started.send_signal(number)
    started.wait()
    gone, alive = psutil.wait_procs(running, timeout=60)
    assert not alive, alive
    seconds = time.monotonic() - begin
    text = (folder / "output.txt").read_text()
    stopped = re.findall(r"stopped after step (\d+); to resume: (.*)", text)
    assert len(stopped) == 1, text  # saved once
    step, command = stopped[0]
    assert (folder / f"run/checkpoints/step-{int(step):07d}/manifest.json").is_file()
    assert command.endswith("run.yaml --resume latest") and launcher[-1] in command, command
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=50)
    args = parser.parse_args()
    times = []
    for i in range(args.count):
        name = list(LAUNCHERS)[i % len(LAUNCHERS)]
        number = signal.SIGKILL if i % 5 == 4 else signal.SIGTERM
        with tempfile.TemporaryDirectory() as folder:
            times.append(terminate(Path(folder), name, number))
        print(f"{name}, {number.name}: ended after {times[-1]:.1f} s", flush=True)
    print(
        f"{len(times)} of {args.count} saved once and resumable, the slowest in {max(times):.1f} s"
    )


if __name__ == "__main__":
    main()
