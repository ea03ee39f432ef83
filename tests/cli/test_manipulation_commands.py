"""`unclip reconstruct | vary | interpolate | diff | edit | probe`: files and error messages."""

from __future__ import annotations

import copy
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unclip.cli.main import main
from unclip.image_io import open_image, read_metadata
from unclip.models.lora import LoRAConfig, add_lora, save_lora
from unclip.pipelines.unclip.latent import Latent
from unclip.pipelines.unclip.pipeline import UnCLIPPipeline

QUICK = ["--steps", "6", "--iterations", "2", "--quiet"]


@pytest.fixture(scope="module")
def model(invertible_pipe, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    invertible_pipe.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run(model, tmp_path, monkeypatch, capsys):
    """Run `unclip ARGS --model MODEL` in a folder with images; return exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    for name, colour in (("apple", "red"), ("fish", "blue"), ("leaf", "green")):
        image = Image.new("RGB", (16, 16), "white")
        image.paste(colour, (3, 4, 12, 13))
        image.save(f"{name}.png")
    mask = Image.new("L", (16, 16))
    mask.paste(255, (2, 2, 9, 9))
    mask.save("mask.png")

    def run(*args: str, model: str | None = model) -> tuple[int, str, str]:
        code = main([*args, *(["--model", model] if model else [])])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def no_inversion(monkeypatch):
    """Fail if an image is inverted, which can take hours."""

    def fail(*args, **kwargs):
        raise AssertionError("an image was inverted")

    monkeypatch.setattr(UnCLIPPipeline, "invert", fail)


def pixels(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"), dtype=int)


def regeneration_error(run, path: str) -> int:
    """Return the largest pixel difference, of 255, of `generate --from`."""
    assert run(
        "generate", "--from", path, "-o", "again.png", "--quiet", "--trust-model", model=None
    ) == (0, "", "")
    return int(np.abs(pixels("again.png") - pixels(path)).max())


@pytest.mark.parametrize("command", ["reconstruct", "vary", "interpolate", "diff", "edit", "probe"])
def test_help_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0 and f"example:\n  unclip {command} " in out


def test_reconstruct(run):
    code, out, err = run("reconstruct", "apple.png", "fish.png", "--steps", "6", "-o", "out")
    assert code == 0
    assert out.split() == ["out/apple-reconstruct.png", "out/fish-reconstruct.png"]
    assert "/15" in err  # the progress bar: two stages, and the first again for the second
    assert np.abs(pixels("out/apple-reconstruct.png") - pixels("apple.png")).max() <= 16
    assert regeneration_error(run, "out/fish-reconstruct.png") <= 2
    shown = run("info", "out/fish-reconstruct.png", model=None)[1]
    assert "operation: reconstruct" in shown and "generated from: latents" in shown
    assert len(shown) < 1500


def test_saved_latents_replace_the_image(run):
    save = ["--save-latent", "apple.safetensors", "-o", "a.png"]
    assert run("reconstruct", "apple.png", *QUICK, *save)[0] == 0
    assert run("reconstruct", "apple.safetensors", "--quiet", "-o", "b.png")[0] == 0
    assert np.array_equal(pixels("a.png"), pixels("b.png"))
    path = ["interpolate", "apple.safetensors", "fish.png", "--frames", "3"]
    assert run(*path, "--quiet", "-o", "c.png")[0] == 0
    assert np.array_equal(pixels("c.png")[:, :16], pixels("a.png"))
    code, _, err = run("vary", "apple.safetensors", "--steps", "9", "--iterations", "0")
    assert code == 2 and "apple.safetensors" in err
    assert "--steps, --iterations cannot be given with it" in err
    code, _, err = run("reconstruct", "apple.png", "--save-latent", "apple.pt")
    assert code == 2 and "apple.pt: latents are written as .safetensors" in err


def test_sources_with_one_name_get_numbered_files(run):
    for folder, image in (("A", "apple.png"), ("B", "fish.png")):
        Path(folder).mkdir()
        Path(image).replace(f"{folder}/1.png")
    save = ["--save-latent", "both.safetensors", "-o", "out"]
    code, out, _ = run("reconstruct", "A/1.png", "B/1.png", "--steps", "6", *save)
    files = ["both.safetensors", "out/1-reconstruct-0.png", "out/1-reconstruct-1.png"]
    assert code == 0 and out.split() == files
    assert np.abs(pixels("out/1-reconstruct-0.png") - pixels("A/1.png")).max() <= 16
    commands = {"reconstruct": 2, "vary -n 3": 6, "diff --theta 0.1 0.2 --to a": 4}
    for command, number in commands.items():
        code, _, err = run(*command.split(), "both.safetensors", "-o", "one.png", model="unknown")
        assert code == 2 and f"one.png is one file for {number} images" in err
    code, out, err = run("reconstruct", "both.safetensors", "leaf.png", "-o", "mixed")
    names = ["both-reconstruct-0", "both-reconstruct-1", "leaf-reconstruct"]
    assert code == 0 and out.split() == [f"mixed/{name}.png" for name in names]
    mixed = pixels("mixed/both-reconstruct-1.png")
    assert np.array_equal(mixed, pixels("out/1-reconstruct-1.png"))


def test_latents_of_another_model_are_rejected_before_inversion(run, monkeypatch, request):
    assert run("reconstruct", "apple.png", *QUICK, "--save-latent", "apple.safetensors")[0] == 0
    request.getfixturevalue("no_inversion")
    latent = Latent.load("apple.safetensors")
    replace(latent, image_emb=torch.ones(1, 17)).save("other.safetensors")
    code, _, err = run("interpolate", "other.safetensors", "fish.png")
    assert code == 2 and "17" in err and "16" in err and err.count("\n") == 1
    again = replace(latent.options, decoder=replace(latent.options.decoder, steps=7))
    replace(latent, options=again).save("longer.safetensors")
    code, _, err = run("interpolate", "apple.safetensors", "fish.png", "longer.safetensors")
    assert code == 2 and "different options" in err


def test_sources_are_checked_one_at_a_time(run, monkeypatch):
    """Several large images would fill the memory."""
    opened = []

    def open_and_watch(source: Path) -> Image.Image:
        assert all(image() is None for image in opened)
        image = open_image(source)
        opened.append(weakref.ref(image))
        return image

    monkeypatch.setattr("unclip.image_io.open_image", open_and_watch)
    files = ["apple.png", "fish.png", "leaf.png"]
    assert run("reconstruct", *files, "apple.png", *QUICK, "--grid")[0] == 0
    assert len(opened) >= 3


def test_vary(run):
    vary = ["vary", "apple.png", "fish.png"]
    code, out, _ = run(*vary, "--eta", "0.4", "-n", "2", "--seed", "7", "--steps", "6")
    assert code == 0
    assert out.split() == [f"{name}-vary-{i}.png" for name in ("apple", "fish") for i in (0, 1)]
    (metadata,) = read_metadata("fish-vary-1.png")
    assert (metadata["seed"], metadata["arguments"]) == (10, {"eta": 0.4})
    assert regeneration_error(run, "fish-vary-1.png") <= 2
    run(*vary, "-n", "3", *QUICK, "--grid", "-o", "sheet.png")
    assert Image.open("sheet.png").size == (3 * 20 - 4, 2 * (16 + 40) - 4)  # with captions
    assert regeneration_error(run, "sheet.png") <= 2


def test_interpolate_writes_a_strip_an_animation_or_a_folder(run):
    path = ["interpolate", "apple.png", "fish.png", "leaf.png", "--frames", "5", *QUICK]
    assert run(*path, "-o", "path.png")[0] == 0
    assert Image.open("path.png").size == (5 * 20 - 4, 16)
    frames = [entry["arguments"]["frames"] for entry in read_metadata("path.png")]
    assert frames == [[k / 4] for k in range(5)]
    assert regeneration_error(run, "path.png") <= 2
    assert run(*path, "-o", "path.gif")[0] == 0
    with Image.open("path.gif") as animation:
        assert (animation.n_frames, animation.size) == (5, (16, 16))
    assert read_metadata("path.gif") == read_metadata("path.png")
    assert run(*path, "-o", "frames")[0] == 0
    names = sorted(path.name for path in Path("frames").iterdir())
    assert names == [f"apple-fish-leaf-interpolate-{k}.png" for k in range(5)]


@pytest.mark.parametrize("spacing", [[], ["--even"]])
def test_interpolate_between_prompts(run, spacing):
    prompts = ["--prompts", "a red apple", "a blue fish", "--frames", "3", "--noise", "first"]
    options = ["--seed", "4", "--steps", "6", "--quiet", "-o", "path.png"]
    assert run("interpolate", *prompts, *spacing, *options) == (0, "", "")
    assert regeneration_error(run, "path.png") <= 2


def test_diff(run):
    args = ["--from", "a red apple", "--to", "a blue fish", "--theta", "0", "0.2", "0.5"]
    assert run("diff", "apple.png", "fish.png", *args, *QUICK, "--grid", "-o", "diff.png")[0] == 0
    assert Image.open("diff.png").size == (3 * 20 - 4, 2 * (16 + 40) - 4)  # with captions
    entries = read_metadata("diff.png")
    assert [entry["arguments"]["theta"] for entry in entries] == [0.0, 0.2, 0.5] * 2
    assert regeneration_error(run, "diff.png") <= 2
    assert run("diff", "apple.png", "--to", "a blue fish", *QUICK, "-o", "one.png")[0] == 0
    defaults = {"base": "", "target": "a blue fish", "theta": 0.3, "eta": 0.5}
    assert read_metadata("one.png")[0]["arguments"] == defaults


@pytest.mark.parametrize(
    ("args", "size"),
    [
        ("--mask mask.png --resamples 2 --agreement 0", (16, 16)),
        ("--mask mask.png --strength 0.5", (16, 16)),
        ("--extend 0 4 9 0", (25, 20)),
        ("--strength 0.5", (16, 16)),
        ("--negative-prompt apple", (16, 16)),
        ("", (16, 16)),
    ],
)
def test_edit(run, args, size):
    edit = ["edit", "apple.png", "--prompt", "a blue fish", "--seed", "3", "--quiet"]
    assert run(*edit, *args.split(), "-o", "edited.png") == (0, "", "")
    assert Image.open("edited.png").size == size
    if "--mask" in args:
        kept = np.asarray(Image.open("mask.png")) == 0
        assert np.array_equal(pixels("edited.png")[kept], pixels("apple.png")[kept])
    assert regeneration_error(run, "edited.png") <= 2


RUNTIME = {
    "reconstruct": "apple.png --iterations 1",
    "vary": "apple.png --iterations 1 --seed 1",
    "interpolate": "--prompts a b --frames 2 --seed 1",
    "diff": "apple.png --to a --iterations 1 --seed 1",
    "edit": "apple.png --mask mask.png --prompt a --seed 1",
    "probe": "apple.png --word fish --classes a b -n 1",
}


@pytest.mark.parametrize("command", RUNTIME)
def test_every_command_quantizes_offloads_compiles_and_adapts(run, invertible_pipe, command):
    torch.manual_seed(0)
    adapted = copy.deepcopy(invertible_pipe.decoder)
    add_lora(adapted, LoRAConfig())
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    save_lora(adapted, Path("adapter"))
    words = [command, *RUNTIME[command].split(), "--steps", "6", "--quiet"]
    assert run(*words, "-o", "plain.png") == (0, "", "")
    for flag in ("--offload", "--compile"):
        assert run(*words, flag, "-o", "same.png") == (0, "", "")
        assert np.abs(pixels("same.png") - pixels("plain.png")).max() <= 3
    flags = ["--quantize", "int8", "--offload", "--lora", "adapter:0.5"]
    assert run(*words, *flags, "-o", "other.png") == (0, "", "")
    entry = read_metadata("other.png")[0]
    assert (entry["quantized"], entry["lora"][0]["scale"]) == ("int8", 0.5)
    assert (pixels("other.png") != pixels("plain.png")).any()


def test_edits_and_interpolations_of_prompts_use_another_prior(run, model):
    prior = ["--prior", model, "--prior-steps", "2", "--steps", "6", "--quiet"]
    assert run("edit", "apple.png", "--prompt", "a", *prior, "-o", "edited.png") == (0, "", "")
    assert run("interpolate", "--prompts", "a", "b", *prior, "-o", "path.png") == (0, "", "")
    for file in ("edited.png", "path.png"):
        entry = read_metadata(file)[0]
        assert entry["prior_model"] == model and entry["options"]["prior"]["steps"] == 2


@pytest.mark.parametrize(
    ("call", "args", "finished"),
    [
        ("vary", "vary apple.png fish.png -n 10", 10),
        ("text_diff", "diff apple.png fish.png --to b --theta 0 .1 .2 .3 .4 .5 .6 .7 .8", 9),
        ("interpolate", "interpolate apple.png fish.png --frames 20", 16),
        ("interpolate", "interpolate --prompts a b --frames 20 --noise random", 16),
    ],
)
def test_an_interrupted_sheet_keeps_finished_images(run, monkeypatch, call, args, finished):
    whole, calls = getattr(UnCLIPPipeline, call), []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    quick = QUICK if "--prompts" not in args else ["--steps", "6", "--quiet"]
    command = [*args.split(), *quick, "--seed", "5", "--grid"]
    assert run(*command, "-o", "whole.png") == (0, "", "")
    monkeypatch.setattr(UnCLIPPipeline, call, interrupted)
    assert run(*command, "-o", "part.png") == (130, "", "interrupted\n")
    entries = read_metadata("whole.png")
    assert len(entries) > finished
    assert read_metadata("part.png") == entries[:finished]


def test_an_image_too_large_for_metadata_is_reported(run):
    Image.new("RGB", (2100, 2000), "red").save("large.png")
    args = ["--strength", "0.5", "--steps", "3", "--quiet", "-o", "edited.png"]
    code, _, err = run("edit", "large.png", *args)
    assert code == 0 and err.startswith("warning: ") and "2100 x 2000" in err
    shown = run("info", "edited.png", model=None)[1]
    assert "generated from: another image, which is not stored" in shown and "--from" not in shown
    assert "cannot be generated again" in shown.splitlines()[-1]


def test_an_empty_mask_is_reported_in_one_line(run):
    Image.new("L", (16, 16)).save("black.png")
    args = ["--mask", "black.png", "--prompt", "a", "-o", "same.png", "--quiet"]
    code, out, err = run("edit", "apple.png", *args)
    assert (code, out) == (0, "") and err.startswith("warning: ") and err.count("\n") == 1
    assert np.array_equal(pixels("same.png"), pixels("apple.png"))


def test_probe_components(run):
    data = Path("data")
    data.mkdir()
    for i in range(8):
        Image.effect_noise((16, 16), 20 * i).convert("RGB").save(data / f"{i}.png")
        (data / f"{i}.txt").write_text(str(i))
    probe = ["probe", "apple.png", "fish.png", "--components", "1", "4", "--steps", "3", "--quiet"]
    code, _, err = run(*probe, "--data", "data", "--save-pca", "apple.png/pca.safetensors")
    assert code == 2 and err.count("\n") == 1
    assert err.startswith("error: cannot write apple.png/pca.safetensors: ")
    assert run(*probe, "--data", "data", "--save-pca", "new/pca.safetensors") == (0, "", "")
    assert len(read_metadata("components.png")) == 4
    assert Image.open("components.png").width == 3 * 100 - 4
    assert run(*probe, "--pca", "new/pca.safetensors", "-o", "b.png") == (0, "", "")
    assert np.array_equal(pixels("components.png"), pixels("b.png"))


def test_probe_word(run):
    word = ["--word", "fish", "--classes", "a red apple", "a blue fish", "-n", "2"]
    code, out, _ = run("probe", "apple.png", *word, "--steps", "3")
    assert (code, out) == (0, "attack.png\n") and len(read_metadata("attack.png")) == 4


def test_mix_and_negative_prompts_are_stored_and_regenerated(run):
    args = ["--mix", "2", "1", "--negative-prompt", "a cat", "--seed", "1", "--quiet"]
    assert run("generate", "a red apple", "a blue fish", *args) == (0, "", "")
    (metadata,) = read_metadata("a-red-apple-and-a-blue-fish-1.png")
    assert metadata["prompt"] == {"a red apple": 2.0, "a blue fish": 1.0}
    assert metadata["negative_prompt"] == "a cat"
    assert regeneration_error(run, "a-red-apple-and-a-blue-fish-1.png") <= 2


NOT_A_DIRECTORY = "apple.png is not a directory"
ATTACK = "probe apple.png --word a --classes b c"


@pytest.mark.parametrize(
    ("command", "facts"),
    [
        ("vary none.png", ("none.png does not exist",)),
        ("vary apple.png --eta 2", ("'2' is not a number from 0 to 1",)),
        ("vary apple.png -n 2 -o a.png", ("a.png is one file for 2 images",)),
        ("vary apple.png --iterations -1", ("--iterations", "'-1'", "at least 0")),
        ("vary mask.safetensors", ("mask.safetensors",)),
        ("reconstruct apple.png -o a.gif", ("a.gif: images are written as .png",)),
        ("interpolate", ("either images or --prompts",)),
        ("vary apple.png --seed -1", ("--seed", "'-1'", "0 to 2**62")),
        ("vary apple.png -o apple.png/x.png", ("cannot write apple.png/x.png", NOT_A_DIRECTORY)),
        ("vary apple.png -o apple.png/new/dir", ("apple.png/new/dir", NOT_A_DIRECTORY)),
        (
            "reconstruct apple.png --save-latent apple.png/l.safetensors",
            ("cannot write apple.png/l.safetensors", NOT_A_DIRECTORY),
        ),
        (
            "reconstruct apple.png --save-latent folder.safetensors",
            ("folder.safetensors is a folder",),
        ),
        ("interpolate apple.png fish.png --seed -1", ("--seed", "'-1'", "0 to 2**62")),
        ("interpolate apple.png fish.png -o folder.gif", ("folder.gif is a folder",)),
        ("interpolate apple.png fish.png -o apple.png/a.gif", (NOT_A_DIRECTORY,)),
        ("interpolate apple.png fish.png -o a.gif --fps 0", ("fps is 0", "0.1 to 100")),
        ("interpolate apple.png fish.png -o a.gif --fps nan", ("fps is nan", "0.1 to 100")),
        ("interpolate apple.png fish.png -o a.gif --grid", ("a.gif is an animation", "--grid")),
        ("interpolate --prompts a b --iterations 5", ("--iterations", "--prompts")),
        ("diff apple.png --from a --to a", ("same embedding",)),
        ("diff apple.png --to a --seed -1", ("--seed", "'-1'", "0 to 2**62")),
        (f"{ATTACK} --pca a.safetensors", ("--pca", "--word")),
        (f"{ATTACK} --save-pca a.safetensors", ("--save-pca", "--word")),
        (f"{ATTACK} --data a", ("--data", "--word")),
        (f"{ATTACK} --components 2", ("--components", "--word")),
        ("probe apple.png --data a -o folder.png", ("folder.png is a folder",)),
        ("probe apple.png --data a --pca b", ("--pca", "not allowed", "--data")),
        ("interpolate apple.png", ("at least 2 images or prompts; got 1",)),
        ("interpolate apple.png fish.png --frames 1", ("--frames", "'1'", "at least 2")),
        ("interpolate apple.png fish.png -o a.bmp", ("a.bmp", ".png")),
        ("diff apple.png", ("arguments are required: --to",)),
        ("diff apple.png --to a --theta 2", ("'2' is not a number from 0 to 1",)),
        ("edit apple.png --mask small.png", ("4 x 4", "16 x 16")),
        ("edit apple.png --mask mask.png --extend 1 0 0 0", ("--extend", "not allowed", "--mask")),
        ("edit apple.png --extend 0 0 0 0", ("0",)),
        ("edit apple.png --extend 1 0 0 0 --strength 0.5", ("--strength", "--extend")),
        ("edit apple.png --resamples 3", ("--resamples needs --mask or --extend",)),
        ("edit apple.png --agreement 3", ("--agreement needs --mask or --extend",)),
        (
            "edit apple.png --mask mask.png --agreement -1",
            ("agreement is -1.0", "expected at least 0"),
        ),
        ("edit apple.png --training-free", ("--training-free needs --mask or --extend",)),
        ("edit apple.png --strength 0", ("strength is 0.0",)),
        ("edit apple.png --strength 2", ("--strength", "'2' is not a number from 0 to 1")),
        ("probe apple.png", ("--data", "--pca")),
        ("probe apple.png --word a", ("--word and --classes",)),
        ("probe apple.png --word a --classes b", ("1 class",)),
        ("probe apple.png fish.png --word a --classes b c", ("one image; got 2",)),
        ("probe apple.png --pca none.safetensors", ("none.safetensors",)),
        ("vary apple.png --set decoder.eta=0.5", ("the decoder has sampler 'ddim', eta 0.5",)),
        ("interpolate apple.png fish.png --prior x", ("--prior needs --prompts",)),
        ("edit apple.png --prior-steps 2", ("--prior-steps needs --prompt;",)),
        ("generate a b --mix 1", ("1 weights for 2 prompts",)),
        ("generate a b --mix 1 -1", ("sum above 0",)),
    ],
)
def test_invalid_arguments_are_reported_before_inversion(
    run, tmp_path, no_inversion, command, facts
):
    for name in ("folder.png", "folder.gif", "folder.safetensors"):
        Path(name).mkdir()
    Image.new("L", (4, 4), 255).save("small.png")
    before = set(tmp_path.rglob("*"))
    code, out, err = run(*command.split(), "--quiet")
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1
    assert all(fact in err for fact in facts), err
    assert set(tmp_path.rglob("*")) == before


def test_an_mp4_without_ffmpeg_is_rejected_before_inversion(
    run, monkeypatch, tmp_path, no_inversion
):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = run("interpolate", "apple.png", "fish.png", "-o", "path.mp4", "--quiet")
    assert code == 2 and "ffmpeg" in err


def test_manipulations_need_an_unclip_model(run, tiny_dalle_folder):
    code, _, err = run("vary", "apple.png", "--quiet", model=str(tiny_dalle_folder))
    assert code == 2 and "of kind dalle" in err and "vary needs an unCLIP model" in err
