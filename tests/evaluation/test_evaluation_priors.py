"""Priors compared on the same captions: `unclip evaluate-priors`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import CONTEXT, EMB_DIM, TEXT_WIDTH
from scripts import write_shape_images

from unclip.checkpoints.store import save_component
from unclip.cli.main import main
from unclip.evaluation.pairs import Pairs, load_pairs
from unclip.evaluation.priors import TRUTH, WITHOUT, PriorComparison, table
from unclip.models.unclip.ar_prior import ARPrior, ARPriorConfig
from unclip.models.unclip.one_shot_prior import OneShotPrior, OneShotPriorConfig
from unclip.pipelines.unclip.pipeline import UnCLIPPipeline

SIZES = (EMB_DIM, TEXT_WIDTH, CONTEXT, 32, 2, 2)
NAMES = ["diffusion", "ar", "one-shot", *WITHOUT, TRUTH]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pairs") / "shapes"
    write_shape_images(folder, size=16)
    return folder


@pytest.fixture(scope="module")
def held_out(data) -> Pairs:
    return load_pairs(data, 8, progress=False)


@pytest.fixture(scope="module")
def pipe(tiny_folder) -> UnCLIPPipeline:
    return UnCLIPPipeline.from_pretrained(tiny_folder)


class KnowsTheTruth(OneShotPrior):
    """Whatever it is told, it draws one embedding."""

    def sample(self, prefix, generators, combine, **how):
        return torch.ones(len(generators), EMB_DIM)


def compare(pipe, held_out, **changes) -> PriorComparison:
    torch.manual_seed(0)
    priors = {
        "ar": ARPrior(ARPriorConfig(*SIZES, components=4, buckets=8)),
        "one-shot": KnowsTheTruth(OneShotPriorConfig(*SIZES)),
    }
    return PriorComparison(pipe, priors, held_out, progress=False, **changes)


def test_every_prior_and_the_decoder_without_one_are_measured(pipe, held_out):
    own, schedule = pipe.prior, pipe.schedules["prior"].config
    rows = list(compare(pipe, held_out, guidance={"ar": 1.5}).rows())
    assert [row["name"] for row in rows] == NAMES
    assert pipe.prior is own and pipe.schedules["prior"].config == schedule
    assert [row.get("guidance") for row in rows] == [2.0, 1.5, 2.0, None, None, None]
    assert all(row["milliseconds"] > 0 for row in rows[:3])
    assert all(0 <= row["recall@1"] <= 1 for row in rows)
    truth, same = rows[-1], rows[2]
    assert truth["cosine"] == pytest.approx(1.0) and truth["gap"] > 0
    assert same["gap"] == pytest.approx(0.0, abs=1e-6) and same["cosine_of_seeds"] == pytest.approx(
        1.0
    )
    assert rows[1]["cosine_of_seeds"] < 1 - 1e-3
    assert "cosine" not in rows[4] and json.dumps(rows)


def test_figures_are_those_of_the_pipeline(pipe, held_out):
    row = next(compare(pipe, held_out, seed=3).rows())
    drawn = pipe(held_out.captions, seed=3, progress=False)
    true_emb = pipe.encode_image(held_out.floats())
    assert row["cosine"] == pytest.approx(
        torch.cosine_similarity(drawn.image_emb, true_emb).mean().item(), abs=1e-5
    )


def test_names_are_told_apart(pipe, held_out):
    prior = OneShotPrior(OneShotPriorConfig(*SIZES))
    for name in ("diffusion", TRUTH):
        with pytest.raises(ValueError, match=f"a prior is named '{name}', as another row is"):
            PriorComparison(pipe, {name: prior}, held_out, progress=False)
    with pytest.raises(
        ValueError, match="guidance of 'art', which is no prior here; there are diffusion, ar"
    ):
        compare(pipe, held_out, guidance={"art": 1.0})


def test_the_command_prints_a_table_and_writes_figures(tiny_folder, data, tmp_path, capsys):
    save_component(ARPrior(ARPriorConfig(*SIZES, components=4, buckets=8)), tmp_path / "ar")
    arguments = [
        "evaluate-priors",
        "--model",
        str(tiny_folder),
        "--data",
        str(data),
        "--limit",
        "4",
        "--quiet",
    ]
    out = tmp_path / "priors.json"
    assert (
        main(
            [
                *arguments,
                "--prior",
                f"ar={tmp_path / 'ar'}",
                "--prior-guidance",
                "ar=1",
                "--json",
                str(out),
            ]
        )
        == 0
    )
    results, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert results["pairs"] == 4 and [row["name"] for row in results["rows"]] == [
        NAMES[0],
        NAMES[1],
        *NAMES[3:],
    ]
    assert table(results["rows"]) in printed and printed.count("embedding from") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prior", "nowhere"], "'nowhere' is not of the form NAME=VALUE"),
        (["--prior", "ar=nowhere"], "nowhere"),
        (
            ["--prior-guidance", "diffusion=much"],
            "--prior-guidance diffusion=much: expected a number",
        ),
        (["--batch-size", "0"], "'0' is not a whole number"),
        (["--json", "nowhere/priors.json"], "there is no folder nowhere"),
        (["--limit", "1"], "only one held-out pair"),
    ],
)
def test_bad_arguments_are_told_in_one_line(arguments, message, tiny_folder, data, capsys):
    told = [
        "evaluate-priors",
        "--model",
        str(tiny_folder),
        "--data",
        str(data),
        "--quiet",
        *arguments,
    ]
    assert main(told) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
