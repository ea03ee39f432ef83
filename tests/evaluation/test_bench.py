"""`unclip bench`: processes, timing, stages, random networks and tables."""

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
from unclip.checkpoints.diffusers.layout import KARLO_OPTIONS
from unclip.cli.main import main
from unclip.clip import open_clip
from unclip.config import parse
from unclip.evaluation import STAGES, bench
from unclip.evaluation.bench import BenchConfig, processes, tables, timing, worker
from unclip.evaluation.bench.memory import PeakMemory
from unclip.evaluation.bench.random_models import (
    DALLE_SIZES,
    KARLO_SIZES,
    build_dalle,
    build_karlo,
    random_network,
)
from unclip.evaluation.bench.stage_calls import (
    Inputs,
    dalle_stages,
    sampling_steps,
    unclip_calls,
    unclip_stages,
)
from unclip.evaluation.bench.timing import StepCosts, count_operations, interleave, time_stage
from unclip.evaluation.bench.worker import measure
from unclip.models.cpu.int8 import is_quantized
from unclip.models.unclip.decoder import DecoderConfig
from unclip.models.unclip.one_shot_prior import OneShotPrior, OneShotPriorConfig
from unclip.models.unclip.prior import DiffusionPrior, PriorConfig, TextPriorConfig
from unclip.models.unclip.upsampler import UpsamplerConfig
from unclip.pipelines.unclip.pipeline import UnCLIPPipeline
from unclip.types import CodeOptions, UnCLIPOptions

CPU = torch.device("cpu")
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


@pytest.fixture
def fixed_peak(monkeypatch):
    monkeypatch.setattr(bench, "machine_peak", lambda machine: PEAK)


@pytest.fixture
def in_process(monkeypatch):
    """Run the worker in this process."""

    def run(arguments):
        try:
            worker.main(arguments[2:])
        except SystemExit as error:
            raise ValueError(str(error).removeprefix("error: ")) from None
        return 1.0, None

    monkeypatch.setattr(bench, "run", run)


# -- processes


def test_the_command_prints_and_writes_what_it_measured(tiny_folder, fixed_peak, tmp_path, capsys):
    file = tmp_path / "bench.json"
    arguments = f"--model {tiny_folder} --repeat 1 --batch 2 --dtype fp32 --quiet --json {file}"
    assert main(["bench", *arguments.split()]) == 0
    results = json.loads(file.read_text())
    seconds = results["seconds"]
    assert list(seconds) == ["import", "cold", "call", *STAGES["unclip"]]
    assert {len(values) for values in seconds.values()} == {1}
    assert 0 < seconds["import"][0] < seconds["cold"][0]
    assert results["machine"]["dtype"] == "float32" and results["machine"]["threads"] >= 1
    assert results["machine_peak"] == PEAK
    assert (results["batch"], results["size"]) == (2, 16)
    output = capsys.readouterr().out
    for line in ("import unclip", "from cold start to PNG", "... decoder, 3 steps", "peak memory"):
        assert line in output
    assert "measured peak in float32: convolution" in output
    assert "\n| all, 2 of 16 px: " in output


def test_options_can_be_set(in_process, fixed_peak, tmp_path, capsys):
    file = tmp_path / "bench.json"
    arguments = f"bench --repeat 1 --quiet --json {file} --stages"
    options = "--set decoder.steps=2 --set decoder.guidance=1"
    assert main(f"{arguments} decoder --model karlo-tiny --whole {options}".split()) == 0
    results = json.loads(file.read_text())
    assert results["steps"]["decoder"] == 2 and results["set"] == options.split()[1::2]
    guided = 2 * results["flops"]["decoder"]
    assert main(f"{arguments} decoder --model karlo-tiny --whole {options[:21]}".split()) == 0
    assert json.loads(file.read_text())["flops"]["decoder"] == pytest.approx(guided, rel=0.1)
    assert main(f"{arguments} codes --model dalle-tiny --set guidance=2".split()) == 0
    assert main(f"{arguments} codes --model dalle-tiny --set steps=2".split()) == 2
    assert "--set steps=2: steps is unknown" in capsys.readouterr().err
    assert main("bench --data x --set steps=2".split()) == 2
    assert "--set cannot be given with --data" in capsys.readouterr().err


