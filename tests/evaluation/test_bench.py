"""The benchmark measures what it says, in processes that do not carry the memory of the one that starts them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from scripts import ROOT

import unclip
from unclip.cli.main import main
from unclip.clip import open_clip
from unclip.config import parse
from unclip.evaluation import STAGES, bench
from unclip.evaluation.bench import BenchConfig, clock, karlo, memory, peak, processes, tables
from unclip.evaluation.bench.calls import Inputs, picture_work, stage_calls, stage_steps
from unclip.evaluation.bench.stages import measure
from unclip.models.cpu.int8 import is_quantized
from unclip.models.unclip.decoder import DecoderConfig
from unclip.models.unclip.one_shot_prior import OneShotPrior, OneShotPriorConfig
from unclip.models.unclip.prior import DiffusionPrior, PriorConfig
from unclip.models.unclip.prior import TextPriorConfig
from unclip.models.unclip.upsampler import UpsamplerConfig
from unclip.pipelines.unclip.pipeline import UnCLIPPipeline
from unclip.types import UnCLIPOptions

CPU = torch.device("cpu")
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


# -- processes


def test_bench_prints_and_writes_what_it_measured(tiny_folder, tmp_path, capsys):
    file = tmp_path / "bench.json"
    words = [
        "bench",
        "--model",
        str(tiny_folder),
        "--repeat",
        "1",
        "--batch",
        "2",
        "--dtype",
        "fp32",
        "--quiet",
    ]
    assert main([*words, "--json", str(file)]) == 0
    results = json.loads(file.read_text())
    assert {name: len(values) for name, values in results["seconds"].items()} == dict.fromkeys(
        ("import", "cold", "call", *STAGES), 1
    )
    assert 0 < results["seconds"]["import"][0] < results["seconds"]["cold"][0]
    assert results["machine"]["dtype"] == "float32" and results["machine"]["threads"] >= 1
    assert (
        results["machine_peak"].keys() == PEAK.keys()
        and min(results["machine_peak"].values()) > 1e8
    )
    assert (results["batch"], results["size"]) == (2, 16)
    out = capsys.readouterr().out
    for line in (
        "import unclip",
        "unclip generate, from cold to PNG",
        "of that: decoder, 3 steps",
        "peak memory",
    ):
        assert line in out
    assert "measured peak in float32: convolution" in out and "\n| all, 2 of 16 px: " in out


@pytest.mark.slow
def test_offloaded_random_networks_are_read_from_a_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "machine_peak", lambda where: PEAK)
    file = tmp_path / "bench.json"
    words = [
        "bench",
        "--model",
        "karlo-tiny",
        "--offload",
        "--stages",
        "text,decoder",
        "--repeat",
        "1",
    ]
    assert main([*words, "--quiet", "--json", str(file)]) == 0
    results = json.loads(file.read_text())
    assert (
        results["model"] == "karlo-tiny"
        and results["offload"]
        and results["seconds"].keys() == {"text", "decoder"}
    )
    assert len(results["weights"]) == 5 and results["step_seconds"].keys() == {"decoder"}
    assert "peak memory" in capsys.readouterr().out


def test_a_process_is_charged_for_its_own_memory_only():
    """Needs a parent without torch, which is why the package imports none."""
    code = (
        "import sys; from unclip.evaluation.bench import processes; assert 'torch' not in sys.modules;"
        "print(processes.run(['-c', 'pass'])[1], processes.run(['-c', 'bytearray(200_000_000)'])[1])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    if "None" not in ran.stdout:  # Windows does not tell
        small, large = map(int, ran.stdout.split())
        assert small < 100e6 and 200e6 < large < 300e6


def test_a_process_that_fails_is_told_in_its_own_words():
    with pytest.raises(ValueError, match=r"^no such thing$"):
        processes.run(["-c", "import sys; sys.exit('error: no such thing')"])


# -- times and operations


@pytest.fixture
def ticking(monkeypatch):
    """A host clock that moves only when a stage says so."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now.seconds)
    return now


def slow_stage(now, steps=4, lead=10.0, step=2.0, rest=1.0):
    def call(on_step):
        now.seconds += lead
        for _ in range(steps):
            now.seconds += step
            on_step(None)
        now.seconds += rest
        return "drawn"

    return call


def test_a_stage_is_timed_step_by_step(ticking):
    found = clock.timed(slow_stage(ticking), CPU)
    assert found == clock.Steps([12, 2, 2, 2], 1, "drawn") and (found.step, found.whole(4)) == (
        2,
        19,
    )


def test_a_stage_that_is_stopped_is_composed_of_its_steps(ticking):
    found = clock.timed(slow_stage(ticking), CPU, most=2)
    assert found == clock.Steps([12, 2], 0, None) and (found.step, found.whole(25)) == (2, 60)
    single = clock.timed(slow_stage(ticking), CPU, most=1)
    assert (single.step, single.whole(7)) == (12, 84)


