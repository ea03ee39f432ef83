"""`unclip generate`, `variations`, `info` and `models`: files, messages and interruption."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sampling import interrupt_the_second_batch

from unclip.checkpoints import store
from unclip.cli.main import main
from unclip.image_io import read_metadata
from unclip.pipelines.unclip.stages import DecoderStage

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tiny_folder, tmp_path, monkeypatch, capsys):
    """Run `unclip ARGS --model TINY` in an empty folder; return exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*args: str, model: str | None = str(tiny_folder)) -> tuple[int, str, str]:
        code = main([*args, *(["--model", model] if model else [])])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def pixels(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path), dtype=int)


def test_one_image_is_written_to_a_file(run, tmp_path):
    done = run("generate", "a red apple", "-o", "new/apple.png", "--seed", "3", "--quiet")
    assert done == (0, "", "")
    (metadata,) = read_metadata("new/apple.png")
    assert (metadata["prompt"], metadata["seed"]) == ("a red apple", 3)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["apple.png"]


def test_several_images_are_written_to_a_folder(run):
    args = ["generate", "a red apple", "Ein Fisch!", "-n", "2", "--seed", "5", "-o", "out"]
    code, out, err = run(*args)
    names = ["a-red-apple-5.png", "a-red-apple-6.png", "ein-fisch-7.png", "ein-fisch-8.png"]
    assert code == 0 and out.split() == [f"out/{name}" for name in names]
    assert all(Path("out", name).is_file() for name in names)
    assert "/8" in err  # the progress bar


def test_default_output_is_the_current_folder(run):
    run("generate", "🍎", "--seed", "0", "--quiet")
    assert [path.name for path in Path().glob("image-*-0.png")]


def test_long_file_names_are_cut(run):
    run("generate", "\U00010330" * 80, "--seed", "0", "--quiet")
    (path,) = Path().glob("\U00010330*.png")
    assert path.name.startswith("\U00010330" * 45 + "-") and path.name.endswith("-0.png")


def test_arguments_are_utf_8_in_a_locale_that_is_not(run, monkeypatch):
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")  # LC_ALL=C PYTHONUTF8=0
    negative = ["--negative-prompt", "th\udcc3\udca9", "--guidance", "2"]
    assert run("generate", "caf\udcc3\udca9", *negative, "--seed", "1", "--quiet") == (0, "", "")
    (file,) = Path().glob("caf-*-1.png")
    (metadata,) = read_metadata(file)
    assert (metadata["prompt"], metadata["negative_prompt"]) == ("café", "thé")


def test_grid_has_one_row_per_prompt_and_captions(run):
    run("generate", "a", "b", "-n", "3", "--seed", "0", "--grid", "-o", "sheet.png", "--quiet")
    width, height = Image.open("sheet.png").size
    cell = (height - 4) // 2
    assert width == 3 * 16 + 2 * 4 and cell > 16 + 2 * 12  # two lines of text below each image
    assert (pixels("sheet.png")[16:cell] < 128).any() and (pixels("sheet.png")[-4:] > 200).all()
    assert [entry["seed"] for entry in read_metadata("sheet.png")] == [0, 1, 2, 3, 4, 5]
    run("generate", "a", "-n", "4", "--seed", "0", "--grid", "-o", "folder", "--quiet")
    assert Image.open("folder/grid.png").size == (36, height)


@pytest.mark.parametrize("name", ["a.jpg", "a.jpeg", "a.webp"])
def test_other_formats_store_the_metadata_too(run, name):
    run("generate", "a red apple", "--seed", "3", "-o", name, "--quiet")
    assert [entry["seed"] for entry in read_metadata(name)] == [3]
    assert run("generate", "--from", name, "-o", "again.png", "--quiet") == (0, "", "")
    run("generate", "a red apple", "--seed", "3", "-o", "plain.png", "--quiet")
    assert not (pixels("again.png") - pixels("plain.png")).any()
    code, _, err = run("generate", "a", "-o", "a.gif", "--quiet")
    assert code == 2 and "images are written as .png, .jpg or .webp" in err


def test_prompts_file(run):
    Path("prompts.txt").write_text("a red apple\n\n  a blue fish \n", encoding="utf-8-sig")
    code, out, _ = run("generate", "a cat", "--prompts-file", "prompts.txt", "--seed", "0")
    assert code == 0 and out.split() == ["a-cat-0.png", "a-red-apple-1.png", "a-blue-fish-2.png"]
    # The byte order mark is not part of the prompt.
    assert read_metadata("a-red-apple-1.png")[0]["prompt"] == "a red apple"


