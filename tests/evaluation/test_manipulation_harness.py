"""The harness tells what manipulations are worth, keeps what it has measured, and goes on where it stopped."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image

from unclip.data.shards import ShardWriter
from unclip.evaluation import manipulation
from unclip.evaluation.manipulation import PARTS, Manipulations, main, rows
from unclip.evaluation.pairs import load_pairs

pytestmark = pytest.mark.filterwarnings("ignore:the prompt")  # the tiny CLIP has a short context


@pytest.fixture(scope="module")
def model(invertible_pipe, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("models") / "still"
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


@pytest.fixture(scope="module")
def results(model, data, tmp_path_factory) -> dict:
    file = tmp_path_factory.mktemp("results") / "all.json"
    main(["--model", model, "--data", data, "--steps", "6", "--json", str(file), "--quiet"])
    return json.loads(file.read_text())


def test_all_parts_are_measured(results):
    assert set(PARTS) <= results.keys()
    table = list(rows(results))
    assert len(table) > 20 and all(row.what and row.value for row in table)


def test_reconstruction_is_better_with_corrections(results):
    part = results["reconstruction"]
    assert (
        part["psnr"]["fixed_point, guidance 2"]["mean"] > part["psnr"]["plain, guidance 2"]["mean"]
    )
    assert part["psnr"]["fixed_point, no guidance"]["mean"] > 25 and part["upsampled"]["size"] == 16


def test_variations_and_paths_are_told_as_they_are(results):
    distances = [results["variations"][str(eta)]["pixel_rms"] for eta in manipulation.ETAS]
    assert distances == sorted(distances) and distances[0] < 0.1
    path = results["interpolation"]
    assert (
        path["ends_differ_by"] <= 1
        and path["paths"] == 2
        and path["largest_step_of_embeddings"] < 1.01
    )
    assert all(1 <= step["mean"] <= step["most"] for step in path["largest_step"].values())


def test_text_diffs_and_components_have_known_ends(results):
    assert results["text_diff"]["cases"] == 4
    for eta in manipulation.TEXT_DIFF_ETAS:
        diff = results["text_diff"][str(eta)]
        assert (
            0 <= diff["monotone"] <= diff["rising_steps"] <= 1 and diff["monotone_embeddings"] == 1
        )
    assert results["text_diff"]["0.0"]["cosine_to_source"]["0.0"] > 0.9
    of = results["pca"]["of"]
    assert of["3"]["cosine"] == pytest.approx(1, abs=1e-3) and of["3"][
        "explained"
    ] == pytest.approx(1, abs=1e-3)
    assert of["3"]["recall@1"] == results["pca"]["whole"]["recall@1"]


def test_inpainting_keeps_what_it_should(results):
    part = results["inpainting"]
    assert part["training-free"]["kept_differs_by"] == part["pasted"]["kept_differs_by"] == 0
    assert part["captions"] == 4 and part["random"] == 0.25
    assert part["training-free"]["seam"] < part["pasted"]["seam"] + 20 and "fine-tuned" not in part
    assert part["training-free"]["seam_of_own_caption"] < part["pasted"]["seam"] + 20


def test_what_was_measured_is_not_measured_again(model, data, tmp_path, monkeypatch):
    file = tmp_path / "some.json"
    args = [
        "--model",
        model,
        "--data",
        data,
        "--steps",
        "6",
        "--json",
        str(file),
        "--quiet",
        "--parts",
    ]
    main([*args, "pca"])
    measured = []
    run = Manipulations.run
    monkeypatch.setattr(
        Manipulations, "run", lambda self, part: measured.append(part) or run(self, part)
    )

    def stopped(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Manipulations, "text_diff", stopped)
    with pytest.raises(SystemExit, match="goes on with the parts that are missing"):
        main([*args, "pca", "reconstruction", "text_diff"])
    assert measured == ["reconstruction", "text_diff"]
    assert json.loads(file.read_text()).keys() == {"settings", "pca", "reconstruction"}
    with pytest.raises(SystemExit, match="holds figures under other settings"):
        main([*args[:5], "7", *args[6:], "pca"])


def test_one_pair_is_too_few(invertible_pipe, data):
    with pytest.raises(ValueError, match="1 held-out pair; expected at least 2"):
        Manipulations(invertible_pipe, load_pairs(data, 8, 1, False), list)


def test_a_seam_is_a_step_of_colour():
    image = Image.new("L", (8, 8)).convert("RGB")
    image.paste((60, 60, 60), (2, 2, 6, 6))
    assert manipulation._seam(image, (2, 2, 6, 6)) == pytest.approx(60)
    assert manipulation._seam(Image.fromarray(np.full((8, 8, 3), 9, np.uint8)), (2, 2, 6, 6)) == 0
