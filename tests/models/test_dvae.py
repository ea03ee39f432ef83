"""OpenAI's dVAE: its structure, its likelihood, its relaxation, and its published files."""

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
SMALL = DVAEConfig(image_size=16, vocab_size=24, width=8, groups=3, blocks=1, code_width=8)


def small(**changes: object) -> DVAE:
    torch.manual_seed(0)
    return DVAE(DVAEConfig(**{**vars(SMALL), **changes})).eval()


def pictures(batch: int = 2, size: int = 16) -> Tensor:
    return numbers("pictures", (batch, 3, size, size), 0.4).clamp(-1, 1)


class Module(nn.Module):
    """A module by the names of its tensors, pickled as a whole like OpenAI's."""

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
    """Files like the published ones, at a quarter of the width; not to be changed by a test."""
    folder = tmp_path_factory.mktemp("openai")
    for part in ("encoder", "decoder"):
        module = Module()
        for name, tensor in weights(
            {f"{part}.{name}": shape for name, shape in OPENAI[part].items()}
        ).items():
            module.add(name.removeprefix(f"{part}."), tensor)
        torch.save(module, folder / f"{part}.pkl")
    return folder


def test_openai_s_files_answer_as_openai_s_code(folder):
    dvae, images = load_codec(folder), pictures(2, 32)
    logits = dvae.logits(images).permute(0, 3, 1, 2)
    torch.testing.assert_close(sampled(logits), OPENAI["logits"], atol=1e-5, rtol=0)
    assert dvae.encode(images).flatten().tolist() == OPENAI["codes"]
    codes = torch.tensor(OPENAI["decoded_codes"]).view(2, 4, 4)
    mean, scale = dvae._pixel_distribution(dvae._embed(codes))
    torch.testing.assert_close(
        sampled(torch.cat([mean, scale.log()], 1)), OPENAI["statistics"], atol=1e-5, rtol=0
    )
    torch.testing.assert_close(sampled(dvae.decode(codes)), OPENAI["pictures"], atol=1e-5, rtol=0)


def test_sizes_are_read_from_the_files_and_their_names_can_be_given_back(folder):
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


def test_a_file_that_lacks_a_tensor_is_refused(folder, tmp_path):
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


def test_something_else_is_no_dvae(tmp_path):
    for part in ("encoder", "decoder"):
        torch.save(nn.Linear(2, 2), tmp_path / f"{part}.pkl")
    with pytest.raises(
        ValueError, match="is not a dVAE of OpenAI: the tensor encoder.blocks.output.conv.w is missing"
    ):
        load_codec(tmp_path)
    with pytest.raises(FileNotFoundError, match="nothing does not exist"):
        load_codec(tmp_path / "nothing")


def test_the_published_size():
    with torch.device("meta"):
        dvae = DVAE(DVAEConfig())
    sizes = [
        (len(x.state_dict()), sum(p.numel() for p in x.parameters()))
        for x in (dvae.encoder, dvae.decoder)
    ]
    assert sizes == [(74, 53_786_240), (76, 43_829_766)]
    assert dvae.grid == (32, 32)
    assert dvae.encoder.group_4.block_2.gain == 1 / 64


def test_the_encoder_is_its_published_formula():
    dvae, images = small(), pictures()
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


def test_weights_begin_with_the_variance_of_the_paper():
    weight = DVAE(DVAEConfig(width=64)).encoder.group_1.block_1.res_path.conv_2.w
    assert weight.std().item() == pytest.approx((16 * 9) ** -0.5, rel=0.05)
    assert not any(
        tensor.any() for name, tensor in small().state_dict().items() if name.endswith(".b")
    )


def test_a_look_up_is_the_one_hot_convolution_bit_for_bit():
    dvae = small()
    codes = torch.randint(24, (2, 4, 4), generator=torch.Generator().manual_seed(0))
    one_hot = F.one_hot(codes, 24).permute(0, 3, 1, 2).float()
    assert torch.equal(dvae._embed(codes), dvae.decoder.input(one_hot))


def test_soft_codes_are_a_weighted_mean_of_the_codebook():
    dvae, soft = small(), torch.randn(2, 4, 4, 24).softmax(dim=-1)
    wanted = (
        sum(soft[..., k, None] * dvae.decoder.input.w[:, k, 0, 0] for k in range(24))
        + dvae.decoder.input.b
    )
    torch.testing.assert_close(dvae._embed(soft).permute(0, 2, 3, 1), wanted)


def test_the_likelihood_is_a_laplace_of_the_logit():
    mean, scale = torch.randn(2, 3, 4, 4), torch.rand(2, 3, 4, 4) + 0.1
    images = pictures(2, 4)
    density = TransformedDistribution(Laplace(mean, scale), SigmoidTransform())
    torch.testing.assert_close(
        logit_laplace_nll(images, mean, scale), -density.log_prob(to_logit_range(images))
    )


def test_the_likelihood_s_density_has_mass_one():
    x = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    images = (
        2 * (x - EPS) / (1 - 2 * EPS) - 1
    )  # the logit range is (0, 1) for pixels beyond [-1, 1]
    for mean, scale in ((0.0, 1.0), (1.5, 0.3), (-2.0, 0.8)):
        nll = logit_laplace_nll(images.double(), torch.tensor(mean), torch.tensor(scale))
        assert torch.exp(-nll.double()).mean().item() == pytest.approx(1, abs=1e-3)


def test_pixels_survive_the_map_and_its_inverse():
    images = torch.linspace(-1, 1, 101)
    assert to_logit_range(images).aminmax() == (pytest.approx(EPS), pytest.approx(1 - EPS))
    torch.testing.assert_close(
        logits_to_pixels(torch.logit(to_logit_range(images))), images, atol=1e-6, rtol=0
    )


