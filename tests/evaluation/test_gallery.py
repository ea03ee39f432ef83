"""The gallery is made by the lines that it shows."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image
from scripts import ROOT

from unclip.cli.main import _parser
from unclip.evaluation import gallery
from unclip.evaluation.figures import FIGURES, Figure
from unclip.evaluation.gallery import inpaints, main, page, shown

pytestmark = pytest.mark.filterwarnings("ignore:the prompt")  # the tiny CLIP has a short context


@pytest.fixture(scope="module")
def model(invertible_pipe, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("models") / "still"
    invertible_pipe.save_pretrained(folder)
    return str(folder)


def commands(figure: Figure) -> list[list[str]]:
    return [shlex.split(line) for line in figure.lines if line.startswith("unclip ")]


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.name)
def test_lines_are_valid_and_write_what_is_shown(figure):
    written = []
    for words in commands(figure):
        args = _parser().parse_args(words[1:])
        written.append(args.output.name)
        unseeded = (
            args.run.__name__ in ("interpolate", "edit") or getattr(args, "eta", None) == 0
        )  # nothing is random
        assert unseeded or getattr(args, "seed", 0) is not None
    for line in figure.lines:
        if not line.startswith("unclip "):
            compile(line, figure.name, "exec")
            written += re.findall(r'save\("(.+?)"\)', line)
    assert sorted(written) == sorted(figure.shows)


def test_lines_build_on_what_lines_before_have_written():
    there = set()
    for figure in FIGURES:
        for line in figure.lines:
            used = set(
                re.findall(
                    r"[\w-]+\.(?:png|safetensors)", re.sub(r"(-o|--save-latent) \S+", "", line)
                )
            )
            own = set(re.findall(r'save\("(.+?)"\)', line))
            assert used - own <= there, line
            there |= own | set(re.findall(r"(?:-o|--save-latent) (\S+)", line))
    files = [shown(name) for figure in FIGURES for name in figure.shows]
    assert len(set(files)) == len(files)


def test_the_bundled_page_is_what_its_lines_and_figures_make():
    assets = ROOT / "assets"
    assert page("emoji", assets / "gallery") == (assets / "gallery.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("there", "expected"), [("decoder", True), ("inpainter", True), ("other", False)]
)
def test_a_model_inpaints_with_either_decoder(there, expected, model, tmp_path):
    assert not inpaints(Path(model))
    (tmp_path / there).mkdir()
    (tmp_path / there / "config.json").write_text('{"type": "Decoder", "inpaints": true}')
    assert inpaints(tmp_path) is expected


def test_every_command_that_manipulates_is_shown():
    shown_commands = {words[1] for figure in FIGURES for words in commands(figure)}
    assert shown_commands >= {"reconstruct", "vary", "interpolate", "diff", "edit", "probe"}


PYTHON = """import unclip
from unclip.image_io import save_animation

pipe = unclip.load("emoji")
images = pipe.variations("apple.png", num_images=3, seed=1).images
images[0].save("b.png")
save_animation(images, "a.gif")"""


@pytest.fixture(scope="module")
def made(model, tmp_path_factory) -> Path:
    """Two figures of the tiny model, by a shell's lines and by Python, and a table."""
    folder = tmp_path_factory.mktemp("page")
    few = [
        Figure(
            "one",
            "One",
            "Drawn.",
            ('unclip generate "an apple" --seed 0 -o apple.png',),
            ("apple.png",),
        ),
        Figure("some", "Some", "Moving.", (PYTHON,), ("b.png", "a.gif")),
        Figure(
            "fitted",
            "Fitted",
            "",
            ("unclip probe apple.png --data a.tar -o c.png",),
            ("c.png",),
            "training data",
        ),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gallery, "FIGURES", few)
        main(["--out", str(folder / "gallery.md"), "--model", model, "--quiet"])
    return folder


def test_figures_are_small_pictures_beside_their_lines(made):
    text = (made / "gallery.md").read_text()
    assert "# Gallery" in text and "on the still model" in text
    assert '```sh\nunclip generate "an apple" --seed 0 -o apple.png\n```' in text
    assert "```python\nimport unclip\nfrom unclip.image_io import save_animation\n" in text
    links = re.findall(r"!\[.+?\]\((gallery/.+?)\)", text)
    assert links == ["gallery/apple.webp", "gallery/b.webp", "gallery/a-moving.webp"]
    assert all((made / link).is_file() for link in links) and "Fitted" not in text
    with Image.open(made / "gallery/a-moving.webp") as image:
        assert image.n_frames == 3 and image.size == (160, 160)
    with Image.open(made / "gallery/b.webp") as image:
        assert image.size == (16, 16)


def test_what_was_measured_is_told(made, tmp_path):
    step = {"mean": 1.5, "most": 1.9, "within_twice": 1.0}
    path = {"paths": 3, "ends_differ_by": 1, "largest_step_of_embeddings": 1.0}
    path["largest_step"] = {"plain": step, "even": step}
    results = {"settings": {"pairs": 32}, "interpolation": path}
    (tmp_path / "manipulation.json").write_text(json.dumps(results))
    text = page("emoji", tmp_path)
    assert (
        "On 32 held-out pairs" in text
        and "| 1.50 | most 1.90; 100% of 3 paths within twice |" in text
    )


def test_measuring_is_left_to_the_harness(monkeypatch, model, tmp_path):
    seen = []
    monkeypatch.setattr(gallery, "FIGURES", [])
    monkeypatch.setattr(gallery.manipulation, "measure", seen.append)
    data = ["--data", "heldout.tar", "--limit", "4"]
    main(["--out", str(tmp_path / "g.md"), "--model", model, "--quiet", *data])
    assert (seen[0].limit, seen[0].data, seen[0].json) == (
        4,
        ["heldout.tar"],
        tmp_path / "g/manipulation.json",
    )


def test_a_line_that_fails_is_told(monkeypatch, model, tmp_path):
    broken = Figure("broken", "Broken", "", ("unclip vary missing.png -o a.png",), ("a.png",))
    monkeypatch.setattr(gallery, "FIGURES", [broken])
    with pytest.raises(
        SystemExit,
        match="`unclip vary missing.png -o a.png` ended with 2: .*missing.png does not exist",
    ):
        main(["--out", str(tmp_path / "g.md"), "--model", model, "--quiet"])
    with pytest.raises(SystemExit, match="expected a file that ends in .md"):
        main(["--out", str(tmp_path / "g.html"), "--model", model])
