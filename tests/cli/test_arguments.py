"""One command line for all kinds of models: each takes its own arguments, and says which they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unclip.cli.main import main
from unclip.image_io import read_metadata, save_png


@pytest.fixture
def run(tiny_folder, tiny_dalle_folder, tmp_path, monkeypatch, capsys):
    """Runs `unclip ARGS --model MODEL` in an empty folder; gives exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    models = {"unclip": str(tiny_folder), "dalle": str(tiny_dalle_folder)}

    def run(*args: str, model: str | None = "dalle") -> tuple[int, str, str]:
        code = main([*args, *(["--model", models[model]] if model else [])])
        return (code, *capsys.readouterr())

    return run


def pixels(path: str) -> np.ndarray:
    return np.asarray(Image.open(path), dtype=int)


def test_dalle_draws_to_files_and_again_from_them(run):
    code, out, err = run(
        "generate", "a red apple", "Ein Fisch!", "-n", "2", "--seed", "5", "-o", "drawn"
    )
    assert code == 0 and out.split() == [
        f"drawn/{name}.png"
        for name in ("a-red-apple-5", "a-red-apple-6", "ein-fisch-7", "ein-fisch-8")
    ]
    assert "/16" in err
    assert run("generate", "--from", "drawn/ein-fisch-8.png", "-o", "again.png", model=None)[0] == 0
    assert not (pixels("again.png") - pixels("drawn/ein-fisch-8.png")).any()


def test_sampling_arguments_reach_the_options(run):
    sampling = "--temperature 0.5 --top-k 3 --top-p 0.9 --guidance 2"
    assert run("generate", "a", "--seed", "0", *sampling.split(), "-o", "a.png", "--quiet") == (
        0,
        "",
        "",
    )
    assert read_metadata("a.png")[0]["options"] == {
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.9,
        "guidance": 2.0,
    }


@pytest.mark.parametrize("model", ["unclip", "dalle"])
def test_the_best_candidates_are_written(run, model):
    code, out, _ = run(
        "generate",
        "a",
        "b",
        "-n",
        "2",
        "--candidates",
        "5",
        "--seed",
        "0",
        "--quiet",
        "--grid",
        "-o",
        "a.png",
        model=model,
    )
    assert code == 0
    entries = read_metadata("a.png")
    assert [entry["prompt"] for entry in entries] == ["a", "a", "b", "b"]
    assert [entry["seed"] // 5 for entry in entries] == [0, 0, 1, 1]
    assert all(entry["candidates"] == 5 and -1 <= entry["score"] <= 1 for entry in entries)
    assert entries[0]["score"] >= entries[1]["score"]
    for prompt in "ab":  # one after the other, as without a grid
        assert (
            run(
                "generate",
                "a",
                "b",
                "-n",
                "2",
                "--candidates",
                "9",
                "--seed",
                "0",
                "-o",
                ".",
                model=model,
            )[0]
            == 0
        )
        assert len(list(Path().glob(f"{prompt}-*.png"))) == 2
        assert all(
            0 <= int(path.stem[2:]) - 9 * "ab".index(prompt) < 9
            for path in Path().glob(f"{prompt}-*.png")
        )


def test_a_picture_is_completed(run):
    run("generate", "a red apple", "--seed", "1", "-o", "apple.png", "--quiet")
    drawing = ["complete", "apple.png", "a fish", "--keep", "0.5", "--seed", "3"]
    code, out, _ = run(*drawing, "-n", "2", "--candidates", "4", "-o", "more")
    assert code == 0 and len(out.split()) == 2
    (metadata,) = read_metadata(out.split()[0])
    assert (metadata["prompt"], metadata["operation"], metadata["candidates"]) == (
        "a fish",
        "complete",
        4,
    )
    assert (
        run("generate", "--from", out.split()[0], "-o", "again.png", "--quiet", model=None)[0] == 0
    )
    assert not (pixels("again.png") - pixels(out.split()[0])).any()
    assert (
        "drawn from: another picture, which the picture holds"
        in run("info", "again.png", model=None)[1]
    )
    assert run("complete", "apple.png", "--seed", "3")[1] == "apple-3.png\n"


def test_variations_of_a_picture(run):
    run("generate", "a red apple", "--seed", "1", "-o", "apple.png", "--quiet")
    code, out, _ = run(
        "variations",
        "apple.png",
        "--keep",
        "0",
        "--prompt",
        "a fish",
        "--temperature",
        "0.7",
        "--seed",
        "2",
    )
    assert code == 0 and out == "a-fish-2.png\n"
    (metadata,) = read_metadata("a-fish-2.png")
    assert (
        metadata["arguments"] == {"prompt": "a fish", "keep": 0.0}
        and metadata["options"]["temperature"] == 0.7
    )


def test_a_picture_of_another_size_is_fitted_if_that_is_asked_for(run):
    Image.new("RGB", (40, 30), "red").save("photo.png")
    for command in ("complete", "variations"):
        code, _, err = run(command, "photo.png", "-o", "a.png", "--quiet")
        assert code == 2 and err.count("\n") == 1
        assert "the image is of 40 x 30 pixels; tiny-dalle takes 16 x 16" in err and "--fit" in err
        assert run(command, "photo.png", "--fit", "-o", f"{command}.png", "--quiet") == (0, "", "")


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (
            "dalle",
            ["generate", "a", "--steps", "3"],
            "tiny-dalle is of kind dalle, which has no --steps; it has --gui",
        ),
        ("dalle", ["generate", "a", "--prior-candidates", "3"], "which has no --prior-candidates"),
        ("dalle", ["generate", "a", "--negative", "b"], "which has no --negative"),
        ("dalle", ["generate", "a", "b", "--mix", "1", "2"], "which has no --mix"),
        (
            "unclip",
            ["generate", "a", "--top-k", "3"],
            "tiny is of kind unclip, which has no --top-k; it has --steps",
        ),
        ("unclip", ["variations", "a.png", "--keep", "0.5"], "which has no --keep"),
        (
            "unclip",
            ["complete", "a.png", "a fish"],
            "tiny is of kind unclip, which completes no pictures",
        ),
        (
            "dalle",
            ["complete", "a.png", "--keep", "1"],
            "keep is 1.0; expected a fraction of the picture in [0, 1)",
        ),
        ("dalle", ["complete", "a.png", "--candidates", "3"], "there is none; give one"),
        ("dalle", ["generate", "a", "--top-k", "0"], "top_k is 0; expected a number of codes"),
        (
            "dalle",
            ["generate", "a", "-n", "3", "--candidates", "2"],
            "expected at least num_images, which is 3",
        ),
        (
            "unclip",
            ["generate", "a", "--candidates", "0"],
            "'0' is not a whole number of at least 1",
        ),
        (
            None,
            ["generate", "--from", "a.png", "--top-k", "3"],
            "--from draws what the picture says",
        ),
        (
            None,
            ["generate", "--from", "a.png", "--preset", "fast"],
            "--from draws what the picture says",
        ),
        (
            "dalle",
            ["generate", "a", "--preset", "fast"],
            "preset 'fast' takes steps of diffusion less often",
        ),
        (
            "unclip",
            ["generate", "a", "--offload", "--compile"],
            "--offload and --compile do not go together",
        ),
    ],
)
def test_what_a_model_does_not_have_is_refused_in_one_line(run, model, arguments, message):
    Image.new("RGB", (16, 16), "red").save("a.png")
    code, out, err = run(*arguments, model=model)
    assert (code, out) == (2, "") and message in err
    assert err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize("model", ["unclip", "dalle"])