@pytest.mark.slow
def test_offloaded_random_networks_are_read_from_a_folder(tmp_path, capsys):
    file = tmp_path / "bench.json"
    arguments = f"--offload --stages text,decoder --repeat 1 --quiet --json {file}"
    assert main(["bench", "--model", "karlo-tiny", *arguments.split()]) == 0
    results = json.loads(file.read_text())
    assert results["model"] == "karlo-tiny" and results["offload"]
    assert results["machine_peak"].keys() == PEAK.keys()
    assert min(results["machine_peak"].values()) > 1e8
    assert results["seconds"].keys() == {"text", "decoder"}
    assert len(results["weights"]) == 5 and results["step_seconds"].keys() == {"decoder"}
    assert "peak memory" in capsys.readouterr().out


def test_peak_memory_of_a_process_excludes_its_parent():
    """The parent must not import torch, so the package does not."""
    code = (
        "import sys; from unclip.evaluation.bench import processes; "
        "assert 'torch' not in sys.modules; "
        "print(processes.run(['-c', 'pass'])[1], "
        "processes.run(['-c', 'bytearray(200_000_000)'])[1])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if "None" not in done.stdout:  # not available on Windows
        small, large = map(int, done.stdout.split())
        assert small < 100e6 and 200e6 < large < 300e6


def test_the_error_of_a_process_is_raised():
    with pytest.raises(ValueError, match=r"^no such thing$"):
        processes.run(["-c", "import sys; sys.exit('error: no such thing')"])


# -- times, operations and memory


@pytest.fixture
def fake_clock(monkeypatch):
    """A host clock that a stage advances."""
    clock = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.seconds)
    return clock


def slow_stage(clock, steps=4, setup=10.0, step=2.0, rest=1.0):
    def call(on_step):
        clock.seconds += setup
        for _ in range(steps):
            clock.seconds += step
            on_step(None)
        clock.seconds += rest
        return "result"

    return call


def test_a_stage_is_timed_step_by_step(fake_clock):
    costs = time_stage(slow_stage(fake_clock), CPU)
    assert costs == StepCosts([12, 2, 2, 2], 1, "result")
    assert (costs.step, costs.total(4)) == (2, 19)


def test_a_stopped_stage_is_extrapolated(fake_clock):
    costs = time_stage(slow_stage(fake_clock), CPU, max_steps=2)
    assert costs == StepCosts([12, 2], 0, None)
    assert (costs.step, costs.total(25)) == (2, 60)
    single = time_stage(slow_stage(fake_clock), CPU, max_steps=1)
    assert (single.step, single.total(7)) == (12, 84)


def test_candidates_are_interleaved():
    order = []

    def candidate(name):
        return lambda i: order.append(name) or (name, i)

    results = interleave({name: candidate(name) for name in "abc"}, 3)
    assert "".join(order) == "abccbaabc" and results["b"] == [("b", 0), ("b", 1), ("b", 2)]


def test_operations_of_two_steps_predict_those_of_all(karlo_pipe):
    calls = unclip_calls(karlo_pipe, Inputs.random(karlo_pipe, ["a fish"], 2), FEW_STEPS)
    steps = sampling_steps(FEW_STEPS)
    for stage in ("prior", "decoder", "upsampler"):
        time_stage(calls[stage], CPU, max_steps=1)  # fill the cache of the empty prompt
        every = count_operations(calls[stage])
        assert len(every.steps) == steps[stage] and every.result is not None
        predicted = count_operations(calls[stage], max_steps=2).total(steps[stage])
        assert predicted == pytest.approx(every.total(steps[stage]), rel=1e-3)


def test_operations_are_those_of_the_layers():
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 5, 3, padding=1), torch.nn.Flatten(), torch.nn.Linear(5 * 16, 7)
    )
    costs = count_operations(lambda on_step: network(torch.zeros(2, 3, 4, 4)))
    assert costs.total(0) == 2 * 2 * (16 * 9 * 3 * 5 + 80 * 7)


