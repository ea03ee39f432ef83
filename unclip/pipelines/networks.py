"""The networks of unCLIP as one: what fits together, where it is kept and in which numbers it computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from unclip.clip import CLIP
from unclip.diffusion.schedules import Schedule, ScheduleConfig
from unclip.models import int8
from unclip.models.decoder import Decoder
from unclip.models.prior import DiffusionPrior
from unclip.models.upsampler import Upsampler
from unclip.pipelines import presets
from unclip.pipelines.base import find_device
from unclip.pipelines.offload import Residency, parts
from unclip.types import StageOptions, UnCLIPOptions

if TYPE_CHECKING:
    from typing_extensions import Self

V = TypeVar("V")

SMALL_CLIP = 200_000_000  # parameters up to which CLIP stays in float32: it runs once a call


class UnCLIPNetworks:
    """CLIP, a prior (or none, for variations only), a decoder and any number of upsamplers."""

    def __init__(
        self,
        clip: CLIP,
        prior: DiffusionPrior | None,
        decoder: Decoder,
        upsamplers: Sequence[Upsampler] = (),
        options: UnCLIPOptions | None = None,
        *,
        schedules: Mapping[str, ScheduleConfig] | None = None,
        residency: Residency | None = None,
    ) -> None:
        """schedules: of "prior", "decoder", "upsampler_0", ...; cosine for those left out. residency: see `offload`."""
        self.clip, self._prior, self.decoder, self.upsamplers = clip, prior, decoder, tuple(upsamplers)
        self.options = options or UnCLIPOptions(upsamplers=(StageOptions(steps=7),) * len(self.upsamplers))
        self.compiled = False
        self.static_shapes = False  # whether texts of different lengths must look alike to the networks
        self._residency = residency
        self._kept: dict[str, tuple[Any, Any]] = {}
        schedules = dict(schedules or {})
        self.schedules = {stage: Schedule(schedules.pop(stage, ScheduleConfig())) for stage in self.networks()}
        if schedules:
            raise ValueError(f"schedules of {', '.join(schedules)}; the model has {', '.join(self.schedules)}")
        self._check_fit()
        for module in (clip, *self.networks().values()):
            settled(module)

    @property
    def prior(self) -> DiffusionPrior | None:
        """From text to image embeddings; None in a model that draws variations only."""
        return self._prior

    @prior.setter
    def prior(self, prior: DiffusionPrior) -> None:
        """Another prior for the same CLIP, such as `unclip.load_prior` gives; it comes with its own noise schedule.

        Moved to the others' device and dtype. ValueError if it was trained for another CLIP.
        """
        if not isinstance(prior, nn.Module):
            raise ValueError(f"prior is a {type(prior).__name__}; expected a network, such as unclip.load_prior gives")
        self._check_clip_fit("prior", prior.config)
        self._prior = settled(prior, self.dtype)
        self.schedules = {**self.schedules, "prior": Schedule(getattr(prior, "schedule", ScheduleConfig()))}
        if self._residency is None:
            prior.to(self.device)
        else:
            self._residency.add(prior)

    def networks(self) -> dict[str, nn.Module]:
        """Every network but CLIP, under the name of its stage."""
        prior = {} if self.prior is None else {"prior": self.prior}
        return {**prior, "decoder": self.decoder, **{f"upsampler_{i}": up for i, up in enumerate(self.upsamplers)}}

    @property
    def device(self) -> torch.device:
        """Where the networks compute."""
        return self._residency.device if self._residency else next(self.decoder.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.decoder.parameters()).dtype

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Moves all networks; parameters become `dtype`, but a small CLIP and the prior's statistics stay float32."""
        if self._residency is not None:
            raise ValueError("the networks are offloaded; call to() before offload()")
        self._kept.clear()
        for module in (self.clip, *self.networks().values()):
            settled(module.to(device=device), dtype)
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
            raise ValueError("the networks are compiled, and must stay where they are; use one or the other")
        device = find_device(self.device if device is None else device)
        if self._residency is None:
            self._residency = Residency(device)
            for part in parts([self.clip, *self.networks().values()]):
                self._residency.add(part)
        elif device != self.device:
            raise ValueError(f"the networks are offloaded already, to compute on {self.device}")
        return self

    def quantize(self, kind: str = "int8") -> Self:
        """Approximate: the weights of all networks but CLIP as 8-bit integers, in place; half of bfloat16's memory.

        For good, and not to be saved: `save_pretrained` refuses.
        """
        if kind != "int8":
            raise ValueError(f"unknown kind of weights {kind!r}; expected 'int8'")
        if self._residency is not None:
            raise ValueError("the networks are offloaded; call quantize() before offload()")
        self._kept.clear()
        for network in self.networks().values():
            int8.quantize(network)
        return self

    def preset(self, name: str) -> UnCLIPOptions:
        """The model's options by a name: "exact" for its own, "fast" for several times cheaper ones (approximate)."""
        return presets.preset(name, self.options, [up.config for up in self.upsamplers])

    def _use(self, module: nn.Module) -> None:
        """To be called before a network (of an upsampler: one of its U-Nets) computes."""
        if self._residency is not None:
            self._residency.use(module)

    def _keep(self, name: str, modules: Sequence[nn.Module], compute: Callable[[], V]) -> V:
        """What `compute` answers, kept across calls for as long as the weights of `modules` are the same."""
        weights = [module if self._residency else _versions(module) for module in modules]
        if name not in self._kept or self._kept[name][0] != weights:
            self._kept[name] = (weights, compute())
        return self._kept[name][1]

    def _check_whole(self) -> None:
        """ValueError unless all weights are there and as they were trained."""
        if self.offloaded:
            raise ValueError("the networks are offloaded; save a model before offload()")
        if any(int8.is_quantized(network) for network in self.networks().values()):
            raise ValueError("the weights are rounded to 8 bits, which is not to be saved; save before quantize()")

    def _check_fit(self) -> None:
        """Networks that were not trained for one another are refused."""
        if self.prior is not None:
            self._check_clip_fit("prior", self.prior.config)
        self._check_clip_fit("decoder", self.decoder.config)
        size = self.decoder.config.image_size
        for i, upsampler in enumerate(self.upsamplers):
            if upsampler.config.low_size != size:
                raise ValueError(f"upsampler_{i} takes pictures of {upsampler.config.low_size} px, but gets {size} px")
            size = upsampler.config.high_size

    def _check_clip_fit(self, stage: str, config: Any) -> None:
        for size in ("emb_dim", "text_width"):
            given, expected = getattr(config, size), getattr(self.clip, size)
            if given not in (expected, None):  # None: it reads no captions
                raise ValueError(f"{stage} has {size} {given}, but CLIP has {expected}")

    def _check_upsampling(self, options: Sequence[StageOptions]) -> None:
        """Fewer stages than the model has are fine: the picture then stays smaller."""
        if len(options) > len(self.upsamplers):
            have = len(self.upsamplers)
            raise ValueError(
                f"options for {len(options)} upsamplers, but the model has {have}; start from pipe.options"
            )


def settled(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A network as it draws: frozen, convolutions channels-last, parameters in `dtype`.

    A small CLIP keeps its dtype, and so do buffers, which are statistics.
    """
    module.eval().requires_grad_(False)
    if isinstance(module, CLIP):
        dtype = dtype if sum(p.numel() for p in module.parameters()) > SMALL_CLIP else None
    else:
        module.to(memory_format=torch.channels_last)
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype=dtype)
    return module


def _versions(module: nn.Module) -> list[tuple[int, int]]:
    """Another list after each change of the weights, but for changes behind PyTorch's back (through `.data`)."""
    tensors = (*module.parameters(), *module.buffers())
    return [(id(tensor), 0 if tensor.is_inference() else tensor._version) for tensor in tensors]
