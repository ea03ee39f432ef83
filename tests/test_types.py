"""pyright accepts the package and the Python blocks of the README files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from scripts import ROOT
from test_readme import RUNNABLE, blocks

MAX_IGNORES = 20


def pyright(*arguments: str | Path) -> list[str]:
    """Return pyright's errors."""
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
        + [str(argument) for argument in arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    report = json.loads(done.stdout)
    return [
        f"{error['file']}:{error['range']['start']['line'] + 1}: {error['message']}"
        for error in report["generalDiagnostics"]
        if error["severity"] == "error"
    ]


@pytest.mark.slow  # a minute; `.ci/run` runs pyright before the tests
def test_the_package_has_no_type_errors():
    assert pyright() == []


def test_few_type_errors_are_ignored():
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "unclip").rglob("*.py"))
    assert code.count("type: ignore") + code.count("pyright: ignore") < MAX_IGNORES


def test_python_blocks_of_the_readme_files_have_no_type_errors(tmp_path):
    """One file beside them has a deliberate error, which shows that pyright reads the folder."""
    for page in RUNNABLE:
        name = "_".join(page.relative_to(ROOT).with_suffix(".py").parts)
        (tmp_path / name).write_text("\n".join(text for _, text in blocks(page, "python")))
    (tmp_path / "wrong.py").write_text("import unclip\n\nunclip.StageOptions(steps='five')\n")
    project = {"extraPaths": [str(ROOT)], "typeCheckingMode": "basic"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(project))
    (error,) = pyright("--project", tmp_path)
    assert error.startswith(f"{tmp_path / 'wrong.py'}:3:")


def test_the_package_declares_its_types():
    assert (ROOT / "unclip" / "py.typed").is_file()
