"""What tests of the samplers share."""

from __future__ import annotations

import torch

from unclip.diffusion.schedules import Schedule

SAMPLERS = ["ancestral", "ddim", "dpm++", "unipc"]
COSINE = Schedule()


def seeds(*values):
    return [torch.Generator().manual_seed(value) for value in values]


def toy_network(channels=3, dtype=torch.float64):
    """A fixed function of x_t and t whose samples do not see each other."""
    weight = torch.randn(
        channels, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(7)
    ).to(dtype)

    def denoise(x_t, t):
        time = (t.to(x_t.dtype) / 1000).view(-1, *[1] * (x_t.ndim - 1))
        return torch.stack([(w.view(-1, 1, 1) * x_t + time).sum(1).tanh() for w in weight], dim=1)

    return denoise
