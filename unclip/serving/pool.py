"""The models of one device, loaded at first use and unloaded when idle."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class LoadedModel:
    """A pipeline in memory."""

    pipe: Any
    used: float = field(default_factory=time.monotonic)
    max_batch: int | None = None  # images that fit in memory, once a call has failed


class ModelPool:
    """Loads models by name. It is used by one engine thread."""

    def __init__(self, load: Callable[[str], Any], keep: str, idle_seconds: float) -> None:
        """keep: a model that is never unloaded."""
        self._load, self._keep, self._idle_seconds = load, keep, idle_seconds
        self._loaded: dict[str, LoadedModel] = {}

    def get(self, name: str) -> LoadedModel:
        """Return a model; the first call loads it."""
        if name not in self._loaded:
            self._loaded[name] = LoadedModel(self._load(name))
        model = self._loaded[name]
        model.used = time.monotonic()
        return model

    def offload_idle(self) -> list[str]:
        """Drop the models that were not used for idle_seconds; return their names."""
        oldest = time.monotonic() - self._idle_seconds
        idle = [
            name
            for name, model in self._loaded.items()
            if name != self._keep and model.used < oldest
        ]
        for name in idle:
            del self._loaded[name]
        return idle