def test_sampling_flags_set_the_options_of_each_stage(run):
    decoder = "--steps 4 --guidance 2.5 --sampler ancestral --upsampler-steps 1"
    prior = "--prior-steps 5 --prior-guidance 1 --prior-candidates 1"
    run("generate", "a", *decoder.split(), *prior.split(), "-o", "a.png", "--quiet")
    options = read_metadata("a.png")[0]["options"]
    keys = ("steps", "guidance", "sampler")
    assert [options["decoder"][key] for key in keys] == [4, 2.5, "ancestral"]
    assert [options["prior"][key] for key in keys] == [5, 1.0, "ancestral"]
    assert [stage["steps"] for stage in options["upsamplers"]] == [1]
    assert options["prior_candidates"] == 1


def test_info_shows_how_to_regenerate_an_image(run):
    run("generate", "a red apple", "a fish", "--seed", "2", "--steps", "5", "-o", ".", "--quiet")
    code, out, _ = run("info", "a-fish-3.png", model=None)
    assert code == 0
    assert "prompt: a fish\nseed: 3\n" in out and "decoder: steps 5, guidance 3.0" in out
    command = out.splitlines()[-1].removeprefix("generate it again: unclip ")
    assert main([*command.split(), "--quiet"]) == 0
    assert np.abs(pixels("again.png") - pixels("a-fish-3.png")).max() <= 2


def test_variations_and_their_regeneration(run):
    run("generate", "a red apple", "--seed", "2", "-o", "apple.png", "--quiet")
    args = ["variations", "apple.png", "-n", "2", "--seed", "7", "--steps", "2", "-o", "more"]
    code, out, _ = run(*args)
    assert code == 0 and out.split() == ["more/apple-7.png", "more/apple-8.png"]
    run(
        "generate",
        "--from",
        "more/apple-8.png",
        "-o",
        "again.png",
        "--quiet",
        "--trust-model",
        model=None,
    )
    assert np.abs(pixels("again.png") - pixels("more/apple-8.png")).max() <= 2
    assert "generated from: a CLIP image embedding" in run("info", "again.png", model=None)[1]


def test_variations_with_a_prompt(run):
    Image.effect_noise((16, 16), 90).convert("RGB").save("noise.png")
    texts = ["--prompt", "a red apple", "--negative-prompt", "a blue fish"]
    assert run("variations", "noise.png", *texts, "--seed", "7", "-o", "a.png", "--quiet")[0] == 0
    run("variations", "noise.png", "--seed", "7", "-o", "plain.png", "--quiet")
    assert np.abs(pixels("a.png") - pixels("plain.png")).max() > 2
    again = ["--from", "a.png", "-o", "again.png", "--quiet", "--trust-model"]
    run("generate", *again, model=None)
    assert np.abs(pixels("again.png") - pixels("a.png")).max() <= 2


def test_a_grid_is_regenerated(run):
    run("generate", "a", "b", "-n", "2", "--seed", "0", "--grid", "-o", "sheet.png", "--quiet")
    run(
        "generate", "--from", "sheet.png", "-o", "again.png", "--quiet", "--trust-model", model=None
    )
    assert np.abs(pixels("again.png") - pixels("sheet.png")).max() <= 2


def test_info_lists_the_components_of_a_model(run, tiny_folder):
    code, out, _ = run("info", str(tiny_folder), model=None)
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["tiny:", "unclip", "in", str(tiny_folder)]
    assert lines[1] == ["licence:", "MIT"]
    assert [line[0] for line in lines[3:8]] == ["clip", "prior", "decoder", "upsampler_0", "all"]
    assert "  prior: steps 3, guidance 2.0, sampler ancestral" in out


def test_models_lists_the_bundled_models(run, tiny_folder, monkeypatch):
    from unclip.checkpoints import folders

    monkeypatch.setattr(folders, "bundled_models", lambda: {"emoji": tiny_folder})
    assert run("models", model=None) == (0, "emoji  2 MB  MIT\n", "")


def test_a_truncated_prompt_is_reported_in_one_line(run):
    code, _, err = run("generate", "a red " * 6 + "submarine", "-o", "a.png", "--quiet")
    assert code == 0 and err.startswith("warning: ") and "marine'" in err and err.count("\n") == 1


