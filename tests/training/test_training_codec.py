"""What codecs are trained on: values that change over time, distances of features, a judge that learns beside them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import tiny_clip
from torch import Tensor, nn

from unclip.models.codecs.discriminator import DiscriminatorConfig, hinge_loss
from unclip.models.codecs.dvae import DVAE, DVAEConfig
from unclip.models.codecs.vqvae import VQVAE, ConvNetConfig, VQVAEConfig
from unclip.training.codec import (
    AdversarialCodec,
    AdversarialConfig,
    Annealing,
    CodecLoss,
    PerceptualConfig,
    adaptive_weight,
    perceptual_distance,
)
from unclip.training.fit import FitConfig, fit
from unclip.training.launch import Run
from unclip.training.optim import OptimConfig
from unclip.weights import read_tensors

JUDGE = AdversarialConfig(weight=0.5, discriminator=DiscriminatorConfig(width=4, layers=1))


def vqvae() -> VQVAE:
    torch.manual_seed(0)
    net = ConvNetConfig(width=16, factor=4, blocks=1, block_width=8)
    return VQVAE(VQVAEConfig(image_size=16, vocab_size=8, code_width=4, net=net, pixel_loss="l1"))


def dvae() -> DVAE:
    torch.manual_seed(0)
    return DVAE(DVAEConfig(image_size=16, vocab_size=8, width=8, groups=2, blocks=1, code_width=8))


def batch(size: int = 4) -> dict[str, Tensor]:
    return {
        "image": torch.rand(size, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    }


class SameBatches:
    """Two batches a pass, all the same."""

    def __iter__(self):
        return iter([batch(), batch()])

    def __len__(self):
        return 2

    def state_dict(self):
        return {"epoch": 0, "batch": 0}

    def load_state_dict(self, state):
        pass

    broken = {}


def test_a_value_is_annealed_along_a_cosine():
    temperature = Annealing(1.0, 1 / 16, 150_000)
    assert temperature.at(0) == 1.0
    assert temperature.at(75_000) == pytest.approx((1 + 1 / 16) / 2)
    assert temperature.at(150_000) == temperature.at(10**7) == 1 / 16
    assert temperature.at(15_000) > 0.97 and Annealing(0.0, 6.6, 5000).at(2500) == pytest.approx(
        3.3
    )
    with pytest.raises(ValueError, match="steps is 0"):
        Annealing(1.0, 0.0, 0)


def test_the_codec_is_told_the_values_of_the_step():
    codec, given = dvae(), []
    loss = CodecLoss(
        codec, {"temperature": Annealing(1.0, 0.0, 10), "kl_weight": Annealing(0.0, 2.0, 10)}
    )

    class Recorder(nn.Module):
        def forward(self, images: Tensor, **annealed: float):
            given.append(annealed)
            return codec(images, **annealed)

    for step in (0, 5, 10):
        loss.before_step(step)
        loss(Recorder(), batch())
    assert [values["temperature"] for values in given] == pytest.approx([1.0, 0.5, 0.0])
    assert [values["kl_weight"] for values in given] == pytest.approx([0.0, 1.0, 2.0])
    with pytest.raises(
        ValueError, match="anneal.temprature is unknown; this codec anneals temperature, kl_weight"
    ):
        CodecLoss(codec, {"temprature": Annealing(1.0, 0.0, 10)})
    with pytest.raises(ValueError, match="this codec anneals nothing"):
        CodecLoss(vqvae(), {"temperature": Annealing(1.0, 0.0, 10)})


def test_fit_tells_the_step_and_goes_on_from_it(tmp_path):
    def run(steps: int, resume: str | None = None) -> list[int]:
        codec, told = dvae(), []
        config = FitConfig(
            str(tmp_path), steps, precision="fp32", trackers=(), val_every=0, preview_every=0
        )
        loss = CodecLoss(codec, {"temperature": Annealing(1.0, 0.1, 10)})
        fit(
            codec,
            loss,
            SameBatches(),
            config,
            OptimConfig(),
            run=Run({"fit": {"steps": steps}}, resume=resume),
            before_step=lambda step: told.append(step) or loss.before_step(step),
        )
        return told

    assert run(3) == [0, 1, 2]
    assert run(5, resume="latest") == [3, 4]


def test_the_distance_of_features_by_hand():
    maps = {
        "a": [torch.tensor([3.0, 4.0]).view(1, 2, 1, 1)],
        "b": [torch.tensor([0.0, 2.0]).view(1, 2, 1, 1)],
    }
    assert perceptual_distance(maps.get, "a", "b").item() == pytest.approx(0.6**2 + 0.2**2)
    assert perceptual_distance(maps.get, "a", "a").item() == 0


def test_clip_gives_features_that_a_picture_can_be_moved_by():
    clip = tiny_clip().eval().requires_grad_(False)
    images = batch()["image"].requires_grad_()
    maps = clip.image_features(images)
    assert all(x.ndim == 4 and len(x) == 4 for x in maps)
    distance = perceptual_distance(clip.image_features, images, -images.detach())
    (gradient,) = torch.autograd.grad(distance, images)
    assert gradient.abs().sum() > 0
    nearer = perceptual_distance(clip.image_features, images - 10 * gradient, -images.detach())
    assert nearer < distance


def test_the_features_add_to_the_loss():
    codec, clip = vqvae().eval(), tiny_clip().eval().requires_grad_(False)
    plain = CodecLoss(codec, {})(codec, batch())
    both = CodecLoss(codec, {}, clip.image_features, PerceptualConfig(weight=3.0))(codec, batch())
    torch.testing.assert_close(both["loss"], plain["loss"] + 3 * both["perceptual"])
    assert both["perceptual"] > 0


def test_the_adaptive_weight_makes_both_gradients_equal_in_the_last_layer():
    weight = torch.randn(5, requires_grad=True)
    first, second = (3 * weight).square().sum(), (weight * torch.arange(5.0)).sum()
    factor = adaptive_weight(first, second, weight)
    norms = [
        torch.autograd.grad(x, weight, retain_graph=True)[0].norm()
        for x in (first, factor * second)
    ]
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-3, atol=0)
    assert adaptive_weight(first * 0 + (weight * 1e6).sum(), second * 0, weight) == 1e4


def judged() -> AdversarialCodec:
    return AdversarialCodec(vqvae(), JUDGE).train()


def test_codec_and_judge_learn_as_with_an_optimiser_each():
    """The gradient of the one loss is, for the codec, that of its own loss, and for the judge that of the hinge."""
    model, data = judged(), batch()
    CodecLoss(model.codec, {}, adversarial=JUDGE)(model, data)["loss"].backward()
    alone = judged()
    terms = alone.codec(data["image"])
    score = alone.discriminator(terms.reconstruction).mean()
    factor = JUDGE.weight * adaptive_weight(terms.loss, -score, alone.codec.last_layer)
    own = torch.autograd.grad(
        terms.loss - factor * score, list(alone.codec.parameters()), retain_graph=True
    )
    for parameter, gradient in zip(model.codec.parameters(), own, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    real, fake = (
        alone.discriminator(data["image"]),
        alone.discriminator(terms.reconstruction.detach()),
    )
    own = torch.autograd.grad(hinge_loss(real, fake), list(alone.discriminator.parameters()))
    for parameter, gradient in zip(model.discriminator.parameters(), own, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_before_its_start_the_judge_changes_nothing():
    config = AdversarialConfig(start=5, discriminator=JUDGE.discriminator)
    model, data = judged(), batch()
    loss = CodecLoss(model.codec, {}, adversarial=config)
    plain = CodecLoss(model.codec, {})(model.codec, data)["loss"]
    torch.testing.assert_close(loss(model, data)["loss"], plain)
    loss.before_step(5)
    assert loss(model, data)["loss"] != plain


def test_validation_needs_no_gradient():
    model, data = judged().eval(), batch()
    with torch.no_grad():
        terms = CodecLoss(model.codec, {}, adversarial=JUDGE)(model, data)
    assert terms["loss"].isfinite() and {"score", "hinge"} <= set(terms)


def test_a_judged_codec_is_trained_and_resumed(tmp_path):
    def run(folder: Path, *steps: int) -> dict[str, Tensor]:
        for i, until in enumerate(steps):
            model = judged()
            loss = CodecLoss(model.codec, {}, adversarial=JUDGE)
            config = FitConfig(
                str(folder), until, precision="fp32", trackers=(), val_every=0, preview_every=0
            )
            start = Run({"fit": {"steps": until}}, resume="latest" if i else None)
            fit(
                model,
                loss,
                SameBatches(),
                config,
                OptimConfig(lr=1e-3),
                run=start,
                before_step=loss.before_step,
            )
        return read_tensors(folder / "model" / "model.safetensors")

    once, twice = run(tmp_path / "once", 4), run(tmp_path / "twice", 2, 4)
    assert once.keys() == twice.keys() and all(
        torch.equal(once[name], twice[name]) for name in once
    )
