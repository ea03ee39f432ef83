"""The networks of unCLIP as one: what fits together, and what of their answers is kept from call to call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from unclip.clip import CLIP
from unclip.diffusion.schedules import Schedule, ScheduleConfig
from unclip.models.unclip.decoder import Decoder
from unclip.models.unclip.prior import DiffusionPrior, DirectPrior
from unclip.models.unclip.upsampler import Upsampler
from unclip.pipelines.inference import prepare_for_inference
from unclip.pipelines.offload import Offloader
from unclip.pipelines.runtime import Placement
from unclip.types import StageOptions, UnCLIPOptions

if TYPE_CHECKING:
    from typing_extensions import Self

V = TypeVar("V")


class UnCLIPNetworks(Placement):
    """CLIP, a prior (or none, for variations only), a decoder and any number of upsamplers."""

    def __init__(
        self,
        clip: CLIP,
        prior: DiffusionPrior | DirectPrior | None,
        decoder: Decoder,
        upsamplers: Sequence[Upsampler] = (),
        options: UnCLIPOptions | None = None,
        *,
        inpainter: Decoder | None = None,
        schedules: Mapping[str, ScheduleConfig] | None = None,
        residency: Offloader | None = None,
    ) -> None:
        """inpainter: a decoder that was trained to inpaint, of the same size; not needed if `decoder` was.

        schedules: of "prior", "decoder", "upsampler_0", ...; cosine for those left out. residency: see `offload`.
        """
        self.clip, self._prior, self.decoder, self.upsamplers = (
            clip,
            prior,
            decoder,
            tuple(upsamplers),
        )
        self.inpainter = (
            decoder
            if inpainter is None and getattr(decoder.config, "inpaints", False)
            else inpainter
        )
        self.options = options or UnCLIPOptions(
            upsamplers=(StageOptions(steps=7),) * len(self.upsamplers)
        )
        self.static_shapes = (
            False  # whether texts of different lengths must look alike to the networks
        )
        self._residency = residency
        self._kept: dict[str, tuple[Any, Any]] = {}
        schedules = dict(schedules or {})
        diffused = [
            stage
            for stage, network in self.networks().items()
            if not isinstance(network, DirectPrior)
        ]
        self.schedules = {
            stage: Schedule(schedules.pop(stage, ScheduleConfig())) for stage in diffused
        }
        if schedules:
            raise ValueError(
                f"schedules of {', '.join(schedules)}; the model has {', '.join(self.schedules)}"
            )
        self._check_fit()
        for module in (clip, *self.networks().values()):
            prepare_for_inference(module, device=residency and residency.device)

    @property
    def prior(self) -> DiffusionPrior | DirectPrior | None:
        """From text to image embeddings; None in a model that draws variations only."""
        return self._prior

    @prior.setter
    def prior(self, prior: DiffusionPrior | DirectPrior) -> None:
        """Another prior for the same CLIP, such as `unclip.load_prior` gives; it comes with its own noise schedule.

        Moved to the others' device and dtype, offloaded or compiled as they are. ValueError if it was trained for
        another CLIP.
        """
        if not isinstance(prior, nn.Module):
            raise ValueError(
                f"prior is a {type(prior).__name__}; expected a network, such as unclip.load_prior gives"
            )
        self._check_clip_fit("prior", prior.config)
        schedules = dict(self.schedules)
        if (before := schedules.pop("prior", None)) is not None:
            self._prior.schedule = before.config  # so that it can be put back
        if not isinstance(prior, DirectPrior):
            schedules["prior"] = Schedule(getattr(prior, "schedule", ScheduleConfig()))
        self._prior, self.schedules = prepare_for_inference(prior, self.dtype, self.device), schedules
        self._kept.clear()
        if self._residency is not None:
            self._residency.add(prior)
            return
        prior.to(self.device)
        if self._prepare is not None:
            self._prepare(prior)

    def networks(self) -> dict[str, nn.Module]:
        """Every network but CLIP, under the name of its stage."""
        prior = {} if self.prior is None else {"prior": self.prior}
        inpainter = {} if self.inpainter in (None, self.decoder) else {"inpainter": self.inpainter}
        upsamplers = {f"upsampler_{i}": up for i, up in enumerate(self.upsamplers)}
        return {**prior, "decoder": self.decoder, **inpainter, **upsamplers}

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        self._kept.clear()
        return super().to(device, dtype)

    def _keep(self, name: str, modules: Sequence[nn.Module], compute: Callable[[], V]) -> V:
        """What `compute` answers, kept across calls for as long as the weights of `modules` are the same."""
        weights = [module if self._residency else _versions(module) for module in modules]
        if name not in self._kept or self._kept[name][0] != weights:
            self._kept[name] = (weights, compute())
        return self._kept[name][1]

    def _check_fit(self) -> None:
        """Networks that were not trained for one another are refused."""
        if self.prior is not None:
            self._check_clip_fit("prior", self.prior.config)
        self._check_clip_fit("decoder", self.decoder.config)
        size = self.decoder.config.image_size
        if self.inpainter is not None:
            self._check_clip_fit("inpainter", self.inpainter.config)
            if (
                not getattr(self.inpainter.config, "inpaints", False)
                or self.inpainter.config.image_size != size
            ):
                raise ValueError(
                    f"inpainter is no decoder of {size} px that was trained to inpaint"
                )
        for i, upsampler in enumerate(self.upsamplers):
            if upsampler.config.low_size != size:
                raise ValueError(
                    f"upsampler_{i} takes pictures of {upsampler.config.low_size} px, but gets {size} px"
                )
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


def _versions(module: nn.Module) -> list[tuple[int, int]]:
    """Another list after each change of the weights, but for changes behind PyTorch's back (through `.data`)."""
    tensors = (*module.parameters(), *module.buffers())
    return [(id(tensor), 0 if tensor.is_inference() else tensor._version) for tensor in tensors]
