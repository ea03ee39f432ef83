"""Kill training runs at random moments and in the middle of saves, and resume them.

PYTHONPATH=.:tests python tests/faults/kills.py --kills 200

Each case trains a tiny network once without and once with kills. All processes are forks of this
one, so that a start costs no imports. Weights, averages, moments and metrics must be identical.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fitting import OPTIM, fit_config
from forks import FSDP, fork, wait
from networks import Captioned, build

from unclip.training.fit import fit
from unclip.training.launch import Run
from unclip.training.tensors import SavedTensors

STEPS = 12


@dataclass(frozen=True)
class Case:
    network: str
    processes: int = 1
    sharded: bool = False
    async_save: bool = False

    def __str__(self) -> str:
        kind = "FSDP2" if self.sharded else "DDP"
        parts = [self.network, f"{self.processes} processes, {kind}" if self.processes > 1 else ""]
        return ", ".join(filter(None, [*parts, "async saves" if self.async_save else ""]))


CASES = (
    *map(Case, ("prior", "decoder", "clip", "codec", "dalle")),
    Case("prior", async_save=True),
    Case("decoder", processes=2),
    Case("prior", processes=2, sharded=True),
    Case("clip", processes=2, sharded=True, async_save=True),
)


def train(case: Case, output: Path) -> None:
    model, loss_fn = build(case.network)
    rank, processes = int(os.environ.get("RANK", 0)), case.processes
    settings = {"save_every": 2, "log_every": 3, "async_save": case.async_save, "progress": False}
    config = fit_config(output, STEPS, precision="fp32", **settings)
    resume = "latest" if next(output.glob("checkpoints/step-*"), None) else None
    run = Run({"fit": vars(config)}, resume=resume)
    fit(model, loss_fn, Captioned(rank=rank, processes=processes), config, OPTIM, run=run)


def start(case: Case, output: Path, kill: Callable[[], None] | None) -> list[int]:
    """Start the processes of a run; `kill` is called in one of them before it trains."""
    victim = random.randrange(case.processes)

    def run(rank: int) -> None:
        if kill is not None and rank == victim:
            kill()
        train(case, output)

    return fork(run, case.processes, FSDP if case.sharded else None)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in_save() -> None:
    """Kill this process at a random write of a save: a flush or a rename."""
    left = random.SystemRandom().randrange(40)  # forks share the state of other generators

    def counted(function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                die()
            return function(*args, **kwargs)

        return call

    os.fsync, Path.rename = counted(os.fsync), counted(Path.rename)


def kill_at_random(longest: float) -> Callable[[], None]:
    delay = random.uniform(0, longest)

    def begin() -> None:
        timer = threading.Timer(delay, die)
        timer.daemon = True
        timer.start()

    return begin


def result(output: Path) -> dict[str, Any]:
    """Return everything that must be identical: all tensors, and metrics without times."""
    checkpoint = output / f"checkpoints/step-{STEPS:07d}"
    found: dict[str, Any] = {
        f"{kind}/{name}": tensor
        for kind in ("model", "ema", "optimizer")
        for name, tensor in SavedTensors(checkpoint, kind).items()
    }
    for name, tensor in SavedTensors(output / "model", "model").items():
        found[f"export/{name}"] = tensor
    rows = [json.loads(row) for row in (output / "metrics.jsonl").read_text().splitlines()]
    times = {"hours", "samples_per_s"}
    found["metrics"] = [{k: v for k, v in row.items() if k not in times} for row in rows]
    return found


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    if one.keys() != other.keys():
        return sorted(one.keys() ^ other.keys())
    return [
        name
        for name, x in one.items()
        if not (torch.equal(x, other[name]) if isinstance(x, torch.Tensor) else x == other[name])
    ]


@dataclass
class Outcome:
    kills: int = 0
    in_saves: int = 0
    different: int = 0


def survive(case: Case, kills: int, folder: Path, longest_wait: float = 30.0) -> Outcome:
    """Compare an uninterrupted run with killed and resumed ones, until there were `kills` kills."""
    outcome = Outcome()
    started = time.monotonic()
    assert set(wait(start(case, folder / "whole", None), 600)) == {0}, case
    seconds, whole = time.monotonic() - started, result(folder / "whole")
    while outcome.kills < kills:
        output = folder / "killed"
        shutil.rmtree(output, ignore_errors=True)
        finished = False
        while not finished:
            kill, in_save = None, random.random() < 0.5
            if outcome.kills < kills:
                kill = kill_in_save if in_save else kill_at_random(seconds)
            codes = wait(start(case, output, kill), 10 * seconds + longest_wait)
            finished = set(codes) == {0}
            killed = -signal.SIGKILL in codes
            assert finished or killed, f"{case}: exit codes {codes}"
            outcome.kills += killed
            outcome.in_saves += killed and in_save
        if names := differences(result(output), whole):
            print(f"{case}: different: {', '.join(names[:5])}")
            outcome.different += 1
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    about = f"only cases with this in their name: {'; '.join(map(str, CASES))}"
    parser.add_argument("--case", default="", help=about)
    args = parser.parse_args()
    random.seed(args.seed)
    torch.set_num_threads(1)
    total = Outcome()
    cases = [case for case in CASES if args.case in str(case)]
    for i, case in enumerate(cases):
        share = args.kills * (i + 1) // len(cases) - args.kills * i // len(cases)
        with tempfile.TemporaryDirectory() as folder:
            outcome = survive(case, share, Path(folder))
        print(f"{case}: {outcome}", flush=True)
        total.kills += outcome.kills
        total.in_saves += outcome.in_saves
        total.different += outcome.different
    print(f"{total.kills} kills, {total.in_saves} in a save; {total.different} runs differ")
    sys.exit(total.different > 0)


if __name__ == "__main__":
    main()
