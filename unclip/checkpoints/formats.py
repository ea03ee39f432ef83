"""The formats that a model can be loaded from; a foreign one adds a file, a line to FORMATS and one to CONTENTS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from unclip.checkpoints import dalle_pytorch, glide, karlo, min_dalle, store
from unclip.checkpoints.dalle2_pytorch import load as dalle2_pytorch
from unclip.checkpoints.diffusers import layout as diffusers_layout
from unclip.checkpoints.diffusers import load as diffusers
from unclip.checkpoints.priors import PRIORS


@dataclass(frozen=True)
class Format:
    """How a folder or file is told and read."""

    name: str
    recognise: Callable[[Path], bool]
    load: Callable[[Path, torch.dtype], store.Bundle]


FORMATS = (
    Format("unclip", store.recognise, store.load_bundle),
    Format("diffusers", diffusers_layout.recognise, diffusers.load_bundle),
    Format("Karlo's own", karlo.recognise, karlo.load_bundle),
    Format("GLIDE", glide.recognise, glide.load_bundle),
    Format("DALLE2-pytorch", dalle2_pytorch.recognise, dalle2_pytorch.load_bundle),
    Format("min-dalle", min_dalle.recognise, min_dalle.load_bundle),
    Format("DALLE-pytorch", dalle_pytorch.recognise, dalle_pytorch.load_bundle),
)


def load_any(path: Path, dtype: torch.dtype = torch.float32) -> store.Bundle:
    """Reads a model of whatever format; ValueError if none recognises it."""
    for known in FORMATS:
        if known.recognise(path):
            return known.load(path, dtype)
    if any(known.recognise(path) for known in PRIORS):
        raise ValueError(f"{path} holds a prior, not a whole model; unclip.load_prior reads it")
    names = ", ".join(known.name for known in FORMATS)
    raise ValueError(
        f"{path} holds no model of a known format ({names}); a model folder has a model.json"
    )
