"""Arguments of `generate`, `variations` and `complete` for each kind of model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unclip.checkpoints import store
from unclip.cli.main import main
from unclip.image_io import read_metadata, save_png


@pytest.fixture
def run(tiny_folder, tiny_dalle_folder, tmp_path, monkeypatch, capsys):
    """Run `unclip ARGS --model MODEL` in an empty folder; return exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    models = {"unclip": str(tiny_folder), "dalle": str(tiny_dalle_folder)}

    def run(*args: str, model: str | None = "dalle") -> tuple[int, str, str]:
        code = main([*args, *(["--model", models[model]] if model else [])])
        return (code, *capsys.readouterr())

    return run


def pixels(path: str) -> np.ndarray:
    return np.asarray(Image.open(path), dtype=int)


def test_dalle_generates_files_and_regenerates_them(run):
    args = ["generate", "a red apple", "Ein Fisch!", "-n", "2", "--seed", "5", "-o", "out"]
    code, out, err = run(*args)
    names = ["a-red-apple-5", "a-red-apple-6", "ein-fisch-7", "ein-fisch-8"]
    assert code == 0 and out.split() == [f"out/{name}.png" for name in names]
    assert "/16" in err  # the progress bar
    assert (
        run(
            "generate",
            "--from",
            "out/ein-fisch-8.png",
            "-o",
            "again.png",
            "--trust-model",
            model=None,
        )[0]
        == 0
    )
    assert not (pixels("again.png") - pixels("out/ein-fisch-8.png")).any()


def test_sampling_flags_set_the_options(run):
    flags = "--temperature 0.5 --top-k 3 --top-p 0.9 --guidance 2".split()
    done = run("generate", "a", "--seed", "0", *flags, "-o", "a.png", "--quiet")
    assert done == (0, "", "")
    expected = {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "guidance": 2.0, "candidates": 1}
    assert read_metadata("a.png")[0]["options"] == expected


def test_any_option_can_be_set(run):
    settings = "prior.sampler=ddim decoder.eta=0.5 decoder.guidance_interval=[0.2,0.9] "
    settings += "decoder.steps=4 upsamplers.0.guidance=1.5 embedding=none embedding=prior"
    flags = ["--steps", "3", "--upsampler-steps", "2", "--embedding", "text"]
    flags += [word for setting in settings.split() for word in ("--set", setting)]
    done = run("generate", "a", "--seed", "0", *flags, "-o", "a.png", "--quiet", model="unclip")
    assert done == (0, "", "")
    options = read_metadata("a.png")[0]["options"]
    changed = {"eta": 0.5, "guidance_interval": [0.2, 0.9], "steps": 4}
    assert changed.items() <= options["decoder"].items()  # --set overrides --steps
    (upsampler,) = options["upsamplers"]
    assert (upsampler["guidance"], upsampler["steps"]) == (1.5, 2)
    assert (options["prior"]["sampler"], options["embedding"]) == ("ddim", "prior")
    for command in (["variations", "a.png", "--fit"], ["complete", "a.png", "--keep", "0.5"]):
        flags = ["--set", "temperature=0.5", "-o", "b.png", "--quiet"]
        assert run(*command, *flags) == (0, "", "")
        assert read_metadata("b.png")[0]["options"]["temperature"] == 0.5
    args = ["generate", "a", "--set", "candidates=3", "--guidance", "2", "-o", "c.png", "--quiet"]
    assert run(*args) == (0, "", "")
    options = read_metadata("c.png")[0]["options"]
    assert (options["candidates"], options["guidance"]) == (3, 2.0)


