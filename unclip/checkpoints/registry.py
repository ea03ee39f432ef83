"""All checkpoint formats in the order in which they are tried, and loading of any of them.

A new format defines a `Format` in its own module and adds one line here.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from unclip.checkpoints import dalle_pytorch, glide, karlo, min_dalle, store, taming
from unclip.checkpoints.dalle2_pytorch import load as dalle2_pytorch
from unclip.checkpoints.diffusers import load as diffusers
from unclip.checkpoints.folders import is_hub_id, locate
from unclip.checkpoints.formats import Bundle, Format, LoadedPrior, T
from unclip.checkpoints.hub import CODEC_FILES, HubArguments
from unclip.checkpoints.openai import dvae as openai_dvae
from unclip.models.codecs.codec import Autoencoder
from unclip.types import DType
from unclip.weights import to_dtype

if TYPE_CHECKING:
    from typing_extensions import Unpack

MODELS = (
    store.FORMAT,
    diffusers.FORMAT,
    karlo.FORMAT,
    glide.FORMAT,
    dalle2_pytorch.FORMAT,
    min_dalle.FORMAT,
    dalle_pytorch.FORMAT,
)
CODECS: tuple[Format[Any], ...] = (openai_dvae.FORMAT, taming.FORMAT, store.COMPONENT)
PRIORS = (store.PRIOR, diffusers.PRIOR, karlo.PRIOR, dalle2_pytorch.PRIOR)


def load_any(path: Path, dtype: torch.dtype = torch.float32) -> Bundle:
    """Load a model of any known format onto the CPU. Raises ValueError if no format matches."""
    if format := _matching(MODELS, path):
        return format.load(path, dtype)
    if _matching(PRIORS, path):
        raise ValueError(f"{path} is a prior, not a whole model; load it with unclip.load_prior")
    hint = f"a model folder has a {store.MODEL_FILE}"
    raise ValueError(f"{path} is not a model of a known format ({_names(MODELS)}); {hint}")


def load_any_prior(path: Path, dtype: torch.dtype = torch.float32) -> LoadedPrior:
    """Load a prior of any known format, from its own files or out of a whole model."""
    if format := _matching(PRIORS, path):
        return format.load(path, dtype)
    raise ValueError(f"{path} is not a prior of a known format ({_names(PRIORS)})")


def load_codec(
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: DType = torch.float32,
    **hub: Unpack[HubArguments],
) -> Autoencoder:
    """Load an image codec in eval mode: a component folder, OpenAI's dVAE or a VQGAN of taming's.

    path: may be a Hub id "org/name[@revision]"; hub: see `load`. Raises FileNotFoundError if the
    path does not exist, and ValueError if it is not a codec.
    """
    if not Path(path).exists() and not is_hub_id(path):
        raise FileNotFoundError(f"{path} does not exist; expected an image codec")
    path, dtype = locate(path, CODEC_FILES, **hub), to_dtype(dtype) or torch.float32
    if not (format := _matching(CODECS, path)):
        raise ValueError(f"{path} is not an image codec of a known format ({_names(CODECS)})")
    codec = format.load(path, dtype)
    if not isinstance(codec, Autoencoder):
        raise ValueError(f"{path} is a {type(codec).__name__}; expected an image codec")
    return codec.to(device)


def _matching(formats: Iterable[Format[T]], path: Path) -> Format[T] | None:
    return next((format for format in formats if format.recognise(path)), None)


def _names(formats: Iterable[Format[Any]]) -> str:
    return ", ".join(format.name for format in formats)
