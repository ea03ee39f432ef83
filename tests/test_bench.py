"""The benchmark measures what it says, in processes that do not carry the memory of the one that starts them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from unclip.cli import main
from unclip.evaluation import bench
from unclip.evaluation.bench_stages import measure


def test_bench_prints_and_writes_what_it_measured(tiny_folder, tmp_path, capsys):
    file = tmp_path / "bench.json"
    words = ["bench", "--model", str(tiny_folder), "--repeat", "1", "--batch", "2", "--dtype", "fp32", "--quiet"]
    assert main([*words, "--json", str(file)]) == 0
    results = json.loads(file.read_text())
    assert {name: len(values) for name, values in results["seconds"].items()} == dict.fromkeys(
        ("import", "cold", "call", "text", "prior", "decoder", "upsampler"), 1
    )
    assert 0 < results["seconds"]["import"][0] < results["seconds"]["cold"][0]
    assert results["machine"]["dtype"] == "float32" and results["machine"]["threads"] >= 1
    assert (results["batch"], results["size"]) == (2, 16)
    out = capsys.readouterr().out
    for line in ("import unclip", "unclip generate, from cold to PNG", "of that: decoder, 3 steps", "peak memory"):
        assert line in out


def test_stages_are_timed_after_a_warm_up(tiny_pipe):
    measured = measure(tiny_pipe, batch=2, repeat=3)
    seconds = measured["seconds"]
    assert list(seconds) == ["call", "text", "prior", "decoder", "upsampler"]
    assert all(len(values) == 3 and min(values) > 0 for values in seconds.values())
    assert measured["steps"] == {"prior": 3, "decoder": 3, "upsampler": 2} and measured["size"] == 16


def test_a_process_is_charged_for_its_own_memory_only():
    """Needs a parent without torch, which is why the module imports none."""
    code = (
        "import sys; from unclip.evaluation import bench; assert 'torch' not in sys.modules;"
        "print(bench._run(['-c', 'pass'])[1], bench._run(['-c', 'bytearray(200_000_000)'])[1])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    if "None" not in ran.stdout:  # Windows does not tell
        small, large = map(int, ran.stdout.split())
        assert small < 100e6 and 200e6 < large < 300e6


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


def test_a_process_that_fails_is_told_in_its_own_words():
    with pytest.raises(ValueError, match=r"^no such thing$"):
        bench._run(["-c", "import sys; sys.exit('error: no such thing')"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeat", "0"], "repeat is 0; expected at least 1"),
        (["--batch", "0"], "batch is 0"),
        (["--model", "emojy"], "unknown model 'emojy'"),
    ],
)
def test_bad_arguments_are_told_in_one_line(arguments, message, tiny_folder, capsys):
    assert main(["bench", "--model", str(tiny_folder), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
