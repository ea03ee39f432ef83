"""compare_diffusers.py: both sides compute the same, interleaved."""

from __future__ import annotations

import json
from dataclasses import replace

import compare_diffusers
import comparison
import diffusers_reference as reference
import pytest
import torch
from comparison import Candidate, Comparison

import unclip
from unclip.checkpoints.diffusers.layout import KARLO_OPTIONS
from unclip.evaluation.bench import BenchConfig
from unclip.evaluation.bench.random_models import build_karlo
from unclip.evaluation.bench.stage_calls import Inputs

CPU = torch.device("cpu")
TINY = BenchConfig("karlo-tiny", dtype="float32", device="cpu", repeat=1)
FEW_STEPS = replace(
    KARLO_OPTIONS,
    prior=replace(KARLO_OPTIONS.prior, steps=5),
    decoder=replace(KARLO_OPTIONS.decoder, steps=5),
    upsamplers=(replace(KARLO_OPTIONS.upsamplers[0], steps=3),),
)
PEAK = {"convolution": 2e12, "matmul": 1e12}


@pytest.fixture(scope="module")
def karlo_pipe():
    return build_karlo("karlo-tiny", torch.float32)


def generators():
    return [torch.Generator().manual_seed(seed) for seed in (3, 4)]


def test_the_reference_generates_the_images_of_diffusers(tmp_path):
    karlo = pytest.importorskip("karlo")
    pipe = karlo.text_to_image()
    ours = unclip.load(karlo.write(pipe, tmp_path / "karlo"), "cpu", torch.float32)
    prompts = ["a fish", "two birds"]
    expected = pipe(
        prompts, generator=generators(), output_type="np", decoder_num_inference_steps=3
    ).images
    options = replace(ours.options, decoder=replace(ours.options.decoder, steps=3))
    stages = {name: stage(ours) for name, stage in reference.REFERENCES.items()}
    images = reference.generate(stages, prompts, generators(), options).mul(0.5).add(0.5)
    difference = (images.permute(0, 2, 3, 1) - torch.from_numpy(expected)).abs()
    assert difference.max() < 5e-3 and difference.mean() < 5e-5  # open_clip encodes the text here


def test_matrices_are_shared_with_the_reference(karlo_pipe):
    network = reference.reference_prior(karlo_pipe.prior)
    ours, theirs = karlo_pipe.prior.blocks[1], network.transformer_blocks[1]
    assert theirs.ff.net[2].weight.data_ptr() == ours.fc2.weight.data_ptr()
    assert theirs.attn1.to_q.weight.data_ptr() == ours.qkv.weight.data_ptr()


@pytest.mark.parametrize("stage", reference.REFERENCES)
def test_both_sides_have_the_same_outputs(stage, karlo_pipe):
    inputs = Inputs.random(karlo_pipe, ["a fish", "two birds"])
    side = reference.REFERENCES[stage](karlo_pipe)
    assert reference.difference(side, inputs) < 1e-4
    bias = list(side.networks[-1].parameters())[-1]
    bias.data = bias + 1  # of the reference only
    assert reference.difference(side, inputs) > 0.1


def test_candidates_are_interleaved():
    order = []
    candidates = {name: Candidate(lambda _, n=name: order.append(n) or n) for name in "abc"}
    timings = comparison.time_interleaved(candidates, CPU, 3, "", progress=False)
    assert "".join(order) == "abccbaabc"
    assert [costs.result for costs in timings["b"]] == ["b"] * 3


@pytest.fixture
def few_steps(monkeypatch):
    """Sample a few steps, and skip the measurement of the peak rate."""
    monkeypatch.setattr(compare_diffusers, "KARLO_OPTIONS", FEW_STEPS)
    monkeypatch.setattr(comparison, "machine_peak", lambda machine: PEAK)


def test_the_script_compares_all_stages(few_steps, tmp_path, capsys):
    file = tmp_path / "comparison.json"
    arguments = "--model karlo-tiny --dtype float32 --device cpu --repeat 1 --quiet --json"
    compare_diffusers.main([*arguments.split(), str(file)])
    rows = {row["name"]: row for row in json.loads(file.read_text())["rows"]}
    prior, several = "prior, 5 steps, 1 image", "prior, 4 images of one prompt"
    decoder, exact = "decoder step, 1 image", "whole pipeline, exact, 1 image"
    stages, fast = [prior, several, decoder], "whole pipeline, fast, 1 image"
    assert list(rows) == [*stages, "upsampler step, 1 image", exact, fast]
    for row in rows.values():
        assert row["speedup"] == pytest.approx(row["reference"][0] / row["ours"][0])
        assert row["speedups"] == [row["speedup"]]
    for name in stages:
        theirs, ours = rows[name]["flops"]
        assert theirs > ours > 0 and rows[name]["difference"] < 1e-4
    assert rows[prior]["extrapolated"] and not rows[decoder]["extrapolated"]
    assert rows[exact]["reference"][0] > 5 * rows[decoder]["reference"][0]
    output = capsys.readouterr().out
    assert output.index(f"{decoder}: ") < output.index("| upsampler step, 1 image |")
    assert "unclip | speed-up" in output


def test_whole_images_of_both_sides_are_the_same(few_steps):
    exact, fast = compare_diffusers.compare_whole(TINY, compiled=False, progress=False)
    assert exact.difference < 2e-3 < fast.difference and not exact.extrapolated
    assert len(exact.reference) == len(fast.ours) == 1 and exact.reference == fast.reference


@pytest.mark.parametrize("model", ["tiny", "dalle-tiny"])
def test_models_that_diffusers_cannot_express_are_rejected(model, few_steps, tiny_folder):
    name = str(tiny_folder) if model == "tiny" else model
    with pytest.raises(SystemExit, match=f"^error: .*{'null text' if model == 'tiny' else model}"):
        compare_diffusers.main(["--model", name, "--repeat", "1", "--quiet"])


def test_the_table_marks_extrapolated_rows():
    step = Comparison("a step", [3.0, 6.0], [1.0, 2.0], True, (1e12, 5e11), 0.01).to_dict()
    whole = Comparison("whole pipeline", [8.0], [2.0], produced=(4, "images")).to_dict()
    results = {
        "reference": "diffusers 1",
        "machine_peak": PEAK,
        "rows": [step, whole],
        "peak_memory": 2.5e9,
    }
    head, _, first, last, *notes = comparison.comparison_table(results).splitlines()
    assert "diffusers 1 | unclip" in head
    assert first == "| a step * | 4.50 s | 1.50 s | 3x | 3x to 3x | 11% and 17% |"
    rate = "0.5 and 2 images per second"
    assert last == f"| whole pipeline | 8.00 s | 2.00 s | 4x | 4x to 4x | {rate} |"
    assert "Extrapolated" in notes[1] and "a step 1.0e-02 standard deviations" in notes[3]
    assert "2.50 GB" in notes[5]