def test_operations_of_two_steps_tell_those_of_all(karlo_pipe):
    calls = stage_calls(karlo_pipe, Inputs.make(karlo_pipe, ["a fish"], 2), FEW_STEPS)
    steps = stage_steps(FEW_STEPS)
    for stage in ("prior", "decoder", "upsampler"):
        clock.timed(calls[stage], CPU, most=1)  # the empty prompt's part of it is kept
        every = clock.counted(calls[stage])
        assert len(every.each) == steps[stage] and every.result is not None
        composed = clock.counted(calls[stage], most=2).whole(steps[stage])
        assert composed == pytest.approx(
            every.whole(steps[stage]), rel=1e-3
        )  # little is computed elsewhere


def test_a_prior_without_diffusion_has_steps_of_its_own(tiny_pipe):
    sizes = {
        field.name: getattr(tiny_pipe.prior.config, field.name) for field in fields(TextPriorConfig)
    }
    prior = OneShotPrior(OneShotPriorConfig(**sizes))
    pipe = UnCLIPPipeline(
        tiny_pipe.clip, prior, tiny_pipe.decoder, tiny_pipe.upsamplers, tiny_pipe.options
    )
    ours, theirs = (picture_work(one, "a fish", 1, FEW_STEPS).steps for one in (pipe, tiny_pipe))
    assert ours["prior"] == 1 < theirs["prior"] and ours["decoder"] == theirs["decoder"]


def test_operations_are_those_of_the_layers():
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 5, 3, padding=1), torch.nn.Flatten(), torch.nn.Linear(5 * 16, 7)
    )
    found = clock.counted(lambda on_step: network(torch.zeros(2, 3, 4, 4)))
    assert found.whole(0) == 2 * 2 * (16 * 9 * 3 * 5 + 80 * 7)


def test_the_peak_of_a_stage_is_its_own():
    used = memory.PeakMemory(CPU)
    with used.within("large"):
        torch.ones(50_000_000).sum()  # 200 MB
    with used.within("small"):
        torch.ones(10).sum()
    if used.highest is not None:  # Linux
        assert used.of["small"] + 100e6 < used.of["large"] <= used.highest


@pytest.mark.parametrize("steps_only", [False, True])
def test_stages_are_timed_after_a_warm_up(tiny_pipe, steps_only):
    measured = measure(tiny_pipe, BenchConfig("tiny", batch=2, repeat=3, steps_only=steps_only))
    seconds = measured["seconds"]
    assert list(seconds) == [*([] if steps_only else ["call"]), *STAGES]
    assert all(len(values) == 3 and min(values) > 0 for values in seconds.values())
    assert (
        measured["steps"] == {"prior": 3, "decoder": 3, "upsampler": 2} and measured["size"] == 16
    )
    assert measured["flops"].keys() == set(STAGES) and min(measured["flops"].values()) > 0
    of_prior = (
        sum(p.numel() * 4 for p in tiny_pipe.prior.parameters()) + 2 * 16 * 4
    )  # and the statistics
    assert measured["weights"]["prior"] == of_prior


def test_networks_are_changed_as_asked(tiny_folder):
    config = BenchConfig(
        "tiny", repeat=1, stages=("decoder",), preset="fast", quantize="int8", offload=True
    )
    pipe = unclip.load(tiny_folder, "cpu", torch.float32)
    measured = measure(pipe, config)
    assert measured["seconds"].keys() == measured["flops"].keys() == {"decoder"}
    assert measured["steps"]["decoder"] == pipe.preset("fast").decoder.steps
    assert isinstance(pipe.decoder.unet.stem, torch.nn.Conv2d) and is_quantized(pipe.decoder)
    assert not any(p.is_meta for p in pipe.decoder.parameters()) and all(
        p.is_meta for p in pipe.clip.parameters()
    )


def test_the_peak_is_the_best_of_many_runs(monkeypatch):
    monkeypatch.setattr(peak, "_best", lambda compute, device, seconds: 0.5)
    conv = 2 * 9 * (320 * 64) ** 2 / 0.5
    assert peak.measure_peak(CPU, torch.float32) == {
        "convolution": conv,
        "matmul": 2 * 2048**3 / 0.5,
    }


def test_the_best_run_counts(monkeypatch, ticking):
    waits = iter([1.0, 5.0, 2.0, 3.0])

    def compute():
        ticking.seconds += next(waits)

    assert peak._best(compute, CPU, seconds=8.0) == 2.0  # the first warms up


# -- Karlo with random weights


def test_random_karlo_is_what_the_configs_say():
    size = karlo.SIZES["karlo-random"]
    folder = ROOT / "configs" / "karlo"
    told = {
        name: yaml.safe_load((folder / f"{name}.yaml").read_text())
        for name in ("prior", "decoder", "upsampler")
    }
    assert size.prior == parse(PriorConfig, told["prior"]["model"])
    assert size.decoder == parse(DecoderConfig, told["decoder"]["model"])
    assert replace(size.upsampler, last_unet=None) == parse(
        UpsamplerConfig, told["upsampler"]["model"]
    )
    assert size.upsampler.last_unet == size.upsampler.unet
    text = open_clip.get_model_config("ViT-L-14")["text_cfg"]
    assert (
        size.clip.model_cfg["text_cfg"] == text and size.clip.model_cfg["embed_dim"] == size.emb_dim
    )
    options = yaml.safe_load((folder / "model.yaml").read_text())["options"]
    assert parse(UnCLIPOptions, options) == karlo.KARLO_OPTIONS


