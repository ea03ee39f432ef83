"""The upsamplers: diffusion at high resolution with the enlarged small image as extra channels."""

# B batch, s low size, S high size, M width of a U-Net's modulation

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from unclip.config import PositiveInt, check_multiple, config
from unclip.image_io import resize
from unclip.models.layers import DenoiserCache, Timestep, embed_time
from unclip.models.unet import UNet, UNetConfig


@config
class UpsamplerConfig:
    unet: UNetConfig
    low_size: PositiveInt
    high_size: PositiveInt
    prediction: Literal["eps", "x0", "v"] = "eps"
    learned_variance: bool = False
    residual: bool = False  # predict x_0 minus the enlarged small image (SRDiff, 2104.14951)
    last_unet: UNetConfig | None = None  # a separate network for the last step (Karlo)

    def __post_init__(self) -> None:
        inputs, size = {"x_t": 3, "low_res": 3}, self.high_size
        for name, unet in (("unet", self.unet), ("last_unet", self.last_unet or self.unet)):
            unet.check(name, inputs, self.learned_variance, high_size=size)
            if unet.context_dim is not None:
                raise ValueError(f"{name}.context_dim is {unet.context_dim}; expected none")
        check_multiple("high_size", size, low_size=self.low_size)
        if self.residual and self.prediction != "x0":
            raise ValueError(f"residual needs prediction: x0, but prediction is {self.prediction}")


class Upsampler(nn.Module):
    """U-Net over [x_t ; enlarged small image], with an optional second one for the last step."""

    def __init__(self, config: UpsamplerConfig) -> None:
        super().__init__()
        self.config = config
        self.unet = UNet(config.unet)
        self.last_unet = UNet(config.last_unet) if config.last_unet is not None else None

    def condition(self, low_res: Tensor) -> Tensor:
        """Enlarge by high_size / low_size: (B, 3, s, s) -> (B, 3, S, S).

        Bicubic and antialiased; values may leave [-1, 1].
        """
        factor = self.config.high_size // self.config.low_size
        return resize(low_res, (low_res.shape[2] * factor, low_res.shape[3] * factor))

    def denoise(
        self, x_t: Tensor, t: Timestep, context: Tensor, cache: DenoiserCache | None = None
    ) -> Tensor:
        """Predict from x_t (B, 3, S, S) at t, (B,) or one number -> (B, 3 or 6, S, S).

        context: the small image in [-1, 1], enlarged by `condition` or not. Crops work as well.
        """
        return self._denoise(self.unet, x_t, t, context, cache)

    def denoise_last(
        self, x_t: Tensor, t: Timestep, context: Tensor, cache: DenoiserCache | None = None
    ) -> Tensor:
        """`denoise` with the U-Net of the last step."""
        assert self.last_unet is not None
        return self._denoise(self.last_unet, x_t, t, context, cache)

    forward = denoise

    def _denoise(
        self, unet: UNet, x_t: Tensor, t: Timestep, low_res: Tensor, cache: DenoiserCache | None
    ) -> Tensor:
        if (size := low_res.shape[2:]) != x_t.shape[2:]:
            low_res = self.condition(low_res)
        if low_res.shape[2:] != x_t.shape[2:]:
            raise ValueError(
                f"low_res is {tuple(size)} and x_t {tuple(x_t.shape[2:])}; expected the same size, "
                f"or {self.config.high_size // self.config.low_size} times smaller"
            )
        low_res = low_res.to(x_t.dtype)
        x = torch.cat([x_t, low_res], dim=1)  # B 6 S S

        def modulate(t: Tensor) -> Tensor:
            return unet.modulation(unet.time(t))

        modulation = embed_time(modulate, t, x, cache)  # B or 1, M
        deep_features = None if cache is None else cache.deep_features(t)
        output, deep_features = unet(x, modulation, deep_features=deep_features)
        if cache is not None:
            cache.store(t, deep_features)
        if not self.config.residual:
            return output
        prediction, *variance = output.split(3, dim=1)
        return torch.cat([prediction + low_res, *variance], dim=1)
