"""The command `unclip`: one module of this package for each group of subcommands.

The imports at the top of these files do not import torch, so that `unclip --help` is fast.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TextIO, cast

from unclip import __version__
from unclip.cli import bench, edit, evaluate, generate, manipulate, models, probe, serve
from unclip.extras import import_extra
from unclip.files import error_text, out_of_memory
from unclip.pipelines.memory import enable_memory_reuse

GROUPS = (generate, manipulate, edit, probe, models, serve, evaluate, bench)
RENAMED = {"drift": "evaluate-approximations"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns 0 on success, 2 on bad input or if memory runs out (one line on stderr), 130 if
    interrupted.
    """
    out, err = (cast(TextIO, _Stream(stream)) for stream in (sys.stdout, sys.stderr))
    enable_memory_reuse()
    with warnings.catch_warnings(), redirect_stdout(out), redirect_stderr(err):
        warnings.showwarning = lambda message, *_: _print_line(f"warning: {error_text(message)}")
        try:
            args = build_parser().parse_args(
                _new_name(list(sys.argv[1:] if argv is None else argv))
            )
            args.run(args)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except (ValueError, OSError) as error:
            print(f"error: {error_text(error)}", file=sys.stderr)
            return 2
        except (MemoryError, RuntimeError) as error:
            print(f"error: {out_of_memory(error)}", file=sys.stderr)
            return 2
    return 0


def _print_line(text: str) -> None:
    """Print a line on standard error, above the progress bar if there is one."""
    if (module := sys.modules.get("tqdm")) is None:
        print(text, file=sys.stderr)
    else:
        module.tqdm.write(text, file=sys.stderr)


def _new_name(argv: list[str]) -> list[str]:
    """Replace the old name of a command, with a warning."""
    if not argv or argv[0] not in RENAMED:
        return argv
    new = RENAMED[argv[0]]
    warnings.warn(f"{argv[0]} is deprecated; use {new}", FutureWarning, stacklevel=2)
    return [new, *argv[1:]]


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; `args.run(args)` runs the one that was given."""
    about = "Text to image with CLIP latents (DALL-E 2, unCLIP) or image codes (DALL-E 1)."
    parser = _Parser(prog="unclip", description=about)
    parser.add_argument("--version", action="version", version=f"unclip {__version__}")
    about = "print a script for completion in bash, zsh or tcsh (needs shtab)"
    shells = ("bash", "zsh", "tcsh")
    parser.add_argument("--print-completion", choices=shells, action=_PrintCompletion, help=about)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for group in GROUPS:
        group.add_commands(commands)
    return parser


class _Parser(argparse.ArgumentParser):
    def __init__(self, **kwargs: Any) -> None:
        # "bench --steps" is a mistake, not an abbreviation of --steps-only.
        super().__init__(allow_abbrev=False, **kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Report unknown arguments here, where the flags and the help are those of the command."""
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].partition("=")[0]
            near = get_close_matches(flag, self._option_string_actions, 1, 0.7)
            hint = f"; did you mean {near[0]}?" if near else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return known, unknown

    def error(self, message: str) -> Any:
        raise ValueError(f"{message} (see {self.prog} --help)")


class _PrintCompletion(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        shtab = import_extra("shtab", "completion", "shell completion")
        for command in parser._subparsers._group_actions[0].choices.values():
            for action in command._actions:
                if action.type is Path:
                    action.complete = shtab.FILE  # type: ignore[attr-defined]
        print(shtab.complete(parser, values))
        parser.exit()


class _Stream:
    """Standard output or error, flushed at every write.

    Characters that its encoding lacks are escaped. If the shell has closed the stream (None), or
    the reader of a pipe has gone, output is dropped and the command continues. A full disk is an
    OSError.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream or open(os.devnull, "w", encoding="utf-8")
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError as error:
            # Python flushes the stream again when it exits; let that succeed.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            if not isinstance(error, BrokenPipeError):
                raise OSError(f"cannot write to standard output: {error.strerror}") from None
        return len(text)
