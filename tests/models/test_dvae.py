"""OpenAI's dVAE: structure, likelihood, relaxation and published files."""

from __future__ import annotations

import math
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from recorded import numbers, recording, sampled, weights
from torch import Tensor, nn
from torch.distributions import Categorical, Laplace, SigmoidTransform, TransformedDistribution

from unclip.checkpoints.openai import dvae as openai_dvae
from unclip.checkpoints.registry import load_codec
from unclip.checkpoints.renaming import export_state
from unclip.models.codecs.dvae import (
    DVAE,
    EPS,
    DVAEConfig,
    logit_laplace_nll,
    logits_to_pixels,
    to_logit_range,
)
from unclip.models.codecs.quantizers import kl_to_uniform

OPENAI = recording("openai_dvae")
SMALL_CONFIG = DVAEConfig(image_size=16, vocab_size=24, width=8, groups=3, blocks=1, code_width=8)


def make_dvae(**changes: object) -> DVAE:
    torch.manual_seed(0)
    return DVAE(DVAEConfig(**{**vars(SMALL_CONFIG), **changes})).eval()


def make_images(batch: int = 2, size: int = 16) -> Tensor:
    return numbers("pictures", (batch, 3, size, size), 0.4).clamp(-1, 1)


class Module(nn.Module):
    """Module built from tensor names, pickled as a whole as OpenAI's are."""

    def add(self, name: str, tensor: Tensor) -> None:
        first, _, rest = name.partition(".")
        if not rest:
            self.register_parameter(first, nn.Parameter(tensor))
            return
        if not hasattr(self, first):
            self.add_module(first, Module())
        getattr(self, first).add(rest, tensor)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files like the published ones, at a quarter of the width. Tests must not change them."""
    folder = tmp_path_factory.mktemp("openai")
    for part in ("encoder", "decoder"):
        module = Module()
        for name, tensor in weights(
            {f"{part}.{name}": shape for name, shape in OPENAI[part].items()}
        ).items():
            module.add(name.removeprefix(f"{part}."), tensor)
        torch.save(module, folder / f"{part}.pkl")
    return folder


def test_openai_files_give_recorded_outputs(folder):
    dvae, images = load_codec(folder), make_images(2, 32)
    logits = dvae.logits(images).permute(0, 3, 1, 2)
    torch.testing.assert_close(sampled(logits), OPENAI["logits"], atol=1e-5, rtol=0)
    assert dvae.encode(images).flatten().tolist() == OPENAI["codes"]
    codes = torch.tensor(OPENAI["decoded_codes"]).view(2, 4, 4)
    mean, scale = dvae._pixel_distribution(dvae._embed(codes))
    torch.testing.assert_close(
        sampled(torch.cat([mean, scale.log()], 1)), OPENAI["statistics"], atol=1e-5, rtol=0
    )
    torch.testing.assert_close(sampled(dvae.decode(codes)), OPENAI["pictures"], atol=1e-5, rtol=0)


def test_config_is_inferred_and_names_are_restored(folder):
    dvae = openai_dvae.load(folder)
    assert dvae.config == DVAEConfig(vocab_size=512, width=64, code_width=16)
    state = dvae.state_dict()
    there = export_state(
        state, openai_dvae.rules({name: tensor.shape for name, tensor in state.items()})
    )
    shapes = {
        f"{part}.{name}": tuple(shape)
        for part in ("encoder", "decoder")
        for name, shape in OPENAI[part].items()
    }
    assert {name: tuple(tensor.shape) for name, tensor in there.items()} == shapes


def test_missing_tensor_raises(folder, tmp_path):
    for part in ("encoder", "decoder"):
        module = Module()
        for name, shape in OPENAI[part].items():
            if name != "blocks.group_2.block_1.res_path.conv_2.w":
                module.add(name, torch.zeros(shape))
        torch.save(module, tmp_path / f"{part}.pkl")
    with pytest.raises(
        ValueError, match=r"missing: encoder\.blocks\.group_2\.block_1\.res_path\.conv_2\.w"
    ):
        load_codec(tmp_path)


def test_other_files_raise(tmp_path):
    for part in ("encoder", "decoder"):
        torch.save(nn.Linear(2, 2), tmp_path / f"{part}.pkl")
    with pytest.raises(
        ValueError,
        match="is not a dVAE of OpenAI: the tensor encoder.blocks.output.conv.w is missing",
    ):
        load_codec(tmp_path)
    with pytest.raises(FileNotFoundError, match="nothing does not exist"):
        load_codec(tmp_path / "nothing")


def test_published_size():
    with torch.device("meta"):
        dvae = DVAE(DVAEConfig())
    sizes = [
        (len(x.state_dict()), sum(p.numel() for p in x.parameters()))
        for x in (dvae.encoder, dvae.decoder)
    ]
    assert sizes == [(74, 53_786_240), (76, 43_829_766)]
    assert dvae.grid == (32, 32)
    assert dvae.encoder.group_4.block_2.gain == 1 / 64


def test_encoder_matches_reference_formula():
    dvae, images = make_dvae(), make_images()
    state = dvae.encoder.state_dict()

    def conv(x: Tensor, name: str) -> Tensor:
        w = state[f"{name}.w"]
        return F.conv2d(x, w, state[f"{name}.b"], padding=(w.shape[-1] - 1) // 2)

    x = conv(0.8 * (images + 1) / 2 + 0.1, "input")
    for group in (1, 2, 3):
        name, h = f"group_{group}.block_1", x
        for i in (1, 2, 3, 4):
            h = conv(F.relu(h), f"{name}.res_path.conv_{i}")
        x = (conv(x, f"{name}.id_path") if group > 1 else x) + h / 9  # 3 groups of 1 block
        x = F.max_pool2d(x, 2) if group < 3 else x
    torch.testing.assert_close(
        dvae.logits(images).permute(0, 3, 1, 2), conv(F.relu(x), "output.conv")
    )


def test_initial_weights_have_the_variance_of_the_paper():
    weight = DVAE(DVAEConfig(width=64)).encoder.group_1.block_1.res_path.conv_2.w
    assert weight.std().item() == pytest.approx((16 * 9) ** -0.5, rel=0.05)
    assert not any(
        tensor.any() for name, tensor in make_dvae().state_dict().items() if name.endswith(".b")
    )


def test_embedding_equals_one_hot_convolution():
    dvae = make_dvae()
    codes = torch.randint(24, (2, 4, 4), generator=torch.Generator().manual_seed(0))
    one_hot = F.one_hot(codes, 24).permute(0, 3, 1, 2).float()
    assert torch.equal(dvae._embed(codes), dvae.decoder.input(one_hot))


def test_soft_codes_are_a_weighted_mean_of_the_codebook():
    dvae, soft = make_dvae(), torch.randn(2, 4, 4, 24).softmax(dim=-1)
    expected = (
        sum(soft[..., k, None] * dvae.decoder.input.w[:, k, 0, 0] for k in range(24))
        + dvae.decoder.input.b
    )
    torch.testing.assert_close(dvae._embed(soft).permute(0, 2, 3, 1), expected)


def test_likelihood_is_a_logit_laplace():
    mean, scale = torch.randn(2, 3, 4, 4), torch.rand(2, 3, 4, 4) + 0.1
    images = make_images(2, 4)
    density = TransformedDistribution(Laplace(mean, scale), SigmoidTransform())
    torch.testing.assert_close(
        logit_laplace_nll(images, mean, scale), -density.log_prob(to_logit_range(images))
    )


def test_likelihood_density_integrates_to_one():
    x = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    # pixels beyond [-1, 1], so that the logit range is (0, 1)
    images = 2 * (x - EPS) / (1 - 2 * EPS) - 1
    for mean, scale in ((0.0, 1.0), (1.5, 0.3), (-2.0, 0.8)):
        nll = logit_laplace_nll(images.double(), torch.tensor(mean), torch.tensor(scale))
        assert torch.exp(-nll.double()).mean().item() == pytest.approx(1, abs=1e-3)


def test_logit_range_round_trip():
    images = torch.linspace(-1, 1, 101)
    assert to_logit_range(images).aminmax() == (pytest.approx(EPS), pytest.approx(1 - EPS))
    torch.testing.assert_close(
        logits_to_pixels(torch.logit(to_logit_range(images))), images, atol=1e-6, rtol=0
    )


def test_log_likelihood_is_a_density_over_pixels_in_0_to_1():
    dvae, images = make_dvae(), make_images()
    codes = dvae.encode(images)
    mean, scale = dvae._pixel_distribution(dvae._embed(codes))
    density = TransformedDistribution(Laplace(mean, scale), SigmoidTransform())
    expected = (density.log_prob(to_logit_range(images)) + math.log(0.8)).sum(dim=(1, 2, 3))
    torch.testing.assert_close(dvae.log_likelihood(images, codes), expected)


def test_kl_equals_categorical_and_monte_carlo():
    logits = 2 * torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    q, uniform = Categorical(logits=logits), Categorical(probs=torch.ones(5, 16))
    torch.testing.assert_close(kl_to_uniform(logits), torch.distributions.kl_divergence(q, uniform))
    torch.manual_seed(0)
    samples = q.sample((40_000,))
    estimate = (q.log_prob(samples) + math.log(16)).mean(dim=0)
    torch.testing.assert_close(kl_to_uniform(logits), estimate, atol=0.03, rtol=0)


def test_kl_is_between_zero_and_all_bits():
    for k in (2, 1024, 8192):
        flat = kl_to_uniform(torch.full((3, k), 0.1))
        assert (flat >= 0).all() and flat.max() < 1e-5
        certain = kl_to_uniform(torch.eye(k)[:3] * 1e4)
        torch.testing.assert_close(
            certain / math.log(2), torch.full((3 if k > 2 else 2,), math.log2(k))
        )


def test_kl_does_not_depend_on_the_batch_size():
    dvae, images = make_dvae(), make_images()
    one, many = dvae.loss(images), dvae.loss(images.repeat(5, 1, 1, 1))
    torch.testing.assert_close(one.logged["kl_bits"], many.logged["kl_bits"])
    torch.testing.assert_close(one.loss, many.loss)
    assert 0 <= one.logged["kl_bits"] <= math.log2(24)


def test_kl_weight_is_per_value():
    dvae, images = make_dvae(), make_images()
    nll, both = dvae.loss(images, kl_weight=0.0), dvae.loss(images, kl_weight=6.6)
    kl = both.logged["kl_bits"] * math.log(2)
    # 48 = 3 channels x 4 x 4 pixels; 192 in the paper
    torch.testing.assert_close(both.loss - nll.loss, 6.6 * kl / 48)
    torch.testing.assert_close(nll.loss, nll.logged["nll"])


def test_eval_mode_is_deterministic_with_hard_codes():
    dvae, images = make_dvae(), make_images()
    values = images[0].numel()
    terms = dvae.loss(images, temperature=0.7)
    hard = -dvae.log_likelihood(images, dvae.encode(images)).mean() / values + math.log(0.8)
    torch.testing.assert_close(terms.logged["nll"], hard)
    torch.testing.assert_close(terms.reconstruction.clamp(-1, 1), dvae.reconstruct(images))
    dvae.train()
    assert dvae.loss(images).logged["nll"] != dvae.loss(images).logged["nll"]


def test_gumbel_softmax_at_low_temperature_samples_the_distribution():
    """Chi-squared test of 20,000 samples, with the 99.9th percentile for 7 degrees of freedom."""
    torch.manual_seed(0)
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, 0.5, -2.0, 1.5])
    samples = F.gumbel_softmax(logits.expand(20_000, 8), tau=1e-3, dim=-1)
    assert (samples.max(dim=-1).values > 1 - 1e-3).float().mean() > 0.99
    expected = 20_000 * logits.softmax(dim=-1)
    assert ((samples.round().sum(dim=0) - expected).square() / expected).sum() < 24.3


def test_training_at_low_temperature_decodes_posterior_samples(monkeypatch):
    """The decoder gets weights that sum to 1 and have the posterior as their mean."""
    dvae, inputs = make_dvae().train(), []
    embed = dvae._embed
    monkeypatch.setattr(dvae, "_embed", lambda soft: inputs.append(soft) or embed(soft))
    images = make_images(1).expand(400, -1, -1, -1)
    with torch.no_grad():
        dvae.encoder.output.conv.w.mul_(3)
        torch.manual_seed(0)
        dvae.loss(images, temperature=1e-3)
        p = dvae.logits(images[:1]).softmax(dim=-1)[0]  # h w K
    torch.testing.assert_close(inputs[0].sum(dim=-1), torch.ones(400, 4, 4))
    torch.testing.assert_close(inputs[0].mean(dim=0), p, atol=0.12, rtol=0)


def test_min_scale_bounds_the_likelihood():
    flat = torch.ones(1, 3, 16, 16)
    for min_scale in (0.0, 0.5):
        dvae = make_dvae(min_scale=min_scale)
        nn.init.zeros_(dvae.decoder.output.conv.w)
        # mean exactly white, small scale
        dvae.decoder.output.conv.b.data = torch.tensor([math.log(9.0)] * 3 + [-5.0] * 3)
        nll = dvae.loss(flat).logged["nll"].item()
        assert nll == pytest.approx(math.log(2 * (math.exp(-5) + min_scale) * 0.09), abs=1e-3)


def test_tensor_names_are_those_of_openai():
    with torch.device("meta"):
        names = DVAE(DVAEConfig(width=64, vocab_size=512, code_width=16)).state_dict()
    expected = OrderedDict(
        (f"{part}.{n.removeprefix('blocks.')}", 0)
        for part in ("encoder", "decoder")
        for n in OPENAI[part]
    )
    assert list(names) == list(expected)
