"""ELBO of the Gaussian VAE, compared with Monte Carlo and torch.distributions."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from unclip.models.codecs.vae import GaussianVAE, GaussianVAEConfig, kl_to_normal
from unclip.models.codecs.vqvae import ConvNetConfig


def make_vae() -> GaussianVAE:
    torch.manual_seed(0)
    net = ConvNetConfig(width=16, factor=4, blocks=1, block_width=8)
    return GaussianVAE(GaussianVAEConfig(image_size=16, latent_width=2, net=net)).eval()


def make_images() -> torch.Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_kl_equals_monte_carlo_estimate():
    torch.manual_seed(0)
    mean, ln_var = torch.randn(3, 2, 2, 2), torch.randn(3, 2, 2, 2)
    q, p = Normal(mean, torch.exp(ln_var / 2)), Normal(0.0, 1.0)
    torch.testing.assert_close(
        kl_to_normal(mean, ln_var), kl_divergence(q, p).flatten(1).sum(dim=1)
    )
    z = q.sample((20_000,))
    estimate = (q.log_prob(z) - p.log_prob(z)).flatten(2).sum(dim=2).mean(dim=0)
    torch.testing.assert_close(kl_to_normal(mean, ln_var), estimate, atol=0.1, rtol=0)


def test_likelihood_is_a_normal_around_the_reconstruction():
    model, images = make_vae(), make_images()
    model.ln_scale.data.fill_(-1.2)
    likelihood, kl, reconstruction = model.elbo(images)
    expected = Normal(reconstruction, math.exp(-1.2)).log_prob(images).sum(dim=(1, 2, 3))
    torch.testing.assert_close(likelihood, expected)
    mean, ln_var = model.posterior(images)
    torch.testing.assert_close(kl, kl_to_normal(mean, ln_var))


def test_elbo_is_below_the_importance_weighted_bound():
    """ln mean_k p(x, z_k) / q(z_k | x) is above the ELBO and approaches ln p(x) (1509.00519)."""
    model, images = make_vae(), make_images()[:1]
    torch.manual_seed(0)
    with torch.no_grad():
        mean, ln_var = model.posterior(images)
        q = Normal(mean, torch.exp(ln_var / 2))
        z = q.sample((2000,))[:, 0]
        x = Normal(model.decoder(z), model.ln_scale.exp()).log_prob(images).sum(dim=(1, 2, 3))
        ratio = x + (Normal(0.0, 1.0).log_prob(z) - q.log_prob(z)).flatten(1).sum(dim=1)
        evidence = ratio.logsumexp(dim=0) - math.log(2000)
        elbo = torch.stack(
            [likelihood - kl for likelihood, kl, _ in (model.elbo(images) for _ in range(200))]
        ).mean()
    assert elbo < evidence
    assert elbo.item() == pytest.approx(ratio.mean().item(), rel=0.01)


def test_loss_is_the_elbo_per_value():
    model, images = make_vae(), make_images()
    torch.manual_seed(3)
    likelihood, kl, _ = model.elbo(images)
    torch.manual_seed(3)
    terms = model.loss(images, kl_weight=0.3)
    torch.testing.assert_close(terms.loss, (-likelihood + 0.3 * kl).mean() / (3 * 16 * 16))
    positions = 4 * 4
    torch.testing.assert_close(terms.logged["kl_bits"], kl.mean() / math.log(2) / positions)
