"""What all training scripts share: the command line, the seed, and errors in one line."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from unclip.config import load_config

C = TypeVar("C")


@dataclass(frozen=True)
class Run(Generic[C]):
    """One start of a training script: its whole config, and what the command line asks for."""

    config: C
    resume: str | None = None  # "latest" or the folder of a checkpoint
    init: str | None = (
        None  # weights to start from with a fresh optimiser: a safetensors file or a folder
    )
    dry_run: bool = False
    traceback: bool = False

    @property
    def device(self) -> torch.device:
        """Where `fit` will train in this process: for the frozen networks that a loss uses."""
        from unclip.training.processes import this_process  # late: accelerate is slow to import

        return this_process().device


def setup(cls: type[C], description: str | None, argv: Sequence[str] | None = None) -> Run[C]:
    """Read the command line and the config; `cls` is a dataclass with a field `fit: FitConfig`."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="YAML file with all settings"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override: optim.lr=1e-4"
    )
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--resume",
        metavar="latest|FOLDER",
        help="continue a run exactly where a checkpoint left it",
    )
    start.add_argument(
        "--init", metavar="PATH", help="start from these weights (safetensors file or folder)"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print parameters, memory and FLOPs a step, then stop",
    )
    parser.add_argument(
        "--traceback", action="store_true", help="show where in the code an error was raised"
    )
    args = parser.parse_args(argv)
    config = load_config(args.config, cls, args.set)
    torch.manual_seed(config.fit.seed)  # the initial weights; `fit` seeds each process again
    return Run(config, args.resume, args.init, args.dry_run, args.traceback)


def launch(
    main: Callable[[Run[C]], Any],
    cls: type[C],
    description: str | None,
    argv: Sequence[str] | None = None,
) -> None:
    """Run a script's `main`; a mistake of the user's, a full disk or a NaN ends it with one line and exit code 1."""
    run = None
    try:
        run = setup(cls, description, argv)
        main(run)
    except (ValueError, OSError, FloatingPointError) as error:
        if run is not None and run.traceback:
            raise
        sys.exit(f"error: {error}")


def resume_command() -> str:
    """The command line of this process, continued from its latest checkpoint."""
    words = iter(sys.argv)
    kept = []
    for word in words:
        if word in ("--resume", "--init"):
            next(words, None)
        elif not word.startswith(("--resume=", "--init=")):
            kept.append(word)
    launcher = (
        ["accelerate", "launch"] if "ACCELERATE_MIXED_PRECISION" in os.environ else ["python"]
    )
    return shlex.join([*launcher, *kept, "--resume", "latest"])
