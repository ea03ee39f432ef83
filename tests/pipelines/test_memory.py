"""Reuse of freed CPU memory is opt-in."""

from __future__ import annotations

import copy

import pytest
import torch

import unclip
from unclip.cli.main import main
from unclip.pipelines import memory

pytestmark = pytest.mark.skipif(memory._libc() is None, reason="needs glibc")
CPU = torch.device("cpu")


@pytest.fixture
def settings(monkeypatch) -> list[dict[int, int]]:
    """The malloc settings that are applied, in order."""
    applied: list[dict[int, int]] = []
    monkeypatch.setattr(memory, "enabled", False)
    monkeypatch.setattr(memory, "_set", applied.append)
    return applied


def test_malloc_is_unchanged_by_default(settings, tiny_pipe):
    tiny_pipe("a red apple", seed=0, progress=False)
    assert settings == []


def test_memory_is_kept_only_during_calls(settings):
    memory.enable_memory_reuse()
    with memory.kept_memory(CPU), memory.kept_memory(CPU):
        assert memory.DEFAULTS not in settings
    assert settings[0] == memory.REUSE and settings[-1] == memory.DEFAULTS
    assert settings.count(memory.DEFAULTS) == 1  # after the outer context


def test_compile_and_the_command_line_enable_it(settings, monkeypatch, tiny_pipe, capsys):
    unclip.compile(copy.deepcopy(tiny_pipe))
    assert memory.enabled
    monkeypatch.setattr(memory, "enabled", False)
    with pytest.raises(SystemExit):
        main(["--help"])
    assert memory.enabled
