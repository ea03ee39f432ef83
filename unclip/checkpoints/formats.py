"""Interface of checkpoint formats, and the results of loading."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from unclip.diffusion.schedules import ScheduleConfig

T = TypeVar("T")
States = dict[str, Mapping[str, Tensor]]  # component -> its tensors, named as in the file


@dataclass(frozen=True)
class Format(Generic[T]):
    """One checkpoint format. T: `Bundle` for a model, `LoadedPrior` for a prior, else a network."""

    name: str
    kind: str  # "unclip", "glide", "dalle" or "model" (any of them); "prior", "codec", "component"
    recognise: Callable[[Path], bool]
    load: Callable[[Path, torch.dtype], T]
    probe: Callable[[Path], States] | None = None  # None: the headers of the weights are enough


@dataclass(frozen=True)
class Bundle:
    """Everything in a model's checkpoint; a pipeline is built from it."""

    kind: str
    components: Mapping[str, Any]  # clip (or tokenizer), prior, decoder, upsampler_0, ...
    schedules: dict[str, ScheduleConfig]  # one for each component that is sampled by diffusion
    options: Any
    name: str
    licence: str


@dataclass(frozen=True)
class LoadedPrior:
    """A prior without the rest of its model, as `unclip.load_prior` returns it."""

    network: Any
    schedule: ScheduleConfig | None = None  # of a diffusion prior; None = cosine
    source: str | None = None  # where it was loaded from, for the metadata of images


class Components(Mapping[str, Any]):
    """Components that are loaded one by one, each on first access."""

    def __init__(self, readers: Mapping[str, Callable[[], Any]]) -> None:
        self._readers, self._loaded = dict(readers), {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._loaded:
            self._loaded[name] = self._readers[name]()
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)
