"""Interface of all image codecs, and their shared parts."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from unclip.checkpoints.store import load_component, save_component
from unclip.config import parse, to_dict
from unclip.models.codecs.codec import (
    Autoencoder,
    GatedConv,
    ImageCodec,
    code_statistics,
    laplace_mixture,
)
from unclip.models.codecs.dvae import DVAE, DVAEConfig
from unclip.models.codecs.quantizers import GumbelConfig, NearestConfig
from unclip.models.codecs.vae import GaussianVAE, GaussianVAEConfig
from unclip.models.codecs.vqgan import VQGAN, VQGANConfig
from unclip.models.codecs.vqvae import VQVAE, ConvNetConfig, VQVAEConfig
from unclip.models.unet import LevelSpec

NET = ConvNetConfig(width=16, factor=4, blocks=1, block_width=8)
LEVELS = (LevelSpec(8, 1), LevelSpec(16, 1, attention=True))
CODECS = {
    "dvae": (
        DVAE,
        DVAEConfig(image_size=16, vocab_size=24, width=8, groups=3, blocks=1, code_width=8),
    ),
    "gated": (
        DVAE,
        DVAEConfig(
            image_size=16, vocab_size=24, width=8, groups=2, blocks=1, code_width=8, conv="gated"
        ),
    ),
    "vqvae": (VQVAE, VQVAEConfig(image_size=16, vocab_size=24, code_width=6, net=NET)),
    "ema": (VQVAE, VQVAEConfig("vqvae", 16, 24, 6, NET, NearestConfig(ema=0.9, revive=1.0))),
    "vqgan": (VQGAN, VQGANConfig("vqgan", 16, 24, 6, LEVELS, feature_width=8, groups=4)),
    "gumbel": (
        VQGAN,
        VQGANConfig(
            "vqgan", 16, 24, 6, LEVELS, feature_width=8, groups=4, quantizer=GumbelConfig()
        ),
    ),
    "gaussian": (GaussianVAE, GaussianVAEConfig(image_size=16, net=NET)),
}
DISCRETE = [name for name in CODECS if name != "gaussian"]


def make_codec(name: str) -> Autoencoder:
    torch.manual_seed(0)
    network, config = CODECS[name]
    codec = network(config)
    if name in ("vqvae", "ema", "vqgan"):  # typical codes: features of images
        features = codec._features(make_images(4)).detach().permute(0, 2, 3, 1).flatten(0, 2)  # N C
        codec.quantizer.codebook.data.copy_(features[:: len(features) // 24][:24])
    return codec.eval()


def make_images(batch: int = 2, height: int = 16, width: int = 16) -> torch.Tensor:
    """Random colours in squares of 4 x 4 pixels."""
    colours = torch.rand(
        batch, 3, height // 4, width // 4, generator=torch.Generator().manual_seed(1)
    ).round()
    return (2 * colours - 1).kron(torch.ones(4, 4))


@pytest.mark.parametrize("name", DISCRETE)
def test_encode_and_decode(name):
    codec, images = make_codec(name), make_images()
    codes = codec.encode(images)
    assert codes.dtype == torch.long and codes.shape == (2, *codec.grid)
    assert codes.min() >= 0 and codes.max() < codec.vocab_size and codes.unique().numel() > 1
    decoded = codec.decode(codes)
    assert decoded.shape == images.shape
    assert decoded.dtype == torch.float32
    assert decoded.abs().max() <= 1
    torch.testing.assert_close(decoded, codec.reconstruct(images))
    assert torch.equal(codes, codec.encode(images))  # no noise
    assert not decoded.requires_grad


@pytest.mark.parametrize("name", DISCRETE)
def test_codes_are_most_likely_and_reconstruction_is_likely(name):
    codec, images = make_codec(name), make_images()
    logits, codes = codec.logits(images), codec.encode(images)
    assert logits.shape == (2, *codec.grid, codec.vocab_size)
    assert torch.equal(logits.argmax(dim=-1), codes)
    own, other = (
        codec.log_likelihood(x, codes) for x in (codec.decode(codes), -codec.decode(codes))
    )
    assert own.shape == (2,) and (own > other).all()


def test_laplace_mixture_matches_torch_distributions():
    scales = 2 ** torch.linspace(-9, 0, 64, dtype=torch.float64)
    images, reconstructions = make_images(3), 0.9 * make_images(3).flip(0)
    error = ((images - reconstructions) / 2).double()
    each = torch.stack(
        [torch.distributions.Laplace(0.0, s).log_prob(error).sum(dim=(1, 2, 3)) for s in scales]
    )
    expected = (each.logsumexp(dim=0) - torch.tensor(64.0).log()).float()
    torch.testing.assert_close(laplace_mixture(images, reconstructions), expected)
    exact = laplace_mixture(images, images) / images[0].numel()  # at most 8 bits per value
    assert (exact / torch.tensor(2.0).log()).max() < 8


@pytest.mark.parametrize("name", DISCRETE)
def test_other_image_sizes(name):
    codec, images = make_codec(name), make_images(1, 24, 8)
    codes = codec.encode(images)
    assert codes.shape[1:] == (24 // codec.factor, 8 // codec.factor)
    assert codec.decode(codes).shape == images.shape


@pytest.mark.parametrize("name", CODECS)
def test_training_reduces_the_error_with_all_parameters(name):
    codec, images = make_codec(name).train(), make_images(4)
    optimizer = torch.optim.Adam(codec.parameters(), lr=5e-3)
    annealed = {"temperature": 0.5, "kl_weight": 0.01}
    errors = []
    for _ in range(30):
        terms = codec(images, **{key: annealed[key] for key in codec.annealed})
        optimizer.zero_grad()
        terms.loss.backward()
        assert all(p.grad is not None for p in codec.parameters())
        optimizer.step()
        errors.append(terms.logged["pixel" if "pixel" in terms.logged else "nll"].item())
    assert errors[-1] < errors[0] - 0.1 and terms.loss.isfinite()
    assert terms.reconstruction.shape == images.shape and terms.reconstruction.requires_grad
    assert all(value.ndim == 0 and not value.requires_grad for value in terms.logged.values())
    if name != "gaussian":
        assert 0 < terms.logged["usage"] <= 1 <= terms.logged["perplexity"] <= codec.vocab_size


@pytest.mark.parametrize("name", CODECS)
def test_save_and_load(name, tmp_path):
    codec, images = make_codec(name), make_images()
    save_component(codec, tmp_path)
    loaded = load_component(tmp_path)
    assert loaded.config == codec.config
    assert torch.equal(loaded.reconstruct(images), codec.reconstruct(images))


@pytest.mark.parametrize("name", DISCRETE)
def test_bfloat16_is_close_to_float32(name, tmp_path):
    codec = make_codec(name)
    save_component(codec, tmp_path)
    half = load_component(tmp_path, torch.bfloat16)
    codes = codec.encode(make_images())
    assert half.encode(make_images()).shape == codes.shape
    torch.testing.assert_close(half.decode(codes), codec.decode(codes), atol=0.1, rtol=0)


@pytest.mark.parametrize("name", CODECS)
def test_config_round_trip(name):
    config = CODECS[name][1]
    assert parse(type(config), to_dict(config)) == config


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("shape", [(2, 3, 15, 16), (2, 1, 16, 16), (3, 16, 16), (0, 3, 16, 16)])
def test_images_of_invalid_shape_raise(name, shape):
    with pytest.raises(ValueError, match=r"images are \(.*expected \(B, 3, H, W\)"):
        make_codec(name).reconstruct(torch.zeros(shape))


def test_invalid_codes_raise():
    codec = make_codec("dvae")
    with pytest.raises(ValueError, match="codes are 0 to 24; this codec expects 0 to 23"):
        codec.decode(torch.tensor([[[0, 24]]]))
    with pytest.raises(ValueError, match="codes are -1 to 3"):
        codec.decode(torch.tensor([[[-1, 3]]]))
    with pytest.raises(ValueError, match=r"expected \(B, h, w\) of integers"):
        codec.decode(torch.zeros(4, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="of integers"):
        codec.decode(torch.zeros(1, 4, 4))


def test_gated_convolution():
    torch.manual_seed(0)
    gated, x = GatedConv(lambda: nn.Conv2d(3, 5, 3, padding=1)), torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(gated(x), gated.conv(x) * torch.sigmoid(gated.gate(x)))
    nn.init.zeros_(gated.gate.weight)
    nn.init.constant_(gated.gate.bias, 100.0)
    assert torch.equal(gated(x), gated.conv(x))
    nn.init.constant_(gated.gate.bias, -200.0)
    assert not gated(x).any()


def test_open_gates_equal_plain_convolutions():
    _, config = CODECS["gated"]
    gated, plain = make_codec("gated"), DVAE(DVAEConfig(**{**vars(config), "conv": "plain"}))
    state = gated.state_dict()
    for name in state:
        if ".gate." in name:
            nn.init.constant_(state[name], 100.0 if name.endswith(".b") else 0.0)
    plain_state = {
        re.sub(r"(conv_\d)\.conv\.", r"\1.", name): x
        for name, x in state.items()
        if ".gate." not in name
    }
    plain.load_state_dict(plain_state)
    assert torch.equal(gated.logits(make_images()), plain.logits(make_images()))
    assert torch.equal(gated.reconstruct(make_images()), plain.reconstruct(make_images()))


def test_usage_and_perplexity():
    even = code_statistics(torch.arange(8).view(2, 2, 2), 16)
    assert even["usage"] == 0.5
    torch.testing.assert_close(even["perplexity"], torch.tensor(8.0))
    one = code_statistics(torch.full((2, 3, 3), 5), 16)
    assert (one["usage"].item(), one["perplexity"].item()) == (1 / 16, 1.0)
    p = torch.tensor([0.5, 0.25, 0.25])
    mixed = code_statistics(torch.tensor([[0, 0, 1, 2]]), 3)
    torch.testing.assert_close(
        mixed["perplexity"], torch.distributions.Categorical(p).entropy().exp()
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: DVAEConfig(image_size=20), "image_size is 20; expected a multiple of factor = 8"),
        (lambda: DVAEConfig(width=6), "width is 6; expected .*a multiple of 4"),
        (lambda: DVAEConfig(blocks=0), "blocks is 0; expected at least 1"),
        (lambda: DVAEConfig(min_scale=-1.0), "min_scale is -1.0"),
        (lambda: ConvNetConfig(factor=6), "factor is 6; expected a power of 2"),
        (lambda: VQVAEConfig(image_size=20), "image_size is 20"),
        (lambda: NearestConfig(ema=1.0), "ema is 1.0; expected .*less than 1"),
        (lambda: NearestConfig(revive=0.0), "revive is 0.0"),
        (
            lambda: VQGANConfig(groups=24),
            r"levels\[0\].channels is 128; expected a multiple of groups = 24",
        ),
        (lambda: VQGANConfig(levels=()), r"levels is \(\)"),
        (
            lambda: VQGANConfig(image_size=100),
            "image_size is 100; expected a multiple of factor = 16",
        ),
        (lambda: GaussianVAEConfig(latent_width=0), "latent_width is 0"),
    ],
)
def test_invalid_configs_raise(config, message):
    with pytest.raises(ValueError, match=message):
        config()


def test_base_classes_and_grids():
    assert all(isinstance(make_codec(name), ImageCodec) == (name != "gaussian") for name in CODECS)
    assert (make_codec("dvae").grid, make_codec("gated").grid, make_codec("vqgan").grid) == (
        (4, 4),
        (8, 8),
        (8, 8),
    )
