"""assets/build_gallery.py builds the gallery from its commands."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import build_gallery
import pytest
from build_gallery import has_inpainter, main, page, webp_name
from gallery_figures import FIGURES, Figure
from PIL import Image
from scripts import ROOT

from unclip.cli.main import build_parser

pytestmark = pytest.mark.filterwarnings("ignore:the prompt")  # the tiny CLIP has a short context


@pytest.fixture(scope="module")
def model(invertible_pipe, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("models") / "invertible"
    invertible_pipe.save_pretrained(folder)
    return str(folder)


def shell_commands(figure: Figure) -> list[list[str]]:
    return [shlex.split(line) for line in figure.commands if line.startswith("unclip ")]


def saved_by_python(command: str) -> set[str]:
    return set(re.findall(r'save\("(.+?)"\)', command))


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.name)
def test_commands_are_valid_and_write_the_outputs(figure):
    written = []
    for words in shell_commands(figure):
        args = build_parser().parse_args(words[1:])
        written.append(args.output.name)
        command, eta = args.run.__name__, getattr(args, "eta", None)
        deterministic = command in ("interpolate", "edit") or eta == 0
        assert deterministic or getattr(args, "seed", 0) is not None
    for command in figure.commands:
        if not command.startswith("unclip "):
            compile(command, figure.name, "exec")
            written += saved_by_python(command)
    assert sorted(written) == sorted(figure.outputs)


def test_commands_use_only_files_that_earlier_commands_write():
    existing = set()
    for figure in FIGURES:
        for command in figure.commands:
            inputs = re.sub(r"(-o|--save-latent) \S+", "", command)
            used = set(re.findall(r"[\w-]+\.(?:png|safetensors)", inputs))
            assert used - saved_by_python(command) <= existing, command
            existing |= saved_by_python(command)
            existing |= set(re.findall(r"(?:-o|--save-latent) (\S+)", command))
    files = [webp_name(name) for figure in FIGURES for name in figure.outputs]
    assert len(set(files)) == len(files)


def test_every_manipulation_command_is_shown():
    shown = {words[1] for figure in FIGURES for words in shell_commands(figure)}
    assert shown >= {"reconstruct", "vary", "interpolate", "diff", "edit", "probe"}


def test_the_bundled_gallery_is_up_to_date():
    assets = ROOT / "assets"
    text = (assets / "gallery.md").read_text(encoding="utf-8")
    assert page("emoji", assets / "gallery") == text


@pytest.mark.parametrize(
    ("name", "expected"), [("decoder", True), ("inpainter", True), ("other", False)]
)
def test_inpainters_are_detected(name, expected, model, tmp_path):
    assert not has_inpainter(Path(model))
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.json").write_text('{"type": "Decoder", "inpaints": true}')
    assert has_inpainter(tmp_path) is expected


PYTHON = """import unclip
from unclip.image_io import save_animation

pipe = unclip.load("emoji")
images = pipe.variations("apple.png", num_images=3, seed=1).images
images[0].save("b.png")
save_animation(images, "a.gif")"""


@pytest.fixture(scope="module")
def gallery(model, tmp_path_factory) -> Path:
    """The folder of a gallery of the tiny model, by shell and Python commands."""
    folder = tmp_path_factory.mktemp("page")
    shell = 'unclip generate "an apple" --seed 0 -o apple.png'
    probe = "unclip probe apple.png --data a.tar -o c.png"
    figures = [
        Figure("one", "One", "Generated.", (shell,), ("apple.png",)),
        Figure("some", "Some", "Animated.", (PYTHON,), ("b.png", "a.gif")),
        Figure("fitted", "Fitted", "", (probe,), ("c.png",), needs="training data"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_gallery, "FIGURES", figures)
        main(["--out", str(folder / "gallery.md"), "--model", model, "--quiet"])
    return folder


def test_the_page_has_commands_and_reduced_images(gallery):
    text = (gallery / "gallery.md").read_text()
    assert "# Gallery" in text
    assert '```sh\nunclip generate "an apple" --seed 0 -o apple.png\n```' in text
    assert "```python\nimport unclip\nfrom unclip.image_io import save_animation\n" in text
    links = re.findall(r"!\[.+?\]\((gallery/.+?)\)", text)
    assert links == ["gallery/apple.webp", "gallery/b.webp", "gallery/a-moving.webp"]
    assert all((gallery / link).is_file() for link in links) and "Fitted" not in text
    with Image.open(gallery / "gallery/a-moving.webp") as image:
        assert image.n_frames == 3 and image.size == (160, 160)
    with Image.open(gallery / "gallery/b.webp") as image:
        assert image.size == (16, 16)


def test_the_page_has_the_stored_results(tmp_path):
    step = {"mean": 1.5, "maximum": 1.9, "within_twice": 1.0}
    path = {"paths": 3, "ends_differ_by": 1, "largest_step_of_embeddings": 1.0}
    path["largest_step"] = {"plain": step, "even": step}
    results = {"settings": {"pairs": 32}, "interpolation": path}
    (tmp_path / "manipulation.json").write_text(json.dumps(results))
    text = page("emoji", tmp_path)
    assert "On 32 held-out pairs" in text
    assert "| 1.50 | maximum 1.90; 100% of 3 paths within twice |" in text


def test_data_is_passed_to_the_evaluation(monkeypatch, model, tmp_path):
    calls = []
    monkeypatch.setattr(build_gallery, "FIGURES", [])
    monkeypatch.setattr(build_gallery, "run_unclip", calls.append)
    data = ["--data", "heldout.tar", "--limit", "4"]
    main(["--out", str(tmp_path / "g.md"), "--model", model, "--quiet", *data])
    args = build_parser().parse_args(calls[0])
    assert args.run.__name__ == "evaluate_manipulations"
    assert (args.limit, args.data, args.quiet) == (4, ["heldout.tar"], True)
    assert args.json == tmp_path / "g" / "manipulation.json"


def test_a_failing_command_is_reported(monkeypatch, model, tmp_path):
    command = "unclip vary missing.png -o a.png"
    figure = Figure("broken", "Broken", "", (command,), ("a.png",))
    monkeypatch.setattr(build_gallery, "FIGURES", [figure])
    with pytest.raises(SystemExit, match=f"`{command}` failed with code 2: .*missing.png"):
        main(["--out", str(tmp_path / "g.md"), "--model", model, "--quiet"])


def test_the_page_must_be_markdown(model, tmp_path):
    with pytest.raises(SystemExit, match="expected a file that ends in .md"):
        main(["--out", str(tmp_path / "g.html"), "--model", model])
