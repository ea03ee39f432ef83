"""train/analytic.py measures the errors of a prior, and its model is then sampled with them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import scrambled, tiny_clip, tiny_decoder, tiny_prior
from scripts import ROOT, run_script, write_shape_images

import unclip
from unclip.checkpoints.store import load_schedule, save_component
from unclip.data.loader import DataConfig
from unclip.diffusion.schedules import ScheduleConfig
from unclip.pipelines.unclip.pipeline import UnCLIPPipeline
from unclip.training.embedded import measure_stats, open_loader
from unclip.types import StageOptions


@pytest.fixture
def folder(tmp_path):
    """An untrained prior, which predicts the mean embedding, its CLIP, and twelve images."""
    torch.manual_seed(0)
    tiny_clip().save_pretrained(tmp_path / "clip")
    write_shape_images(tmp_path / "data")
    clip, prior = unclip.CLIP.from_pretrained(tmp_path / "clip"), tiny_prior()
    loader = open_loader(DataConfig(str(tmp_path / "data"), 16, 12), clip, embed_once=False)
    measure_stats(prior, clip, loader, batches=1)
    save_component(prior, tmp_path / "prior", schedule=ScheduleConfig("linear", 100))
    return tmp_path


def measure(folder, *arguments):
    paths = {"prior": "prior", "clip": "clip", "data": "data"}
    given = [f"--{name}={folder / path}" for name, path in paths.items()]
    run_script(ROOT / "train/analytic.py", *given, "--batch-size=12", *arguments)


@pytest.mark.filterwarnings("ignore:.*captions are longer")
def test_the_error_of_the_mean_is_the_variance(folder):
    measure(folder, "--points=5")
    schedule = load_schedule(folder / "prior")
    assert replace(schedule, x0_errors=None) == ScheduleConfig("linear", 100)
    assert schedule.x0_errors == pytest.approx([11 / 12] * 5, abs=1e-4)  # std is unbiased


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--batches=0", "--batches is 0"),
        ("--points=0", "--points is 0"),
        ("--device=abacus", "unknown device 'abacus'"),
    ],
)
def test_wrong_arguments_are_one_line(folder, arguments, message):
    with pytest.raises(SystemExit, match=message):
        measure(folder, arguments)


def test_a_model_is_sampled_with_its_errors(tmp_path):
    torch.manual_seed(0)
    parts = tiny_clip(), scrambled(tiny_prior()), scrambled(tiny_decoder())
    config = ScheduleConfig(x0_errors=(0.1, 0.9))
    pipe = UnCLIPPipeline(*parts, schedules={"prior": config})
    pipe.save_pretrained(tmp_path / "model")
    pipe = unclip.load(tmp_path / "model", "cpu")
    assert pipe.schedules["prior"].config == config

    def sample(sampler):
        options = replace(pipe.options, prior=StageOptions(4, sampler=sampler), prior_candidates=1)
        return pipe("a red apple", options=options, seed=0, progress=False).image_emb

    assert torch.equal(sample("analytic"), sample("analytic"))
    assert not torch.allclose(sample("analytic"), sample("ancestral"))
