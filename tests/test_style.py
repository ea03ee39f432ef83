"""Static checks: linters, import layers, import cycles, inheritance, and forbidden constructs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest
from scripts import ROOT

CODE = [path for folder in ("unclip", "train") for path in sorted((ROOT / folder).rglob("*.py"))]
TEXT = [
    *CODE,
    *sorted((ROOT / "tests").rglob("*.py")),
    *(path for folder in (".ci", "configs") for path in sorted((ROOT / folder).rglob("*.*"))),
    *(ROOT / name for name in (".ci/run", "LICENSE", "pyproject.toml", ".gitignore")),
    *(path for path in sorted(ROOT.rglob("*.md")) if ".git" not in path.parts),
]
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in CODE}
PICKLE_READER = ROOT / "unclip" / "checkpoints" / "pickles.py"  # imports nothing: test_pickles.py
UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve"}
REQUIRED = {  # calls that unpickle unless an argument forbids it
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
}
# An absolute path on one machine; "#!/usr/bin/env" exists on all.
MACHINE_PATH = re.compile(
    r"(?<![\w.:/*{}!-])/(?:home|mnt|opt|root|scratch|tmp|usr|var|work|Users)/[\w.]|\b[A-Z]:\\\w"
)


def test_ruff():
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--no-cache", "."], cwd=ROOT, capture_output=True
    )
    assert done.returncode == 0, done.stdout.decode()


def test_imports_follow_the_layers():
    # In a process of its own, as it disables the loggers of the process.
    script = "from importlinter import cli; print(cli.lint_imports(no_cache=True, no_logo=True))"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith("\n0\n"), done.stdout + done.stderr


# -- import cycles


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def import_graph(sources: dict[str, tuple[ast.Module, bool]]) -> dict[str, set[str]]:
    """Map each module to the modules it imports anywhere, also in functions and for types only.

    `sources` maps a name to its syntax tree and whether it is a package.
    """
    graph: dict[str, set[str]] = {}
    for name, (tree, is_package) in sources.items():
        package = name if is_package else name.rpartition(".")[0]
        found: set[str] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = resolve_name("." * node.level + (node.module or ""), package)
                for alias in node.names:
                    submodule = f"{base}.{alias.name}"
                    found.add(submodule if submodule in sources else base)
        graph[name] = {module for module in found if module in sources and module != name}
    return graph


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the sets of modules that import each other (strongly connected components)."""

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            for module in graph[todo.pop()] - seen:
                seen.add(module)
                todo.append(module)
        return seen

    reach = {module: reachable(module) for module in graph}
    groups = {
        frozenset(other for other in reach[module] if module in reach[other]) for module in graph
    }
    return sorted(sorted(group) for group in groups if group)


def test_no_import_cycles():
    """`unclip/__init__.py` is left out: it resolves the public names lazily, by module name."""
    sources = {
        module_name(path): (tree, path.name == "__init__.py") for path, tree in TREES.items()
    }
    del sources["unclip"]
    assert cycles(import_graph(sources)) == []


def test_late_and_type_only_imports_count_as_cycles():
    late = "def f():\n    from . import b\n"
    typed = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p.a import X\n"
    sources = {name: (ast.parse(code), False) for name, code in (("p.a", late), ("p.b", typed))}
    assert cycles(import_graph(sources)) == [["p.a", "p.b"]]


# -- classes and dispatch


def bases() -> dict[str, list[str]]:
    """Map the name of each class to the names of its bases."""
    return {
        node.name: [ast.unparse(base).split("[")[0].rpartition(".")[2] for base in node.bases]
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }


def depth(name: str, classes: dict[str, list[str]]) -> int:
    """Count the levels of our own classes above and including `name`."""
    parents = [base for base in classes.get(name, []) if base in classes and base != name]
    return 1 + max((depth(parent, classes) for parent in parents), default=0)


def is_module(name: str, classes: dict[str, list[str]]) -> bool:
    """Return whether a class inherits from `nn.Module`, by single inheritance."""
    parents = [base for base in classes.get(name, []) if base not in ("ABC", "Generic", "Protocol")]
    return len(parents) == 1 and (parents[0] == "Module" or is_module(parents[0], classes))


def test_inheritance_is_at_most_two_levels_deep():
    """Networks may be deeper, by single inheritance."""
    classes = bases()
    deep = [name for name in classes if depth(name, classes) > 2]
    assert [name for name in deep if not is_module(name, classes)] == []
    assert depth("C", {"A": ["Module"], "B": ["A"], "C": ["B"]}) == 3


def test_pipelines_do_not_dispatch_on_attributes():
    """`hasattr(x, name)` and `getattr(x, name, default)` hide which types a function takes."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"
        for path, tree in TREES.items()
        if "pipelines" in path.parts
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and (node.func.id == "hasattr" or node.func.id == "getattr" and len(node.args) == 3)
        and ast.unparse(node.args[0]) != "libc"  # a C library, whose functions differ by system
    ]
    assert found == []


def test_long_files_are_reported():
    for path in CODE:
        if (length := len(path.read_text(encoding="utf-8").splitlines())) > 600:
            warnings.warn(
                f"{path.relative_to(ROOT)} has {length} lines; is it one idea?", stacklevel=1
            )


# -- pickles and paths


def test_no_code_unpickles():
    others = [path for path in CODE if path != PICKLE_READER]
    assert [f"{path}: {found}" for path in others for found in unpickling(TREES[path])] == []


@pytest.mark.parametrize(
    "code",
    ["import pickle", "from dill import loads", "torch.load(f)", "np.load(f, allow_pickle=True)"],
)
def test_unpickling_is_detected(code):
    assert len(list(unpickling(ast.parse(code)))) == 1


def unpickling(tree: ast.Module) -> Iterator[str]:
    """Yield the lines of a module that may unpickle something."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            from_import = isinstance(node, ast.ImportFrom)
            modules = [node.module or ""] if from_import else [a.name for a in node.names]
            yield from (
                f"line {node.lineno}: {m}" for m in modules if m.split(".")[0] in UNPICKLERS
            )
        elif isinstance(node, ast.Call) and (called := ast.unparse(node.func)) in REQUIRED:
            argument, value = REQUIRED[called]
            given = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
            if given.get(argument) is not value:
                yield f"line {node.lineno}: {called} without {argument}={value}"


def test_no_file_contains_a_path_of_one_machine():
    lines = [
        (path, i, line)
        for path in TEXT
        for i, line in enumerate(path.read_text("utf-8").splitlines(), start=1)
    ]
    assert [f"{path}:{i}: {line}" for path, i, line in lines if MACHINE_PATH.search(line)] == []
    assert MACHINE_PATH.search("/" + "home/me/data")
    assert not MACHINE_PATH.search("assets/home/x and https://a.org/usr/b")
