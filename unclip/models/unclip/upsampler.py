"""The upsamplers: diffusion at high resolution with the enlarged low-resolution picture as extra channels."""

# B batch, s low size, S high size

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from unclip.models.unet import UNet, UNetConfig
from unclip.image_io import resize


@dataclass(frozen=True)
class UpsamplerConfig:
    unet: UNetConfig
    low_size: int
    high_size: int
    prediction: Literal["eps", "x0", "v"] = "eps"
    learned_variance: bool = False
    residual: bool = False  # the network predicts what x_0 has over the enlarged low-res picture (SRDiff, 2104.14951)
    last_unet: UNetConfig | None = None  # a network of its own for the last step (Karlo)

    def __post_init__(self) -> None:
        channels = 6 if self.learned_variance else 3
        for name, unet in (("unet", self.unet), ("last_unet", self.last_unet)):
            if unet is None:
                continue
            if unet.in_channels != 6 or unet.out_channels != channels:
                raise ValueError(
                    f"{name} has {unet.in_channels} channels in and {unet.out_channels} out; "
                    f"an upsampler with learned_variance={self.learned_variance} needs 6 and {channels}"
                )
            if unet.context_dim is not None:
                raise ValueError(
                    f"{name}.context_dim is {unet.context_dim}; an upsampler has no context"
                )
            if self.high_size % unet.size_divisor:
                raise ValueError(
                    f"high_size is {self.high_size}; expected a multiple of {unet.size_divisor}"
                )
        if self.residual and self.prediction != "x0":
            raise ValueError(f"residual needs prediction: x0, but prediction is {self.prediction}")
        if self.low_size < 1 or self.high_size % self.low_size:
            raise ValueError(
                f"low_size is {self.low_size}; it must divide high_size = {self.high_size}"
            )


class Upsampler(nn.Module):
    """A U-Net over [x_t ; enlarged low-resolution picture], and perhaps a second one for the last step."""

    def __init__(self, config: UpsamplerConfig) -> None:
        super().__init__()
        self.config = config
        self.unet = UNet(config.unet)
        self.last_unet = UNet(config.last_unet) if config.last_unet is not None else None

    def prepare(self, low_res: torch.Tensor) -> torch.Tensor:
        """Enlarged by high_size / low_size (bicubic, antialiased, not clamped): (B, 3, s, s) -> (B, 3, S, S)."""
        factor = self.config.high_size // self.config.low_size
        return resize(low_res, (low_res.shape[2] * factor, low_res.shape[3] * factor))

    def network(self, last: bool = False) -> UNet:
        """Of the last step, or of those before."""
        return self.last_unet if last and self.last_unet is not None else self.unet

    def denoise(
        self, x_t: torch.Tensor, t: torch.Tensor, low_res: torch.Tensor, last: bool = False
    ) -> torch.Tensor:
        """(B, 3, S, S), (B,), low_res in [-1, 1] at low or high size -> (B, 3 or 6, S, S). Crops will do as well."""
        unet = self.network(last)
        return self.step(x_t, unet.modulation(unet.time_embedding(t)), low_res, last=last)[0]

    def embed(self, t: torch.Tensor, low_res: torch.Tensor, last: bool = False) -> torch.Tensor:
        """What `step` is to be told at T timesteps: (T,) -> (T, 1, M)."""
        unet = self.network(last)
        return unet.modulation(unet.time_embedding(t))[:, None]

    def step(
        self,
        x_t: torch.Tensor,
        modulation: torch.Tensor,
        low_res: torch.Tensor,
        deep_features: torch.Tensor | None = None,
        last: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`denoise` from the modulation (B or 1, M) on; `deep_features` goes in and comes out as in `UNet`."""
        if low_res.shape[2:] != x_t.shape[2:]:
            given = low_res.shape[2:]
            low_res = self.prepare(low_res)
            if low_res.shape[2:] != x_t.shape[2:]:
                raise ValueError(
                    f"low_res is {tuple(given)} and x_t {tuple(x_t.shape[2:])}; expected the same size, "
                    f"or {self.config.high_size // self.config.low_size} times smaller"
                )
        low_res = low_res.to(x_t.dtype)
        output, deep_features = self.network(last)(
            torch.cat([x_t, low_res], dim=1), modulation, deep_features=deep_features
        )
        if not self.config.residual:
            return output, deep_features
        prediction, *variance = output.split(3, dim=1)
        return torch.cat([prediction + low_res, *variance], dim=1), deep_features

    forward = denoise
