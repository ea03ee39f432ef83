"""Invalid input: exit code 2 and one clear line, no traceback, and nothing is written."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import unclip
from unclip.checkpoints import folders
from unclip.cli.main import main
from unclip.files import out_of_memory
from unclip.image_io import save_png


@pytest.fixture
def here(tiny_folder, tmp_path, monkeypatch) -> Path:
    """A working folder with a broken model and some broken files."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_folder, tmp_path / "assets" / "emoji")
    monkeypatch.setattr(folders, "_PACKAGE", tmp_path)
    shutil.copytree(tiny_folder, tmp_path / "broken")
    weights = tmp_path / "broken" / "prior" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    shutil.copytree(tiny_folder, tmp_path / "partial")
    (tmp_path / "partial" / "decoder" / "schedule.json").unlink()
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes("Äpfel".encode("latin-1"))
    plain = Image.new("RGB", (4, 4))
    plain.save(tmp_path / "plain.png")
    (tmp_path / "evil.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")
    (tmp_path / "lfs.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "cut.safetensors").write_bytes(bytes([2, 0, 0, 0, 0, 0, 0, 0]) + b"[]")
    for name, model in {
        "model": {"model": "evil/\x1bmodel"},
        "prior": {"prior_model": "x"},
    }.items():
        save_png(plain, tmp_path / f"{name}.png", {"seed": 1, "options": {}, **model})
    return tmp_path


UNKNOWN_MODEL = ("unknown model", "bundled models: emoji")
NOT_WITH_FROM = ("--from", "cannot be given with it")


@pytest.mark.parametrize(
    ("command", "facts"),
    [
        ("generate a -o -", ("-o -", "standard output")),
        ("", ("arguments are required: COMMAND",)),
        ("paint apple", ("invalid choice: 'paint'",)),
        ("generate", ("no prompt", "--prompts-file", "--from")),
        ("generate a -n 0", ("--num-images", "'0'", "at least 1")),
        ("generate a -n x", ("--num-images", "'x'")),
        ("generate a --steps 0", ("--steps", "'0'", "at least 1")),
        ("generate a --sampler euler", ("--sampler", "'euler'", "ddim")),
        ("generate a --seed -3", ("--seed", "'-3'", "from 0 to 2**62")),
        ("generate a --guidance nan", ("--guidance", "'nan'", "finite")),
        ("generate a --guidance 1e39", ("guidance", "1e+39")),
        ("generate a --temperature 0.2", ("temperature", "0.2", "diffusion prior")),
        ("generate caf\udce9", ("Unicode",)),
        ("generate a --model emojis", ("'emojis'", *UNKNOWN_MODEL)),
        ("generate a --model ./nowhere", ("'./nowhere'", *UNKNOWN_MODEL)),
        ("generate a --model broken", ("broken/prior/model.safetensors", "truncated")),
        ("generate a --model partial", ("partial/decoder/schedule.json", "missing")),
        ("generate a --device abacus", ("unknown device", "'abacus'")),
        ("generate a --device cuda:99", ("cuda:99", "cpu")),
        ("generate a --device xpu", ("xpu", "cpu")),
        ("generate a --device meta", ("meta", "cpu")),
        ("generate a -n 2 -o a.png", ("a.png", "one file", "2 images")),
        ("generate a -o a.bmp", ("a.bmp", ".png")),
        ("generate a -o a.heic", ("a.heic", ".png", "create it first")),
        ("generate a -n 2 -o a.jpgg --grid", ("a.jpgg", ".png")),
        ("generate a -o empty.txt", ("empty.txt is a file",)),
        ("generate --prompts-file empty.txt", ("empty.txt has no prompts",)),
        ("generate --prompts-file latin.txt", ("latin.txt is not UTF-8",)),
        ("generate --prompts-file none.txt", ("none.txt",)),
        ("generate a --from plain.png", NOT_WITH_FROM),
        ("generate --from plain.png --seed 1", NOT_WITH_FROM),
        ("generate --from plain.png", ("plain.png", "metadata")),
        ("generate --from evil.png", ("evil.png", "not a readable image")),
        ("generate --from model.png", (r"'evil/\x1bmodel'", "--model NAME", "--trust-model")),
        ("generate --from prior.png --model emoji", ("the prior 'x'", "--trust-model")),
        ("generate --from /dev/zero", ("/dev/zero", "device")),
        ("generate --prompts-file /dev/zero", ("/dev/zero", "device")),
        ("variations evil.png", ("evil.png", "not a readable image")),
        ("variations none.png", ("none.png",)),
        ("variations broken", ("error: broken is a folder; expected a file\n",)),
        ("variations empty.txt", ("empty.txt", "image")),
        (
            "variations plain.png --num-candidates 2",
            ("--num-candidates 2", "unclip variations --help"),
        ),
        ("generate a --modle y", ("--modle y; did you mean --model?", "unclip generate --help")),
        ("bench --steps 0", ("unrecognized arguments: --steps 0",)),
        ("interpolate --prompts a b -o a.webm", ("a.webm", ".gif, .mp4, .png")),
        ("info nothing", ("'nothing'", *UNKNOWN_MODEL)),
        ("info plain.png", ("plain.png", "metadata")),
        ("info evil.png", ("evil.png", "not a readable image")),
        ("info empty.txt/model", ("empty.txt/model",)),
        ("push plain.png/x me/x", ("plain.png/x",)),
        ("info lfs.safetensors", ("lfs.safetensors", "Git LFS")),
        ("info cut.safetensors", ("cut.safetensors", "truncated")),
        ("info none.png", ("image file none.png does not exist",)),
        ("evaluate --data none --json broken", ("broken is a folder",)),
        ("evaluate --data none --sheets empty.txt", ("empty.txt is not a directory",)),
        (f"generate a --seed {10**26}", ("--seed", "2**62")),
        ("evaluate --data none --table broken", ("broken is a folder",)),
        ("evaluate --data none --train-judge broken", ("broken is a folder",)),
        ("evaluate --data none --judge none.st", ("no judge at none.st", "--train-judge")),
        ("evaluate --data none --judge a --train-judge b", ("--judge and --train-judge",)),
        ("evaluate-codec emoji --data none --sheet broken", ("broken is a folder",)),
        ("info assets", ("assets", "model, codec or prior")),
    ],
)
def test_invalid_arguments_are_reported_in_one_line(here, capsys, command, facts):
    before = set(here.rglob("*"))
    quiet = ["--quiet"] if command.startswith(("generate", "variations")) else []
    assert main([*command.split(), *quiet]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert all(fact in err for fact in facts), err
    assert set(here.rglob("*")) == before


def test_too_little_memory_is_reported_in_one_line(here, capsys):
    assert main(["generate", "a", "-n", str(2**60), "-o", "many"]) == 2
    assert capsys.readouterr().err == "error: out of memory\n"
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    assert re.fullmatch(r"out of memory \(.*can't allocate memory.*\)", out_of_memory(error.value))
    with pytest.raises(RuntimeError, match="another error"):
        out_of_memory(RuntimeError("another error"))


@pytest.mark.parametrize(
    "command",
    [
        ("generate",),
        ("edit", "plain.png", "--prompt"),
        ("interpolate", "--prompts", "a"),
        ("push", "emoji", "me/model", "--prompts"),
        ("variations", "plain.png", "--model", "emoji-dalle1", "--prompt"),
        ("complete", "plain.png"),
    ],
)
@pytest.mark.parametrize("prompt", ["", " \n"])
def test_an_empty_prompt_is_refused(here, capsys, command, prompt):
    assert main([*command, prompt]) == 2
    assert "the prompt is empty; expected a description" in capsys.readouterr().err


def test_a_temperature_of_a_diffusion_prior_is_refused_before_weights_are_read(here, capsys):
    for file in (here / "assets" / "emoji").rglob("*.safetensors"):
        file.unlink()
    assert main(["generate", "a", "--temperature", "0.2"]) == 2
    assert "temperature is 0.2; expected 1 for a diffusion prior" in capsys.readouterr().err


def test_invalid_files_of_a_model_are_reported(here):
    folder = here / "assets" / "emoji"
    (folder / "options.json").write_text(json.dumps({"prior": {"steps": 3, "guidence": 1.0}}))
    with pytest.raises(ValueError, match=r"options\.json: prior\.guidence .*'guidance'"):
        unclip.load("emoji")
    (folder / "options.json").write_text("{")
    with pytest.raises(ValueError, match=r"options\.json is not valid JSON"):
        unclip.load("emoji")
    (folder / "model.json").write_text("{}")
    with pytest.raises(ValueError, match=r"model\.json .*format"):
        unclip.load("emoji")


def test_a_folder_without_permission_is_refused_before_any_work(tmp_path, monkeypatch, capsys):
    (tmp_path / "locked").mkdir()
    monkeypatch.setattr("os.access", lambda path, mode: Path(path).name != "locked")
    for output in ("locked/a.png", "locked", "locked/new/folder"):
        output = tmp_path / output
        assert main(["generate", "a cat", "--model", "emoji", "--output", str(output)]) == 2
        expected = (
            f"error: cannot write {output}: no permission to write in {tmp_path / 'locked'}\n"
        )
        assert capsys.readouterr().err == expected
