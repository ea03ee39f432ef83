"""assets/build_binding.py measures binding with a model of any quality."""

from __future__ import annotations

import json

import build_binding
import numpy as np
import pytest
from PIL import Image

from unclip.data.shapes import draw


@pytest.mark.filterwarnings("ignore")  # the tiny model knows no shapes
def test_the_page_has_every_choice_and_condition(tiny_folder, tmp_path):
    out = tmp_path / "binding.md"
    build_binding.main(["--model", str(tiny_folder), "--out", str(out), "--count", "3"])
    results = json.loads(out.with_suffix(".json").read_text())
    assert len(results["choices"]) == 3 and len(results["images"]) == 7
    assert all(0 <= value["mean"] <= 1 for value in results["choices"].values())
    page = out.read_text()
    assert "on 3 scenes" in page and "| the twin's embedding and the text |" in page
    assert Image.open(out.with_suffix(".webp")).height > 7 * build_binding.CELL


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        ("--model none --out a.md", "unknown model 'none'"),
        ("--model emoji --out a.txt", "a.txt: expected a file that ends in .md"),
        ("--model emoji --out folder.md", "folder.md is a folder"),
        ("--model emoji --out a.md --count 0", "--count is 0"),
        ("--model emoji --out a.md --seed -1", "--seed -1"),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path, monkeypatch, arguments, facts):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.md").mkdir()
    with pytest.raises(SystemExit, match=facts):
        build_binding.main(arguments.split())
    assert len(list(tmp_path.iterdir())) == 1


def test_drawings_are_bound_and_their_twins_are_exchanged():
    study = build_binding.Study.__new__(build_binding.Study)
    study.scenes = build_binding.make_scenes(20, seed=0)
    study.twins = [build_binding.swap(scene) for scene in study.scenes]
    for scenes, name in ((study.scenes, "bound"), (study.twins, "exchanged")):
        verdict = study.judge([np.asarray(draw(scene.shapes, 64)) for scene in scenes])
        assert verdict[name].float().mean() > 0.9
        assert not verdict["bound" if name == "exchanged" else "exchanged"].any()
