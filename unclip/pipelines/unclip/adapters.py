"""LoRA adapters of a pipeline's networks: loaded, scaled, merged and unloaded."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

from torch import nn

from unclip.models.lora import attach, detach, merge, read_lora
from unclip.pipelines.runtime import Runtime


@dataclass
class LoadedLoRA:
    source: str  # as it was given
    path: Path  # resolved
    scale: float
    network: nn.Module
    name: str | None  # of its layers; None once they are merged

    def is_from(self, path: str | Path) -> bool:
        return self.path == Path(path).resolve()


@dataclass
class Adapters:
    """The adapters of the networks of a runtime, in the order in which they were loaded."""

    runtime: Runtime
    loaded: list[LoadedLoRA] = field(default_factory=list)
    _number: int = 0  # of the next adapter

    def load(self, path: str | Path, scale: float, component: str | None, merged: bool) -> None:
        """See `UnCLIPPipeline.load_lora`."""
        if not isinstance(scale, Real) or not math.isfinite(scale):
            raise ValueError(f"scale is {scale!r}; expected a finite number")
        self._check("load_lora()")
        adapter = read_lora(path)
        networks = {n: net for n, net in self.runtime.networks.items() if n != "clip"}
        if component is not None:
            if component not in networks:
                raise ValueError(f"component is {component!r}; expected {', '.join(networks)}")
            networks = {component: networks[component]}
        misfits = {name: adapter.misfit(network) for name, network in networks.items()}
        stage = next((name for name, misfit in misfits.items() if misfit is None), None)
        if stage is None:
            reasons = "; ".join(f"{name}: {misfit}" for name, misfit in misfits.items())
            raise ValueError(f"the LoRA {path} fits no network of the model: {reasons}")
        network = networks[stage]
        loaded = [one for one in self._current() if one.is_from(path)]
        if any(one.name is None and one.network is network for one in loaded):
            raise ValueError(f"the LoRA {path} is merged already; load the model again")
        for same in [one for one in loaded if one.name is not None]:
            self._remove(same)  # it is loaded with another scale
        name = f"lora_{self._number}"
        self._number += 1
        attach(network, adapter, name, scale)
        if merged:
            merge(network, name)
        source, resolved = str(path), Path(path).resolve()
        self.loaded.append(LoadedLoRA(source, resolved, scale, network, None if merged else name))
        self.runtime.refresh(network)

    def unload(self, path: str | Path | None) -> None:
        """See `UnCLIPPipeline.unload_lora`."""
        self._check("unload_lora()")
        chosen = [one for one in self._current() if path is None or one.is_from(path)]
        if path is not None and not chosen:
            loaded = ", ".join(one.source for one in self._current()) or "none"
            raise ValueError(f"the LoRA {path} is not loaded; loaded: {loaded}")
        if merged := [one.source for one in chosen if one.name is None]:
            raise ValueError(
                f"the LoRA {merged[0]} is merged into the weights; load the model again"
            )
        for one in chosen:
            self._remove(one)

    def metadata(self) -> dict[str, Any]:
        """Return an entry of the metadata of images, if there are adapters."""
        entries = [{"path": one.source, "scale": one.scale} for one in self._current()]
        return {"lora": entries} if entries else {}

    def check_saveable(self) -> None:
        """Raise ValueError if weights are not in the form in which networks are saved."""
        if unmerged := [one.source for one in self._current() if one.name is not None]:
            raise ValueError(
                f"the LoRA {unmerged[0]} is not part of the weights; unload it, or load it with "
                "merge=True"
            )

    def _current(self) -> list[LoadedLoRA]:
        """Return the adapters of networks that are still in the pipeline."""
        networks = list(self.runtime.networks.values())
        return [one for one in self.loaded if any(one.network is net for net in networks)]

    def _remove(self, one: LoadedLoRA) -> None:
        assert one.name is not None
        detach(one.network, one.name)
        self.loaded.remove(one)
        self.runtime.refresh(one.network)

    def _check(self, call: str) -> None:
        self.runtime.check_unmodified(call)
        if self.runtime.quantized:
            raise ValueError(f"the weights are rounded to 8 bits; call {call} before quantize()")
