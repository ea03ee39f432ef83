"""The benchmark against diffusers: both sides draw the same, in turns, and what the table tells of it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import unclip
from unclip.cli.main import main
from unclip.evaluation.bench import BenchConfig, compare, karlo, reference, tables, turns
from unclip.evaluation.bench.calls import Inputs

CPU = torch.device("cpu")
TINY = BenchConfig("karlo-tiny", dtype="fp32", device="cpu", repeat=1)
FEW_STEPS = replace(
    karlo.KARLO_OPTIONS,
    prior=replace(karlo.KARLO_OPTIONS.prior, steps=5),
    decoder=replace(karlo.KARLO_OPTIONS.decoder, steps=5),
    upsamplers=(replace(karlo.KARLO_OPTIONS.upsamplers[0], steps=3),),
)
PEAK = {"convolution": 2e12, "matmul": 1e12}


@pytest.fixture(scope="module")
def karlo_pipe():
    return karlo.build("karlo-tiny", torch.float32)


def test_the_reference_is_diffusers_pipeline(tmp_path):
    """Stage by stage, but the same numbers as its own call draws."""
    theirs = pytest.importorskip("karlo")
    pipe = theirs.text_to_image()
    ours = unclip.load(theirs.write(pipe, tmp_path / "karlo"), "cpu", torch.float32)
    prompts = ["a fish", "two birds"]
    expected = pipe(
        prompts, generator=generators(), output_type="np", decoder_num_inference_steps=3
    ).images
    options = replace(ours.options, decoder=replace(ours.options.decoder, steps=3))
    stages = {name: stage(ours) for name, stage in reference.REFERENCES.items()}
    drawn = reference.draw(stages, prompts, generators(), options).mul(0.5).add(0.5)
    apart = (drawn.permute(0, 2, 3, 1) - torch.from_numpy(expected)).abs()
    assert apart.max() < 5e-3 and apart.mean() < 5e-5  # the text is encoded by open_clip here


def generators():
    return [torch.Generator().manual_seed(seed) for seed in (3, 4)]


def test_matrices_are_shared_with_the_reference(karlo_pipe):
    network = reference.reference_prior(karlo_pipe.prior)
    ours, theirs = karlo_pipe.prior.blocks[1], network.transformer_blocks[1]
    assert theirs.ff.net[2].weight.data_ptr() == ours.fc2.weight.data_ptr()
    assert theirs.attn1.to_q.weight.data_ptr() == ours.qkv.weight.data_ptr()


def test_both_sides_answer_the_same(karlo_pipe):
    inputs = Inputs.make(karlo_pipe, ["a fish", "two birds"])
    for stage in reference.REFERENCES.values():
        side = stage(karlo_pipe)
        assert reference.difference(side, inputs) < 1e-4
        bias = next(reversed(list(side.networks[-1].parameters())))
        bias.data = bias + 1  # only theirs
        assert reference.difference(side, inputs) > 0.1


def test_contenders_take_turns():
    order = []
    contenders = {
        n: turns.Contender(lambda on_step, n=n: order.append(n) or n) for n in ("a", "b", "c")
    }
    taken = turns.take_turns(contenders, CPU, 3, "", progress=False)
    assert "".join(order) == "abccbaabc" and [one.result for one in taken["b"]] == ["b"] * 3


@pytest.fixture
def quick(monkeypatch):
    """A few steps, and a peak that nobody measures."""
    monkeypatch.setattr(compare, "KARLO_OPTIONS", FEW_STEPS)
    monkeypatch.setattr(turns, "machine_peak", lambda where: PEAK)


def test_rows_of_a_comparison(quick, tmp_path, capsys):
    words = [
        "bench",
        "--model",
        "karlo-tiny",
        "--dtype",
        "fp32",
        "--device",
        "cpu",
        "--against",
        "diffusers",
    ]
    assert main([*words, "--repeat", "1", "--quiet", "--json", str(tmp_path / "against.json")]) == 0
    results = json.loads((tmp_path / "against.json").read_text())
    rows = {row["what"]: row for row in results["rows"]}
    stages = ["prior, 5 steps, 1 image", "prior, 4 images of one prompt", "decoder step, 1 image"]
    wholes = [f"whole pipeline, {what}, 1 image" for what in ("exact", "fast")]
    assert list(rows) == [*stages, "upsampler step, 1 image", *wholes]
    for row in rows.values():
        assert row["ratio"] == pytest.approx(row["theirs"][0] / row["ours"][0]) and row[
            "ratios"
        ] == [row["ratio"]]
    for name in stages:
        theirs, ours = rows[name]["flops"]
        assert theirs > ours > 0 and rows[name]["difference"] < 1e-4
    assert rows[stages[0]]["composed"] and not rows[stages[2]]["composed"]
    assert rows["whole pipeline, exact, 1 image"]["theirs"][0] > 5 * rows[stages[2]]["theirs"][0]
    out = capsys.readouterr().out
    assert (
        out.index("decoder step, 1 image: ") < out.index("| upsampler step, 1 image |")
        and "unclip | times" in out
    )


def test_whole_pictures_of_both_sides_are_the_same(quick):
    exact, fast = compare.compare_whole(TINY, compiled=False, progress=False)
    assert exact.difference < 2e-3 < fast.difference and not exact.composed
    assert len(exact.theirs) == len(fast.ours) == 1 and exact.theirs == fast.theirs


def test_a_model_that_diffusers_cannot_express_is_refused(quick, tiny_folder, capsys):
    assert main(["bench", "--model", str(tiny_folder), "--against", "diffusers", "--quiet"]) == 2
    assert (
        "cannot be compared with diffusers: prior (its null text is learned"
        in capsys.readouterr().err
    )


def test_the_table_of_a_comparison_tells_what_is_composed():
    row = turns.Comparison("a step", [3.0, 6.0], [1.0, 2.0], True, (1e12, 5e11), 0.01).plain()
    whole = turns.Comparison("whole pipeline", [8.0], [2.0], made=(4, "images")).plain()
    results = {
        "against": "diffusers 1",
        "machine_peak": PEAK,
        "rows": [row, whole],
        "peak_memory": 2.5e9,
    }
    head, _, line, last, *notes = tables.comparison_table(results).splitlines()
    assert "diffusers 1 | unclip" in head
    assert line == "| a step * | 4.50 s | 1.50 s | 3x | 3x to 3x | 11% and 17% |"
    assert (
        last == "| whole pipeline | 8.00 s | 2.00 s | 4x | 4x to 4x | 0.5 and 2 images a second |"
    )
    assert (
        "single steps x their number" in notes[1]
        and "a step 1.0e-02 standard deviations" in notes[3]
    )
    assert notes[5] == "Both sides needed 2.50 GB of memory at most."
