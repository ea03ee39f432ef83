"""The figures of an evaluation are right where the answer is known, and tell a good model from a bad one."""

from __future__ import annotations

import builtins
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import ROOT
from styled import HELD_OUT, STYLES, png, write_pairs

from unclip.cli.main import main
from unclip.evaluation import card, harness, report, sheets
from unclip.evaluation.drawing import Drawn, Imagined, UnCLIPDrawer
from unclip.evaluation.metrics import (
    agreement,
    diversity,
    nearest_by_cosine,
    nearest_by_pixels,
    psnr,
    recall,
)
from unclip.evaluation.pairs import Pairs, load_pairs
from unclip.evaluation.style import train_classifier
from unclip.evaluation.unclip_harness import NOISE_LEVELS, UnCLIPEvaluation

pytestmark = pytest.mark.filterwarnings("ignore:the prompt")  # the tiny CLIP has a short context


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def held_out(data) -> Pairs:
    return load_pairs(data / "heldout-*.tar", 8, progress=False)


@pytest.fixture(scope="module")
def train(data) -> Pairs:
    return load_pairs(sorted(data.glob("train-*.tar")), 8, progress=False)


@pytest.fixture(autouse=True)
def short_training_of_the_classifier(monkeypatch):
    monkeypatch.setattr(
        harness,
        "train_classifier",
        lambda pairs, seed, **_: train_classifier(pairs, seed, 100, False),
    )


@pytest.fixture
def evaluation(tiny_pipe, held_out, train) -> UnCLIPEvaluation:
    return UnCLIPEvaluation(
        UnCLIPDrawer(tiny_pipe, batch_size=3, progress=False), held_out, train, seed=5
    )


# -- metrics


def test_recall_counts_what_is_among_the_first_and_takes_ties_for_misses():
    candidates = torch.eye(4)
    emb = torch.tensor([[1.0, 0, 0, 0], [0.9, 1, 0, 0], [0.9, 0.8, 0.7, 0]])
    assert recall(emb, candidates, torch.tensor([0, 1, 2]), ks=(1, 2, 3)) == pytest.approx(
        {"recall@1": 2 / 3, "recall@2": 2 / 3, "recall@3": 1.0}
    )
    same = torch.ones(3, 4)
    assert recall(same, candidates, torch.tensor([0, 1, 2]), ks=(1,)) == {"recall@1": 0.0}


def test_agreement_is_the_mean_cosine_on_and_off_the_diagonal():
    true = torch.eye(3) * torch.tensor([1.0, 2.0, 3.0])  # lengths do not matter
    assert agreement(true, true) == pytest.approx({"matching": 1.0, "mismatched": 0.0, "gap": 1.0})
    shifted = agreement(true.roll(1, 0), true)
    assert shifted == pytest.approx({"matching": 0.0, "mismatched": 0.5, "gap": -0.5})


def test_diversity_is_0_for_copies_and_1_for_orthogonal_pictures():
    assert diversity(torch.ones(2, 3, 4)) == pytest.approx(0.0, abs=1e-6)
    assert diversity(torch.eye(3)[None]) == pytest.approx(1.0)


def test_psnr_of_a_known_error():
    truth = torch.zeros(2, 3, 4, 4)
    assert psnr(
        truth + torch.tensor([0.2, 0.02]).view(2, 1, 1, 1), truth
    ).tolist() == pytest.approx([20.0, 40.0])
    assert psnr(truth, truth).tolist() == [100.0, 100.0]


def test_nearest_pictures_are_found_whatever_the_chunk():
    torch.manual_seed(0)
    candidates = torch.randint(256, (7, 3, 4, 4), dtype=torch.uint8)
    wanted = torch.tensor([5, 0, 3])
    images = candidates[wanted].float() / 127.5 - 1 + 0.01
    for chunk in (2, 512):
        row, distance = nearest_by_pixels(images, candidates, chunk)
        assert row.tolist() == wanted.tolist()
        assert distance.tolist() == pytest.approx([0.01] * 3, rel=0.05)
    row, distance = nearest_by_cosine(torch.eye(4)[[2, 1]] * 5, torch.eye(4))
    assert (row.tolist(), distance.tolist()) == ([2, 1], [0.0, 0.0])