def test_peak_memory_is_measured_for_each_block():
    memory = PeakMemory(CPU)
    with memory.measure("large"):
        torch.ones(50_000_000).sum()  # 200 MB
    with memory.measure("small"):
        torch.ones(10).sum()
    if memory.highest is not None:  # Linux
        assert memory.by_name["small"] + 100e6 < memory.by_name["large"] <= memory.highest


def test_the_peak_rate_is_operations_over_the_best_time(monkeypatch):
    monkeypatch.setattr(timing, "_best_time", lambda compute, device, seconds: 0.5)
    convolution, matmul = 2 * 9 * (320 * 64) ** 2 / 0.5, 2 * 2048**3 / 0.5
    rates = timing.measure_peak(CPU, torch.float32)
    assert rates == {"convolution": convolution, "matmul": matmul}


def test_the_peak_rate_is_that_of_the_device_and_dtype(in_process, monkeypatch):
    measured = []
    monkeypatch.setattr(worker, "measure_peak", lambda *where: measured.append(where) or PEAK)
    assert bench.machine_peak({"device": "cpu", "dtype": "bfloat16", "threads": 1}) == PEAK
    assert measured == [(CPU, torch.bfloat16)]


def test_the_best_time_excludes_the_warm_up(fake_clock):
    durations = iter([1.0, 5.0, 2.0, 3.0])

    def compute():
        fake_clock.seconds += next(durations)

    assert timing._best_time(compute, CPU, seconds=8.0) == 2.0


# -- stages


@pytest.mark.parametrize("steps_only", [False, True])
def test_all_stages_of_unclip_are_measured(tiny_pipe, steps_only):
    results = measure(tiny_pipe, BenchConfig("tiny", batch=2, repeat=3, steps_only=steps_only))
    seconds = results["seconds"]
    assert list(seconds) == [*([] if steps_only else ["call"]), *STAGES["unclip"]]
    assert all(len(values) == 3 and min(values) > 0 for values in seconds.values())
    assert results["steps"] == {"prior": 3, "decoder": 3, "upsampler": 2}
    assert results["size"] == 16 and results["flops"].keys() == set(STAGES["unclip"])
    assert min(results["flops"].values()) > 0
    parameters = sum(p.numel() * 4 for p in tiny_pipe.prior.parameters())
    assert results["weights"]["prior"] == parameters + 2 * 16 * 4  # and two buffers


def test_all_stages_of_a_dalle_are_measured(tiny_dalle):
    results = measure(tiny_dalle, BenchConfig("tiny", batch=2, repeat=2, num_candidates=3))
    seconds = results["seconds"]
    assert list(seconds) == ["call", "generated", "reranked", *STAGES["dalle"]]
    assert all(len(values) == 2 and min(values) > 0 for values in seconds.values())
    assert results["steps"] == {"codes": 16} and results["size"] == 16
    assert results["flops"].keys() == set(STAGES["dalle"]) and min(results["flops"].values()) > 0
    assert results["weights"].keys() == {"clip", "codec", "dalle"}


def test_stages_can_be_selected(tiny_dalle):
    codec = measure(tiny_dalle, BenchConfig("tiny", repeat=1, stages=("codec",)))
    assert list(codec["seconds"]) == ["codec"]
    with pytest.raises(ValueError, match="no stage 'prior'; expected some of text, codes, codec"):
        measure(tiny_dalle, BenchConfig("tiny", stages=("prior",)))


def test_reranking_of_unclip_is_measured(tiny_pipe):
    results = measure(tiny_pipe, BenchConfig("tiny", repeat=1, stages=("text",), num_candidates=2))
    assert list(results["seconds"]) == ["generated", "reranked", "text"]


def test_networks_are_quantized_and_offloaded(tiny_folder):
    config = BenchConfig(
        "tiny", repeat=1, stages=("decoder",), preset="fast", quantize="int8", offload=True
    )
    pipe = unclip.load(tiny_folder, "cpu", torch.float32)
    results = measure(pipe, config)
    assert results["seconds"].keys() == results["flops"].keys() == {"decoder"}
    assert results["steps"]["decoder"] == pipe.preset("fast").decoder.steps
    assert isinstance(pipe.decoder.unet.stem, torch.nn.Conv2d) and is_quantized(pipe.decoder)
    assert not any(p.is_meta for p in pipe.decoder.parameters())
    assert all(p.is_meta for p in pipe.clip.parameters())