def test_an_interrupted_command_keeps_finished_images(run, monkeypatch):
    interrupt_the_second_batch(monkeypatch)
    code, out, err = run("generate", "a", "b", "c", "-n", "10", "--seed", "0", "--quiet")
    assert (code, out, err) == (130, "", "interrupted\n")
    assert sorted(path.name for path in Path().iterdir()) == [f"a-{seed}.png" for seed in range(10)]
    assert [entry["seed"] for entry in read_metadata("a-9.png")] == [9]


def test_an_interrupted_sheet_keeps_finished_images(run, monkeypatch):
    interrupt_the_second_batch(monkeypatch)
    args = [
        "generate",
        "a",
        "b",
        "c",
        "-n",
        "10",
        "--seed",
        "0",
        "--grid",
        "-o",
        "a.png",
        "--quiet",
    ]
    assert run(*args) == (130, "", "interrupted\n")
    assert [entry["seed"] for entry in read_metadata("a.png")] == list(range(10))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--steps 0", "'0' is not a whole number of at least 1"),
        ("--steps 5000", "steps of the decoder are 5000; expected at most 1000"),
        ("--guidance 1e9", "guidance is 1000000000.0"),
        ("--set decoder.timesteps=[1000,0]", "timesteps of the decoder start at 1000; expected"),
        ("--temperature -1", "temperature is -1.0"),
        ("--top-k 3", "which has no --top-k"),
        ("--num-candidates 2 -n 3", "expected at least"),
        ("--negative-prompt a --guidance 1 --prior-guidance 1", "guidance is 1 in"),
        ("--mix 0", "with a sum above 0"),
    ],
)
def test_arguments_are_checked_before_the_model_is_loaded(run, monkeypatch, flags, message):
    monkeypatch.setattr(store, "load_component", None)
    code, _, err = run("generate", "a red apple", *flags.split())
    assert code == 2 and message in err and len(err.splitlines()) == 1


def test_dtypes_have_short_and_long_names(run):
    for dtype in ("bf16", "bfloat16"):
        run("generate", "a", "--seed", "0", "--dtype", dtype, "-o", f"{dtype}.png", "--quiet")
    assert not (pixels("bf16.png") - pixels("bfloat16.png")).any()


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_is_printed(shell, capsys):
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit, match="0"):
        main(["--print-completion", shell])
    out = capsys.readouterr().out
    assert "evaluate" in out and "--prior-steps" in out


@pytest.mark.parametrize("command", ["generate", "variations"])
def test_many_images_are_written_batch_by_batch(run, monkeypatch, command):
    Image.new("RGB", (16, 16), "red").save("a.png")
    subject = {"generate": "a", "variations": "a.png"}[command]
    run(command, subject, "-n", "19", "--seed", "3", "-o", "sheet.png", "--grid", "--quiet")
    with monkeypatch.context() as patches:
        interrupt_the_second_batch(patches)
        assert run(command, subject, "-n", "19", "--seed", "3", "-o", "cut", "--quiet")[0] == 130
    assert sorted(path.name for path in Path("cut").iterdir()) == sorted(
        f"a-{seed}.png" for seed in range(3, 19)
    )
    run(command, subject, "-n", "19", "--seed", "3", "-o", "all", "--quiet")
    entries = [read_metadata(f"all/a-{seed}.png")[0] for seed in range(3, 22)]
    assert entries == read_metadata("sheet.png")  # generated in one call


def test_mix_adds_the_weights_of_equal_prompts(run):
    run("generate", "a", "b", "a", "--mix", "1", "2", "3", "-o", "mixed.png", "--quiet")
    assert read_metadata("mixed.png")[0]["prompt"] == {"a": 4.0, "b": 2.0}


