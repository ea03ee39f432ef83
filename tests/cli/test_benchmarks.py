"""`unclip generate --geneval` and `--dpg-bench`: the layouts that the benchmarks' scorers read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sampling import interrupt_the_second_batch

from unclip.cli.main import main
from unclip.image_io import read_metadata

pytestmark = pytest.mark.filterwarnings("ignore:the prompt")  # the tiny CLIP has a short context
PROMPTS = ("a red apple", "a blue fish", "two red apples")
SHORT = "--steps 1 --prior-steps 1 --prior-candidates 1 --upsampler-steps 1 --seed 3 --quiet"
DPG_NAMES = ("COCOval2014000000000164", "partiprompts12", "9")


@pytest.fixture
def run(tiny_folder, tmp_path, monkeypatch, capsys):
    """Run `unclip generate ARGS` in a folder with the prompts of both benchmarks."""
    monkeypatch.chdir(tmp_path)
    lines = [
        json.dumps({"tag": "colors", "include": [{"class": "apple", "count": 1}], "prompt": prompt})
        for prompt in PROMPTS
    ]
    Path("metadata.jsonl").write_text("\n".join(lines) + "\n")
    Path("prompts").mkdir()
    for name, prompt in zip(DPG_NAMES, PROMPTS, strict=True):
        Path("prompts", f"{name}.txt").write_text(f"{prompt}\n")

    def run(args: str) -> tuple[int, str, str]:
        code = main(["generate", *args.split(), "--model", str(tiny_folder)])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def read(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path), dtype=int)


def test_geneval_layout(run):
    """GenEval's scorer opens DIR/00000/metadata.jsonl and DIR/00000/samples/0000.png, ..."""
    code, out, err = run("--geneval metadata.jsonl -o images --seed 5")
    assert (code, out) == (0, "images\n") and "prompt/s" in err  # a bar over the prompts
    files = {str(path.relative_to("images")) for path in Path("images").rglob("*.*")}
    names = [f"samples/{k:04}.png" for k in range(4)]
    assert files == {f"{i:05}/{name}" for i in range(3) for name in ["metadata.jsonl", *names]}
    lines = Path("metadata.jsonl").read_text().splitlines()
    for i, prompt in enumerate(PROMPTS):
        folder = Path("images", f"{i:05}")
        assert json.loads((folder / "metadata.jsonl").read_text()) == json.loads(lines[i])
        entries = [read_metadata(folder / name)[0] for name in names]
        assert {entry["prompt"] for entry in entries} == {prompt}
        assert [entry["seed"] for entry in entries] == list(range(5 + 4 * i, 9 + 4 * i))
    run(f"--geneval metadata.jsonl -n 1 -o one {SHORT}")
    assert [path.name for path in Path("one/00002/samples").iterdir()] == ["0000.png"]


def test_benchmark_images_are_those_of_the_seeds_alone(run, tiny_pipe):
    run("--geneval metadata.jsonl -o images --seed 5 --quiet")
    expected = tiny_pipe(PROMPTS[2], seed=14, progress=False).images[0]
    image = read("images/00002/samples/0001.png")
    assert np.abs(image - np.asarray(expected, int)).max() <= 2