def test_a_one_shot_prior_has_one_step(tiny_pipe):
    config = tiny_pipe.prior.config
    sizes = {field.name: getattr(config, field.name) for field in fields(TextPriorConfig)}
    prior = OneShotPrior(OneShotPriorConfig(**sizes))
    pipe = UnCLIPPipeline(
        tiny_pipe.clip, prior, tiny_pipe.decoder, tiny_pipe.upsamplers, tiny_pipe.options
    )
    one_shot, diffusion = (
        unclip_stages(p, "a fish", 1, FEW_STEPS).steps for p in (pipe, tiny_pipe)
    )
    assert one_shot["prior"] == 1 < diffusion["prior"]
    assert one_shot["decoder"] == diffusion["decoder"]


def test_a_step_of_a_dalle_is_one_code_of_each_image(tiny_dalle):
    steps, options = [], CodeOptions(guidance=2.0)
    stages = dalle_stages(tiny_dalle, "a fish", 3, options)
    codes = stages.calls["codes"](steps.append)
    assert len(steps) == stages.steps["codes"] == 16 and codes.shape == (3, 4, 4)
    expected = tiny_dalle("a fish", num_images=3, seed=0, options=options, progress=False).codes
    assert torch.equal(codes, expected)


# -- random networks


def test_random_karlo_has_the_sizes_of_the_configs():
    size, folder = KARLO_SIZES["karlo-random"], ROOT / "configs" / "karlo"

    def config(name):
        return yaml.safe_load((folder / f"{name}.yaml").read_text())

    assert size.prior == parse(PriorConfig, config("prior")["model"])
    assert size.decoder == parse(DecoderConfig, config("decoder")["model"])
    upsampler = parse(UpsamplerConfig, config("upsampler")["model"])
    assert replace(size.upsampler, last_unet=None) == upsampler
    assert size.upsampler.last_unet == size.upsampler.unet
    clip = size.clip.model_cfg
    assert clip["text_cfg"] == open_clip.get_model_config("ViT-L-14")["text_cfg"]
    assert clip["embed_dim"] == size.width
    assert parse(UnCLIPOptions, config("model")["options"]) == KARLO_OPTIONS


def test_random_networks_are_scaled_and_deterministic():
    config = KARLO_SIZES["karlo-tiny"].prior
    first, second = (random_network(DiffusionPrior, config, torch.bfloat16) for _ in range(2))
    assert {p.dtype for p in first.parameters()} == {torch.bfloat16}
    assert first.emb_std.dtype == torch.float32
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)
    rows = first.blocks[0].qkv.weight
    assert len(rows.float().unique(dim=0)) == len(rows)
    assert rows.float().std().item() == pytest.approx(config.width**-0.5, rel=0.05)


def test_images_of_random_networks_differ(karlo_pipe):
    first, second = karlo_pipe(["a fish", "a bird"], seed=0, progress=False).images
    pixels = np.stack([first, second]).astype(float)
    assert first.size == (64, 64) and pixels.std() > 20
    assert np.abs(pixels[0] - pixels[1]).mean() > 5


def test_only_the_wanted_stages_are_built():
    pipe = build_karlo("karlo-tiny", torch.float32, stages=["upsampler"])
    assert pipe.prior is None and len(pipe.upsamplers) == 1
    assert sum(p.numel() for p in pipe.decoder.parameters()) < 300_000
    assert build_karlo("karlo-tiny", torch.float32, stages=["prior"]).prior is not None


def test_random_dalle_has_the_sizes_of_the_original():
    config = DALLE_SIZES["dalle-random"]
    assert (config.width, config.depth, config.num_codes) == (512, 12, 1024)
    pipe = build_dalle("dalle-tiny", torch.bfloat16)
    dtypes = {p.dtype for network in pipe.networks().values() for p in network.parameters()}
    assert dtypes == {torch.bfloat16}
    assert pipe("a fish", progress=False).images[0].size == (32, 32)


# -- tables


