"""What pipelines of all kinds do with their networks as a whole: where they are, in which numbers they compute."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from unclip.clip import CLIP
from unclip.models.codecs.codec import ImageCodec
from unclip.models.cpu import int8
from unclip.pipelines import presets
from unclip.pipelines.base import find_device
from unclip.pipelines.inference import prepare_for_inference
from unclip.pipelines.memory import kept_memory
from unclip.pipelines.offload import Offloader, parts

if TYPE_CHECKING:
    from typing_extensions import Self


class Placement:
    """A pipeline's hold on its networks. `_use` is to be called before one of them computes."""

    kind: str
    source: str  # what the model was loaded from
    options: Any
    clip: CLIP | None = None
    networks: Callable[[], dict[str, nn.Module]]  # every one but CLIP, under the name of its stage
    _residency: Offloader | None = None
    _prepare: Callable[[nn.Module], None] | None = None  # what `unclip.compile` does to a network

    @property
    def device(self) -> torch.device:
        """Where the networks compute."""
        return self._residency.device if self._residency else self._parameter.device

    @property
    def dtype(self) -> torch.dtype:
        return self._parameter.dtype

    @property
    def _parameter(self) -> nn.Parameter:
        *_, network = self.networks().values()
        return next(network.parameters())

    @property
    def _modules(self) -> list[nn.Module]:
        return [*([] if self.clip is None else [self.clip]), *self.networks().values()]

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """Moves all networks; parameters become `dtype`, but a small CLIP and statistics stay float32."""
        self._check_untouched("to()")
        device = None if device is None else find_device(device)
        for module in self._modules:
            prepare_for_inference(module.to(device=device), dtype)
        return self

    @property
    def offloaded(self) -> bool:
        """Whether one network is in memory at a time."""
        return self._residency is not None

    def offload(self, device: torch.device | str | None = None) -> Self:
        """Keeps one network in memory at a time, in place; computes on `device` (by default where the networks are).

        On an accelerator the others wait in main memory. Where the CPU computes they wait in a temporary folder (in
        TMPDIR; it should be on a disk, with room for all weights) and are read from there for their use. The pictures
        are the same. For good: load the model again to have all networks in memory.
        """
        if self.compiled:
            raise ValueError(
                "the networks are compiled, and must stay where they are; use one or the other"
            )
        device = find_device(self.device if device is None else device)
        if self._residency is None:
            self._residency = Offloader(device)
            for part in parts(self._modules):
                self._residency.add(part)
        elif device != self.device:
            raise ValueError(f"the networks are offloaded already, to compute on {self.device}")
        return self

    @property
    def compiled(self) -> bool:
        """Whether `unclip.compile` has prepared the networks."""
        return self._prepare is not None

    def quantize(self, kind: str = "int8") -> Self:
        """Approximate: weights as 8-bit integers, in place; half of bfloat16's memory. CLIP and codecs are left alone.

        For good, and not to be saved: `save_pretrained` refuses.
        """
        if kind != "int8":
            raise ValueError(f"unknown kind of weights {kind!r}; expected 'int8'")
        self._check_untouched("quantize()")
        for network in self.networks().values():
            if not isinstance(network, ImageCodec):
                int8.quantize(network)
        return self

    @property
    def quantized(self) -> str | None:
        """The kind of weights that `quantize` made; None where they are as they were trained."""
        return (
            "int8"
            if any(int8.is_quantized(network) for network in self.networks().values())
            else None
        )

    def preset(self, name: str) -> Any:
        """The model's options by a name: "exact" for its own, "fast" for several times cheaper ones (approximate)."""
        return presets.preset(
            name, self.options, [up.config for up in getattr(self, "upsamplers", ())]
        )

    def _keeping(self) -> AbstractContextManager[None]:
        """To be entered for a call's steps: they go quicker with memory kept, and offloading is for having little."""
        return nullcontext() if self.offloaded else kept_memory(self.device)

    def _use(self, module: nn.Module) -> None:
        """To be called before a network (of an upsampler: one of its U-Nets) computes."""
        if self._residency is not None:
            self._residency.use(module)

    def _check_untouched(self, call: str) -> None:
        """ValueError unless networks can still be changed one and all."""
        if self.offloaded:
            raise ValueError(f"the networks are offloaded; call {call} before offload()")
        if self.compiled:
            raise ValueError(f"the networks are compiled; call {call} before unclip.compile()")

    def _check_whole(self) -> None:
        """ValueError unless all weights are there and as they were trained."""
        if self.offloaded:
            raise ValueError("the networks are offloaded; save a model before offload()")
        if self.quantized:
            raise ValueError(
                "the weights are rounded to 8 bits, which is not to be saved; save before quantize()"
            )
