"""The figures of a DALL-E's evaluation are right where the answer is known; the command, its sheets and its card."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from styled import write_pairs

from unclip.cli.main import main
from unclip.evaluation import card, dalle_harness, harness, report
from unclip.evaluation.codec import evaluate_codec
from unclip.evaluation.dalle_harness import DalleEvaluation
from unclip.evaluation.drawing import DalleDrawer, Drawn, UnCLIPDrawer
from unclip.evaluation.pairs import Pairs, load_pairs
from unclip.evaluation.style import train_classifier
from unclip.pipelines.base import to_pil
from unclip.pipelines.unclip.bound_stage import to_tensor

pytestmark = pytest.mark.filterwarnings(
    "ignore:the prompt"
)  # the tiny tokenizer has a short context


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def held_out(data) -> Pairs:
    return load_pairs(data / "heldout-*.tar", 16, progress=False)


@pytest.fixture(scope="module")
def train(data) -> Pairs:
    return load_pairs(data / "train-*.tar", 16, progress=False)


@pytest.fixture(autouse=True)
def little_work(monkeypatch):
    monkeypatch.setattr(
        harness,
        "train_classifier",
        lambda pairs, seed, **_: train_classifier(pairs, seed, 8, False),
    )
    monkeypatch.setattr(dalle_harness, "CANDIDATES", (1, 2, 8))
    monkeypatch.setattr(dalle_harness, "RERANKED", 3)


@pytest.fixture
def drawer(tiny_dalle) -> DalleDrawer:
    return DalleDrawer(tiny_dalle, batch_size=3, progress=False)


@pytest.fixture
def evaluation(drawer, held_out, train) -> DalleEvaluation:
    return DalleEvaluation(drawer, held_out, train, beside=drawer, seed=5)


def test_what_is_measured_is_what_the_pipeline_draws(evaluation, tiny_dalle):
    for row in (0, 3):
        drawn = tiny_dalle(evaluation.held_out.captions[row], seed=5 + row, progress=False).images[
            0
        ]
        assert torch.equal(evaluation.drawn.images[row], to_tensor([drawn])[0])
        assert evaluation.drawer.enlarge(evaluation.drawn, [row])[0].tobytes() == drawn.tobytes()


def test_results_are_plain_and_complete(evaluation, tiny_dalle, held_out):
    results = evaluation.run()
    assert json.loads(json.dumps(results)) == results and evaluation.results == results
    assert results["beside"] == "tiny-dalle" and results["options"] == {
        "temperature": 1.0,
        "top_k": None,
        "top_p": 1.0,
        "guidance": 1.0,
    }
    assert results["parameters"].keys() == {"clip", "codec", "dalle"}
    for group in results["recall"]["groups"].values():
        assert group["drawn"] == group["beside"]  # the same model here
    for group in results["style"].values():
        assert group["drawn"] == group["beside"]
    assert results["codec"] == pytest.approx(
        evaluate_codec(tiny_dalle.codec, held_out.images), rel=1e-4
    )
    assert results["repeatable"] == {
        "same_seed_same_bytes": True,
        "batch_and_alone_differ_by": 0,
        "redrawn_same_bytes": True,
    }
    told = report.plain(report.rows(results))
    for words in (
        "recall@1",
        "tiny-dalle",
        "best of 8 (3 captions)",
        "PSNR",
        "perplexity",
        "bits per value",
    ):
        assert words in told


def test_the_best_of_more_candidates_is_the_best_of_their_groups(evaluation, tiny_dalle):
    chosen, figures = evaluation.chosen, evaluation.candidates()
    assert {n: tuple(emb.shape[:2]) for n, emb in chosen.emb.items()} == {
        1: (3, 8),
        2: (3, 4),
        8: (3, 1),
    }
    row = chosen.rows[1]
    pictures = tiny_dalle(
        evaluation.held_out.captions[row], num_images=8, seed=5, progress=False
    ).images
    emb = evaluation.drawer.embed(to_tensor(pictures))
    score = F.cosine_similarity(emb, evaluation.text_emb[row][None])
    torch.testing.assert_close(chosen.emb[1][1], emb)
    torch.testing.assert_close(chosen.emb[8][1, 0], emb[score.argmax()])
    best_of_2 = [score[i : i + 2].argmax().item() + i for i in range(0, 8, 2)]
    torch.testing.assert_close(chosen.emb[2][1], emb[best_of_2])
    assert torch.equal(chosen.first[8][1], to_tensor([pictures[score.argmax()]])[0])
    scores = [figures["of"][n]["clip_score"] for n in ("1", "2", "8")]
    assert scores == sorted(scores) and scores[0] < scores[-1] and figures["captions"] == 3
    best = max(
        tiny_dalle(
            evaluation.held_out.captions[row], num_candidates=8, seed=5, progress=False
        ).scores
    )
    assert best == pytest.approx(score.max().item(), abs=1e-5)


def test_candidates_that_are_the_truth_are_like_it(evaluation, held_out, monkeypatch):
    truth = dict(zip(held_out.captions, held_out.floats(), strict=True))
    monkeypatch.setattr(
        evaluation.drawer,
        "candidates",
        lambda caption, n, seed: Drawn([caption] * n, truth[caption].expand(n, -1, -1, -1)),
    )
    found = evaluation.candidates()["of"]
    assert all(figures["cosine_to_truth"] == pytest.approx(1.0) for figures in found.values())
    evaluation.true_emb = evaluation.text_emb
    evaluation.chosen = dalle_harness.Chosen([0, 2], {1: evaluation.text_emb[[0, 2]][:, None]}, {})
    assert evaluation.candidates()["of"] == {
        "1": {"clip_score": pytest.approx(1), "cosine_to_truth": pytest.approx(1), "recall@1": 1.0}
    }


def test_the_bound_s_terms_add_up(evaluation, tiny_dalle, held_out):
    found = evaluation.bound()
    pictures = to_pil(held_out.floats())
    bound = tiny_dalle.elbo(pictures, held_out.captions, seed=5)
    assert found["bits_per_dim"] == pytest.approx(bound.bits_per_dim.mean().item())
    assert sum(found["bits_of_dim"].values()) == pytest.approx(found["bits_per_dim"], rel=1e-5)
    assert found["bits_per_code"] * 16 == pytest.approx(found["bits_of_dim"]["codes"] * 3 * 16**2)
    with torch.no_grad():  # codes that all are as likely cost log2 of their number
        uniform = copy.deepcopy(tiny_dalle)
        uniform.dalle.code_head.weight.zero_(), uniform.dalle.code_head.bias.zero_()
    plain = DalleEvaluation(DalleDrawer(uniform, progress=False), held_out).bound()
    assert plain["bits_per_code"] == pytest.approx(math.log2(24), rel=1e-5)


def test_the_command_writes_figures_pictures_and_a_card(tiny_dalle_folder, data, tmp_path, capsys):
    model, held_out, trained = (
        str(tiny_dalle_folder),
        str(data / "heldout-*.tar"),
        str(data / "train-*.tar"),
    )
    words = [
        "--model",
        model,
        "--data",
        held_out,
        "--train-data",
        trained,
        "--quiet",
        "--temperature",
        "0.9",
    ]
    assert main(["evaluate", *words, "--beside", model, "--pictures", str(tmp_path / "p")]) == 0
    assert {path.name for path in (tmp_path / "p").iterdir()} == {
        f"{name}.png"
        for name in ("heldout", "failures", "samples", "nearest", "codec", "candidates")
    }
    assert Image.open(tmp_path / "p" / "codec.png").size == (4 * 16 + 3 * 4, 36)
    assert "tiny-dalle" in capsys.readouterr().out

    (tmp_path / "README.md").write_text(
        "".join(f"<!-- {name} -->\n<!-- /{name} -->\n" for name in ("runs", "figures"))
    )
    for name in ("codec", "dalle", "clip"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        row = {"step": 7, "hours": 0.25, "loss": 2.5, "val_loss": 3.5}
        (tmp_path / "runs" / name / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    runs = [str(tmp_path / "runs" / name) for name in ("dalle", "codec")]
    card.main(["--out", str(tmp_path), "--runs", *runs, *words, "--parts", "codec", "bound"])
    text = (tmp_path / "README.md").read_text()
    assert "| codec | 7 | 0.2 | 2.5000 | 3.5000 |\n| dalle |" in text and "clip" not in text
    assert (
        "seed 0; temperature 0.9, top-p 1, guidance 1." in text and "| codec alone: PSNR |" in text
    )
    assert (tmp_path / "codec.png").is_file() and not (tmp_path / "candidates.png").exists()


def test_another_model_stands_beside_on_the_samples(evaluation, tiny_pipe, held_out):
    from unclip.evaluation.sheets import samples_sheet

    two = samples_sheet(evaluation, ["a fish"] * 3, size=20)
    assert two.width == 2 * (2 * 20 + 4) + 8
    small = UnCLIPDrawer(tiny_pipe, progress=False)
    with pytest.raises(
        ValueError, match="tiny draws 8 pixels and tiny-dalle 16; pictures of different sizes"
    ):
        DalleEvaluation(evaluation.drawer, held_out, beside=small)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--steps 3", "tiny-dalle is of kind dalle, which has no --steps; it has --gui"),
        (
            "--parts prior",
            "unknown part 'prior'; expected some of pictures, candidates, codec, bound, repeatable",
        ),
        ("--beside nothing", "unknown model 'nothing'"),
        ("--top-k 0", "top_k is 0"),
    ],
)
def test_bad_arguments_are_told_in_one_line(arguments, message, tiny_dalle_folder, data, capsys):
    words = [
        "--model",
        str(tiny_dalle_folder),
        "--data",
        str(data / "heldout-*.tar"),
        "--quiet",
        *arguments.split(),
    ]
    assert main(["evaluate", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_a_model_without_clip_cannot_be_evaluated(tiny_dalle, held_out):
    blind = copy.copy(tiny_dalle)
    blind.clip = None
    with pytest.raises(
        ValueError, match="tiny-dalle has no CLIP, which tells what its pictures show"
    ):
        DalleEvaluation(DalleDrawer(blind), held_out)
