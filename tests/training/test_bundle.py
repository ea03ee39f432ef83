"""train/bundle.py with bundled models in place of trained networks."""

from __future__ import annotations

from pathlib import Path

import pytest
from scripts import ROOT, run_script

import unclip
from unclip.checkpoints import folders

UNCLIP = (
    "--set=clip=emoji",
    "--set=prior=emoji",
    "--set=decoder=emoji",
    "--set=upsamplers=[emoji]",
)
DALLE = ("--set=codec=emoji-dalle1", "--set=dalle=emoji-dalle1", "--set=clip=emoji")


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch, tmp_path, tiny_pipe, tiny_dalle_folder):
    """Small models with the names of the bundled ones."""
    tiny_pipe.save_pretrained(tmp_path / "emoji")
    models = {"emoji": tmp_path / "emoji", "emoji-dalle1": tiny_dalle_folder}
    monkeypatch.setattr(folders, "bundled_models", lambda: models)
    monkeypatch.chdir(tmp_path)


def bundle(config, *settings):
    config = str(ROOT / f"configs/tiny/{config}.yaml")
    run_script(ROOT / "train/bundle.py", "--config", config, "--set=output=model", *settings)


def test_names_of_bundled_models_stand_for_their_components(tiny_pipe):
    bundle("model", *UNCLIP, "--set=dtype=fp32")
    sampling = {"seed": 0, "options": tiny_pipe.options, "progress": False}
    expected = tiny_pipe("a red circle", **sampling).images[0]
    assert unclip.load("model")("a red circle", **sampling).images[0] == expected


def test_a_dalle_of_bundled_parts_shares_their_clip():
    bundle("model_dalle", *DALLE)
    assert folders.shared_from(Path("model")) == {"clip": "emoji"}
    assert unclip.load("model")("a red circle", seed=0, progress=False).images


def test_a_component_that_a_bundled_model_does_not_have_is_named():
    with pytest.raises(SystemExit, match="error: codec: emoji has no codec; it has clip, prior"):
        bundle("model_dalle", *DALLE, "--set=codec=emoji")