def test_ctrl_c_exits_with_code_130(run, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(DecoderStage, "sample", interrupted)
    assert run("generate", "a", "-o", "a.png", "--quiet") == (130, "", "interrupted\n")
    assert not Path("a.png").exists()


def test_a_closed_pipe_loses_no_image(run, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:  # flushed at the end, like stdout when Python exits
        monkeypatch.setattr(sys, "stdout", closed)
        monkeypatch.setattr(sys, "stderr", closed)
        assert run("generate", "a", "b", "c", "--seed", "0")[0] == 0
    assert sorted(path.name for path in Path().iterdir()) == ["a-0.png", "b-1.png", "c-2.png"]


def test_closed_standard_streams_lose_no_image(run, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert run("generate", "a", "b", "--seed", "0")[0] == 0
    assert sorted(path.name for path in Path().iterdir()) == ["a-0.png", "b-1.png"]


def test_a_warning_stands_on_its_own_line_while_progress_is_shown(run):
    _, _, err = run("generate", "an apple " * 200, "--seed", "0")
    assert "step/s]" in err
    (line,) = [line for line in err.split("\n") if "warning: " in line]
    assert line.split("\r")[-1].startswith("warning: the prompt 'an apple ")


def test_a_file_that_cannot_be_written_is_named(run):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        code, _, err = run("generate", "a", "-o", "a.png", "--quiet")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2
    assert err == "error: cannot write a.png: File too large\n"


def test_prompts_are_read_from_standard_input(run, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO("\ufeffein Käse\n\n a fish \n".encode()))
    monkeypatch.setattr(sys, "stdin", stream)
    assert run("generate", "--prompts-file", "-", "--seed", "0")[0] == 0
    assert sorted(path.name for path in Path().iterdir()) == ["a-fish-1.png", "ein-käse-0.png"]
    for data, message in [(b"\xff", "is not UTF-8"), (b"\n", "- has no prompts")]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        code, _, err = run("generate", "--prompts-file", "-")
        assert code == 2 and message in err and err.count("\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_reported_in_one_line(run, monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        code, _, err = run("models", model=None)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert "standard output" in err and "No space left on device" in err


def test_characters_that_the_terminal_lacks_are_escaped(run, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
    assert run("generate", "赤", "a", "--seed", "0")[0] == 0
    assert sys.stdout.buffer.getvalue().decode().splitlines() == ["\\u8d64-0.png", "a-1.png"]


def test_the_parser_is_built_quickly_and_without_torch():
    script = (
        "import sys, time; start = time.process_time()\n"
        "from unclip.cli.main import build_parser; build_parser()\n"
        "print(time.process_time() - start)\n"
        "assert not {'torch', 'numpy', 'PIL', 'open_clip'} & set(sys.modules), sorted(sys.modules)"
    )
    command = [sys.executable, "-c", script]
    runs = [subprocess.run(command, cwd=ROOT, check=True, capture_output=True) for _ in range(3)]
    assert min(float(done.stdout) for done in runs) <= 0.5  # 0.3 on slow CPUs
    command = [sys.executable, "-m", "unclip", "--version"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (shown.returncode, shown.stdout) == (0, "unclip 0.1.0\n")


def test_public_names_exist():
    import unclip

    assert all(getattr(unclip, name) is not None for name in unclip.__all__)
    with pytest.raises(AttributeError, match="nothing_such"):
        unclip.nothing_such  # noqa: B018


def test_generate_imports_nothing_slow(tmp_path):
    script = (
        "import sys; from unclip.cli.main import main; code = main(sys.argv[1:])\n"
        "slow = ('diffusers', 'accelerate', 'pandas', 'scipy', 'transformers', 'torch._dynamo')\n"
        "print([name for name in slow if name in sys.modules], code)"
    )
    args = ["generate", "a", "--steps", "1", "-o", str(tmp_path / "a.png"), "--quiet"]
    done = subprocess.run(
        [sys.executable, "-c", script, *args], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert done.stdout == "[] 0\n"


@pytest.mark.slow
def test_the_wheel_has_the_bundled_models(tmp_path):
    build = ["pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([sys.executable, "-m", *build], cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("unclip-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    script = (
        "import sys, unclip; from unclip.cli.main import main\n"
        "print(unclip.__file__); main(['models'])\n"
        "for name in sys.argv[1:]: print(unclip.load(name).name)"  # and what they share
    )
    names = sorted(file.parent.name for file in (ROOT / "assets").glob("*/model.json"))
    command = [sys.executable, "-c", script, *names]
    site = tmp_path / "site"
    shown = subprocess.run(command, cwd=site, check=True, capture_output=True, text=True).stdout
    path, *models = shown.splitlines()
    assert path.startswith(str(site))
    assert [line.split()[0] for line in models] == [*names, *names]
    for name in names:
        source, copy = ROOT / "assets" / name, site / "unclip" / "assets" / name
        expected = sorted(path.relative_to(source) for path in source.rglob("*"))
        assert sorted(path.relative_to(copy) for path in copy.rglob("*")) == expected
