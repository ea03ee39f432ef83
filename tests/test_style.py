"""What keeps the code in order: linters, the direction of imports, and things that may not be in it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
from importlinter import cli as import_linter
from scripts import ROOT

CODE = [path for folder in ("unclip", "train") for path in sorted((ROOT / folder).rglob("*.py"))]
TEXT = [
    *CODE,
    *sorted((ROOT / "tests").rglob("*.py")),
    *(
        path
        for folder in (".ci", "configs")
        for path in sorted((ROOT / folder).rglob("*"))
        if path.is_file()
    ),
    *(ROOT / name for name in ("README.md", "LICENSE", "pyproject.toml", ".gitignore")),
    *sorted(ROOT.glob("assets/**/*.md")),
]
READER = (
    ROOT / "unclip" / "checkpoints" / "pickles.py"
)  # its unpickler imports no name: test_pickles
UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve"}
REQUIRED = {  # calls that would unpickle unless told otherwise
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
}
# An absolute path into somebody's machine; "#!/usr/bin/env" is the same on all.
PLACE = re.compile(
    r"(?<![\w.:/*{}!-])/(?:home|mnt|opt|root|scratch|tmp|usr|var|work|Users)/[\w.]|\b[A-Z]:\\\w"
)


def test_ruff():
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--no-cache", "."], cwd=ROOT, capture_output=True
    )
    assert done.returncode == 0, done.stdout.decode()


def test_imports_run_one_way(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert import_linter.lint_imports(no_cache=True, no_logo=True) == 0, capsys.readouterr().out


def test_nothing_is_unpickled():
    others = [path for path in CODE if path != READER]
    assert [
        f"{path}: {found}"
        for path in others
        for found in unpickling(path.read_text(encoding="utf-8"))
    ] == []


@pytest.mark.parametrize(
    "code",
    ["import pickle", "from dill import loads", "torch.load(f)", "np.load(f, allow_pickle=True)"],
)
def test_unpickling_would_be_noticed(code):
    assert len(list(unpickling(code))) == 1


def unpickling(code: str) -> Iterator[str]:
    """The lines of a module that could unpickle something."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
            )
            yield from (
                f"line {node.lineno}: {m}" for m in modules if m.split(".")[0] in UNPICKLERS
            )
        elif isinstance(node, ast.Call) and (called := ast.unparse(node.func)) in REQUIRED:
            argument, value = REQUIRED[called]
            if not any(
                k.arg == argument and getattr(k.value, "value", None) is value
                for k in node.keywords
            ):
                yield f"line {node.lineno}: {called} without {argument}={value}"


def test_no_place_of_a_machine_is_written_down():
    lines = [
        (path, i, line)
        for path in TEXT
        for i, line in enumerate(path.read_text("utf-8").splitlines(), start=1)
    ]
    assert [f"{path}:{i}: {line}" for path, i, line in lines if PLACE.search(line)] == []
    assert PLACE.search("/" + "home/me/data") and not PLACE.search(
        "assets/home/x and https://a.org/usr/b"
    )
