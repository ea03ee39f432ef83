"""The network of an upsampler's last step: what it reads, what is trained, and its use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import scrambled, tiny_clip, tiny_decoder, tiny_prior, tiny_unet, tiny_upsampler
from scripts import ROOT, run_script, write_shape_images
from torch import Tensor

from unclip.checkpoints.store import load_component
from unclip.data.corruption import CorruptionConfig
from unclip.diffusion.schedules import Schedule
from unclip.models.codecs.discriminator import DiscriminatorConfig
from unclip.models.unclip.upsampler import Upsampler
from unclip.pipelines.unclip.pipeline import UnCLIPPipeline
from unclip.training.codec import AdversarialCodec, AdversarialConfig, CodecLoss
from unclip.training.last_step import LastStep
from unclip.types import StageOptions, UnCLIPOptions

UNET = "{in_channels: 6, out_channels: 3, patch: 2, groups: 8, resample: conv, mid_attention: false"
UNET += ", levels: [{channels: 16, blocks: 1}, {channels: 32, blocks: 1}]}"
LAST = ("--set=model.prediction=x0", f"--set=model.last_unet={UNET}")


def last_step(**changes: object) -> LastStep:
    torch.manual_seed(0)
    upsampler = scrambled(tiny_upsampler(last_unet=tiny_unet(6, 3), **changes))
    return LastStep(upsampler, Schedule(), CorruptionConfig(), steps=3).train()


@pytest.mark.parametrize(
    "adversarial", [None, AdversarialConfig(0.1, 0, DiscriminatorConfig(8, 1))]
)
def test_training_lowers_the_error_and_leaves_the_first_network(adversarial):
    step = last_step(prediction="x0")
    before = {name: weight.clone() for name, weight in step.upsampler.state_dict().items()}
    model = AdversarialCodec(step, adversarial) if adversarial else step
    loss = CodecLoss(step, {}, adversarial=adversarial)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 3e-3)
    images, errors = torch.rand(4, 3, 16, 16) * 2 - 1, []
    for _ in range(30):
        terms = loss(model, {"image": images})
        errors.append(float(terms["mse"]))
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
    assert sum(errors[-5:]) < 0.8 * sum(errors[:5])
    for name, weight in step.upsampler.state_dict().items():
        assert torch.equal(weight, before[name]) == name.startswith("unet."), name


def test_a_dry_run_with_processes_is_refused():
    settings = (*LAST, "--set=last={steps: 3}", "--dry-run", "64")
    with pytest.raises(SystemExit, match="--dry-run PROCESSES does not support last"):
        run_script(
            ROOT / "train/upsampler.py",
            "--config",
            str(ROOT / "configs/tiny/upsampler.yaml"),
            *settings,
        )


@torch.no_grad()
def test_the_last_step_starts_where_the_pipeline_arrives():
    """With the same noise, the sample is the pipeline's."""
    step, noise, used = last_step(prediction="v").eval(), [], []
    randn_like = torch.randn_like

    def recorded(x: Tensor) -> Tensor:
        noise.append(randn_like(x))
        return noise[-1]

    images = torch.rand(1, 3, 16, 16) * 2 - 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", recorded)
        sample = step.reconstruct(images)
        parts = (tiny_clip(), tiny_prior(), tiny_decoder(), [step.upsampler])
        options = UnCLIPOptions(upsamplers=(StageOptions(3, sampler="ancestral"),))
        pipe = UnCLIPPipeline(*parts, options=options)
        patch.setattr(
            "unclip.diffusion.samplers.randn",
            lambda *_: used.append(1) or noise[len(used)],
        )
        bound = pipe.upsampler_stages[0].bind(step._reduce(images), options.upsamplers[0])
        expected = bound.sample(noise[0], [torch.Generator()])
    assert len(noise) == 3 and len(used) == 2
    torch.testing.assert_close(sample, expected.clamp(-1, 1))


def test_the_script_trains_resumes_and_its_model_is_used(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_shape_images(tmp_path / "data/tiny")

    def train(*arguments: str) -> None:
        settings = ("--config", str(ROOT / "configs/tiny/upsampler.yaml"), *arguments)
        run_script(ROOT / "train/upsampler.py", *settings)

    train("--set=model.prediction=x0", "--set=fit.steps=4")
    adversarial = "adversarial: {discriminator: {width: 8, layers: 1}}"
    last = (*LAST, f"--set=last={{steps: 3, {adversarial}}}", "--set=fit.output=runs/last")
    train(*last, "--init", "runs/tiny/upsampler/model", "--set=fit.steps=4")
    train(*last, "--resume", "latest", "--set=fit.steps=8")
    rows = [json.loads(row) for row in Path("runs/last/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 8 and {"mse", "hinge", "score"} <= rows[0].keys()
    assert list(Path("runs/last/previews").iterdir())
    first, both = (load_component(f"runs/{run}/model") for run in ("tiny/upsampler", "last"))
    assert isinstance(both, Upsampler) and both.last_unet is not None
    for name, weight in first.unet.state_dict().items():
        assert torch.equal(both.unet.state_dict()[name], weight)
    assert not torch.equal(both.last_unet.head.weight, both.unet.head.weight)

    options = UnCLIPOptions(upsamplers=(StageOptions(3, sampler="ancestral"),))
    decoder = tiny_decoder(image_size=16)
    pipe = UnCLIPPipeline(tiny_clip(), tiny_prior(), decoder, [both], options=options)
    small = torch.rand(1, 3, 16, 16) * 2 - 1
    call = {"generators": [torch.Generator().manual_seed(0)], "options": options.upsamplers}
    large = pipe.upsample(small, **call)
    both.last_unet.load_state_dict(both.unet.state_dict())
    call["generators"] = [torch.Generator().manual_seed(0)]
    assert large.shape == (1, 3, 32, 32) and not torch.equal(large, pipe.upsample(small, **call))
