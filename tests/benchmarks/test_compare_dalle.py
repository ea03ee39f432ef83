"""compare_dalle.py: the references sample from the same weights."""

from __future__ import annotations

import json
import sys

import compare_dalle
import comparison
import dalle_reference
import pytest
import torch
from compare_dalle import build_mega
from dalle_reference import DallePytorch, PlainMega, import_dalle_pytorch

from unclip.evaluation.bench import BenchConfig
from unclip.evaluation.bench.random_models import build_dalle
from unclip.models.dalle.sampling import sample_codes
from unclip.models.published.bart_dalle import BartDALLEConfig
from unclip.pipelines.request import generators_from
from unclip.types import CodeOptions


@pytest.fixture
def fixed_peak(monkeypatch):
    peak = {"convolution": 2e12, "matmul": 1e12}
    monkeypatch.setattr(comparison, "machine_peak", lambda machine: peak)


def test_the_plain_decoder_samples_the_same_codes():
    mega, steps = build_mega("mega-tiny", torch.float32), []
    options = CodeOptions(top_k=8, guidance=3.0)
    tokens = torch.tensor([[3, 4, 5, 1, 1, 1, 1, 1]])
    theirs = PlainMega(mega).sample(tokens, generators_from(range(3)), options, steps.append)
    prefix = mega.condition(tokens).repeat_interleave(3)
    ours = sample_codes(mega, prefix, generators_from(range(3)), options)
    assert torch.equal(theirs, ours.flatten(1)) and len(steps) == 16
    assert len(theirs.unique(dim=0)) == 3


def test_random_mega_has_the_sizes_of_the_original():
    full = BartDALLEConfig(encoder_depth=2, decoder_depth=2)
    assert compare_dalle.MEGA_SIZES["mega-random"] == full


def test_the_plain_decoder_recomputes_keys_of_the_text_for_every_code(monkeypatch):
    mega, lengths = build_mega("mega-tiny", torch.float32), []
    plain, tokens = PlainMega(mega), torch.tensor([[3, 4, 5, 6, 7, 8, 9, 10]])
    linear = torch.nn.functional.linear

    def recorded(x, weight, *bias):
        lengths.append(x.shape[1])
        return linear(x, weight, *bias)

    states, mask = plain.encode(tokens)
    monkeypatch.setattr(dalle_reference.F, "linear", recorded)
    plain.step(None, 0, plain.start_cache(states), states, mask)
    assert lengths.count(8) == 2 * 2  # keys and values of the 8 tokens in both layers


def test_the_script_compares_with_the_plain_decoder(fixed_peak, tmp_path, capsys):
    file = tmp_path / "plain.json"
    arguments = "--reference plain --model mega-tiny --repeat 2 --quiet --dtype float32 --json"
    compare_dalle.main([*arguments.split(), str(file)])
    results = json.loads(file.read_text())
    one, four = results["rows"]
    assert one["name"] == "16 image tokens, 1 image, guided"
    assert four["name"] == "16 image tokens, 4 images, guided"
    assert (one["produced"], four["produced"]) == ([16, "image tokens"], [64, "image tokens"])
    assert max(one["difference"], four["difference"]) < 1e-4 and len(one["speedups"]) == 2
    assert results["reference"] == "a plain cached decoder"
    output, memory = capsys.readouterr().out, results["peak_memory"]
    assert "image tokens per second |" in output
    assert memory is None or f"{memory / 1e9:.2f} GB" in output


class Uncached:
    """Our network in place of DALLE-pytorch's; it computes the whole stream for each code."""

    def __init__(self, ours):
        self.ours, self.positions = ours, []

    def logits(self, tokens, codes):
        padding = self.ours.config.num_codes - codes.shape[1]
        output = self.ours(tokens, torch.nn.functional.pad(codes, (0, padding)))
        return output.codes[:, codes.shape[1]]

    def sample(self, tokens, codes):
        self.positions.append(codes.shape[1])
        return self.logits(tokens, codes).argmax(dim=-1)


def test_a_few_positions_stand_for_all_codes(monkeypatch):
    references = []

    def make(ours):
        references.append(Uncached(ours))
        return references[0]

    monkeypatch.setattr(compare_dalle, "DallePytorch", make)
    config = BenchConfig("dalle-tiny", dtype="float32", device="cpu", repeat=2, batch=3)
    (row,) = compare_dalle.compare_dalle_pytorch(config, progress=False)
    assert references[0].positions == [1, 3, 5, 7, 9, 11, 13, 15] * 2
    assert row.difference < 1e-4 and row.extrapolated
    assert row.produced == (48, "image tokens") and row.name == "16 image tokens, 3 images"
    assert len(row.reference) == len(row.ours) == 2


def test_dalle_pytorch_has_the_same_outputs(fixed_peak, capsys):
    pytest.importorskip("axial_positional_embedding")
    ours = build_dalle("dalle-tiny", torch.float32).dalle
    theirs, tokens = DallePytorch(ours), torch.arange(1, 9)[None]
    codes = torch.arange(16)[None]
    with torch.no_grad():
        expected = ours(tokens, codes).codes
        for m in (0, 1, 5, 15):
            assert (theirs.logits(tokens, codes[:, :m]) - expected[:, m]).abs().max() < 1e-4
        assert 0 <= int(theirs.sample(tokens, codes[:, :3])) < 32
    arguments = "--reference dalle-pytorch --model dalle-tiny --repeat 1 --quiet"
    compare_dalle.main(arguments.split())
    assert "| DALLE-pytorch 1." in capsys.readouterr().out


def test_unused_requirements_of_dalle_pytorch_may_be_missing(tmp_path, monkeypatch):
    package = tmp_path / "dalle_pytorch"
    package.mkdir()
    (package / "__init__.py").write_text("from taming_missing.models import VQModel\n")
    (package / "dalle_pytorch.py").write_text("imported = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "dalle_pytorch"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ValueError, match="'taming_missing'.*pip install --no-deps dalle-pytorch"):
        import_dalle_pytorch()
    unused = {"taming_missing.models": ("VQModel",)}
    monkeypatch.setattr(dalle_reference, "UNUSED_MODULES", unused)
    assert import_dalle_pytorch().imported and "taming_missing" not in sys.modules
    for name in ("dalle_pytorch", "dalle_pytorch.dalle_pytorch"):
        sys.modules.pop(name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--reference plain --model emoji", "emoji.* plain; mega-random can"),
        ("--reference dalle-pytorch --model karlo-tiny", "dalle-pytorch; dalle-random can"),
    ],
)
def test_other_models_are_rejected(arguments, message):
    with pytest.raises(SystemExit, match=message):
        compare_dalle.main([*arguments.split(), "--quiet"])