# -- pairs


def test_pairs_know_style_concept_and_skin_tone(held_out, train):
    assert {(pair.concept, pair.style) for pair in held_out.entries} == HELD_OUT
    assert (len(train), train.styles) == (8, ["dark", "pale"])
    assert {pair.concept for pair in held_out.entries if pair.toned} == {"moon"}
    apple = held_out.captions.index("apple, dark emoji")
    truth = np.asarray(Image.open(io.BytesIO(png("apple", "dark"))))
    assert (np.asarray(held_out.picture(apple, 32)) == truth).all()
    assert held_out.floats([apple]).shape == (1, 3, 8, 8)
    assert held_out.floats().min() >= -1 and held_out.floats().max() == 1


def test_spread_evens_out_styles_and_leaves_skin_tones_for_last(held_out, train):
    rows = held_out.spread(4)
    assert sorted(rows) == [0, 1, 2, 3] and held_out.entries[rows[-1]].toned
    assert {held_out.entries[row].style for row in rows[:2]} == set(STYLES)
    assert len({train.entries[row].concept for row in train.spread(6)}) == 6


def test_pairs_of_a_folder_without_metadata(tmp_path):
    for name, caption in {
        "a": "red apple, noto emoji",
        "b": "something else",
        "c": "x, y emoji",
    }.items():
        (tmp_path / f"{name}.png").write_bytes(png("apple", "dark"))
        (tmp_path / f"{name}.txt").write_text(caption)
    pairs = load_pairs(tmp_path, 8, progress=False)
    assert [(pair.concept, pair.style) for pair in pairs.entries] == [
        ("red apple", "noto"),
        ("something else", None),
        ("x", "y"),
    ]
    assert load_pairs(tmp_path, 8, limit=2, progress=False).captions == [
        "red apple, noto emoji",
        "something else",
    ]
    (tmp_path / "b.png").write_bytes(b"no picture")
    with pytest.warns(UserWarning, match="1 broken pictures left out"):
        assert load_pairs(tmp_path, 8, progress=False).broken == 1


# -- the style classifier


def test_the_classifier_tells_styles_and_is_the_same_again(train, held_out):
    classifier = train_classifier(train, 1, 100, False)
    styles = [pair.style for pair in held_out.entries]
    assert classifier.right(held_out.floats(), styles).all()
    assert not classifier.right(
        held_out.floats(), ["pale" if style == "dark" else "dark" for style in styles]
    ).any()
    again = train_classifier(train, 1, 100, False)
    assert all(
        torch.equal(a, b) for a, b in zip(classifier.parameters(), again.parameters(), strict=True)
    )


# -- the evaluation


def test_what_is_measured_is_what_the_pipeline_draws(evaluation, tiny_pipe):
    """Stage by stage and in other batches, but the same pictures; asked for twice, the same again."""
    pictures = evaluation.drawer.enlarge(evaluation.drawn, [3, 1])
    again = evaluation.drawer.enlarge(evaluation.drawn, [1, 3])
    for row, picture, same in zip([3, 1], pictures, reversed(again), strict=True):
        drawn = tiny_pipe(evaluation.held_out.captions[row], seed=5 + row, progress=False).images[0]
        assert np.abs(np.asarray(picture, int) - np.asarray(drawn, int)).max() <= 2
        assert np.abs(np.asarray(picture, int) - np.asarray(same, int)).max() <= 2