def test_log_likelihood_is_the_density_of_pixels_between_0_and_1():
    dvae, images = small(), pictures()
    codes = dvae.encode(images)
    mean, scale = dvae._pixel_distribution(dvae._embed(codes))
    density = TransformedDistribution(Laplace(mean, scale), SigmoidTransform())
    wanted = (density.log_prob(to_logit_range(images)) + math.log(0.8)).sum(dim=(1, 2, 3))
    torch.testing.assert_close(dvae.log_likelihood(images, codes), wanted)


def test_the_kl_is_that_of_a_categorical_and_of_a_monte_carlo_run():
    logits = 2 * torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    q, uniform = Categorical(logits=logits), Categorical(probs=torch.ones(5, 16))
    torch.testing.assert_close(kl_to_uniform(logits), torch.distributions.kl_divergence(q, uniform))
    torch.manual_seed(0)
    drawn = q.sample((40_000,))
    estimate = (q.log_prob(drawn) + math.log(16)).mean(dim=0)
    torch.testing.assert_close(kl_to_uniform(logits), estimate, atol=0.03, rtol=0)


def test_the_kl_is_never_negative_and_never_above_all_bits():
    for k in (2, 1024, 8192):
        flat = kl_to_uniform(torch.full((3, k), 0.1))
        assert (flat >= 0).all() and flat.max() < 1e-5
        sure = kl_to_uniform(torch.eye(k)[:3] * 1e4)
        torch.testing.assert_close(
            sure / math.log(2), torch.full((3 if k > 2 else 2,), math.log2(k))
        )


def test_the_kl_in_bits_does_not_grow_with_the_batch():
    dvae, images = small(), pictures()
    one, many = dvae.loss(images), dvae.loss(images.repeat(5, 1, 1, 1))
    torch.testing.assert_close(one.logged["kl_bits"], many.logged["kl_bits"])
    torch.testing.assert_close(one.loss, many.loss)
    assert 0 <= one.logged["kl_bits"] <= math.log2(24)


def test_the_loss_weighs_the_kl_by_values_for_each_position():
    dvae, images = small(), pictures()
    nll, both = dvae.loss(images, kl_weight=0.0), dvae.loss(images, kl_weight=6.6)
    kl = both.logged["kl_bits"] * math.log(2)
    torch.testing.assert_close(
        both.loss - nll.loss, 6.6 * kl / 48
    )  # 3 colours of 4 x 4 pixels; 192 in the paper
    torch.testing.assert_close(nll.loss, nll.logged["nll"])


def test_in_eval_mode_the_codes_are_hard_and_nothing_is_drawn():
    dvae, images = small(), pictures()
    values = images[0].numel()
    terms = dvae.loss(images, temperature=0.7)
    hard = -dvae.log_likelihood(images, dvae.encode(images)).mean() / values + math.log(0.8)
    torch.testing.assert_close(terms.logged["nll"], hard)
    torch.testing.assert_close(terms.reconstruction.clamp(-1, 1), dvae.reconstruct(images))
    dvae.train()
    assert dvae.loss(images).logged["nll"] != dvae.loss(images).logged["nll"]


def test_a_cold_relaxation_is_one_hot_with_the_frequencies_of_the_distribution():
    """Gumbel-Max: chi-squared of 20,000 draws, 7 degrees of freedom; 24.3 is exceeded once in a thousand times."""
    torch.manual_seed(0)
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, 0.5, -2.0, 1.5])
    drawn = F.gumbel_softmax(logits.expand(20_000, 8), tau=1e-3, dim=-1)
    assert (drawn.max(dim=-1).values > 1 - 1e-3).float().mean() > 0.99
    expected = 20_000 * logits.softmax(dim=-1)
    assert ((drawn.round().sum(dim=0) - expected).square() / expected).sum() < 24.3


def test_training_at_low_temperature_decodes_codes_drawn_from_the_posterior(monkeypatch):
    """What the decoder is given in training: rows that sum to 1, nearly one-hot, each code as often as it is likely."""
    dvae, given = small().train(), []
    embed = dvae._embed
    monkeypatch.setattr(dvae, "_embed", lambda soft: given.append(soft) or embed(soft))
    images = pictures(1).expand(400, -1, -1, -1)
    with torch.no_grad():
        dvae.encoder.output.conv.w.mul_(3)
        torch.manual_seed(0)
        dvae.loss(images, temperature=1e-3)
        p = dvae.logits(images[:1]).softmax(dim=-1)[0]  # h w K
    torch.testing.assert_close(given[0].sum(dim=-1), torch.ones(400, 4, 4))
    torch.testing.assert_close(given[0].mean(dim=0), p, atol=0.12, rtol=0)


def test_a_floor_under_the_scale_bounds_the_likelihood():
    flat = torch.ones(1, 3, 16, 16)
    for floor in (0.0, 0.5):
        dvae = small(min_scale=floor)
        nn.init.zeros_(dvae.decoder.output.conv.w)
        dvae.decoder.output.conv.b.data = torch.tensor(
            [math.log(9.0)] * 3 + [-5.0] * 3
        )  # exactly white, and sure
        nll = dvae.loss(flat).logged["nll"].item()
        assert nll == pytest.approx(math.log(2 * (math.exp(-5) + floor) * 0.09), abs=1e-3)


def test_names_are_openai_s():
    with torch.device("meta"):
        names = DVAE(DVAEConfig(width=64, vocab_size=512, code_width=16)).state_dict()
    wanted = OrderedDict(
        (f"{part}.{n.removeprefix('blocks.')}", 0)
        for part in ("encoder", "decoder")
        for n in OPENAI[part]
    )
    assert list(names) == list(wanted)
