"""Conversion of any supported checkpoint to our own or diffusers' layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from unclip.checkpoints import store
from unclip.checkpoints.diffusers import custom
from unclip.checkpoints.diffusers import layout as diffusers
from unclip.checkpoints.folders import locate
from unclip.checkpoints.formats import Bundle
from unclip.checkpoints.registry import load_any
from unclip.checkpoints.summary import describe
from unclip.types import DType
from unclip.weights import to_dtype

WRITERS: dict[str, Callable[[Bundle, str | Path, torch.dtype | None], None]] = {
    "unclip": store.save_bundle,
    "diffusers": custom.save,
}
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # widest first


def convert(source: str | Path, folder: str | Path, to: str, dtype: DType | None = None) -> None:
    """Write the model at `source` (anything that `unclip.load` accepts) in the layout `to`.

    dtype: of the stored weights, by default the widest that they have. Raises ValueError with the
    reasons if diffusers' layout cannot express the model.
    """
    if to not in WRITERS:
        raise ValueError(f"to is {to!r}; expected {' or '.join(WRITERS)}")
    path = locate(source)
    dtype = to_dtype(dtype) or stored_dtype(path)
    WRITERS[to](load_any(path, dtype), folder, dtype)


def stored_dtype(path: Path) -> torch.dtype:
    """Return the widest dtype in the headers of a folder's weights; float32 for other formats."""
    if not (store.recognise(path) or diffusers.recognise(path)):
        return torch.float32
    found = {name for component in describe(path) for name in component.dtypes}
    return next((dtype for name, dtype in DTYPES.items() if name in found), torch.float32)
