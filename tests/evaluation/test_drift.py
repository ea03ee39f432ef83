"""Approximations are told apart from the exact model by speed, pixels and CLIP; what was measured is kept."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from scripts import write_shape_images

import unclip
from unclip.cli.main import main
from unclip.evaluation import drift
from unclip.evaluation.drift import EXACT, OTHER_SEEDS, Approximation, Drift, approximations

CAPTIONS = ["a red apple", "a blue fish", "a fish"]


@pytest.fixture
def measured(tiny_pipe, tiny_folder, monkeypatch):
    monkeypatch.setattr(drift, "TURNS", 1)
    return Drift(
        tiny_pipe,
        CAPTIONS,
        lambda dtype: unclip.load(tiny_folder, "cpu", dtype),
        batch_size=2,
        progress=False,
    )


def test_every_approximation_is_measured_once(measured):
    rows = {row["name"]: row for row in measured.rows()}
    assert list(rows)[:2] == [EXACT, OTHER_SEEDS] and list(rows)[-1] == "preset fast, bfloat16"
    assert len(rows) == 13  # of 3 steps, half and a third are both 2
    assert json.loads(json.dumps(rows)) == rows
    exact = rows.pop(EXACT)
    assert exact["pixels"] == 0 and exact["cosine"] == pytest.approx(1.0)
    assert rows[OTHER_SEEDS]["pixels"] > 1 and "seconds" not in rows[OTHER_SEEDS]
    for name, row in rows.items():
        assert row["pixels"] > 0 and row["cosine"] < 1 and 0 <= row["recall@1"] <= 1, name
        assert name == OTHER_SEEDS or len(row["seconds"]) == len(row["exact_seconds"]) == 1
    assert 0 < rows["bfloat16"]["pixels"] < rows[OTHER_SEEDS]["pixels"]
    assert 0 < rows["int8 weights"]["pixels"] < rows[OTHER_SEEDS]["pixels"]


def test_what_is_done_is_not_measured_again(measured, tiny_pipe):
    names = [EXACT, OTHER_SEEDS, *approximations(tiny_pipe.options, tiny_pipe.options)]
    (row,) = measured.rows(done=[name for name in names if name != "bfloat16"])
    assert row["name"] == "bfloat16"


def test_the_exact_model_itself_is_not_changed(measured, tiny_pipe):
    before = {name: p.clone() for name, p in tiny_pipe.decoder.state_dict().items()}
    measured._changed(Approximation(tiny_pipe.options, quantize="int8"))
    assert (
        tiny_pipe.decoder.state_dict().keys() == before.keys() and tiny_pipe.dtype == torch.float32
    )
    assert (
        measured._changed(Approximation(tiny_pipe.options, dtype=torch.bfloat16)).dtype
        == torch.bfloat16
    )
    assert measured._changed(Approximation(tiny_pipe.options)) is tiny_pipe


def test_pixels_and_recall_are_those_of_the_pictures(measured):
    rotated = [measured.exact[i] for i in (1, 2, 0)]
    measured._text_emb = (
        measured._exact_emb
    )  # every picture is found, but for the ones that were moved
    assert measured._compared(measured.exact)["recall@1"] == 1.0
    row = measured._compared(rotated)
    assert row["recall@1"] == 0.0 and row["pixels"] > 1
    inverted = [image.point(lambda value: 255 - value) for image in measured.exact]
    measured.exact = [image.point(lambda value: 0) for image in measured.exact]
    light = [image.point(lambda value: 10) for image in inverted]
    assert measured._compared(light)["pixels"] == 10.0


def test_the_times_of_both_sides_are_taken_in_turns(measured, monkeypatch):
    monkeypatch.setattr(drift, "TURNS", 2)
    order = []
    exact, fast = (
        partial(lambda name, *_, **__: order.append(name), name) for name in ("exact", "fast")
    )
    exact.options, measured.pipe = measured.pipe.options, exact
    times = measured._times(fast, exact.options)
    assert order == ["fast", "exact", "exact", "fast", "fast", "exact"]
    assert {side: len(seconds) for side, seconds in times.items()} == {
        "seconds": 2,
        "exact_seconds": 2,
    }


def test_the_table():
    row = {
        "name": "half",
        "seconds": [1.0, 2.0],
        "exact_seconds": [3.0, 4.0],
        "pixels": 1.234,
        "cosine": 0.98765,
    }
    lines = drift.table([{**row, "recall@1": 0.5}]).splitlines()
    assert lines[2] == "| half | 2.33 (2.00 to 3.00) | 1.23 | 0.9877 | 50.0% |"


def test_the_command_goes_on_where_it_stopped(tiny_folder, tmp_path, monkeypatch, capsys):
    write_shape_images(tmp_path / "pictures")
    monkeypatch.setattr(drift, "TURNS", 1)
    file = tmp_path / "drift.json"
    words = [
        "drift",
        "--model",
        str(tiny_folder),
        "--data",
        str(tmp_path / "pictures"),
        "--limit",
        "3",
        "--quiet",
    ]
    whole = drift.Drift.rows

    def two(self, done=()):
        for i, row in enumerate(whole(self, done)):
            if i == 2:
                raise KeyboardInterrupt
            yield row

    monkeypatch.setattr(drift.Drift, "rows", two)
    for count in (2, 4):
        assert main([*words, "--json", str(file)]) == 130
        rows = json.loads(file.read_text())["rows"]
        assert len(rows) == count and f"| {rows[-1]['name']} |" in capsys.readouterr().out
    assert rows[0]["name"] == EXACT and len({row["name"] for row in rows}) == 4
    assert main([*words, "--json", str(file), "--seed", "5"]) == 2
    assert "figures of other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--data nowhere", "no data at nowhere"),
        ("--data {data} --limit 1", "only one caption"),
        ("--data {data} --batch-size 0", "'0' is not a whole number"),
        ("--data {data} --json no/folder/e.json", "there is no folder no/folder"),
        ("", "required: --data"),
    ],
)
def test_bad_arguments_are_told_in_one_line(arguments, message, tiny_folder, tmp_path, capsys):
    write_shape_images(tmp_path / "pictures")
    arguments = arguments.format(data=tmp_path / "pictures").split()
    assert main(["drift", "--model", str(tiny_folder), "--quiet", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