def test_a_model_may_be_offloaded_compiled_and_quantized(run, model):
    drawing = ("generate", "a red apple", "--seed", "1", "--quiet", "-o")
    for name, how in {"plain": [], "offloaded": ["--offload"], "compiled": ["--compile"]}.items():
        assert run(*drawing, f"{name}.png", *how, model=model) == (0, "", "")
        assert np.abs(pixels(f"{name}.png") - pixels("plain.png")).max() <= 1
    assert run(*drawing, "rounded.png", "--quantize", "int8", "--offload", model=model) == (
        0,
        "",
        "",
    )


def test_a_quantized_model_draws_again_what_it_drew(run):
    drawing = ("generate", "a red apple", "--seed", "1", "--quiet", "-o")
    for name, how in {"plain": [], "rounded": ["--quantize", "int8"]}.items():
        run(*drawing, f"{name}.png", *how, model="unclip")
    assert (pixels("rounded.png") - pixels("plain.png")).any()
    assert "quantized: int8\n" in run("info", "rounded.png", model=None)[1]
    assert run("generate", "--from", "rounded.png", "-o", "again.png", "--quiet", model=None) == (
        0,
        "",
        "",
    )
    assert not (pixels("again.png") - pixels("rounded.png")).any()


@pytest.mark.parametrize(("drawer", "other"), [("unclip", "dalle"), ("dalle", "unclip")])
def test_a_picture_of_another_kind_of_model_is_not_drawn_again(run, drawer, other):
    run("generate", "a", "-o", "a.png", "--quiet", model=drawer)
    (metadata,) = read_metadata("a.png")
    del metadata["kind"]
    save_png(Image.open("a.png"), "untold.png", metadata)
    for path in ("a.png", "untold.png"):
        code, _, err = run("generate", "--from", path, "-o", "b.png", "--quiet", model=other)
        assert code == 2 and err.count("\n") == 1 and not Path("b.png").exists()
        assert (
            f"is of kind {other}, but the picture was drawn by another kind of model; draw it again with"
            in err
        )


def test_the_preset_can_be_changed_further(run):
    assert (
        run(
            "generate",
            "a",
            "--preset",
            "fast",
            "--steps",
            "5",
            "-o",
            "a.png",
            "--quiet",
            model="unclip",
        )[0]
        == 0
    )
    (metadata,) = read_metadata("a.png")
    stage = metadata["options"]["decoder"]
    assert (stage["steps"], stage["sampler"], stage["guidance_interval"]) == (
        5,
        "unipc",
        [0.2, 0.9],
    )


@pytest.mark.parametrize("command", ["generate", "variations", "complete"])
def test_help_tells_them(run, command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "--temperature X" in told and ("--candidates N" in told) == (command != "variations")
    assert ("--prior-candidates N embeddings drawn for a picture" in told) == (
        command == "generate"
    )
