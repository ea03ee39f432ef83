"""Priors without the rest of their model, as `unclip.load_prior` reads them; a foreign one adds a line to PRIORS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from unclip.checkpoints import karlo
from unclip.checkpoints.dalle2_pytorch import load as dalle2_pytorch
from unclip.checkpoints.diffusers import load as diffusers
from unclip.checkpoints.diffusers.layout import INDEX_FILE, SCHEDULER_FILE
from unclip.checkpoints.registry import CONFIG_FILE, MODEL_FILE
from unclip.checkpoints.store import is_diffused, load_component, load_schedule
from unclip.diffusion.schedules import ScheduleConfig
from unclip.files import read_json

Loaded = tuple[
    nn.Module, ScheduleConfig | None
]  # a prior, and the noise schedule of a diffusion prior


@dataclass(frozen=True)
class PriorFormat:
    """How a prior is told and read."""

    name: str
    recognise: Callable[[Path], bool]
    load: Callable[[Path, torch.dtype], Loaded]


def load_any_prior(path: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Reads a prior of whatever format; a diffusion prior's noise schedule becomes its attribute `schedule`."""
    for known in PRIORS:
        if known.recognise(path):
            prior, prior.schedule = known.load(path, dtype)
            return prior
    names = ", ".join(known.name for known in PRIORS)
    raise ValueError(f"{path} holds no prior of a known format ({names})")


def _is_ours(path: Path) -> bool:
    return (path / MODEL_FILE).is_file() or "type" in _config(path)


def _load_ours(path: Path, dtype: torch.dtype) -> Loaded:
    """A prior's folder, or the model folder that it is in."""
    folder = path / "prior" if (path / MODEL_FILE).is_file() else path
    if not folder.is_dir():
        raise ValueError(f"{path} is a model without a prior")
    prior = load_component(folder, dtype)
    if not hasattr(prior, "denormalize"):
        raise ValueError(f"{folder} holds a {type(prior).__name__}; expected a prior")
    return prior, load_schedule(folder) if is_diffused(folder) else None


def _is_diffusers(path: Path) -> bool:
    return (path / INDEX_FILE).is_file() or _config(path).get("_class_name") == "PriorTransformer"


def _load_diffusers(path: Path, dtype: torch.dtype) -> Loaded:
    """A PriorTransformer's folder with its scheduler's beside it, or the pipeline's folder: Karlo's, Kandinsky's."""
    folder = path / "prior" if (path / INDEX_FILE).is_file() else path
    schedulers = [
        folder.parent / name / SCHEDULER_FILE for name in ("scheduler", "prior_scheduler")
    ]
    return diffusers.read_prior(
        folder, next(filter(Path.is_file, schedulers), schedulers[0]), dtype
    )


def _is_original(path: Path) -> bool:
    return path.suffix == ".ckpt" or any(path.glob("prior*.ckpt"))


def _load_original(path: Path, dtype: torch.dtype) -> Loaded:
    """A checkpoint of Karlo's or of Kandinsky 2.1's own code, or its folder; CLIP's statistics lie beside it."""
    file = path if path.is_file() else karlo.only(path, "prior*.ckpt")
    return karlo.read_prior(file, file.parent / karlo.STATS_FILE, dtype), karlo.SCHEDULE


def _config(path: Path) -> dict[str, object]:
    return read_json(path / CONFIG_FILE) if (path / CONFIG_FILE).is_file() else {}


PRIORS = (
    PriorFormat("unclip", _is_ours, _load_ours),
    PriorFormat("diffusers", _is_diffusers, _load_diffusers),
    PriorFormat("Karlo's and Kandinsky's own", _is_original, _load_original),
    PriorFormat("DALLE2-pytorch", dalle2_pytorch.recognise_prior, dalle2_pytorch.load_prior),
)
