"""Layouts with the errors of a layout prior, to train a decoder on.

A layout prior knows the captions of its training almost by heart, and draws those of new captions
worse than the decoder would ever see. Without some words of a caption its errors are similar.
"""

# B batch, L text tokens, S image side, h layout side

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.diffusion.samplers import Estimator, sample
from unclip.diffusion.schedules import Schedule
from unclip.models.unclip.layout_prior import LayoutPrior
from unclip.types import StageOptions, TextEncoding

STEPS = 8
NOISE = (0.4, 1.0)  # range of the first timestep; at 1 nothing of the image's layout is left
MOST_FORGOTTEN = 0.8  # share of a caption's tokens
EMB_NOISE = 2.0  # noise on text embeddings, in their std, for each share of forgotten tokens


@dataclass(frozen=True, eq=False)
class LayoutRedrawing:
    """Noises the layouts of images, and samples new ones from them for incomplete captions."""

    network: LayoutPrior
    schedule: Schedule  # of the layout prior

    @torch.no_grad()
    def __call__(self, images: Tensor, text: TextEncoding) -> Tensor:
        """images: (B, 3, S, S) in [-1, 1], with B captions -> layouts (B, 3, h, h) in [-1, 1]."""
        network, B = self.network, len(images)
        x_0 = network.encode(F.adaptive_avg_pool2d(images, network.config.size))
        context, null = network.condition(None, forget_words(text)), network.condition(None, None)
        both = context.cat([context, null.repeat_interleave(B)])
        start = (self.schedule.num_timesteps - 1) * torch.empty(()).uniform_(*NOISE).item()
        timesteps = torch.linspace(start, 0, STEPS + 1)[:-1].round().tolist()
        options = StageOptions(STEPS, network.config.guidance)
        estimate = Estimator(
            lambda x, t: network.denoise(x, t, context),
            self.schedule,
            options,
            "x0",
            clip=network.config.x0_limit,
            denoise_both=lambda x, t: network.denoise(x, t, both),
        )
        t = torch.full((B,), round(timesteps[0]), device=x_0.device)
        x_t = self.schedule.add_noise(x_0, torch.randn_like(x_0), t)
        x_0 = sample(estimate, x_t, self.schedule, options, timesteps=timesteps)
        return network.decode(x_0).clamp(-1, 1)


def forget_words(text: TextEncoding) -> TextEncoding:
    """Mask 0 to 80 % of the tokens, uniform per row but not all, and noise the embedding."""
    emb, mask = text.emb.float(), text.mask
    share = MOST_FORGOTTEN * torch.rand(len(emb), 1).to(emb)
    kept = mask & (torch.rand(mask.shape).to(emb) >= share)
    emb = emb + EMB_NOISE * share * emb.std() * torch.randn_like(emb)
    return replace(text, emb=emb, mask=torch.where(kept.any(dim=1, keepdim=True), kept, mask))