def test_results_are_plain_and_complete(evaluation):
    results = evaluation.run()
    assert json.loads(json.dumps(results)) == results
    assert results["held_out"] == {"pairs": 4, "broken": 0} and results["train"] == {
        "pairs": 8,
        "broken": 0,
    }
    assert results["options"]["decoder"]["steps"] == 3 and results["parameters"].keys() >= {
        "clip",
        "prior",
        "decoder",
    }
    groups = results["recall"]["groups"]
    assert {name: group["pictures"] for name, group in groups.items()} == {
        "all": 4,
        "dark": 2,
        "pale": 2,
        "without skin tones": 3,
    }
    assert groups["dark"]["captions"] == 4 and groups["without skin tones"]["captions"] == 3
    assert (
        results["repeatable"]["same_seed_same_bytes"]
        and results["repeatable"]["redrawn_same_bytes"]
    )
    assert results["repeatable"]["batch_and_alone_differ_by"] <= 2
    assert results["upsampler"]["from"] == 8 and results["upsampler"]["to"] == 16
    assert (
        results["upsampler"]["psnr"]["bicubic"] > results["upsampler"]["psnr"]["upsampled"]
    )  # random weights
    names = " ".join(row.what for row in report.rows(results))
    for word in ("gap", "recall@5", "style", "nearest", "x_0", "PSNR", "same seed"):
        assert word in names


def test_a_model_that_draws_the_truth_scores_all_there_is(evaluation, held_out):
    """The harness given perfect stages: what it says of the drawn pictures is what it says of the true ones."""
    truth = held_out.floats()
    text = evaluation.drawer.encode_text(held_out.captions)
    evaluation.imagined = Imagined(held_out.captions, text, evaluation.true_emb, [])
    evaluation.drawn = Drawn(held_out.captions, truth, [])
    prior = evaluation.prior()
    assert prior["cosine"]["matching"] == pytest.approx(1.0) and prior["normalised_mse"] == 0.0
    assert prior["cosine"]["matching"] > prior["cosine_of_text"]["matching"]
    for group in evaluation.recall()["groups"].values():
        assert group["drawn"] == group["true"]
    nearest, style = evaluation.nearest(evaluation.train), evaluation.style(evaluation.train)
    assert (
        all(group["drawn"] == group["true"] == 1.0 for group in style.values())
        and style["dark"]["pictures"] == 2
    )
    for kind in ("clip", "pixels"):
        assert nearest[kind]["median_distance"]["drawn"] == pytest.approx(
            nearest[kind]["median_distance"]["true"]
        )
        assert nearest[kind]["same_concept"]["drawn"] == nearest[kind]["same_concept"]["true"]
    assert nearest["nearer_to_truth"] == 1.0


def test_a_model_that_copies_training_pictures_is_found_out(evaluation, held_out, train):
    evaluation.drawn = Drawn(held_out.captions, train.floats()[: len(held_out)], [])
    nearest = evaluation.nearest(train)
    assert nearest["nearer_to_truth"] == 0.0
    asked = [
        (pair.style, drawn.style)
        for pair, drawn in zip(held_out.entries, train.entries[:4], strict=True)
    ]
    same = [style == drawn for style, drawn in asked]
    assert evaluation.style(train)["all"] == {"pictures": 4, "drawn": sum(same) / 4, "true": 1.0}
    assert 0 < sum(same) < 4
    assert nearest["pixels"]["median_distance"]["drawn"] == pytest.approx(0.0, abs=1e-3)
    assert evaluation.nearest_to_drawn["pixels"][0].tolist() == [0, 1, 2, 3]


def test_recall_is_full_when_pictures_embed_like_their_captions(evaluation):
    evaluation.drawn_emb = evaluation.text_emb
    drawn = {name: group["drawn"] for name, group in evaluation.recall()["groups"].items()}
    assert all(found == {"recall@1": 1.0, "recall@5": 1.0} for found in drawn.values())


def test_error_of_a_decoder_that_is_known(evaluation, tiny_pipe, held_out, monkeypatch):
    """One that always answers the noise from which half of the true picture follows."""
    schedule, truth = tiny_pipe.schedules["decoder"], held_out.floats()

    def denoise(x_t, t, context):
        noise = (x_t - schedule.at("alpha", t, x_t) * truth / 2) / schedule.at("sigma", t, x_t)
        return torch.cat(
            [noise, torch.full_like(noise, 7.0)], dim=1
        )  # and a variance, which does not matter

    monkeypatch.setattr(tiny_pipe.decoder, "denoise", denoise)
    evaluation.drawer.batch_size = len(held_out)
    found, expected = evaluation.decoder(), (truth / 2).square().mean().item()
    assert found["x0_mse"] == pytest.approx(
        {str(level): expected for level in NOISE_LEVELS}, rel=1e-3
    )
    assert found["mean_x0_mse"] == pytest.approx(expected, rel=1e-3)


