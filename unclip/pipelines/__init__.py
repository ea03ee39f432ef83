"""From a name or a prompt to pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from unclip.checkpoints.catalogue import locate

if TYPE_CHECKING:
    import torch

    from unclip.pipelines.base import TextToImage


def load(
    name_or_path: str | Path, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> TextToImage:
    """A bundled model ("emoji"), a model folder, or a Hub id "org/name", ready to draw.

    device: by default CUDA, then MPS, then the CPU. dtype: by default half precision on CUDA, else float32.
    ValueError if there is no such model (it lists what there is) or its files are damaged.
    """
    path = locate(name_or_path)  # before torch is imported: a misspelt name is told at once

    from unclip.checkpoints.formats import load_any
    from unclip.pipelines.base import default_dtype, find_device
    from unclip.pipelines.unclip import UnCLIPPipeline

    pipelines = {"unclip": UnCLIPPipeline}
    device = find_device(device)
    dtype = dtype or default_dtype(device)
    bundle = load_any(path, dtype)
    return pipelines[bundle.kind].from_bundle(bundle, source=str(name_or_path)).to(device, dtype)
