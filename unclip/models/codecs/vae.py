"""The Gaussian VAE (1312.6114), the continuous baseline of the codecs: no codes, but an ELBO to compare with."""

# B batch, H W picture, h w grid, C latent width

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.models.codecs.codec import Autoencoder, LossTerms, check_positive
from unclip.models.codecs.vqvae import ConvNetConfig, make_decoder, make_encoder


@dataclass(frozen=True)
class GaussianVAEConfig:
    kind: Literal["gaussian"] = "gaussian"
    image_size: int = 256
    latent_width: int = 4
    net: ConvNetConfig = field(default_factory=ConvNetConfig)

    def __post_init__(self) -> None:
        check_positive(self, "image_size", "latent_width")
        if self.image_size % self.net.factor:
            raise ValueError(
                f"image_size is {self.image_size}; expected a multiple of factor = {self.net.factor}"
            )


class GaussianVAE(Autoencoder):
    """q(z | x) = N(mean, exp(ln_var)), p(z) = N(0, 1), p(x | z) = N(decoder(z), exp(2 ln_scale)), ln_scale learned."""

    annealed = ("kl_weight",)

    def __init__(self, config: GaussianVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.image_size, self.factor = config.image_size, config.net.factor
        self.encoder = make_encoder(config.net, 2 * config.latent_width)
        self.decoder = make_decoder(config.net, config.latent_width)
        self.ln_scale = nn.Parameter(torch.zeros(()))  # of a pixel's error (sigma-VAE, 2006.13202)

    @property
    def last_layer(self) -> Tensor:
        return self.decoder[-1].weight

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) in [-1, 1] -> mean and ln variance of the latent, (B, C, h, w) each, float32."""
        mean, ln_var = self.encoder(images.to(self.last_layer.dtype)).float().chunk(2, dim=1)
        return mean, ln_var.clamp(-20, 10)

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        mean, _ = self.posterior(self.checked(images))
        return self.decoder(mean.to(self.last_layer.dtype)).float().clamp(-1, 1)

    def elbo(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """ln p(x | z) and the KL of q(z | x) from the prior in nats, (B,) each, for one z ~ q; and the reconstruction.

        Their difference bounds ln p(x) from below, as a density of pixels in [-1, 1].
        """
        mean, ln_var = self.posterior(images)
        z = mean + torch.exp(ln_var / 2) * torch.randn_like(mean)  # B C h w
        reconstruction = self.decoder(z.to(self.last_layer.dtype)).float()  # B 3 H W
        likelihood = (
            -0.5 * ((images - reconstruction) * torch.exp(-self.ln_scale)).square() - self.ln_scale
        )
        likelihood = (likelihood - 0.5 * math.log(2 * math.pi)).sum(dim=(1, 2, 3))  # B
        return likelihood, kl_to_normal(mean, ln_var), reconstruction

    def loss(self, images: Tensor, kl_weight: float = 1.0) -> LossTerms:
        """-ELBO for each colour of a pixel, in nats, with the KL weighted."""
        likelihood, kl, reconstruction = self.elbo(images)
        values = images[0].numel()
        positions = values / (3 * self.factor**2)
        nll, kl = -likelihood.mean() / values, kl.mean()
        logged = {
            "nll": nll.detach(),
            "kl_bits": kl.detach() / (math.log(2) * positions),  # of a position, as the dVAE's
            "mse": F.mse_loss(reconstruction.detach(), images),
        }
        return LossTerms(nll + kl_weight * kl / values, reconstruction, logged)


def kl_to_normal(mean: Tensor, ln_var: Tensor) -> Tensor:
    """KL of N(mean, exp(ln_var)) from N(0, 1), summed over all but the first axis: (B, ...) -> (B,) in nats."""
    return 0.5 * (mean.square() + ln_var.exp() - 1 - ln_var).flatten(1).sum(dim=1)
