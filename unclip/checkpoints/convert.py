"""From any format that can be read to either that can be written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from unclip.checkpoints import store
from unclip.checkpoints.diffusers import layout as diffusers_layout
from unclip.checkpoints.diffusers.export import save_for_diffusers
from unclip.checkpoints.formats import load_any
from unclip.checkpoints.registry import describe, locate
from unclip.checkpoints.store import Bundle, save_bundle

WRITERS: dict[str, Callable[[Bundle, str | Path, torch.dtype | None], None]] = {
    "unclip": save_bundle,
    "diffusers": save_for_diffusers,
}
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # the widest first


def convert(
    source: str | Path, folder: str | Path, to: str, dtype: torch.dtype | None = None
) -> None:
    """Writes the model at `source` (what `unclip.load` reads) into a folder in the layout `to`: unclip or diffusers.

    Weights are written in `dtype`, by default in the widest that they are stored in. ValueError if the layout cannot
    express the model, with the reason for each part of it.
    """
    if to not in WRITERS:
        raise ValueError(f"to is {to!r}; expected {' or '.join(WRITERS)}")
    path = locate(source)
    dtype = dtype or stored_dtype(path)
    WRITERS[to](load_any(path, dtype), folder, dtype)


def stored_dtype(path: Path) -> torch.dtype:
    """The widest dtype of a folder's weights; float32 where the files don't tell it without being read."""
    if not (store.recognise(path) or diffusers_layout.recognise(path)):
        return torch.float32
    found = {name for component in describe(path) for name in component.dtypes}
    return next((dtype for name, dtype in DTYPES.items() if name in found), torch.float32)
