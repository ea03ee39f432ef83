"""Gaussian VAE (1312.6114), the continuous baseline of the codecs."""

# B batch, H W image, h w grid, C latent width

from __future__ import annotations

import math
from dataclasses import field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.config import PositiveInt, check_multiple, config
from unclip.models.codecs.codec import Autoencoder, LossTerms
from unclip.models.codecs.vqvae import ConvNetConfig, make_decoder, make_encoder


@config
class GaussianVAEConfig:
    kind: Literal["gaussian"] = "gaussian"
    image_size: PositiveInt = 256
    latent_width: PositiveInt = 4
    net: ConvNetConfig = field(default_factory=ConvNetConfig)

    def __post_init__(self) -> None:
        check_multiple("image_size", self.image_size, factor=self.factor)

    @property
    def factor(self) -> int:
        return self.net.factor


class GaussianVAE(Autoencoder):
    """q(z|x) = N(mean, exp(ln_var)), p(z) = N(0, 1), p(x|z) = N(decoder(z), exp(2 ln_scale))."""

    annealed = ("kl_weight",)

    def __init__(self, config: GaussianVAEConfig) -> None:
        super().__init__(config)
        self.encoder = make_encoder(config.net, 2 * config.latent_width)
        self.decoder = make_decoder(config.net, config.latent_width)
        self.ln_scale = nn.Parameter(torch.zeros(()))  # of the pixel error (sigma-VAE, 2006.13202)

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) in [-1, 1] -> mean and ln variance, (B, C, h, w) each, float32."""
        mean, ln_var = self.encoder(images.to(self.last_layer.dtype)).float().chunk(2, dim=1)
        return mean, ln_var.clamp(-20, 10)

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        mean, _ = self.posterior(self.checked(images))
        return self.decoder(mean.to(self.last_layer.dtype)).float().clamp(-1, 1)

    def elbo(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return ln p(x | z) for one z ~ q and KL(q, p), (B,) each in nats, and the reconstruction.

        Their difference is a lower bound on ln p(x), a density over pixels in [-1, 1].
        """
        mean, ln_var = self.posterior(images)
        z = mean + torch.exp(ln_var / 2) * torch.randn_like(mean)  # B C h w
        reconstruction = self.decoder(z.to(self.last_layer.dtype)).float()  # B 3 H W
        error = (images - reconstruction) * torch.exp(-self.ln_scale)
        likelihood = -0.5 * error.square() - self.ln_scale
        likelihood = (likelihood - 0.5 * math.log(2 * math.pi)).sum(dim=(1, 2, 3))  # B
        return likelihood, kl_to_normal(mean, ln_var), reconstruction

    def loss(self, images: Tensor, kl_weight: float = 1.0) -> LossTerms:
        """Negative ELBO per colour value, in nats, with a weighted KL."""
        likelihood, kl, reconstruction = self.elbo(images)
        values = images[0].numel()
        positions = values / (3 * self.factor**2)
        nll, kl = -likelihood.mean() / values, kl.mean()
        logged = {
            "nll": nll.detach(),
            "kl_bits": kl.detach() / (math.log(2) * positions),  # per position, as for the dVAE
            "mse": F.mse_loss(reconstruction.detach(), images),
        }
        return LossTerms(nll + kl_weight * kl / values, reconstruction, logged)


def kl_to_normal(mean: Tensor, ln_var: Tensor) -> Tensor:
    """KL of N(mean, exp(ln_var)) from N(0, 1): (B, ...) -> (B,) in nats."""
    return 0.5 * (mean.square() + ln_var.exp() - 1 - ln_var).flatten(1).sum(dim=1)