@pytest.mark.parametrize("model", ["unclip", "dalle"])
def test_candidates_keeps_the_best_images(run, model):
    generate = ["generate", "a", "b", "-n", "2", "--seed", "0", "--quiet"]
    args = [*generate, "--num-candidates", "5", "--grid", "-o", "a.png"]
    assert run(*args, model=model)[0] == 0
    entries = read_metadata("a.png")
    assert [entry["prompt"] for entry in entries] == ["a", "a", "b", "b"]
    assert [entry["seed"] // 5 for entry in entries] == [0, 0, 1, 1]
    assert all(entry["candidates"] == 5 and -1 <= entry["score"] <= 1 for entry in entries)
    assert entries[0]["score"] >= entries[1]["score"]
    # Without a grid the prompts are separate calls.
    assert run(*generate, "--num-candidates", "9", "-o", ".", model=model)[0] == 0
    for i, prompt in enumerate("ab"):
        seeds = [int(path.stem[2:]) for path in Path().glob(f"{prompt}-*.png")]
        assert len(seeds) == 2 and all(9 * i <= seed < 9 * (i + 1) for seed in seeds)


def test_complete(run):
    run("generate", "a red apple", "--seed", "1", "-o", "apple.png", "--quiet")
    args = ["complete", "apple.png", "a fish", "--keep", "0.5", "--seed", "3"]
    code, out, _ = run(*args, "-n", "2", "--num-candidates", "4", "-o", "more")
    assert code == 0 and len(out.split()) == 2
    first = out.split()[0]
    (metadata,) = read_metadata(first)
    assert (metadata["prompt"], metadata["operation"]) == ("a fish", "complete")
    assert metadata["candidates"] == 4
    assert (
        run("generate", "--from", first, "-o", "again.png", "--quiet", "--trust-model", model=None)[
            0
        ]
        == 0
    )
    assert not (pixels("again.png") - pixels(first)).any()
    shown = run("info", "again.png", model=None)[1]
    assert "generated from: another image, which is stored in this file" in shown
    assert run("complete", "apple.png", "--seed", "3")[1] == "apple-3.png\n"


def test_dalle_variations(run):
    run("generate", "a red apple", "--seed", "1", "-o", "apple.png", "--quiet")
    flags = ["--keep", "0", "--prompt", "a fish", "--temperature", "0.7", "--seed", "2"]
    code, out, _ = run("variations", "apple.png", *flags)
    assert code == 0 and out == "a-fish-2.png\n"
    (metadata,) = read_metadata("a-fish-2.png")
    assert metadata["arguments"] == {"prompt": "a fish", "keep": 0.0}
    assert metadata["options"]["temperature"] == 0.7


def test_dalle_inpaints(run):
    Image.effect_noise((20, 16), 90).convert("RGB").save("noise.png")
    mask = Image.new("L", (20, 16))
    mask.paste(255, (3, 3, 15, 9))
    mask.save("mask.png")
    flags = ["--prompt", "a fish", "--negative-prompt", "an apple", "--guidance", "2"]
    flags += ["--num-candidates", "3", "--seed", "2", "--quiet"]
    code, _, err = run("edit", "noise.png", "--mask", "mask.png", *flags, "-o", "edited.png")
    assert (code, err) == (0, "")
    changed = (pixels("edited.png") != pixels("noise.png")).any(axis=2)
    assert changed.any() and not changed[np.asarray(mask) == 0].any()
    assert read_metadata("edited.png")[0]["candidates"] == 3
    again = ["--from", "edited.png", "-o", "again.png", "--quiet", "--trust-model"]
    assert run("generate", *again, model=None)[0] == 0
    assert (pixels("again.png") == pixels("edited.png")).all()


@pytest.mark.parametrize("command", ["complete", "variations"])
def test_fit_accepts_an_image_of_another_size(run, command):
    Image.new("RGB", (40, 30), "red").save("photo.png")
    code, _, err = run(command, "photo.png", "-o", "a.png", "--quiet")
    assert code == 2 and err.count("\n") == 1
    assert "40 x 30" in err and "16 x 16" in err and "--fit" in err
    assert run(command, "photo.png", "--fit", "-o", f"{command}.png", "--quiet") == (0, "", "")


@pytest.mark.parametrize(
    ("model", "arguments", "messages"),
    [
        (
            "dalle",
            "generate a --steps 3",
            ("tiny-dalle is of kind dalle, which has no --steps", "--guidance, --temperature"),
        ),
        ("dalle", "generate a --prior-candidates 3", ("has no --prior-candidates",)),
        ("dalle", "generate a --prior x", ("has no --prior;",)),
        ("dalle", "generate a --embedding text", ("has no --embedding",)),
        (
            "dalle",
            "edit a.png --strength 0.5",
            ("which only inpaints; --strength needs an unCLIP",),
        ),
        ("dalle", "edit a.png --extend 1 0 0 0", ("--extend needs an unCLIP model",)),
        ("dalle", "edit a.png", ("of kind dalle, which only inpaints; edit needs --mask",)),
        ("dalle", "edit a.png --mask a.png --steps 3", ("has no --steps",)),
        ("unclip", "edit a.png --mask a.png --top-k 3", ("has no --top-k",)),
        ("dalle", "generate a b --mix 1 2", ("has no --mix",)),
        ("unclip", "generate a --top-k 3", ("tiny is of kind unclip, which has no --top-k",)),
        ("unclip", "variations a.png --keep 0.5", ("has no --keep",)),
        ("unclip", "complete a.png fish", ("tiny is of kind unclip", "needs a DALL-E model")),
        ("dalle", "complete a.png --keep 1", ("keep is 1.0; expected", "[0, 1)")),
        ("dalle", "complete a.png --num-candidates 3", ("give one",)),
        ("dalle", "generate a --top-k 0", ("--top-k", "'0'", "at least 1")),
        ("dalle", "generate a -n 3 --num-candidates 2", ("at least num_images", "3")),
        ("unclip", "generate a --num-candidates 0", ("--num-candidates", "'0'", "at least 1")),
        ("unclip", "generate a --embedding text --prior-steps 3", ("--prior-steps", "text")),
        ("unclip", "generate a --embedding text --temperature 1", ("--temperature", "text")),
        ("unclip", "generate a --embedding none --prior x", ("--prior cannot", "--embedding none")),
        (None, "generate --from a.png --top-k 3", ("--from", "cannot be given with it")),
        (None, "generate --from a.png --set top_k=3", ("--from", "cannot be given with it")),
        (None, "generate --from a.png --preset fast", ("--from", "cannot be given with it")),
        ("dalle", "generate a --preset fast", ("has no --preset",)),
        ("unclip", "generate a --offload --compile", ("--compile", "not allowed", "--offload")),
    ],
)
def test_flags_that_a_model_lacks_are_rejected_in_one_line(run, model, arguments, messages):
    Image.new("RGB", (16, 16), "red").save("a.png")
    code, out, err = run(*arguments.split(), model=model)
    assert (code, out) == (2, "") and all(message in err for message in messages)
    assert err.startswith("error: ") and err.count("\n") == 1


def test_the_embedding_is_chosen(run):
    for flags in (["text"], ["none"], ["prior", "--prior-steps", "3"]):
        args = ["generate", "a", "--embedding", *flags, "-o", "a.png", "--quiet"]
        assert run(*args, model="unclip") == (0, "", "")
        assert read_metadata("a.png")[0]["options"]["embedding"] == flags[0]


@pytest.mark.parametrize("model", ["unclip", "dalle"])
def test_offload_compile_and_quantize(run, model):
    generate = ("generate", "a red apple", "--seed", "1", "--quiet", "-o")
    for name, flags in {"plain": [], "offload": ["--offload"], "compile": ["--compile"]}.items():
        assert run(*generate, f"{name}.png", *flags, model=model) == (0, "", "")
        assert np.abs(pixels(f"{name}.png") - pixels("plain.png")).max() <= 1
    flags = ("--quantize", "int8", "--offload")
    assert run(*generate, "int8.png", *flags, model=model) == (0, "", "")


def test_images_of_a_quantized_model_are_regenerated(run):
    generate = ("generate", "a red apple", "--seed", "1", "--quiet", "-o")
    for name, flags in {"plain": [], "int8": ["--quantize", "int8"]}.items():
        run(*generate, f"{name}.png", *flags, model="unclip")
    assert (pixels("int8.png") - pixels("plain.png")).any()
    assert "quantized: int8\n" in run("info", "int8.png", model=None)[1]
    done = run(
        "generate", "--from", "int8.png", "-o", "again.png", "--quiet", "--trust-model", model=None
    )
    assert done == (0, "", "")
    assert not (pixels("again.png") - pixels("int8.png")).any()


@pytest.mark.parametrize(("source", "other"), [("unclip", "dalle"), ("dalle", "unclip")])
def test_regeneration_needs_the_same_kind_of_model(run, source, other):
    run("generate", "a", "-o", "a.png", "--quiet", model=source)
    (metadata,) = read_metadata("a.png")
    del metadata["kind"]
    save_png(Image.open("a.png"), "no-kind.png", metadata)
    for path in ("a.png", "no-kind.png"):
        code, _, err = run("generate", "--from", path, "-o", "b.png", "--quiet", model=other)
        assert code == 2 and err.count("\n") == 1 and not Path("b.png").exists()
        assert f"is of kind {other}" in err and "another kind of model" in err


def test_flags_change_the_options_of_the_preset(run):
    flags = ("--preset", "fast", "--steps", "5")
    assert run("generate", "a", *flags, "-o", "a.png", "--quiet", model="unclip")[0] == 0
    decoder = read_metadata("a.png")[0]["options"]["decoder"]
    assert (decoder["steps"], decoder["sampler"]) == (5, "unipc")
    assert decoder["guidance_interval"] == [0.2, 0.9]


@pytest.mark.parametrize(
    ("setting", "facts"),
    [
        ("decoder.stepz=3", ("decoder.stepz is unknown", "did you mean 'steps'")),
        ("upsamplers.*.noise=3", ("upsamplers.0.noise is unknown", "steps, guidance, sampler")),
        ("guidance=3", ("guidance is unknown", "decoder.guidance")),
        ("top_k=3", ("top_k is unknown", "prior, decoder, upsamplers")),
        ("decoder.eta=2", ("decoder.eta is 2", "at most 1")),
        ("decoder.steps=many", ("decoder.steps is 'many'", "integer")),
        ("decoder.sampler=euler", ("sampler is 'euler'", "ddim", "unipc")),
        ("decoder.guidance_interval=[1,0]", ("guidance_interval", "low <= high")),
        ("upsamplers.1.steps=3", ("'1' does not exist in a list of 1",)),
        ("decoder.steps", ("expected KEY=VALUE, such as decoder.steps=10",)),
        ("decoder.timesteps=[1", ("'[1' is not a valid YAML value",)),
    ],
)
def test_wrong_settings_are_reported_before_the_model_is_loaded(run, monkeypatch, setting, facts):
    monkeypatch.setattr(store, "load_component", None)
    code, out, err = run("generate", "a", "--set", setting, "--quiet", model="unclip")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert all(fact in err for fact in ("--set", *facts)), err


def test_settings_of_foreign_checkpoints_are_checked_as_far_as_they_are_known(run):
    Path("karlo").mkdir()  # of no known format: an attempt to load it fails
    code, _, err = run("generate", "a", "--set", "decoder.stepz=3", "--model", "karlo", model=None)
    assert code == 2 and "decoder.stepz is unknown" in err and err.count("\n") == 1
    for setting in ("upsamplers.1.eta=1", "decoder.timesteps=[3, 2]", "top_k=3"):
        code, _, err = run("generate", "a", "--set", setting, "--model", "karlo", model=None)
        assert code == 2 and "karlo is not a model" in err


def test_several_images_are_varied(run):
    for name, colour in {"apple": "red", "fish": "blue"}.items():
        Image.new("RGB", (16, 16), colour).save(f"{name}.png")
    args = ["variations", "apple.png", "fish.png", "-n", "2", "--seed", "3", "--steps", "2"]
    code, out, _ = run(*args, "-o", "out", model="unclip")
    names = ["apple-3", "apple-4", "fish-5", "fish-6"]
    assert code == 0 and out.split() == [f"out/{name}.png" for name in names]
    run("variations", "fish.png", "--seed", "6", "--steps", "2", "-o", "6.png", model="unclip")
    assert np.abs(pixels("6.png") - pixels("out/fish-6.png")).max() <= 2
    run(*args, "--grid", "-o", "sheet.png", "--quiet", model="unclip")
    seeds = [entry["seed"] for entry in read_metadata("sheet.png")]
    assert seeds == [3, 4, 5, 6] and Image.open("sheet.png").width == 2 * 20 - 4
    assert run("variations", "apple.png", "fish.png", "-o", "d", "--quiet")[0] == 0  # DALL-E
    assert len([*Path("d").iterdir()]) == 2
    code, _, err = run("variations", "apple.png", "none.png", model="unclip")
    assert code == 2 and "none.png does not exist" in err
    code, _, err = run("variations", "apple.png", "fish.png", "-o", "a.png", model="unclip")
    assert code == 2 and "a.png is one file for 2 images" in err


@pytest.mark.parametrize("command", ["generate", "variations", "complete"])
def test_help_lists_the_sampling_flags(run, command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--temperature X" in shown
    assert ("--num-candidates N" in shown) == (command != "variations")
    assert ("--prior-candidates N" in shown) == (command == "generate")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("evaluate --data none --beside x", "--baseline"),
        ("evaluate --data none --pictures x", "--sheets"),
        ("evaluate-codec none --data none --picture x", "--sheet"),
        ("drift --data none", "evaluate-approximations"),
        ("generate a --candidates 2 -n 3", "--num-candidates"),
        ("bench --candidates 2 --batch-size 4", "--num-candidates"),
    ],
)
def test_old_names_work_with_a_warning(run, old, new):
    code, _, err = run(*old.split(), model="unclip" if "codec" not in old else None)
    assert code == 2 and err.startswith("warning: ") and f"is deprecated; use {new}\n" in err
    assert "unrecognized" not in err and "invalid choice" not in err
