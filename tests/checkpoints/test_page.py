"""unclip/checkpoints/README.md: calls fit the functions' signatures, and no format is missing."""

from __future__ import annotations

import ast
import inspect
import re

import pytest
from scripts import ROOT

import unclip
from unclip.checkpoints.registry import CODECS, MODELS, PRIORS

PAGE = (ROOT / "unclip" / "checkpoints" / "README.md").read_text(encoding="utf-8")
CALLS = re.findall(r"`(unclip\.\w+\([^`]*\))`", PAGE)


def rows(section: str) -> list[list[str]]:
    """Return the cells of the table in a section, without its header."""
    text = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize("call", CALLS)
def test_a_call_fits_the_signature(call: str) -> None:
    node = ast.parse(call, mode="eval").body
    assert isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    arguments = [ast.literal_eval(argument) for argument in node.args]
    keywords = {str(k.arg): ast.literal_eval(k.value) for k in node.keywords}
    inspect.signature(getattr(unclip, node.func.attr)).bind(*arguments, **keywords)


@pytest.mark.parametrize(
    ("section", "formats", "loader"),
    [
        ("Models", MODELS, "load"),
        ("Priors", PRIORS, "load_prior"),
        ("Codecs", CODECS, "load_codec"),
    ],
)
def test_every_format_has_a_row_with_its_loader(section, formats, loader) -> None:
    table = rows(section)
    assert {row[0] for row in table} == {known.name for known in formats}
    assert all(row[-1].startswith(f"`unclip.{loader}(") for row in table)