def test_random_networks_answer_in_range_and_repeat():
    config = karlo.SIZES["karlo-tiny"].prior
    a, b = (karlo.random_network(DiffusionPrior, config, torch.bfloat16) for _ in range(2))
    assert {p.dtype for p in a.parameters()} == {
        torch.bfloat16
    } and a.emb_std.dtype == torch.float32
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    rows = a.blocks[0].qkv.weight
    assert len(rows.float().unique(dim=0)) == len(rows)
    assert rows.float().std().item() == pytest.approx(config.width**-0.5, rel=0.05)


def test_random_pictures_are_neither_blank_nor_all_alike(karlo_pipe):
    first, second = karlo_pipe(["a fish", "a bird"], seed=0, progress=False).images
    pixels = np.stack([first, second]).astype(float)
    assert first.size == (64, 64) and pixels.std() > 20 and np.abs(pixels[0] - pixels[1]).mean() > 5


def test_only_the_stages_asked_for_are_built():
    small = karlo.build("karlo-tiny", torch.float32, stages=["upsampler"])
    assert small.prior is None and len(small.upsamplers) == 1
    assert sum(p.numel() for p in small.decoder.parameters()) < 300_000
    assert karlo.build("karlo-tiny", torch.float32, stages=["prior"]).prior is not None


# -- tables


def test_the_table_tells_the_median_and_the_spread():
    results = {
        "batch": 4,
        "size": 256,
        "seconds": {"import": [0.3, 0.1, 0.2], "call": [2.0, 1.0, 9.0], "decoder": [1.0]},
        "steps": {"decoder": 20},
        "peak_memory": {"generate": 3 * 2**20, "warm": None},
    }
    assert bench.rows(results) == [
        ("import unclip", "200 ms", "100 ms to 300 ms"),
        ("a further call for 4 of 256 px", "2.00 s", "1.00 s to 9.00 s"),
        ("of that: decoder, 20 steps", "1.00 s", "1.00 s to 1.00 s"),
        ("peak memory of unclip generate", "3 MiB", ""),
        ("peak memory of the further calls", "not told by this system", ""),
    ]


def test_the_table_of_stages_ends_with_the_whole():
    results = {
        "batch": 2,
        "size": 256,
        "machine_peak": PEAK,
        "seconds": {"text": [0.5, 0.5, 0.5], "decoder": [9.0, 10.0, 11.0]},
        "step_seconds": {"decoder": [0.4, 0.5, 0.6]},
        "steps": {"decoder": 20},
        "flops": {"text": 1e11, "decoder": 5e12},
        "stage_memory": {"text": None, "decoder": 3 * 2**20},
    }
    lines = tables.stage_table(results).splitlines()
    assert lines[2] == "| text | 500 ms | 500 ms to 500 ms |  | 0.1 | 10% |  |"
    assert (
        lines[3] == "| decoder, 20 steps | 10.00 s | 9.00 s to 11.00 s | 500 ms | 5 | 25% | 3 MiB |"
    )
    assert (
        lines[4]
        == "| all, 2 of 256 px: 0.19 a second | 10.50 s | 9.50 s to 11.50 s |  | 5.1 | 24% |  |"
        == lines[-1]
    )


def test_memory_is_held_against_its_bound():
    results = {
        "weights": {"prior": 2e9, "decoder": 1e9},
        "peak_memory": {"warm": 3.5e9},
        "offload": False,
    }
    told = "peak memory 3.50 GB, at most 3.90 GB (1.3 x 3.00 GB of weights): kept"
    assert tables.memory_claim(results) == told
    assert tables.memory_claim({**results, "offload": True}).endswith(
        "3.00 GB (largest network 2.00 GB + 1.00 GB): EXCEEDED"
    )
    assert tables.memory_claim({**results, "peak_memory": {"warm": 9e9, "device": 3e9}}).endswith(
        ": kept"
    )
    assert tables.memory_claim({**results, "peak_memory": {"warm": None}}) is None


# -- the command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeat", "0"], "'0' is not a whole number of at least 1"),
        (["--preset", "slow"], "invalid choice: 'slow'"),
        (["--model", "emojy"], "unknown model 'emojy'"),
        (["--stages", "prior,decodr"], "unknown stage 'decodr'"),
        (["--steps-only", "--preset", "fast"], "the steps of 'fast' are not alike"),
        (["--steps-only", "--whole"], "--steps-only and --whole exclude each other"),
        (
            ["--against", "diffusers", "--preset", "fast"],
            "--against measures the exact options and the preset 'fast'",
        ),
    ],
)
def test_bad_arguments_are_told_in_one_line(arguments, message, tiny_folder, capsys):
    assert main(["bench", "--model", str(tiny_folder), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
