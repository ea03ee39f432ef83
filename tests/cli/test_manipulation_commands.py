"""`unclip reconstruct | vary | interpolate | diff | edit | probe`: files in, files out, and what goes wrong."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unclip.cli.main import main
from unclip.image_io import open_image, read_metadata
from unclip.pipelines.unclip import manipulations as manipulation

QUICK = ["--steps", "6", "--iterations", "2", "--quiet"]


@pytest.fixture(scope="module")
def model(invertible_pipe, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("models") / "still"
    invertible_pipe.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run(model, tmp_path, monkeypatch, capsys):
    """Runs `unclip ARGS --model MODEL` in a folder with some pictures; gives exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    for name, colour in (("apple", "red"), ("fish", "blue"), ("leaf", "green")):
        picture = Image.new("RGB", (16, 16), "white")
        picture.paste(colour, (3, 4, 12, 13))
        picture.save(f"{name}.png")
    marked = Image.new("L", (16, 16))
    marked.paste(255, (2, 2, 9, 9))
    marked.save("mask.png")

    def run(*args: str, model: str | None = model) -> tuple[int, str, str]:
        code = main([*args, *(["--model", model] if model else [])])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def pixels(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"), dtype=int)


def drawn_again(run, path: str) -> int:
    """How far `generate --from` comes from a picture, of 255."""
    assert run("generate", "--from", path, "-o", "again.png", "--quiet", model=None) == (0, "", "")
    return int(np.abs(pixels("again.png") - pixels(path)).max())


@pytest.mark.parametrize("command", ["reconstruct", "vary", "interpolate", "diff", "edit", "probe"])
def test_help_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0 and f"example:\n  unclip {command} " in out


def test_pictures_are_reconstructed(run):
    code, out, err = run("reconstruct", "apple.png", "fish.png", "--steps", "6", "-o", "drawn")
    assert code == 0 and out.split() == [
        "drawn/apple-reconstruct.png",
        "drawn/fish-reconstruct.png",
    ]
    assert "/15" in err  # the progress bar: two stages, and the first again for the second
    assert np.abs(pixels("drawn/apple-reconstruct.png") - pixels("apple.png")).max() <= 16
    assert drawn_again(run, "drawn/fish-reconstruct.png") <= 2
    told = run("info", "drawn/fish-reconstruct.png", model=None)[1]
    assert "operation: reconstruct" in told and "drawn from: latents" in told and len(told) < 1500


def test_latents_are_kept_for_other_commands(run):
    assert (
        run(
            "reconstruct", "apple.png", *QUICK, "--save-latent", "apple.safetensors", "-o", "a.png"
        )[0]
        == 0
    )
    assert run("reconstruct", "apple.safetensors", "--quiet", "-o", "b.png")[0] == 0
    assert np.array_equal(pixels("a.png"), pixels("b.png"))
    assert (
        run(
            "interpolate",
            "apple.safetensors",
            "fish.png",
            "--frames",
            "3",
            "--quiet",
            "-o",
            "c.png",
        )[0]
        == 0
    )
    assert np.array_equal(pixels("c.png")[:, :16], pixels("a.png"))
    code, _, err = run("vary", "apple.safetensors", "--steps", "9")
    assert (
        code == 2
        and "apple.safetensors was inverted as it tells; --steps cannot be given with it" in err
    )
    code, _, err = run("reconstruct", "apple.png", "--save-latent", "apple.pt")
    assert code == 2 and "apple.pt: latents are written as .safetensors" in err


def test_pictures_are_counted_and_each_gets_a_file_of_its_own(run):
    for folder, picture in (("A", "apple.png"), ("B", "fish.png")):
        Path(folder).mkdir()
        Path(picture).replace(f"{folder}/1.png")
    both = ["A/1.png", "B/1.png"]
    code, out, _ = run(
        "reconstruct", *both, "--steps", "6", "--save-latent", "both.safetensors", "-o", "drawn"
    )
    assert code == 0
    assert out.split() == [
        "both.safetensors",
        "drawn/1-reconstruct-0.png",
        "drawn/1-reconstruct-1.png",
    ]
    assert np.abs(pixels("drawn/1-reconstruct-0.png") - pixels("A/1.png")).max() <= 16
    for command, number in (
        ("reconstruct", 2),
        ("vary -n 3", 6),
        ("diff --theta 0.1 0.2 --to a", 4),
    ):
        code, _, err = run(*command.split(), "both.safetensors", "-o", "one.png", model="unknown")
        assert code == 2 and f"one.png is one file, but {number} pictures will be drawn" in err
    code, out, err = run("reconstruct", "both.safetensors", "leaf.png", "-o", "mixed")
    names = ["both-reconstruct-0", "both-reconstruct-1", "leaf-reconstruct"]
    assert code == 0 and out.split() == [f"mixed/{name}.png" for name in names]
    assert np.array_equal(
        pixels("mixed/both-reconstruct-1.png"), pixels("drawn/1-reconstruct-1.png")
    )


def test_a_latent_of_another_model_is_told_before_anything_is_inverted(run, monkeypatch):
    from unclip.pipelines.unclip.latent import Latent

    assert run("reconstruct", "apple.png", *QUICK, "--save-latent", "apple.safetensors")[0] == 0
    latent = Latent.load("apple.safetensors")
    replace(latent, image_emb=torch.ones(1, 17)).save("other.safetensors")
    monkeypatch.setattr(manipulation, "invert", None)
    code, _, err = run("interpolate", "other.safetensors", "fish.png")
    assert (
        code == 2 and "the latent holds embeddings of width 17, but the model's are 16 wide" in err
    )
    again = replace(latent.options, decoder=replace(latent.options.decoder, steps=7))
    replace(latent, options=again).save("longer.safetensors")
    code, _, err = run("interpolate", "apple.safetensors", "fish.png", "longer.safetensors")
    assert code == 2 and "made under different options" in err


def test_large_pictures_are_not_all_opened_at_once(run, monkeypatch):
    alive = []

    def opened(source: Path) -> Image.Image:
        assert all(one() is None for one in alive)
        alive.append(weakref.ref(picture := open_image(source)))
        return picture

    monkeypatch.setattr("unclip.image_io.open_image", opened)
    monkeypatch.setattr(manipulation, "open_image", opened)
    files = ["apple.png", "fish.png", "leaf.png"]
    for file in files:
        Image.open(file).resize((90, 80)).save(file)
    assert run("reconstruct", *files, "apple.png", *QUICK, "--grid")[0] == 0
    assert len(alive) == 6  # each to see whether it can be read, and to invert it; no file twice


def test_pictures_are_varied(run):
    code, out, _ = run(
        "vary", "apple.png", "fish.png", "--eta", "0.4", "-n", "2", "--seed", "7", "--steps", "6"
    )
    assert code == 0
    assert out.split() == [
        "apple-vary-0.png",
        "apple-vary-1.png",
        "fish-vary-0.png",
        "fish-vary-1.png",
    ]
    (metadata,) = read_metadata("fish-vary-1.png")
    assert (metadata["seed"], metadata["arguments"]) == (10, {"eta": 0.4})
    assert drawn_again(run, "fish-vary-1.png") <= 2
    run("vary", "apple.png", "fish.png", "-n", "3", *QUICK, "--grid", "-o", "sheet.png")
    assert Image.open("sheet.png").size == (3 * 16 + 2 * 4, 2 * 16 + 4)
    assert drawn_again(run, "sheet.png") <= 2


def test_the_way_between_pictures_is_a_strip_a_folder_or_an_animation(run):
    way = ["interpolate", "apple.png", "fish.png", "leaf.png", "--frames", "5", *QUICK]
    assert run(*way, "-o", "way.png")[0] == 0
    assert Image.open("way.png").size == (5 * 20 - 4, 16)
    assert [entry["arguments"]["frames"] for entry in read_metadata("way.png")] == [
        [k / 4] for k in range(5)
    ]
    assert drawn_again(run, "way.png") <= 2
    assert run(*way, "-o", "way.gif")[0] == 0
    with Image.open("way.gif") as animation:
        assert (animation.n_frames, animation.size) == (5, (16, 16))
    assert read_metadata("way.gif") == read_metadata("way.png")
    assert run(*way, "-o", "frames")[0] == 0
    names = sorted(path.name for path in Path("frames").iterdir())
    assert names == [f"apple-fish-leaf-interpolate-{k}.png" for k in range(5)]


def test_the_way_between_prompts(run):
    args = [
        "--prompts",
        "a red apple",
        "a blue fish",
        "--frames",
        "3",
        "--seed",
        "4",
        "--noise",
        "first",
    ]
    for more in ([], ["--even"]):
        assert run("interpolate", *args, *more, "--steps", "6", "--quiet", "-o", "way.png") == (
            0,
            "",
            "",
        )
        assert drawn_again(run, "way.png") <= 2


def test_a_strip_of_text_diffs(run):
    args = ["--from", "a red apple", "--to", "a blue fish", "--theta", "0", "0.2", "0.5"]
    assert run("diff", "apple.png", "fish.png", *args, *QUICK, "--grid", "-o", "diff.png")[0] == 0
    assert Image.open("diff.png").size == (3 * 20 - 4, 2 * 20 - 4)
    assert [entry["arguments"]["theta"] for entry in read_metadata("diff.png")] == [
        0.0,
        0.2,
        0.5,
    ] * 2
    assert drawn_again(run, "diff.png") <= 2
    assert run("diff", "apple.png", "--to", "a blue fish", *QUICK, "-o", "one.png")[0] == 0
    assert read_metadata("one.png")[0]["arguments"] == {
        "base": "",
        "target": "a blue fish",
        "theta": 0.3,
        "eta": 0.5,
    }


@pytest.mark.parametrize(
    ("args", "size"),
    [
        (["--mask", "mask.png", "--resamples", "2", "--agreement", "0"], (16, 16)),
        (["--mask", "mask.png", "--strength", "0.5"], (16, 16)),
        (["--extend", "0", "4", "9", "0"], (25, 20)),
        (["--strength", "0.5"], (16, 16)),
        ([], (16, 16)),
    ],
)
def test_pictures_are_edited(run, args, size):
    edit = [
        "edit",
        "apple.png",
        "--prompt",
        "a blue fish",
        "--seed",
        "3",
        "--quiet",
        *args,
        "-o",
        "edited.png",
    ]
    assert run(*edit) == (0, "", "")
    assert Image.open("edited.png").size == size
    if "--mask" in args:
        kept = np.asarray(Image.open("mask.png")) == 0
        assert np.array_equal(pixels("edited.png")[kept], pixels("apple.png")[kept])
    assert drawn_again(run, "edited.png") <= 2


def test_a_picture_too_large_for_metadata_is_told_of(run):
    Image.new("RGB", (2100, 2000), "red").save("large.png")
    code, _, err = run(
        "edit", "large.png", "--strength", "0.5", "--steps", "3", "--quiet", "-o", "edited.png"
    )
    assert code == 0 and "warning: a picture of 2100 x 2000 px is too large for metadata" in err
    told = run("info", "edited.png", model=None)[1]
    assert (
        "drawn from: another picture, which the picture does not hold" in told
        and "--from" not in told
    )
    assert told.endswith(
        "it cannot be drawn again: what it was drawn from was too large for its metadata\n"
    )


def test_a_mask_that_marks_nothing_is_told_in_one_line(run):
    Image.new("L", (16, 16)).save("black.png")
    code, out, err = run(
        "edit", "apple.png", "--mask", "black.png", "--prompt", "a", "-o", "same.png", "--quiet"
    )
    assert (
        (code, out) == (0, "")
        and err.startswith("warning: nothing is marked")
        and err.count("\n") == 1
    )
    assert np.array_equal(pixels("same.png"), pixels("apple.png"))


def test_components_are_probed(run, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for i in range(8):
        Image.effect_noise((16, 16), 20 * i).convert("RGB").save(data / f"{i}.png")
        (data / f"{i}.txt").write_text(str(i))
    probe = ["probe", "apple.png", "fish.png", "--components", "1", "4", "--steps", "3", "--quiet"]
    code, _, err = run(*probe, "--data", "data", "--save-pca", "apple.png/pca.safetensors")
    assert (
        code == 2
        and err.startswith("error: cannot write apple.png/pca.safetensors: ")
        and err.count("\n") == 1
    )
    assert run(*probe, "--data", "data", "--save-pca", "new/pca.safetensors") == (0, "", "")
    assert (
        len(read_metadata("components.png")) == 4
        and Image.open("components.png").width == 3 * 100 - 4
    )
    assert run(*probe, "--pca", "new/pca.safetensors", "-o", "b.png") == (0, "", "")
    assert np.array_equal(pixels("components.png"), pixels("b.png"))


def test_a_word_is_written_on_a_picture(run):
    probe = [
        "probe",
        "apple.png",
        "--word",
        "fish",
        "--classes",
        "a red apple",
        "a blue fish",
        "-n",
        "2",
    ]
    code, out, _ = run(*probe, "--steps", "3")
    assert (code, out) == (0, "attack.png\n") and len(read_metadata("attack.png")) == 4


def test_what_is_mixed_and_what_is_avoided_reach_the_picture(run):
    args = ["--mix", "2", "1", "--negative", "a cat", "--seed", "1", "--quiet"]
    assert run("generate", "a red apple", "a blue fish", *args) == (0, "", "")
    (metadata,) = read_metadata("a-red-apple-and-a-blue-fish-1.png")
    assert (
        metadata["prompt"] == {"a red apple": 2.0, "a blue fish": 1.0}
        and metadata["negative_prompt"] == "a cat"
    )
    assert drawn_again(run, "a-red-apple-and-a-blue-fish-1.png") <= 2


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("vary none.png", "none.png does not exist"),
        ("vary apple.png --eta 2", "'2' is not a number from 0 to 1"),
        ("vary apple.png -n 2 -o a.png", "a.png is one file, but 2 pictures will be drawn"),
        ("vary apple.png --iterations -1", "iterations is -1"),
        ("vary mask.safetensors", "no weights at mask.safetensors"),
        ("reconstruct apple.png -o a.gif", "a.gif: pictures are written as .png"),
        ("interpolate", "either pictures or --prompts"),
        ("vary apple.png --seed -1", "seed is -1; expected a whole number"),
        (
            "vary apple.png -o apple.png/x.png",
            "cannot write apple.png/x.png: apple.png is no folder",
        ),
        (
            "vary apple.png -o apple.png/new/folder",
            "cannot write apple.png/new/folder: apple.png is no folder",
        ),
        (
            "reconstruct apple.png --save-latent apple.png/l.safetensors",
            "cannot write apple.png/l.safetensors",
        ),
        (
            "reconstruct apple.png --save-latent folder.safetensors",
            "folder.safetensors is a folder",
        ),
        ("interpolate apple.png fish.png --seed -1", "seed is -1; expected a whole number"),
        (
            "interpolate apple.png fish.png -o folder.gif",
            "folder.gif is a folder; expected a file name",
        ),
        (
            "interpolate apple.png fish.png -o apple.png/a.gif",
            "cannot write apple.png/a.gif: apple.png is no folder",
        ),
        (
            "interpolate apple.png fish.png -o a.gif --fps 0",
            "fps is 0; expected 0.1 to 100",
        ),
        ("interpolate apple.png fish.png -o a.gif --fps nan", "fps is nan; expected 0.1 to 100"),
        ("interpolate apple.png fish.png -o a.gif --grid", "a.gif is an animation: --grid"),
        ("interpolate --prompts a b --iterations 5", "--iterations does not go with them"),
        ("diff apple.png --from a --to a", "the two captions have the same embedding"),
        ("diff apple.png --to a --seed -1", "seed is -1; expected a whole number"),
        ("probe apple.png --word a --classes b c --pca a.safetensors", "--pca says nothing"),
        (
            "probe apple.png --word a --classes b c --save-pca a.safetensors",
            "--save-pca says nothing",
        ),
        ("probe apple.png --word a --classes b c --data a", "--data says nothing"),
        ("probe apple.png --word a --classes b c --components 2", "--components says nothing"),
        ("probe apple.png --data a -o folder.png", "folder.png is a folder; expected a file name"),
        ("interpolate apple.png", "at least 2 pictures or prompts; got 1"),
        ("interpolate apple.png fish.png --frames 1", "frames is 1"),
        ("interpolate apple.png fish.png -o a.webp", "a.webp: pictures are written as .png"),
        ("diff apple.png", "the following arguments are required: --to"),
        ("diff apple.png --to a --theta 2", "'2' is not a number from 0 to 1"),
        ("edit apple.png --mask small.png", "the mask is 4 x 4 px, but the picture is 16 x 16"),
        ("edit apple.png --mask mask.png --extend 1 0 0 0", "give one of the two"),
        ("edit apple.png --extend 0 0 0 0", "are all 0"),
        ("edit apple.png --extend 1 0 0 0 --strength 0.5", "--strength does not go with --extend"),
        ("edit apple.png --resamples 3", "that --resamples could bring into harmony"),
        ("edit apple.png --agreement 3", "that --agreement could bring into harmony"),
        (
            "edit apple.png --mask mask.png --agreement -1",
            "agreement is -1.0; expected 0 (none) or more",
        ),
        ("edit apple.png --training-free", "--training-free says nothing"),
        ("edit apple.png --strength 0", "strength is 0.0"),
        ("probe apple.png", "either --data to fit a PCA on, or --pca"),
        ("probe apple.png --word a", "--word and --classes go together"),
        ("probe apple.png --word a --classes b", "1 class is given"),
        (
            "probe apple.png fish.png --word a --classes b c",
            "a word is written on one picture; got 2",
        ),
        ("probe apple.png --pca none.safetensors", "no weights at none.safetensors"),
        ("generate a b --mix 1", "--mix gives 1 weights for 2 prompts"),
        ("generate a b --mix 1 -1", "expected numbers with a sum above 0"),
    ],
)
def test_the_command_line_tells_what_is_wrong(run, tmp_path, monkeypatch, command, message):
    """Before anything is inverted, which may take hours."""
    monkeypatch.setattr(manipulation, "invert", None)
    for name in ("folder.png", "folder.gif", "folder.safetensors"):
        Path(name).mkdir()
    Image.new("L", (4, 4), 255).save("small.png")
    before = set(tmp_path.rglob("*"))
    code, out, err = run(*command.split(), "--quiet")
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1
    assert message in err
    assert set(tmp_path.rglob("*")) == before


def test_an_mp4_without_ffmpeg_is_refused_before_anything_is_drawn(run, monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = run("interpolate", "apple.png", "fish.png", "-o", "way.mp4", "--quiet")
    assert code == 2 and "an .mp4 needs ffmpeg" in err


def test_a_model_without_latents_is_told(run, tiny_dalle_folder):
    code, _, err = run("vary", "apple.png", "--quiet", model=str(tiny_dalle_folder))
    assert code == 2 and "needs an unCLIP model" in err
