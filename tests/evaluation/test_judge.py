"""The judge, and the figures that `unclip evaluate` takes from it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from styled import CONCEPTS, write_pairs

from unclip.cli.main import main
from unclip.evaluation.judge import Judge, augment, judged_concept, train_judge
from unclip.evaluation.metrics import interval, precision_and_recall
from unclip.evaluation.pairs import Pair, Pairs, load_pairs
from unclip.evaluation.unclip import UnCLIPEvaluation, UnCLIPGenerator


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def pairs(data) -> list[Pairs]:
    return [
        load_pairs(data / f"{split}-*.tar", 16, progress=False) for split in ("train", "heldout")
    ]


@pytest.fixture(scope="module")
def judge(pairs) -> Judge:
    with pytest.MonkeyPatch.context() as patch:  # the concepts of the toy data differ by position
        patch.setattr("unclip.evaluation.judge.augment", lambda images: images)
        return train_judge(pairs, 100, batch_size=12, progress=False)


def test_a_trained_judge_names_what_it_sees(judge, pairs):
    held_out = pairs[1]
    verdict = judge.judge(held_out.floats(), held_out.entries)
    assert verdict.concept.all() and verdict.style is not None and verdict.style.all()
    assert judge.config.concepts == sorted(CONCEPTS)
    names = [judge.config.concepts[i] for i in verdict.named]
    assert names == [pair.concept for pair in held_out.entries]
    others = judge.judge(held_out.floats().roll(1, dims=0), held_out.entries)
    assert not others.concept.any()  # the images of other concepts


def test_a_judge_is_saved_in_one_file(judge, pairs, tmp_path):
    judge.save(tmp_path / "judge.safetensors")
    loaded = Judge.load(tmp_path / "judge.safetensors")
    assert loaded.config == judge.config and not loaded.training
    images = pairs[1].floats()
    with torch.inference_mode():
        torch.testing.assert_close(loaded(images)[0], judge(images)[0])


def test_augmentation_keeps_the_image_recognisable():
    torch.manual_seed(0)
    images = torch.ones(64, 3, 40, 40)
    images[:, 0, 10:30, 10:30] = -1  # a square without red
    changed = augment(images)
    assert changed.shape == images.shape and changed.abs().max() <= 1
    assert not torch.equal(changed[0], changed[1])
    centre, corner = changed[:, 0, 18:22, 18:22].mean((1, 2)), changed[:, 0, :2, :2].mean((1, 2))
    assert (centre < -0.4).all() and (corner > 0.4).all()


def test_training_depends_on_the_seed_only(pairs):
    first, second, other = (train_judge(pairs, 2, seed, 8, progress=False) for seed in (0, 0, 1))
    assert torch.equal(first.concept.weight, second.concept.weight)
    assert not torch.equal(first.concept.weight, other.concept.weight)


def test_skin_tones_are_not_judged():
    pair = Pair("k", "c", "woman: medium-dark skin tone, red hair", None, None, True)
    assert judged_concept(pair) == "woman, red hair"
    assert judged_concept(replace(pair, concept="waving hand: light skin tone")) == "waving hand"


def test_the_interval_contains_the_mean_and_shrinks():
    hits = torch.arange(400) % 4 == 0
    low, high = interval(hits)
    assert low < 0.25 < high and high - low == pytest.approx(4 * 0.0217, rel=0.2)
    assert interval(torch.ones(5)) == [1.0, 1.0]


def test_precision_and_recall_tell_quality_from_coverage():
    torch.manual_seed(0)
    true = torch.cat([torch.randn(100, 4), 20 + torch.randn(100, 4)])
    half, noise = torch.randn(100, 4), 100 + torch.randn(100, 4)
    precision, covered = precision_and_recall(half, true)
    assert precision > 0.8 and 0.3 < covered < 0.55
    assert precision_and_recall(noise, true) == (0.0, 0.0)
    with pytest.raises(ValueError, match="more than k = 3"):
        precision_and_recall(half[:3], true)


def test_the_command_trains_a_judge_and_uses_it_again(tiny_folder, data, tmp_path, capsys):
    pytest.importorskip("torchmetrics")
    file = tmp_path / "judge.safetensors"
    arguments = (
        f"evaluate --model {tiny_folder} --data {data}/train-*.tar --steps 1 --prior-candidates 1 "
        f"--parts images --quiet --json {tmp_path}/e.json"
    )
    first = f"{arguments} --train-judge {file} --judge-steps 3 --table {tmp_path}/e.md"
    assert main(first.split()) == 0
    results = json.loads((tmp_path / "e.json").read_text())
    table = (tmp_path / "e.md").read_text()
    assert "| judge: concept among five |" in table and "precision" in table
    assert results["judge"].keys() == {"generated", "true"}
    low, high = results["judge"]["true"]["concept@5"]["interval"]
    assert 0 <= low <= results["judge"]["true"]["concept@5"]["mean"] <= high <= 1
    assert results["realism"]["generated"].keys() == {"fd", "kd", "precision", "recall"}

    assert results["variations"]["images"] == round(
        8 * results["judge"]["true"]["concept@1"]["mean"]
    )

    assert main(f"{arguments} --judge {file}".split()) == 0
    again = json.loads((tmp_path / "e.json").read_text())
    assert again == results
    assert len({*results["sha256"].values(), results["held_out"]["sha256"]}) > 3

    assert main(f"{arguments} --judge {file} --limit 3".split()) == 2
    assert "e.json has results for other settings" in capsys.readouterr().err
    (tmp_path / "e.json").unlink()
    assert main(f"{arguments} --judge {file} --limit 3".split()) == 0  # too few for the features
    few = json.loads((tmp_path / "e.json").read_text())
    assert "judge" in few and "realism" not in few


def test_variations_are_judged(tiny_pipe, judge, pairs, monkeypatch):
    """A decoder that returns the true images, and one that returns those of other concepts."""
    held_out = pairs[1]
    generator = UnCLIPGenerator(tiny_pipe, progress=False)
    evaluation = UnCLIPEvaluation(generator, held_out, judge=judge)
    monkeypatch.setattr(generator, "vary", lambda *given: held_out.floats())
    assert evaluation.variations() == {"images": 4, "mean": 1.0, "interval": [1.0, 1.0]}
    monkeypatch.setattr(generator, "vary", lambda *given: held_out.floats().roll(1, dims=0))
    assert evaluation.variations() == {"images": 4, "mean": 0.0, "interval": [0.0, 0.0]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--judge {model}/decoder/model.safetensors", "is not a judge"),
        ("--judge nowhere", "nowhere"),
        ("--judge a --train-judge b", "expected one of them"),
    ],
)
def test_errors_are_one_line(arguments, message, tiny_folder, data, capsys):
    pytest.importorskip("torchmetrics")
    command = f"evaluate --model {tiny_folder} --data {data}/heldout-*.tar --quiet {arguments}"
    assert main(command.format(model=tiny_folder).split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_an_unknown_concept_is_reported(judge, pairs, tiny_pipe):
    pair = replace(pairs[1].entries[0], concept="whale")
    with pytest.raises(ValueError, match="does not know 'whale'"):
        judge.judge(pairs[1].floats()[:1], [pair])
    held_out = replace(pairs[1], entries=[pair, *pairs[1].entries[1:]])
    with pytest.raises(ValueError, match="does not know 'whale'"):  # before images are generated
        UnCLIPEvaluation(UnCLIPGenerator(tiny_pipe, progress=False), held_out, judge=judge)


def test_a_broken_judge_is_reported_before_the_model_is_loaded(tiny_folder, tmp_path, capsys):
    pytest.importorskip("torchmetrics")
    model, file = tmp_path / "model", tiny_folder / "decoder" / "model.safetensors"
    shutil.copytree(tiny_folder, model)
    (model / "decoder" / "model.safetensors").write_bytes(b"broken too")
    assert main(f"evaluate --model {model} --data none --judge {file}".split()) == 2
    assert "is not a judge" in capsys.readouterr().err
