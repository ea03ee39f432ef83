"""The codec loss: annealed values, perceptual distance, adversarial training."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_clip
from forks import FSDP
from scripts import load_script
from torch import Tensor, nn

from unclip.data.loader import DataConfig
from unclip.models.codecs.discriminator import DiscriminatorConfig, hinge_loss
from unclip.models.codecs.dvae import DVAE, DVAEConfig
from unclip.models.codecs.quantizers import NearestConfig
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

ADVERSARIAL = AdversarialConfig(weight=0.5, discriminator=DiscriminatorConfig(width=4, layers=1))


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
    """A loader of two equal batches per epoch."""

    def __iter__(self):
        return iter([batch(), batch()])

    def __len__(self):
        return 2

    def samples_hash(self):
        return ""

    def state_dict(self):
        return {"epoch": 0, "batch": 0}

    def load_state_dict(self, state):
        pass

    broken = {}


def test_annealing_follows_a_cosine():
    temperature = Annealing(1.0, 1 / 16, 150_000)
    assert temperature.at(0) == 1.0
    assert temperature.at(75_000) == pytest.approx((1 + 1 / 16) / 2)
    assert temperature.at(150_000) == temperature.at(10**7) == 1 / 16
    assert temperature.at(15_000) > 0.97 and Annealing(0.0, 6.6, 5000).at(2500) == pytest.approx(
        3.3
    )
    with pytest.raises(ValueError, match="steps is 0"):
        Annealing(1.0, 0.0, 0)


def test_reviving_learned_codes_is_rejected_if_they_are_sharded(monkeypatch, tmp_path):
    script = load_script("codec")
    model = replace(vqvae().config, quantizer=NearestConfig(revive=1.0))
    config = script.CodecTraining(
        model, DataConfig("no-data", 16, 1), OptimConfig(), FitConfig(str(tmp_path), 1)
    )
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="revive without quantizer.ema needs DDP"):
        script.main(Run(config))


def test_an_adversarial_loss_is_rejected_if_layers_are_sharded(monkeypatch):
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="adversarial needs .* a whole layer; use DDP"):
        AdversarialCodec(dvae(), AdversarialConfig())


def test_the_codec_gets_the_annealed_values():
    codec, calls = dvae(), []
    loss = CodecLoss(
        codec, {"temperature": Annealing(1.0, 0.0, 10), "kl_weight": Annealing(0.0, 2.0, 10)}
    )

    class Recorder(nn.Module):
        def forward(self, images: Tensor, **annealed: float):
            calls.append(annealed)
            return codec(images, **annealed)

    for step in (0, 5, 10):
        loss.before_step(step)
        loss(Recorder(), batch())
    assert [values["temperature"] for values in calls] == pytest.approx([1.0, 0.5, 0.0])
    assert [values["kl_weight"] for values in calls] == pytest.approx([0.0, 1.0, 2.0])
    with pytest.raises(
        ValueError, match="anneal.temprature is unknown; this codec anneals temperature, kl_weight"
    ):
        CodecLoss(codec, {"temprature": Annealing(1.0, 0.0, 10)})
    with pytest.raises(ValueError, match="this codec anneals nothing"):
        CodecLoss(vqvae(), {"temperature": Annealing(1.0, 0.0, 10)})


def test_fit_passes_the_step_and_resumes_it(tmp_path):
    def run(steps: int, resume: str | None = None) -> list[int]:
        codec, steps_passed = dvae(), []
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
            before_step=lambda step: steps_passed.append(step) or loss.before_step(step),
        )
        return steps_passed

    assert run(3) == [0, 1, 2]
    assert run(5, resume="latest") == [3, 4]


def test_a_repeated_validation_has_the_annealed_values_of_its_step(tmp_path):
    def run(folder: Path, interrupted: bool = False, resume: str | None = None) -> None:
        model = AdversarialCodec(dvae(), ADVERSARIAL)
        anneal = {"temperature": Annealing(1.0, 0.1, 4)}
        late = replace(ADVERSARIAL, start=1)
        codec_loss = CodecLoss(model.codec, anneal, adversarial=late)

        def loss(network: nn.Module, data: dict[str, Tensor]) -> dict[str, Tensor]:
            if interrupted and not torch.is_grad_enabled():
                os.kill(os.getpid(), signal.SIGTERM)
            return codec_loss(network, data)

        config = FitConfig(str(folder), 3, val_every=2, preview_every=0, log_every=0, trackers=())
        options = {"val_loader": SameBatches(), "before_step": codec_loss.before_step}
        fit(model, loss, SameBatches(), config, OptimConfig(), run=Run({}, resume), **options)

    def rows(folder: Path) -> list[dict[str, float]]:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return [{**json.loads(line), "hours": 0} for line in lines]

    with pytest.raises(SystemExit):
        run(tmp_path / "run", interrupted=True)
    run(tmp_path / "run", resume="latest")
    run(tmp_path / "whole")
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


def test_the_perceptual_distance_of_known_features():
    maps = {
        "a": [torch.tensor([3.0, 4.0]).view(1, 2, 1, 1)],
        "b": [torch.tensor([0.0, 2.0]).view(1, 2, 1, 1)],
    }
    assert perceptual_distance(maps.get, "a", "b").item() == pytest.approx(0.6**2 + 0.2**2)
    assert perceptual_distance(maps.get, "a", "a").item() == 0


def test_clip_features_have_a_useful_gradient():
    clip = tiny_clip().eval().requires_grad_(False)
    images = batch()["image"].requires_grad_()
    maps = clip.image_features(images)
    assert all(x.ndim == 4 and len(x) == 4 for x in maps)
    distance = perceptual_distance(clip.image_features, images, -images.detach())
    (gradient,) = torch.autograd.grad(distance, images)
    assert gradient.abs().sum() > 0
    closer = perceptual_distance(clip.image_features, images - 10 * gradient, -images.detach())
    assert closer < distance


def test_the_perceptual_distance_is_added_to_the_loss():
    codec, clip = vqvae().eval(), tiny_clip().eval().requires_grad_(False)
    plain = CodecLoss(codec, {})(codec, batch())
    both = CodecLoss(codec, {}, clip.image_features, PerceptualConfig(weight=3.0))(codec, batch())
    torch.testing.assert_close(both["loss"], plain["loss"] + 3 * both["perceptual"])
    assert both["perceptual"] > 0


def test_the_adaptive_weight_equalises_gradients_in_the_last_layer():
    weight = torch.randn(5, requires_grad=True)
    first, second = (3 * weight).square().sum(), (weight * torch.arange(5.0)).sum()
    factor = adaptive_weight(first, second, weight)
    norms = [
        torch.autograd.grad(x, weight, retain_graph=True)[0].norm()
        for x in (first, factor * second)
    ]
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-3, atol=0)
    assert adaptive_weight(first * 0 + (weight * 1e6).sum(), second * 0, weight) == 1e4


def adversarial_codec() -> AdversarialCodec:
    return AdversarialCodec(vqvae(), ADVERSARIAL).train()


def test_codec_and_discriminator_have_separate_gradients():
    """The codec and the discriminator get the gradients of their own losses."""
    model, data = adversarial_codec(), batch()
    CodecLoss(model.codec, {}, adversarial=ADVERSARIAL)(model, data)["loss"].backward()
    separate = adversarial_codec()
    terms = separate.codec(data["image"])
    score = separate.discriminator(terms.reconstruction).mean()
    factor = ADVERSARIAL.weight * adaptive_weight(terms.loss, -score, separate.codec.last_layer)
    own = torch.autograd.grad(
        terms.loss - factor * score, list(separate.codec.parameters()), retain_graph=True
    )
    for parameter, gradient in zip(model.codec.parameters(), own, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    real, fake = (
        separate.discriminator(data["image"]),
        separate.discriminator(terms.reconstruction.detach()),
    )
    own = torch.autograd.grad(hinge_loss(real, fake), list(separate.discriminator.parameters()))
    for parameter, gradient in zip(model.discriminator.parameters(), own, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_the_adversarial_loss_starts_at_its_step():
    config = AdversarialConfig(start=5, discriminator=ADVERSARIAL.discriminator)
    model, data = adversarial_codec(), batch()
    loss = CodecLoss(model.codec, {}, adversarial=config)
    plain = CodecLoss(model.codec, {})(model.codec, data)["loss"]
    torch.testing.assert_close(loss(model, data)["loss"], plain)
    loss.before_step(5)
    assert loss(model, data)["loss"] != plain


def test_the_adversarial_loss_works_without_gradients():
    model, data = adversarial_codec().eval(), batch()
    with torch.no_grad():
        terms = CodecLoss(model.codec, {}, adversarial=ADVERSARIAL)(model, data)
    assert terms["loss"].isfinite() and {"score", "hinge"} <= set(terms)


def test_an_adversarial_codec_is_trained_and_resumed(tmp_path):
    def run(folder: Path, *steps: int) -> dict[str, Tensor]:
        for i, until in enumerate(steps):
            model = adversarial_codec()
            loss = CodecLoss(model.codec, {}, adversarial=ADVERSARIAL)
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
