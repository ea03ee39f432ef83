"""The benchmark of DALL-E: its stages, candidates, and what it is compared with, on the same weights."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from unclip.cli.main import main
from unclip.evaluation import CODE_STAGES, bench
from unclip.evaluation.bench import (
    BenchConfig,
    codes_reference,
    compare_codes,
    dalle,
    stages,
    tables,
    turns,
)
from unclip.evaluation.bench.codes_reference import DallePytorch, PlainMega, import_dalle_pytorch
from unclip.evaluation.bench.stages import measure
from unclip.models.dalle.sampling import sample_codes
from unclip.models.published.bart_dalle import BartDALLEConfig
from unclip.pipelines.base import generators_from
from unclip.types import CodeOptions

PEAK = {"convolution": 2e12, "matmul": 1e12}


@pytest.fixture
def quick(monkeypatch):
    """A peak that nobody measures."""
    monkeypatch.setattr(turns, "machine_peak", lambda where: PEAK)
    monkeypatch.setattr(bench, "machine_peak", lambda where: PEAK)


@pytest.fixture
def in_process(monkeypatch):
    """What a process of its own would do is done here."""

    def run(words):
        monkeypatch.setattr(sys, "argv", words[1:])
        try:
            stages.main()
        except SystemExit as error:
            raise ValueError(str(error).removeprefix("error: ")) from None
        return 1.0, None

    monkeypatch.setattr(bench, "run", run)


# -- alone


def test_stages_and_candidates_are_timed(tiny_dalle):
    measured = measure(tiny_dalle, BenchConfig("tiny", batch=2, repeat=2, candidates=3))
    assert list(measured["seconds"]) == ["call", "drawn", "chosen", *CODE_STAGES]
    assert all(len(values) == 2 and min(values) > 0 for values in measured["seconds"].values())
    assert measured["steps"] == {"codes": 16} and measured["size"] == 16
    assert measured["flops"].keys() == set(CODE_STAGES) and min(measured["flops"].values()) > 0
    assert measured["weights"].keys() == {"clip", "codec", "dalle"}


def test_a_step_is_a_code_of_every_picture(tiny_dalle):
    steps, options = [], CodeOptions(guidance=2.0)
    work = dalle.code_work(tiny_dalle, "a fish", 3, options)
    codes = work.calls["codes"](steps.append)
    assert len(steps) == work.steps["codes"] == 16 and codes.shape == (3, 4, 4)
    assert torch.equal(
        codes, tiny_dalle("a fish", num_images=3, seed=0, options=options, progress=False).codes
    )


def test_only_the_stages_asked_for_are_timed(tiny_dalle):
    assert list(
        measure(tiny_dalle, BenchConfig("tiny", repeat=1, stages=("codec",)))["seconds"]
    ) == ["codec"]
    with pytest.raises(
        ValueError, match="tiny has no stage 'prior'; expected some of text, codes, codec"
    ):
        measure(tiny_dalle, BenchConfig("tiny", stages=("prior",)))


def test_unclip_chooses_among_candidates_too(tiny_pipe):
    measured = measure(tiny_pipe, BenchConfig("tiny", repeat=1, stages=("text",), candidates=2))
    assert list(measured["seconds"]) == ["drawn", "chosen", "text"]


def test_the_command_tells_tokens_a_second(quick, in_process, tmp_path, capsys):
    file = tmp_path / "bench.json"
    assert (
        main(["bench", "--model", "dalle-tiny", "--repeat", "1", "--quiet", "--json", str(file)])
        == 0
    )
    results = json.loads(file.read_text())
    assert results["seconds"].keys() == {"call", *CODE_STAGES} and results["size"] == 32
    assert tables.other_claims(results)[0] in capsys.readouterr().out.splitlines()


def test_what_candidates_cost_is_told():
    seconds = {"drawn": [2.0, 4.0, 6.0], "chosen": [3.0, 5.0, 6.0], "codes": [2.0]}
    results = {"seconds": seconds, "batch": 2, "steps": {"codes": 1024}, "candidates": 64}
    assert tables.other_claims(results) == [
        "1,024 image tokens a second",
        "choosing among 64 candidates takes 1.25x as long as drawing them (1x to 1.5x)",
    ]


# -- random networks


def test_random_dalle_is_what_dalle_pytorch_makes_of_12_layers_of_512():
    config = dalle.SIZES["dalle-random"]
    assert (config.width, config.depth, config.num_codes) == (512, 12, 1024)
    pipe = dalle.build("dalle-tiny", torch.bfloat16)
    assert {p.dtype for network in pipe.networks().values() for p in network.parameters()} == {
        torch.bfloat16
    }
    assert pipe("a fish", progress=False).images[0].size == (32, 32)


def test_random_mega_differs_from_mega_in_depth_alone():
    assert dalle.MEGA_SIZES["mega-random"] == BartDALLEConfig(encoder_depth=2, decoder_depth=2)


# -- against others


def test_the_plain_decoder_draws_the_same_codes():
    mega = dalle.build_mega("mega-tiny", torch.float32)
    tokens, options, steps = (
        torch.tensor([[3, 4, 5, 1, 1, 1, 1, 1]]),
        CodeOptions(top_k=8, guidance=3.0),
        [],
    )
    theirs = PlainMega(mega).draw(tokens, generators_from(range(3)), options, steps.append)
    prefix = mega.condition(tokens).repeat_interleave(3)
    ours = sample_codes(mega, prefix, generators_from(range(3)), options)
    assert (
        torch.equal(theirs, ours.flatten(1)) and len(theirs.unique(dim=0)) == 3 and len(steps) == 16
    )


def test_the_plain_decoder_reads_the_text_again_for_every_code(monkeypatch):
    mega, counts = dalle.build_mega("mega-tiny", torch.float32), []
    plain, tokens = PlainMega(mega), torch.tensor([[3, 4, 5, 6, 7, 8, 9, 10]])
    linear = torch.nn.functional.linear
    monkeypatch.setattr(
        codes_reference.F, "linear", lambda x, w, *b: counts.append(x.shape[1]) or linear(x, w, *b)
    )
    states, mask = plain.read(tokens)
    counts.clear()
    plain.step(None, 0, plain.start(states), states, mask)
    assert counts.count(8) == 2 * 2  # keys and values of the 8 tokens, in each of both layers


def test_rows_against_the_plain_decoder(quick, tmp_path, capsys):
    file = tmp_path / "plain.json"
    words = [
        "bench",
        "--model",
        "mega-tiny",
        "--against",
        "plain",
        "--repeat",
        "2",
        "--quiet",
        "--dtype",
        "fp32",
    ]
    assert main([*words, "--json", str(file)]) == 0
    results = json.loads(file.read_text())
    one, four = results["rows"]
    assert (
        one["what"] == "16 image tokens, 1 image, guided"
        and four["what"] == "16 image tokens, 4 images, guided"
    )
    assert (one["made"], four["made"]) == ([16, "image tokens"], [64, "image tokens"])
    assert max(one["difference"], four["difference"]) < 1e-4 and len(one["ratios"]) == 2
    assert results["against"] == "a plain cached decoder"
    out = capsys.readouterr().out
    assert "image tokens a second |" in out
    assert (
        results["peak_memory"] is None
        or f"{results['peak_memory'] / 1e9:.2f} GB of memory at most" in out
    )


class SameButSlow:
    """Ours in the place of DALLE-pytorch, computing the whole stream."""

    def __init__(self, ours):
        self.ours, self.seen = ours, []

    def logits(self, tokens, codes):
        whole = torch.nn.functional.pad(codes, (0, self.ours.config.num_codes - codes.shape[1]))
        return self.ours(tokens, whole).codes[:, codes.shape[1]]

    def draw(self, tokens, codes):
        self.seen.append(codes.shape[1])
        return self.logits(tokens, codes).argmax(dim=-1)


def test_a_few_places_stand_for_all_codes(quick, monkeypatch):
    made = []
    monkeypatch.setattr(
        compare_codes, "DallePytorch", lambda ours: made.append(SameButSlow(ours)) or made[0]
    )
    config = BenchConfig("dalle-tiny", dtype="fp32", device="cpu", repeat=2, batch=3)
    (row,) = compare_codes.compare_dalle_pytorch(config, progress=False)
    assert made[0].seen == [1, 3, 5, 7, 9, 11, 13, 15] * 2
    assert row.difference < 1e-4 and row.composed and row.made == (48, "image tokens")
    assert len(row.theirs) == len(row.ours) == 2 and row.what == "16 image tokens, 3 images"


def test_dalle_pytorch_answers_the_same(quick, capsys):
    pytest.importorskip("axial_positional_embedding")
    ours = dalle.build("dalle-tiny", torch.float32).dalle
    theirs, tokens = DallePytorch(ours), torch.arange(1, 9)[None]
    codes = torch.arange(16)[None]
    with torch.no_grad():
        expected = ours(tokens, codes).codes
        for m in (0, 1, 5, 15):
            assert (theirs.logits(tokens, codes[:, :m]) - expected[:, m]).abs().max() < 1e-4
        assert 0 <= int(theirs.draw(tokens, codes[:, :3])) < 32
    assert (
        main(
            [
                "bench",
                "--model",
                "dalle-tiny",
                "--against",
                "dalle-pytorch",
                "--repeat",
                "1",
                "--quiet",
            ]
        )
        == 0
    )
    assert "| DALLE-pytorch 1." in capsys.readouterr().out


def test_what_dalle_pytorch_does_not_need_may_be_missing(tmp_path, monkeypatch):
    package = tmp_path / "dalle_pytorch"
    package.mkdir()
    (package / "__init__.py").write_text("from taming_missing.models import VQModel\n")
    (package / "dalle_pytorch.py").write_text("here = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "dalle_pytorch"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(
        ValueError, match=r"No module named 'taming_missing'.*pip install --no-deps dalle-pytorch"
    ):
        import_dalle_pytorch()
    monkeypatch.setattr(codes_reference, "NEEDLESS", {"taming_missing.models": ("VQModel",)})
    assert import_dalle_pytorch().here and "taming_missing" not in sys.modules
    for name in ("dalle_pytorch", "dalle_pytorch.dalle_pytorch"):
        sys.modules.pop(name)


# -- the command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model emoji --against plain", "emoji cannot be compared with plain; mega-random can"),
        (
            "--model karlo-tiny --against dalle-pytorch",
            "cannot be compared with dalle-pytorch; dalle-random can",
        ),
        ("--model mega-tiny", "a transformer without a codec; measure it --against plain"),
        ("--model dalle-tiny --preset fast", "of a DALL-E no preset"),
        ("--model dalle-tiny --candidates 2", "dalle-tiny has no CLIP to compare candidates with"),
        ("--model dalle-tiny --candidates 0", "'0' is not a whole number"),
        ("--model dalle-tiny --against diffusers", "dalle-tiny is no unCLIP model"),
        (
            "--model mega-tiny --against plain --candidates 2",
            "--against measures the exact options",
        ),
    ],
)
def test_bad_arguments_are_told_in_one_line(arguments, message, quick, in_process, capsys):
    assert main(["bench", *arguments.split(), "--repeat", "1", "--quiet"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
