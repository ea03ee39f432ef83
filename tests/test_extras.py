"""Packages of extras: the error for a missing one names an extra that installs it."""

from __future__ import annotations

import re
import sys

import pytest
from scripts import ROOT

from unclip.extras import import_extra

CALL = r'import_extra\(\s*"([\w.]+)",\s*"(\w+)"'
SOURCES = {file: file.read_text("utf-8") for file in (ROOT / "unclip").rglob("*.py")}


def test_a_missing_package_is_reported_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)  # not installed
    with pytest.raises(ValueError) as error:
        import_extra("peft", "finetune", "LoRA")
    command = "pip install 'unclip[finetune]', or '.[finetune]' in a checkout"
    assert str(error.value).startswith(f"LoRA needs peft: {command} (")


def test_extras_contain_their_packages():
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    used = [found for text in SOURCES.values() for found in re.findall(CALL, text)]
    assert len(used) > 6
    for module, extra in used:
        (packages,) = re.findall(rf"(?m)^{extra} = (\[.+\])$", project)
        assert re.search(rf'"{module.split(".")[0].replace("_", "-")}["[;>]', packages), module


def test_hints_name_extras():
    for file, text in SOURCES.items():
        assert not re.search(r"pip install (?!'unclip\[|\{missing)", text), file


def test_pages_install_extras_from_a_checkout_and_one_lists_them_all():
    pages = [p for p in ROOT.rglob("*.md") if not {".git", "runs"} & set(p.relative_to(ROOT).parts)]
    assert len(pages) > 6
    for page in pages:
        assert "unclip[" not in page.read_text("utf-8"), page
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    section = project.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    listed = re.findall(
        r"(?m)^\| `(\w+)` \| .+ \|$", (ROOT / "unclip/README.md").read_text("utf-8")
    )
    assert set(re.findall(r"(?m)^(\w+) = \[", section)) <= set(listed)
