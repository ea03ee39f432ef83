"""`unclip evaluate-priors`."""

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
from unclip.evaluation.priors import (
    TEXT_EMBEDDING,
    TEXT_ONLY,
    TRUE_EMBEDDING,
    PriorComparison,
)
from unclip.evaluation.report import prior_table
from unclip.models.unclip.ar_prior import ARPrior, ARPriorConfig
from unclip.models.unclip.one_shot_prior import OneShotPrior, OneShotPriorConfig
from unclip.pipelines.unclip.pipeline import UnCLIPPipeline

SIZES = (EMB_DIM, TEXT_WIDTH, CONTEXT, 32, 2, 2)
NO_PRIOR = [TEXT_EMBEDDING, TEXT_ONLY, TRUE_EMBEDDING]


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


class ConstantPrior(OneShotPrior):
    """A prior with the same output for every caption."""

    def sample(self, prefix, generators, combine, **options):
        return torch.ones(len(generators), EMB_DIM)


def compare(pipe, held_out, **changes) -> PriorComparison:
    torch.manual_seed(0)
    priors = {
        "ar": ARPrior(ARPriorConfig(*SIZES, components=4, buckets=8)),
        "constant": ConstantPrior(OneShotPriorConfig(*SIZES)),
    }
    return PriorComparison(pipe, priors, held_out, progress=False, **changes)


def test_rows_of_priors_and_of_the_decoder_alone(pipe, held_out):
    own, schedule = pipe.prior, pipe.schedules["prior"].config
    rows = list(compare(pipe, held_out, guidance={"ar": 1.5}).rows())
    assert [row["name"] for row in rows] == ["diffusion", "ar", "constant", *NO_PRIOR]
    assert pipe.prior is own and pipe.schedules["prior"].config == schedule
    assert [row.get("guidance") for row in rows] == [2.0, 1.5, 2.0, None, None, None]
    assert all(row["milliseconds"] > 0 for row in rows[:3])
    assert all(0 <= row["recall@1"] <= 1 for row in rows)
    _, ar, constant, _, text_only, truth = rows
    assert truth["cosine"] == pytest.approx(1.0) and truth["gap"] > 0
    assert constant["gap"] == pytest.approx(0.0, abs=1e-6)
    assert constant["cosine_of_seeds"] == pytest.approx(1.0)
    assert ar["cosine_of_seeds"] < 1 - 1e-3
    assert "cosine" not in text_only and json.dumps(rows)


def test_cosine_is_that_of_the_pipeline_s_embeddings(pipe, held_out):
    row = next(compare(pipe, held_out, seed=3).rows())
    result = pipe(held_out.captions, seed=3, progress=False)
    cosine = torch.cosine_similarity(result.image_emb, pipe.encode_image(held_out.floats()))
    assert row["cosine"] == pytest.approx(cosine.mean().item(), abs=1e-5)


@pytest.mark.parametrize("name", ["diffusion", TRUE_EMBEDDING])
def test_names_must_be_unique(name, pipe, held_out):
    prior = OneShotPrior(OneShotPriorConfig(*SIZES))
    with pytest.raises(ValueError, match=f"name '{name}' of a prior is taken"):
        PriorComparison(pipe, {name: prior}, held_out, progress=False)


def test_guidance_of_an_unknown_prior_is_an_error(pipe, held_out):
    with pytest.raises(ValueError, match="'art'; expected one of diffusion, ar, constant"):
        compare(pipe, held_out, guidance={"art": 1.0})


def test_the_command_prints_a_table_and_writes_results(tiny_folder, data, tmp_path, capsys):
    save_component(ARPrior(ARPriorConfig(*SIZES, components=4, buckets=8)), tmp_path / "ar")
    out = tmp_path / "priors.json"
    arguments = (
        f"evaluate-priors --model {tiny_folder} --data {data} --limit 4 --quiet "
        f"--prior ar={tmp_path / 'ar'} --prior-guidance ar=1 --json {out}"
    )
    assert main(arguments.split()) == 0
    results, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert results["pairs"] == 4
    assert [row["name"] for row in results["rows"]] == ["diffusion", "ar", *NO_PRIOR]
    assert prior_table(results["rows"]) in printed and printed.count("embedding from") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--prior nowhere", "'nowhere' is not of the form NAME=VALUE"),
        ("--prior ar=nowhere", "nowhere"),
        ("--prior-guidance diffusion=much", "--prior-guidance: 'much' is not a finite number"),
        ("--batch-size 0", "'0' is not a whole number"),
        ("--json nowhere/priors.json", "nowhere"),
        ("--limit 1", "expected at least two different captions"),
    ],
)
def test_invalid_arguments_are_reported_in_one_line(arguments, message, tiny_folder, data, capsys):
    words = f"evaluate-priors --model {tiny_folder} --data {data} --quiet {arguments}"
    assert main(words.split()) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
