"""Load a model by name, folder or Hub id, as a pipeline that generates images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from unclip.checkpoints.folders import locate
from unclip.checkpoints.hub import PRIOR_FILES, HubArguments

if TYPE_CHECKING:
    import torch
    from typing_extensions import Unpack

    from unclip.checkpoints.formats import LoadedPrior
    from unclip.pipelines.dalle.pipeline import DallePipeline
    from unclip.pipelines.unclip.pipeline import UnCLIPPipeline
    from unclip.types import DType


@overload
def load(
    name_or_path: Literal["emoji-dalle1"],
    device: torch.device | str | None = None,
    dtype: DType | None = None,
    *,
    offload: bool = False,
    **hub: Unpack[HubArguments],
) -> DallePipeline: ...


@overload
def load(
    name_or_path: Literal["emoji"],
    device: torch.device | str | None = None,
    dtype: DType | None = None,
    *,
    offload: bool = False,
    **hub: Unpack[HubArguments],
) -> UnCLIPPipeline: ...


@overload
def load(
    name_or_path: str | Path,
    device: torch.device | str | None = None,
    dtype: DType | None = None,
    *,
    offload: bool = False,
    **hub: Unpack[HubArguments],
) -> Any: ...  # the class depends on the files


def load(
    name_or_path: str | Path,
    device: torch.device | str | None = None,
    dtype: DType | None = None,
    *,
    offload: bool = False,
    **hub: Unpack[HubArguments],
) -> Any:
    """Load a bundled model ("emoji"), a model folder, or a Hub id "org/name".

    Returns an UnCLIPPipeline, a DallePipeline or a GLIDEPipeline. device: by default CUDA, then
    MPS, then the CPU. dtype: torch's or a name, "bf16"; by default half precision on CUDA, else
    float32. offload: keep one network in memory at a time from the beginning (see
    `Pipeline.offload`). hub: revision (or "org/name@revision"), cache_dir, token and
    local_files_only, as in `huggingface_hub`. ValueError if there is no such model (the message
    lists the existing ones) or its files are damaged.
    """
    path = locate(
        name_or_path, **hub
    )  # before the slow imports, so that a wrong name is reported at once

    from unclip.checkpoints import store
    from unclip.checkpoints.registry import load_any
    from unclip.pipelines.dalle.pipeline import DallePipeline
    from unclip.pipelines.glide import GLIDEPipeline
    from unclip.pipelines.offload import Offloader
    from unclip.pipelines.runtime import default_dtype, find_device, torch_defaults
    from unclip.pipelines.unclip.pipeline import UnCLIPPipeline
    from unclip.weights import to_dtype

    pipelines = {"unclip": UnCLIPPipeline, "glide": GLIDEPipeline, "dalle": DallePipeline}
    device = find_device(device)
    dtype = to_dtype(dtype) or default_dtype(device)
    source = _source(name_or_path, hub)
    with torch_defaults():
        if offload and store.recognise(path):  # weights are mapped on their way to the disk
            bundle = store.load_bundle(path, dtype, mapped=True)
        else:  # other formats always map
            bundle = load_any(path, dtype)
        if offload and bundle.kind == UnCLIPPipeline.kind:
            return UnCLIPPipeline.from_bundle(bundle, source, Offloader(device, dtype))
        pipe = pipelines[bundle.kind].from_bundle(bundle, source=source)
        return pipe.to(dtype=dtype).offload(device) if offload else pipe.to(device, dtype)


def load_prior(
    name_or_path: str | Path, dtype: DType | None = None, **hub: Unpack[HubArguments]
) -> LoadedPrior:
    """Load a prior alone, for `pipe.prior = prior`: a network, its noise schedule and its source.

    It may be a file or a folder of a prior, or any model that `load` reads; from a Hub id, only the
    prior is fetched. It is on the CPU, by default in float32; a pipeline moves it to its own device
    and dtype. hub: see `load`. ValueError if there is none, or it is damaged.
    """
    path = locate(name_or_path, PRIOR_FILES, **hub)

    import torch

    from unclip.checkpoints.registry import load_any_prior
    from unclip.pipelines.runtime import torch_defaults
    from unclip.weights import to_dtype

    with torch_defaults():
        prior = load_any_prior(path, to_dtype(dtype) or torch.float32)
    return replace(prior, source=_source(name_or_path, hub))


def _source(name_or_path: str | Path, hub: HubArguments) -> str:
    """Return what loads the same model again, for the metadata of images."""
    revision = hub.get("revision")
    return str(name_or_path) if revision is None else f"{name_or_path}@{revision}"