def test_rows_have_median_and_range():
    results = {
        "batch": 4,
        "size": 256,
        "seconds": {"import": [0.3, 0.1, 0.2], "call": [2.0, 1.0, 9.0], "decoder": [1.0]},
        "steps": {"decoder": 20},
        "peak_memory": {"generate": 3 * 2**20, "warm": None},
    }
    assert tables.bench_rows(results) == [
        ("import unclip", "200 ms", "100 ms to 300 ms"),
        ("warm call for 4 of 256 px", "2.00 s", "1.00 s to 9.00 s"),
        ("... decoder, 20 steps", "1.00 s", "1.00 s to 1.00 s"),
        ("peak memory of unclip generate", "3 MiB", ""),
        ("peak memory of the warm calls", "not reported by this system", ""),
    ]


def test_the_table_of_stages_ends_with_their_sum():
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
    text, decoder, total = tables.stage_table(results).splitlines()[2:]
    assert text == "| text | 500 ms | 500 ms to 500 ms |  | 0.1 | 10% |  |"
    spread = "10.00 s | 9.00 s to 11.00 s"
    assert decoder == f"| decoder, 20 steps | {spread} | 500 ms | 5 | 25% | 3 MiB |"
    spread = "10.50 s | 9.50 s to 11.50 s"
    assert total == f"| all, 2 of 256 px: 0.19 per second | {spread} |  | 5.1 | 24% |  |"


def test_peak_memory_is_compared_to_its_bound():
    results = {
        "weights": {"prior": 2e9, "decoder": 1e9},
        "peak_memory": {"warm": 3.5e9},
        "offload": False,
    }
    expected = "peak memory 3.50 GB, bound 3.90 GB (1.3 x 3.00 GB of weights): met"
    assert tables.memory_bound(results) == expected
    offloaded = tables.memory_bound({**results, "offload": True})
    assert offloaded.endswith("3.00 GB (largest network 2.00 GB + 1.00 GB): EXCEEDED")
    on_device = tables.memory_bound({**results, "peak_memory": {"warm": 9e9, "device": 3e9}})
    assert on_device.endswith(": met")
    assert tables.memory_bound({**results, "peak_memory": {"warm": None}}) is None


def test_token_rate_and_cost_of_reranking():
    seconds = {"generated": [2.0, 4.0, 6.0], "reranked": [3.0, 5.0, 6.0], "codes": [2.0]}
    results = {"seconds": seconds, "batch": 2, "steps": {"codes": 1024}, "num_candidates": 64}
    rate, reranking = tables.token_and_reranking_lines(results)
    assert rate == "1,024 image tokens per second"
    assert "64 candidates" in reranking and "1.25x" in reranking and "(1x to 1.5x)" in reranking


# -- the command


def test_a_random_dalle_is_measured(fixed_peak, in_process, tmp_path, capsys):
    file = tmp_path / "bench.json"
    arguments = f"bench --model dalle-tiny --repeat 1 --quiet --json {file}"
    assert main(arguments.split()) == 0
    results = json.loads(file.read_text())
    assert results["seconds"].keys() == {"call", *STAGES["dalle"]} and results["size"] == 32
    rate = tables.token_and_reranking_lines(results)[0]
    assert rate in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--repeat 0", "'0' is not a whole number of at least 1"),
        ("--preset slow", "'slow'"),
        ("--model emojy", "emojy"),
        ("--stages prior,decodr", "unknown stage 'decodr'"),
        ("--steps-only --preset fast", "preset 'fast'"),
        ("--steps-only --whole", "--whole: not allowed with argument --steps-only"),
        ("--model dalle-tiny --preset fast", "a DALL-E model does not support presets"),
        ("--model dalle-tiny --num-candidates 2", "dalle-tiny has no CLIP"),
        ("--model dalle-tiny --num-candidates 0", "'0' is not a whole number"),
        ("--batch-size 4", "--batch-size is for a data loader; give --data PATH"),
        ("--data none --batch 1", "--batch cannot be given with --data"),
        ("--data none --model x", "--model cannot be given with --data"),
    ],
)
def test_invalid_arguments_are_reported_in_one_line(
    arguments, message, tiny_folder, fixed_peak, in_process, capsys
):
    model = () if {"--model", "--data"} & {*arguments.split()} else ("--model", str(tiny_folder))
    assert main(["bench", *model, "--quiet", *arguments.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
