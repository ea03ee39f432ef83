"""`unclip evaluate-approximations`."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from scripts import write_shape_images

import unclip
from unclip.cli.main import main
from unclip.evaluation import approximations as module
from unclip.evaluation.approximations import (
    EXACT,
    OTHER_SEEDS,
    Approximation,
    ApproximationError,
    approximations,
)
from unclip.evaluation.report import approximation_table

CAPTIONS = ["a red apple", "a blue fish", "a fish"]


@pytest.fixture
def measurement(tiny_pipe, tiny_folder, monkeypatch) -> ApproximationError:
    monkeypatch.setattr(module, "REPEATS", 1)
    return ApproximationError(
        tiny_pipe,
        CAPTIONS,
        lambda dtype: unclip.load(tiny_folder, "cpu", dtype),
        batch_size=2,
        progress=False,
    )


def test_rows_of_all_approximations(measurement):
    rows = {row["name"]: row for row in measurement.rows()}
    assert list(rows)[:2] == [EXACT, OTHER_SEEDS] and list(rows)[-1] == "preset fast, bfloat16"
    assert len(rows) == 13  # half and a third of 3 steps are both 2
    assert json.loads(json.dumps(rows)) == rows
    exact, others = rows.pop(EXACT), rows[OTHER_SEEDS]
    assert exact["pixels"] == 0 and exact["cosine"] == pytest.approx(1.0)
    assert others["pixels"] > 1 and "seconds" not in others
    for name, row in rows.items():
        assert row["pixels"] > 0 and row["cosine"] < 1 and 0 <= row["recall@1"] <= 1, name
        if name != OTHER_SEEDS:
            assert len(row["seconds"]) == len(row["exact_seconds"]) == 1
    for name in ("bfloat16", "int8 weights"):
        assert 0 < rows[name]["pixels"] < others["pixels"]


def test_rows_that_are_done_are_skipped(measurement, tiny_pipe):
    names = [EXACT, OTHER_SEEDS, *approximations(tiny_pipe.options, tiny_pipe.options)]
    (row,) = measurement.rows(done=[name for name in names if name != "bfloat16"])
    assert row["name"] == "bfloat16"


def test_the_exact_model_is_not_changed(measurement, tiny_pipe):
    keys, options = tiny_pipe.decoder.state_dict().keys(), tiny_pipe.options
    measurement._apply(Approximation(options, quantize="int8"))
    assert tiny_pipe.decoder.state_dict().keys() == keys and tiny_pipe.dtype == torch.float32
    bfloat16 = measurement._apply(Approximation(options, dtype=torch.bfloat16))
    assert bfloat16.dtype == torch.bfloat16
    assert measurement._apply(Approximation(options)) is tiny_pipe


def test_differences_and_recall_are_those_of_the_images(measurement):
    rotated = [measurement.exact[i] for i in (1, 2, 0)]
    measurement._text_emb = measurement._exact_emb  # each exact image matches its caption
    assert measurement._compare(measurement.exact)["recall@1"] == 1.0
    row = measurement._compare(rotated)
    assert row["recall@1"] == 0.0 and row["pixels"] > 1
    measurement.exact = [image.point(lambda value: 0) for image in rotated]
    constant = [image.point(lambda value: 10) for image in rotated]
    assert measurement._compare(constant)["pixels"] == 10.0


def test_images_of_a_repeated_caption_have_one_target(measurement):
    measurement.captions = ["a fish", "a blue fish", "a fish"]
    first, second, _ = measurement.exact
    measurement.exact = [first, second, first]
    measurement._text_emb = measurement._exact_emb
    assert measurement._compare(measurement.exact)["recall@1"] == 1.0


def test_recall_needs_two_distinct_captions(tiny_pipe):
    with pytest.raises(ValueError, match="only one distinct caption"):
        ApproximationError(tiny_pipe, ["a fish"] * 2, lambda dtype: tiny_pipe)


def test_calls_are_interleaved_with_exact_ones(measurement, monkeypatch):
    monkeypatch.setattr(module, "REPEATS", 2)
    order = []

    def call(name, *_, **__):
        order.append(name)

    exact, fast = partial(call, "exact"), partial(call, "fast")
    exact.options, measurement.pipe = measurement.pipe.options, exact
    times = measurement._times(fast, exact.options)
    assert order == ["fast", "exact", "exact", "fast", "fast", "exact"]
    counts = {name: len(seconds) for name, seconds in times.items()}
    assert counts == {"seconds": 2, "exact_seconds": 2}


def test_the_table_shows_speed_ups():
    row = {
        "name": "half",
        "seconds": [1.0, 2.0],
        "exact_seconds": [3.0, 4.0],
        "pixels": 1.234,
        "cosine": 0.98765,
        "recall@1": 0.5,
    }
    lines = approximation_table([row]).splitlines()
    assert lines[2] == "| half | 2.33 (2.00 to 3.00) | 1.23 | 0.9877 | 50.0% |"


def test_the_command_resumes(tiny_folder, tmp_path, monkeypatch, capsys):
    write_shape_images(tmp_path / "images")
    monkeypatch.setattr(module, "REPEATS", 1)
    file, rows = tmp_path / "results.json", ApproximationError.rows

    def interrupted(self, done=()):
        for i, row in enumerate(rows(self, done)):
            if i == 2:
                raise KeyboardInterrupt
            yield row

    monkeypatch.setattr(ApproximationError, "rows", interrupted)
    options = f"--model {tiny_folder} --data {tmp_path}/images --limit 3 --quiet --json {file}"
    for command, count in (("evaluate-approximations", 2), ("drift", 4)):
        assert main([command, *options.split()]) == 130
        stored = json.loads(file.read_text())["rows"]
        output = capsys.readouterr()
        assert len(stored) == count and f"| {stored[-1]['name']} |" in output.out
    assert "drift is deprecated" in output.err
    assert stored[0]["name"] == EXACT and len({row["name"] for row in stored}) == 4
    write_shape_images(tmp_path / "others")
    for other in (["--seed", "5"], ["--data", f"{tmp_path}/others"]):
        assert main(["evaluate-approximations", *options.split(), *other]) == 2
        assert "other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--data nowhere", "nowhere"),
        ("--data {data} --limit 1", "only one distinct caption"),
        ("--data {data} --batch-size 0", "'0' is not a whole number"),
        ("--data {data} --json no/folder/e.json", "no/folder"),
        ("", "--data"),
    ],
)
def test_invalid_arguments_are_reported_in_one_line(
    arguments, message, tiny_folder, tmp_path, capsys
):
    write_shape_images(tmp_path / "images")
    arguments = arguments.format(data=tmp_path / "images").split()
    words = ["evaluate-approximations", "--model", str(tiny_folder), "--quiet", *arguments]
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
