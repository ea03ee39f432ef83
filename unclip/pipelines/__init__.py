"""From a name or a prompt to pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from unclip.checkpoints.folders import locate
from unclip.checkpoints.hub import PRIOR_FILES

if TYPE_CHECKING:
    import torch

    from unclip.models.unclip.prior import DiffusionPrior, DirectPrior
    from unclip.pipelines.base import TextToImage


def load(
    name_or_path: str | Path,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    offload: bool = False,
) -> TextToImage:
    """A bundled model ("emoji"), a model folder, or a Hub id "org/name", ready to draw.

    device: by default CUDA, then MPS, then the CPU. dtype: by default half precision on CUDA, else float32.
    offload: from the beginning, one network is in memory at a time (see `UnCLIPPipeline.offload`).
    ValueError if there is no such model (it lists what there is) or its files are damaged.
    """
    path = locate(name_or_path)  # before torch is imported: a misspelt name is told at once

    from unclip.checkpoints import store
    from unclip.checkpoints.registry import load_any
    from unclip.pipelines.base import default_dtype, find_device
    from unclip.pipelines.dalle.pipeline import DallePipeline
    from unclip.pipelines.glide import GLIDEPipeline
    from unclip.pipelines.offload import Offloader
    from unclip.pipelines.unclip.pipeline import UnCLIPPipeline

    pipelines = {"unclip": UnCLIPPipeline, "glide": GLIDEPipeline, "dalle": DallePipeline}
    device = find_device(device)
    dtype = dtype or default_dtype(device)
    # What waits on the disk is no more than mapped into memory on its way there; other formats always map.
    bundle = (
        store.load_bundle(path, dtype, mapped=True)
        if offload and store.recognise(path)
        else load_any(path, dtype)
    )
    if offload and bundle.kind == UnCLIPPipeline.kind:
        return UnCLIPPipeline.from_bundle(bundle, str(name_or_path), Offloader(device, dtype))
    pipe = pipelines[bundle.kind].from_bundle(bundle, source=str(name_or_path))
    return pipe.to(dtype=dtype).offload(device) if offload else pipe.to(device, dtype)


def load_prior(
    name_or_path: str | Path, dtype: torch.dtype | None = None
) -> DiffusionPrior | DirectPrior:
    """A prior alone, for `pipe.prior = prior`: trained here, Kandinsky's, or the one of any model that `load` reads.

    A file, a folder, or a Hub id of which no more than the prior is fetched. On the CPU, in float32 unless dtype says
    otherwise; a pipeline brings it to its own device and dtype. ValueError if there is none, or it is damaged.
    """
    path = locate(name_or_path, PRIOR_FILES)

    import torch

    from unclip.checkpoints.registry import load_any_prior

    prior, prior.schedule = load_any_prior(path, dtype or torch.float32)
    prior.source = str(name_or_path)  # for the metadata of its pictures
    return prior