def test_parts_can_be_left_out_and_misspelt_ones_are_named(evaluation, tiny_pipe, held_out):
    assert not evaluation.run(["decoder"]).keys() & {
        "prior",
        "recall",
        "style",
        "nearest",
        "upsampler",
    }
    alone = UnCLIPEvaluation(UnCLIPDrawer(tiny_pipe, progress=False), held_out).run(["pictures"])
    assert "recall" in alone and not alone.keys() & {"style", "nearest", "train"}
    with pytest.raises(ValueError, match="unknown part 'decodr'"):
        evaluation.run(["decodr"])


def test_what_is_measured_is_kept_part_by_part(evaluation):
    kept = []
    evaluation.run(
        ["prior", "decoder"],
        keep=lambda results: kept.append({"prior", "decoder"} & results.keys()),
    )
    assert kept == [{"prior"}, {"prior", "decoder"}]


# -- pictures, tables, cards


def test_sheets_show_what_they_say(evaluation, held_out, train):
    evaluation.drawn = Drawn(held_out.captions, train.floats()[:4], evaluation.imagined.generators)
    sheet = sheets.cell(
        [Image.new("RGB", (8, 8), "red"), None, Image.new("RGB", (8, 8), "blue")],
        20,
        "a b",
        ["1"] * 3,
    )
    colours = [sheet.getpixel((left + 10, sheet.height // 3 + 2)) for left in (0, 24, 48)]
    assert colours == [(255, 0, 0), (255, 255, 255), (0, 0, 255)]
    shown = sheets.held_out_sheet(evaluation, size=20)
    assert shown.width == 4 * 24 - 4  # two styles, drawn and true
    assert sheets.failures_sheet(evaluation, size=20).width == 4 * 44 + 3 * 12
    assert sheets.nearest_sheet(evaluation, train, size=20).height > 20


def test_the_command_writes_figures_and_pictures(tiny_folder, data, tmp_path, capsys):
    arguments = [
        "evaluate",
        "--model",
        str(tiny_folder),
        "--data",
        *map(str, data.glob("heldout-*.tar")),
    ]
    drawing = [
        "--steps",
        "2",
        "--guidance",
        "1",
        "--prior-guidance",
        "1",
        "--prior-candidates",
        "1",
        "--quiet",
    ]
    written = ["--json", str(tmp_path / "e.json"), "--pictures", str(tmp_path / "p")]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a fish\n\na sun\n")
    parts = ["--parts", "prior", "pictures", "--prompts-file", str(prompts)]
    assert (
        main([*arguments, "--train-data", str(data / "train-*.tar"), *drawing, *written, *parts])
        == 0
    )
    results = json.loads((tmp_path / "e.json").read_text())
    assert (
        results["options"]["decoder"]["steps"] == 2 and results["options"]["prior"]["guidance"] == 1
    )
    assert results["options"]["prior_candidates"] == 1 and "decoder" not in results
    assert {path.name for path in (tmp_path / "p").iterdir()} == {
        "heldout.png",
        "failures.png",
        "samples.png",
        "nearest.png",
    }
    assert "recall@1 of the caption, all (4 pictures, 4 captions)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--data nowhere", "no data at nowhere"),
        ("--data {data}/heldout-*.tar --limit 0", "'0' is not a whole number"),
        ("--data {data}/heldout-*.tar --limit 1", "only one held-out pair"),
        ("--data {data}/heldout-*.tar --batch-size 0", "'0' is not a whole number"),
        ("--data {data}/heldout-*.tar --json no/folder/e.json", "there is no folder no/folder"),
        ("--data {data}/heldout-*.tar --model emojy", "unknown model 'emojy'"),
        ("--data {data}/heldout-*.tar --steps 0", "steps is 0"),
        ("", "required: --data"),
    ],
)
def test_bad_arguments_are_told_in_one_line(arguments, message, tiny_folder, data, capsys):
    words = [
        "evaluate",
        "--model",
        str(tiny_folder),
        "--quiet",
        *arguments.format(data=data).split(),
    ]
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_a_card_is_filled_in(tiny_folder, data, tmp_path, capsys):
    blocks = "".join(
        f"<!-- {name} -->\nold\n<!-- /{name} -->\n" for name in ("hours", "runs", "figures")
    )
    (tmp_path / "README.md").write_text(f"# A card\n{blocks}the end\n")
    rows = [{"step": 10 * i, "hours": i / 10, "loss": 1 / i} for i in range(1, 30)]
    for name in ("prior", "clip", "another"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        lines = [*rows, {"step": 290, "hours": 2.9, "val_loss": 0.25}]
        (tmp_path / "runs" / name / "metrics.jsonl").write_text(
            "\n".join(map(json.dumps, lines)) + "\n"
        )
    (tmp_path / "runs" / "begun").mkdir()
    (tmp_path / "runs" / "begun" / "metrics.jsonl").touch()
    words = [
        "--out",
        str(tmp_path),
        "--runs",
        str(tmp_path / "runs"),
        "--model",
        str(tiny_folder),
        "--quiet",
    ]
    card.main([*words, "--data", str(data / "heldout-*.tar"), "--parts", "prior", "--steps", "1"])
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("# A card\n<!-- hours -->\nold\n") and text.endswith(
        "<!-- /figures -->\nthe end\n"
    )
    assert "| clip | 290 | 2.9 | 0.0345 | 0.2500 |" in text
    assert (
        text.index("| clip |") < text.index("| prior |") < text.index("| another |")
        and "begun" not in text
    )
    assert (
        "| prior: cosine to the true embedding, gap |" in text
        and "On 4 held-out pairs, seed 0" in text
    )
    assert Image.open(tmp_path / "loss.png").width > 900
    assert {"evaluation.json", "heldout.png"} <= {path.name for path in tmp_path.iterdir()}

    card.main(["--out", str(tmp_path)])  # from evaluation.json alone
    assert (tmp_path / "README.md").read_text() == text
    rows = [
        {
            "name": "one-shot",
            "parameters": 2_340_000,
            "guidance": 1.0,
            "cosine": 0.7,
            "recall@1": 0.25,
        }
    ]
    (tmp_path / "priors.json").write_text(json.dumps({"pairs": 128, "rows": rows}))
    card.main(["--out", str(tmp_path)])
    text = (tmp_path / "README.md").read_text()
    assert "Other priors, and none, on 128 held-out captions" in text
    assert "| one-shot | 2.3 M | 1 | 0.700 |  | 25.0% |  |  |" in text

    (tmp_path / "README.md").write_text("# A card without markers\n")
    with pytest.raises(SystemExit, match="needs the lines <!-- figures -->"):
        card.main(["--out", str(tmp_path)])


@pytest.mark.parametrize("name", ["emoji", "emoji-dalle1"])
def test_the_card_of_a_bundled_model_can_be_filled_in(name):
    readme = (ROOT / "assets" / name / "README.md").read_text(encoding="utf-8")
    for block in ("hours", "runs", "figures"):
        assert "new" in card.fill(readme, block, "new").split(f"<!-- {block} -->")[1]


@pytest.mark.parametrize("name", ["emoji", "emoji-dalle1"])
def test_the_card_of_a_bundled_model_tells_what_was_measured(name):
    folder = ROOT / "assets" / name
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert card.fill(readme, "figures", card.figures(folder)) == readme


def test_loss_curves_without_matplotlib(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        card.draw_losses({"clip": [{"step": 1, "hours": 0.1, "loss": 1.0}]}, tmp_path / "loss.png")
    assert not list(tmp_path.iterdir())


def test_smoothing_keeps_the_level():
    assert card.smoothed([2.0] * 100) == [2.0] * 100
    assert card.smoothed([0.0] * 50 + [1.0] * 50)[52] == pytest.approx(3 / 5)
