"""The formats that a model can be loaded from; a foreign one adds its own file here and a line to FORMATS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from unclip.checkpoints import store


@dataclass(frozen=True)
class Format:
    """How a folder or file is told and read."""

    name: str
    recognise: Callable[[Path], bool]
    load: Callable[[Path, torch.dtype], store.Bundle]


FORMATS = (Format("unclip", store.recognise, store.load_bundle),)


def load_any(path: Path, dtype: torch.dtype = torch.float32) -> store.Bundle:
    """Reads a model of whatever format; ValueError if none recognises it."""
    for known in FORMATS:
        if known.recognise(path):
            return known.load(path, dtype)
    names = ", ".join(known.name for known in FORMATS)
    raise ValueError(f"{path} holds no model of a known format ({names}); a model folder has a model.json")