def test_dpg_layout(run, tiny_pipe):
    """DPG-Bench's scorer opens NAME.png and cuts it in four squares of the image size."""
    assert run("--dpg-bench prompts -o images --seed 0 --quiet") == (0, "", "")
    assert {path.name for path in Path("images").iterdir()} == {f"{n}.png" for n in DPG_NAMES}
    sheet = read(f"images/{DPG_NAMES[0]}.png")
    assert sheet.shape == (32, 32, 3)  # of 16 px each, without a gap
    entries = read_metadata(f"images/{DPG_NAMES[0]}.png")
    assert [entry["prompt"] for entry in entries] == [PROMPTS[0]] * 4
    for k, entry in enumerate(entries):
        expected = tiny_pipe(PROMPTS[0], seed=entry["seed"], progress=False).images[0]
        top, left = 16 * (k // 2), 16 * (k % 2)
        part = sheet[top : top + 16, left : left + 16]
        assert np.abs(part - np.asarray(expected, int)).max() <= 2


@pytest.mark.parametrize("prompts", ["--geneval metadata.jsonl", "--dpg-bench prompts"])
def test_an_interrupted_benchmark_is_resumed(run, monkeypatch, prompts):
    command = f"{prompts} -n 3 -o images {SHORT}"
    monkeypatch.setattr("unclip.cli.generate.BATCH_SIZE", 3)  # a prompt at a time
    with monkeypatch.context() as patches:
        interrupt_the_second_batch(patches)
        assert run(command)[0] == 130
    kept = {path: path.stat().st_mtime_ns for path in Path("images").rglob("*.png")}
    assert kept
    assert run(command)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    run(f"{prompts} -n 3 -o whole {SHORT}")
    whole = sorted(Path("whole").rglob("*.png"))
    assert len(whole) > len(kept)
    for path in whole:
        same = Path("images", path.relative_to("whole"))
        assert not (read(path) - read(same)).any() and read_metadata(path) == read_metadata(same)


def test_a_prompt_with_a_missing_image_is_generated_again(run):
    run(f"--geneval metadata.jsonl -n 2 -o images {SHORT}")
    lost = Path("images/00001/samples/0000.png")
    before = read(lost)
    lost.unlink()
    assert run(f"--geneval metadata.jsonl -n 2 -o images {SHORT}")[0] == 0
    assert np.abs(read(lost) - before).max() <= 2


@pytest.mark.parametrize("prompts", ["--geneval metadata.jsonl", "--dpg-bench prompts"])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--steps 2", "another options"),
        ("--seed 4", "another seed"),
        ("--negative-prompt fish", "another negative prompt"),
        ("-n 1", ""),
    ],
)
def test_images_with_other_settings_are_not_mixed(run, prompts, flags, message):
    run(f"{prompts} -n 2 -o images {SHORT}")
    code, _, err = run(f"{prompts} -n 2 -o images {SHORT} {flags}")
    assert code == 2 and message in err and "images/" in err and err.count("\n") == 1


def test_images_of_other_prompts_are_not_mixed(run):
    for prompts in ("--geneval metadata.jsonl", "--dpg-bench prompts"):
        run(f"{prompts} -n 2 -o images{prompts[2]} {SHORT}")
    lines = Path("metadata.jsonl").read_text().splitlines()
    Path("metadata.jsonl").write_text("\n".join(reversed(lines)))
    Path("prompts", "9.txt").write_text("another fish")
    for prompts in ("--geneval metadata.jsonl", "--dpg-bench prompts"):
        code, _, err = run(f"{prompts} -n 2 -o images{prompts[2]} {SHORT}")
        assert code == 2 and "another prompt" in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--geneval metadata.jsonl", "give --output FOLDER"),
        ("--geneval metadata.jsonl -o a.png", "a.png"),
        ("--geneval metadata.jsonl -o out a cat", "no other prompts"),
        ("--geneval metadata.jsonl -o out --grid", "--grid"),
        ("--geneval none.jsonl -o out", "none.jsonl does not exist"),
        ("--geneval bad.jsonl -o out", "line 2 has no prompt"),
        ("--geneval prompts/9.txt -o out", "one JSON object"),
        ("--dpg-bench metadata.jsonl -o out", "has no .txt files"),
        ("--dpg-bench prompts -n 5 -o out", "at most 4 images"),
    ],
)
def test_invalid_arguments_are_reported_in_one_line(run, args, message):
    Path("bad.jsonl").write_text('{"prompt": "a cat"}\n{"text": "a dog"}\n')
    code, _, err = run(f"{args} --quiet")
    assert code == 2 and message in err and err.count("\n") == 1
    assert not Path("out").exists()
