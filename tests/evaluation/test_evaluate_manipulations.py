"""`unclip evaluate-manipulations`."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from unclip.cli.main import main
from unclip.data.shards import ShardWriter
from unclip.evaluation import MANIPULATION_PARTS
from unclip.evaluation.manipulations import (
    ETAS,
    TEXT_DIFF_ETAS,
    ManipulationEvaluation,
    seam,
)
from unclip.evaluation.pairs import load_pairs
from unclip.evaluation.report import manipulation_rows

pytestmark = pytest.mark.filterwarnings("ignore:the prompt")  # the tiny CLIP has a short context


@pytest.fixture(scope="module")
def model(invertible_pipe, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("models") / "invertible"
    invertible_pipe.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("data")
    with ShardWriter(folder, "heldout") as shards:
        for i, concept in enumerate(("apple", "fish", "sun", "moon")):
            image = Image.new("RGB", (32, 32), "white")
            image.paste((60 * i, 20, 250 - 60 * i), (4 * i, 4, 4 * i + 12, 24))
            file = io.BytesIO()
            image.save(file, "PNG")
            meta = {"annotation": concept, "style": "pale", "captions": [f"{concept}, pale emoji"]}
            shards.write(concept, {"png": file.getvalue(), "json": meta})
    return str(folder / "heldout-*.tar")


def run(model, data, *arguments) -> int:
    words = ["evaluate-manipulations", "--model", model, "--data", data, "--quiet"]
    return main([*words, *map(str, arguments)])


@pytest.fixture(scope="module")
def results(model, data, tmp_path_factory) -> dict:
    file = tmp_path_factory.mktemp("results") / "all.json"
    assert run(model, data, "--steps", 6, "--json", file) == 0
    return json.loads(file.read_text())


def test_all_parts_are_in_the_table(results):
    assert set(MANIPULATION_PARTS) <= results.keys()
    table = manipulation_rows(results)
    assert len(table) > 20 and all(row.figure and row.value for row in table)


def test_corrected_inversion_reconstructs_better(results):
    part = results["reconstruction"]
    psnr = {name: values["mean"] for name, values in part["psnr"].items()}
    assert psnr["fixed_point, guidance 2"] > psnr["plain, guidance 2"]
    assert psnr["fixed_point, no guidance"] > 25 and part["upsampled"]["size"] == 16


def test_variations_move_away_with_eta(results):
    distances = [results["variations"][str(eta)]["pixel_rms"] for eta in ETAS]
    assert distances == sorted(distances) and distances[0] < 0.1


def test_paths_end_at_the_reconstructions(results):
    path = results["interpolation"]
    assert path["ends_differ_by"] <= 1 and path["paths"] == 2
    assert path["largest_step_of_embeddings"] < 1.01
    assert all(1 <= step["mean"] <= step["maximum"] for step in path["largest_step"].values())


def test_text_diffs_start_at_the_source(results):
    assert results["text_diff"]["cases"] == 4
    for eta in TEXT_DIFF_ETAS:
        diff = results["text_diff"][str(eta)]
        assert 0 <= diff["monotone"] <= diff["rising_steps"] <= 1
        assert diff["monotone_embeddings"] == 1
    assert results["text_diff"]["0.0"]["cosine_to_source"]["0.0"] > 0.9


def test_all_components_give_the_full_embedding(results):
    values = results["pca"]["by_count"]["3"]
    assert values["cosine"] == pytest.approx(1, abs=1e-3)
    assert values["explained"] == pytest.approx(1, abs=1e-3)
    assert values["recall@1"] == results["pca"]["full"]["recall@1"]


def test_inpainting_keeps_pixels_outside_the_mask(results):
    part = results["inpainting"]
    free, pasted = part["training-free"], part["pasted"]
    assert free["kept_differs_by"] == pasted["kept_differs_by"] == 0
    assert part["captions"] == 4 and part["random"] == 0.25 and "fine-tuned" not in part
    assert free["seam"] < pasted["seam"] + 20
    assert free["seam_of_own_caption"] < pasted["seam"] + 20


def test_missing_training_data_is_reported_before_the_first_part(model, data, capsys):
    assert run(model, data, "--train-data", "none", "--parts", "reconstruction") == 2
    assert "no data at none" in capsys.readouterr().err


def test_one_image_has_no_components(model, data, tmp_path, capsys):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a")
    assert run(model, data, "--train-data", tmp_path, "--parts", "pca") == 2
    assert f"{tmp_path}: 1 of 1 images can be read; expected 2" in capsys.readouterr().err


def test_an_interrupted_command_resumes(model, data, tmp_path, monkeypatch, capsys):
    file = tmp_path / "some.json"
    assert run(model, data, "--steps", 6, "--json", file, "--parts", "pca") == 0
    parts, run_part = [], ManipulationEvaluation.run
    monkeypatch.setattr(
        ManipulationEvaluation, "run", lambda self, part: parts.append(part) or run_part(self, part)
    )

    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(ManipulationEvaluation, "text_diff", interrupt)
    wanted = ("--parts", "pca", "reconstruction", "text_diff")
    assert run(model, data, "--steps", 6, "--json", file, *wanted) == 130
    assert parts == ["reconstruction", "text_diff"]
    assert json.loads(file.read_text()).keys() == {"settings", "pca", "reconstruction"}
    for other in (["--steps", 7], ["--steps", 6, "--train-data", data]):
        assert run(model, data, *other, "--json", file, "--parts", "pca") == 2
        assert "other settings" in capsys.readouterr().err


def test_one_pair_is_too_few(invertible_pipe, data):
    with pytest.raises(ValueError, match="the only held-out caption is"):
        ManipulationEvaluation(invertible_pipe, load_pairs(data, 8, 1, False), list)


def test_targets_have_another_caption(invertible_pipe, data):
    pairs = load_pairs(data, 8, None, False)
    repeated = replace(pairs, entries=[pairs.entries[row] for row in (0, 1, 0, 1)])
    evaluation = ManipulationEvaluation(invertible_pipe, repeated, list)
    assert evaluation.targets == [3, 0, 1, 2]


def test_the_seam_is_a_step_of_colour():
    image = Image.new("L", (8, 8)).convert("RGB")
    image.paste((60, 60, 60), (2, 2, 6, 6))
    assert seam(image, (2, 2, 6, 6)) == pytest.approx(60)
    assert seam(Image.fromarray(np.full((8, 8, 3), 9, np.uint8)), (2, 2, 6, 6)) == 0
