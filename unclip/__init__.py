"""DALL-E 2 (unCLIP) in PyTorch: `unclip.load("emoji")("a red apple").images[0]`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from unclip import _deprecated

__version__ = "0.1.0"

if TYPE_CHECKING:
    from unclip.checkpoints.registry import load_codec as load_codec
    from unclip.clip import CLIP as CLIP
    from unclip.diffusion.inversion import InversionOptions as InversionOptions
    from unclip.diffusion.repaint import PaintOptions as PaintOptions
    from unclip.pipelines import load as load
    from unclip.pipelines import load_prior as load_prior
    from unclip.pipelines.compilation import compile as compile
    from unclip.pipelines.dalle.pipeline import DallePipeline as DallePipeline
    from unclip.pipelines.glide import GLIDEPipeline as GLIDEPipeline
    from unclip.pipelines.unclip.latent import Latent as Latent
    from unclip.pipelines.unclip.pipeline import UnCLIPPipeline as UnCLIPPipeline
    from unclip.types import CodeOptions as CodeOptions
    from unclip.types import GenerationResult as GenerationResult
    from unclip.types import GLIDEOptions as GLIDEOptions
    from unclip.types import Progress as Progress
    from unclip.types import StageOptions as StageOptions
    from unclip.types import TextEncoding as TextEncoding
    from unclip.types import UnCLIPOptions as UnCLIPOptions

_deprecated.install()

# Resolved on first use (PEP 562), because importing torch and open_clip takes seconds.
_HOME = {
    "CLIP": "unclip.clip",
    "CodeOptions": "unclip.types",
    "DallePipeline": "unclip.pipelines.dalle.pipeline",
    "GLIDEOptions": "unclip.types",
    "GLIDEPipeline": "unclip.pipelines.glide",
    "GenerationResult": "unclip.types",
    "InversionOptions": "unclip.diffusion.inversion",
    "Latent": "unclip.pipelines.unclip.latent",
    "PaintOptions": "unclip.diffusion.repaint",
    "Progress": "unclip.types",
    "StageOptions": "unclip.types",
    "TextEncoding": "unclip.types",
    "UnCLIPOptions": "unclip.types",
    "UnCLIPPipeline": "unclip.pipelines.unclip.pipeline",
    "compile": "unclip.pipelines.compilation",
    "load": "unclip.pipelines",
    "load_codec": "unclip.checkpoints.registry",
    "load_prior": "unclip.pipelines",
}
__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'unclip' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
