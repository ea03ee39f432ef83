"""A network under one condition, as a sampler steps through it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

# B batch, T steps

Embed = Callable[[Tensor], Sequence[Tensor]]  # t (T,) -> what the network is told at each of them
Step = Callable[
    [Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor | None]
]  # x_t, of `Embed`, deep -> answer, deep


class Stepper:
    """A denoiser (see unclip.diffusion.guidance) that shares work between its steps.

    What hangs on t alone is computed for all timesteps of a call at once. With reuse n > 1 a U-Net computes its deep
    levels at every n-th of these only, and keeps their answer in between (DeepCache, 2312.00858).
    """

    def __init__(
        self,
        step: Step,
        embed: Embed,
        timesteps: Sequence[float],
        device: torch.device,
        reuse: int = 1,
        ready: Callable[[], None] | None = None,
    ) -> None:
        """ready: called before every step, to bring the network's weights to the device."""
        self.step, self.embed, self.device, self.reuse = step, embed, device, reuse
        self.places = {t: place for place, t in enumerate(timesteps)}
        self.ready = ready or (lambda: None)
        self.embedded: dict[float, Tensor] = {}
        self.deep: Tensor | None = None
        self.deep_from = -math.inf  # the place of the timestep at which `deep` was computed

    def at(self, t: float) -> Callable[[Tensor, Tensor], Tensor]:
        self.ready()
        if (
            t not in self.embedded
        ):  # t is none of `timesteps` where a scheduler takes it as a tensor of another type
            ts = list(self.places if t in self.places else [t])
            self.embedded |= zip(ts, self.embed(torch.tensor(ts, device=self.device)), strict=True)
        return partial(self._denoise, t)

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.at(t[0].item())(x_t, t)

    def _denoise(self, t: float, x_t: Tensor, ts: Tensor) -> Tensor:
        place = self.places.get(t, math.inf)
        anew = (
            not 0 < place - self.deep_from < self.reuse
        )  # guidance on an interval, or going back, leaves places out
        answer, deep = self.step(x_t, self.embedded[t], None if anew else self.deep)
        if anew and self.reuse > 1:
            self.deep, self.deep_from = deep, place
        return answer
