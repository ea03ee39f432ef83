"""Training of an upsampler's network of the last step with VQ-GAN's loss, as in Karlo v1 alpha.

Karlo publishes that its super-resolution network is trained as a diffusion model and takes the
first six sampling steps, and that a copy of it, fine-tuned with a loss in the style of VQ-GAN
(2012.09841), takes the seventh. What the copy reads in training, the weights of the loss, and its
learning rate are not published.
"""

# B batch, S side of the images

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor
from typing_extensions import Self

from unclip.config import config
from unclip.data.corruption import CorruptionConfig, corrupt
from unclip.diffusion.samplers import Estimator, ancestral_step, ancestral_timesteps
from unclip.diffusion.schedules import Schedule
from unclip.models.codecs.codec import LossTerms, Reconstructor
from unclip.models.unclip.upsampler import Upsampler
from unclip.training.codec import AdversarialConfig, PerceptualConfig
from unclip.training.initialization import read_weights
from unclip.training.losses import resize_square
from unclip.types import StageOptions
from unclip.weights import load_strictly


@config
class LastStepConfig:
    """Training of `model.last_unet` alone; `model.unet` is frozen."""

    steps: Annotated[int, Ge(2)] = 7  # of ancestral sampling, of which last_unet takes the last
    perceptual: PerceptualConfig | None = None
    adversarial: AdversarialConfig | None = None


class LastStep(Reconstructor):
    """Reconstructs images from their small versions, with gradients in the last step only.

    The first U-Net samples down to the last timestep without gradients, as the pipeline does; the
    last one estimates x_0 from there. Its input is not q(x_t | x_0), which at t = 0 is the image
    itself with hardly any noise.
    """

    def __init__(
        self, upsampler: Upsampler, schedule: Schedule, corruption: CorruptionConfig, steps: int
    ) -> None:
        super().__init__()
        self.upsampler, self.schedule, self.corruption = upsampler, schedule, corruption
        self.timesteps = ancestral_timesteps(steps, schedule.num_timesteps)
        upsampler.unet.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the last U-Net; the first one stays in eval mode."""
        super().train(mode)
        self.upsampler.unet.eval()
        return self

    @property
    def last_layer(self) -> Tensor:
        assert self.upsampler.last_unet is not None
        return self.upsampler.last_unet.head.weight

    def loss(self, images: Tensor, **annealed: float) -> LossTerms:
        """Compute VQ-GAN's pixel loss, L1, of images (B, 3, S, S), or crops of them, in [-1, 1]."""
        x_0 = self._upsample(corrupt(self._reduce(images), self.corruption), images)
        mse = F.mse_loss(x_0.detach(), images)
        return LossTerms(F.l1_loss(x_0, images), x_0, {"mse": mse})

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        return self._upsample(self._reduce(images), images).clamp(-1, 1)

    def _reduce(self, images: Tensor) -> Tensor:
        config = self.upsampler.config
        return resize_square(images, images.shape[-1] * config.low_size // config.high_size)

    def _upsample(self, low_res: Tensor, like: Tensor) -> Tensor:
        """Sample x_0 of the shape of `like`, not clipped, from noise of torch's generator."""
        config, schedule, last = self.upsampler.config, self.schedule, self.timesteps[-1]
        with torch.no_grad():
            context = self.upsampler.condition(low_res)
            x_t = self._first_steps(torch.randn_like(like), context)
        output = self.upsampler.denoise_last(x_t, last, context)[:, :3]
        return schedule.predict_x0(output.float(), x_t, last, config.prediction)

    def _first_steps(self, x_t: Tensor, context: Tensor) -> Tensor:
        """Sample from noise x_t down to the last timestep with the first U-Net."""
        config, schedule = self.upsampler.config, self.schedule
        estimate = Estimator(
            lambda x, t: self.upsampler.denoise(x, t, context),
            schedule,
            StageOptions(len(self.timesteps), sampler="ancestral"),
            config.prediction,
            config.learned_variance,
            clip=1.0,
        )
        for t, t_prev in pairwise(self.timesteps):
            x_0, variance = estimate(x_t, t)
            levels = schedule.level(t), schedule.level(t_prev)
            x_t = ancestral_step(x_t, x_0, *levels, torch.randn_like(x_t), variance)
        return x_t


def load_upsampler(upsampler: Upsampler, source: str | Path) -> None:
    """Load weights; if there are none of the last U-Net, it becomes a copy of the first."""
    file, state = read_weights(source)
    if not any(name.startswith("last_unet.") for name in state):
        first = {name: weight for name, weight in state.items() if name.startswith("unet.")}
        # Cloned: the loaded tensors become the parameters.
        state |= {f"last_{name}": weight.clone() for name, weight in first.items()}
    load_strictly(upsampler, state, file)
