"""Bound on ln p(x, y), compared with a codec whose codes can be enumerated."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from unclip.models.codecs.codec import ImageCodec, LossTerms
from unclip.models.codecs.dvae import DVAE, DVAEConfig
from unclip.models.codecs.vqvae import VQVAE, ConvNetConfig, VQVAEConfig
from unclip.models.dalle.bound import joint_bound
from unclip.models.dalle.transformer import DALLE, DALLEConfig

GRID, K = (1, 2), 3


class TableCodec(ImageCodec):
    """Codec whose posterior and likelihoods are tables."""

    grid = GRID

    def __init__(self) -> None:
        super().__init__(SimpleNamespace(image_size=2, factor=1, vocab_size=K))
        self.posterior, self.pixels = torch.randn(*GRID, K), torch.randn(K, K)

    def logits(self, images: Tensor) -> Tensor:
        return self.posterior.expand(len(images), *GRID, K)

    def log_likelihood(self, images: Tensor, codes: Tensor) -> Tensor:
        return self.pixels[codes[:, 0, 0], codes[:, 0, 1]]

    def loss(self, images: Tensor) -> LossTerms: ...
    def _decode(self, codes: Tensor) -> Tensor: ...


@pytest.fixture
def dalle() -> DALLE:
    torch.manual_seed(0)
    return DALLE(
        DALLEConfig(7, 4, K, GRID, width=16, depth=2, heads=2, head_dim=8, kernel=3)
    ).eval()


def test_bound_is_the_posterior_mean_and_below_the_likelihood(dalle):
    torch.manual_seed(1)
    codec, samples = TableCodec(), 4000
    images, tokens = torch.zeros(1, 3, 2, 2), torch.tensor([[3, 1, 9, 10]])
    ln_q = codec.posterior.log_softmax(-1)
    exact, joint = 0.0, []
    for z in itertools.product(range(K), repeat=2):
        codes = torch.tensor(z).view(1, *GRID)
        ln_text, ln_codes = dalle.log_likelihood(tokens, codes)
        ln_p = codec.log_likelihood(images, codes) + ln_codes.sum() + ln_text.sum()
        ln_q_z = ln_q[0, 0, z[0]] + ln_q[0, 1, z[1]]
        exact += ln_q_z.exp() * (ln_p - ln_q_z)
        joint.append(ln_p)
    likelihood = torch.stack(joint).logsumexp(0)

    bound = joint_bound(
        dalle, codec, images.expand(samples, -1, -1, -1), tokens.expand(samples, -1)
    )
    error = 4 * bound.nats.std() / samples**0.5
    assert (bound.nats.mean() - exact).abs() < error
    assert exact < likelihood
    torch.testing.assert_close(bound.bits_per_dim, -bound.nats / (12 * math.log(2)))
    assert torch.equal(bound.text, bound.text[:1].expand(samples))
    assert bound.entropy.unique().numel() == 1


def test_bound_depends_on_the_generator(dalle):
    images, tokens = torch.zeros(50, 3, 2, 2), dalle.null_tokens(50)
    codec = TableCodec()
    first, again, other = (
        joint_bound(dalle, codec, images, tokens, torch.Generator().manual_seed(seed)).codes
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("kind", ["dvae", "vqvae"])
def test_bound_of_real_codecs(kind):
    torch.manual_seed(0)
    if kind == "dvae":
        codec = DVAE(
            DVAEConfig(image_size=8, vocab_size=16, width=8, groups=2, blocks=1, code_width=8)
        ).eval()
    else:  # a deterministic posterior
        net = ConvNetConfig(width=8, factor=2, blocks=1, block_width=4)
        codec = VQVAE(VQVAEConfig(image_size=8, vocab_size=16, code_width=4, net=net)).eval()
    config = DALLEConfig(7, 4, 16, codec.grid, width=16, depth=2, heads=2, head_dim=8, kernel=3)
    bound = joint_bound(
        DALLE(config), codec, torch.rand(3, 3, 8, 8) * 2 - 1, torch.zeros(3, 4).long()
    )
    assert bound.dimensions == 192
    assert bound.bits_per_dim.shape == (3,)
    assert bound.bits_per_dim.isfinite().all()
    assert (bound.codes < 0).all()
    assert (bound.text < 0).all()
    assert (bound.entropy > 0).all() == (kind == "dvae")
