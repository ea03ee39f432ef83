"""Every command and every Python block of the README is run, section by section, as a reader would.

A command that no rule knows fails. Trainings take one step on a few pictures drawn here; pictures are drawn with the
bundled model, or with one of random weights where there is none.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from functools import cache
from glob import glob
from pathlib import Path

import karlo
import pytest
import yaml
from PIL import Image
from scripts import ROOT, draw_pictures, run_script

import unclip
import unclip.pipelines
from unclip.checkpoints import registry as catalogue
from unclip.cli.main import main
from unclip.data import embeddings, emoji

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    ROOT / "README.md",
    *sorted(ROOT.glob("assets/**/*.md")),
    *sorted(ROOT.glob("configs/*/README.md")),
]
ONE_STEP = {"data.workers": 0, "data.batch_size": 2, "fit.val_every": 0, "fit.preview_every": 0}


def sections() -> dict[str, str]:
    title, *parts = re.split(r"^## (.+)$", README, flags=re.MULTILINE)
    return {"first": title, **dict(zip(parts[::2], parts[1::2], strict=True))}


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks in one language ("" for none)."""
    parts = re.split(
        r"^```(\w*)\n", text, flags=re.MULTILINE
    )  # text, language, block, "", text, language, ...
    return [block for told, block in zip(parts[1::4], parts[2::4], strict=True) if told == language]


def commands(text: str) -> list[list[str]]:
    """The words of each command, those joined by && apart, comments left out."""
    found = []
    for line in "".join(blocks(text, "sh")).splitlines():
        words = shlex.split(line, comments=True)
        while "&&" in words:
            found.append(words[: words.index("&&")])
            words = words[words.index("&&") + 1 :]
        found.append(words)
    return [words for words in found if words]


# -- rules: how a command is run here


def pip_install(words: list[str]) -> None:
    (target,) = [word for word in words if word.startswith(".")]
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for extra in re.findall(r"\w+", target):
        assert re.search(rf"^{extra} = \[", pyproject, re.MULTILINE), f"there is no extra {extra}"


def pytest_itself(words: list[str]) -> None:
    assert words == ["pytest"] and Path(__file__).parent == ROOT / "tests"


def git_clone(words: list[str]) -> None:
    assert words[-1].removeprefix("https://") in emoji.__doc__


def render_emoji(words: list[str]) -> None:
    emoji.main(words[3:])


def compute_embeddings(words: list[str]) -> None:
    embeddings.main(words[3:])


def train(words: list[str]) -> None:
    script, *arguments = (
        words[words.index("launch") + 1 :] if words[0] == "accelerate" else words[1:]
    )
    if "--config" in arguments:
        place = arguments.index("--config") + 1
        arguments[place] = str(ROOT / arguments[place])
    if script not in ("train/grow.py", "train/bundle.py"):
        settings = {**ONE_STEP, "fit.steps": 2 if "--resume" in arguments else 1}
        arguments += [f"--set={name}={value}" for name, value in settings.items()]
    run_script(ROOT / script, *arguments)


def draw(words: list[str]) -> None:
    assert main([*words[1:], *(() if words[1] == "info" else ("--quiet",))]) == 0


def evaluate(words: list[str]) -> None:
    words = [file for word in words for file in (sorted(glob(word)) if "*" in word else [word])]
    folder = catalogue.locate(words[words.index("--model") + 1])
    unclip_s = ["--parts", "prior", "--prior-steps=2", "--steps=2"]
    cheap = (
        unclip_s if catalogue.read_model_json(folder)["kind"] == "unclip" else ["--parts", "codec"]
    )
    assert main([*words[1:], *cheap, "--limit=4", "--quiet"]) == 0


def convert(words: list[str]) -> None:
    assert main(words[1:]) == 0


def bench(words: list[str]) -> None:
    words = [word.replace("karlo-random", "karlo-tiny") for word in words]
    model = (
        () if "--model" in words else ("--model", str(catalogue.locate("emoji")))
    )  # for processes of its own
    assert main([*words[1:], *model, "--repeat=1", "--quiet"]) == 0


RULES: dict[str, Callable[[list[str]], None]] = {
    r"pip install ": pip_install,
    r"pytest$": pytest_itself,
    r"git clone ": git_clone,
    r"python -m unclip\.data\.emoji ": render_emoji,
    r"python -m unclip\.data\.embeddings ": compute_embeddings,
    r"(accelerate launch|python) train/\w+\.py ": train,
    r"unclip (generate|variations|interpolate|complete|info) ": draw,
    r"unclip convert ": convert,
    r"unclip evaluate ": evaluate,
    r"unclip bench": bench,
}


def rule(words: list[str]) -> Callable[[list[str]], None]:
    (found,) = [run for pattern, run in RULES.items() if re.match(pattern, shlex.join(words))]
    return found


# -- what a reader has


@pytest.fixture
def reader(tmp_path, monkeypatch, tiny_folder, tiny_dalle_folder):
    """A folder with pictures, prompts and a small checkout of svgmoji; a toy Karlo on the Hub; models are read once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    draw_pictures(tmp_path / "my_pictures")
    Image.new("RGB", (64, 64), "gold").save("other.png")
    hole = Image.new("L", (64, 64))
    hole.paste(255, (16, 16, 48, 48))
    hole.save("hole.png")
    (tmp_path / "prompts.txt").write_text("a red apple\na blue fish\n")
    checkout(tmp_path / "svgmoji")
    there = {
        "emoji": tiny_folder,
        "emoji-dalle1": tiny_dalle_folder,
    }  # in a fraction of the time of the real ones
    monkeypatch.setattr(catalogue, "bundled_models", lambda: there)
    karlo_folder = karlo.write(karlo.text_to_image(), tmp_path / "hub")
    monkeypatch.setattr(catalogue, "_fetch", lambda hub_id, files, known: karlo_folder)
    load = cache(unclip.pipelines.load)
    monkeypatch.setattr(unclip.pipelines, "load", load)
    monkeypatch.setattr(unclip, "load", load)


def checkout(folder: Path, count: int = 30) -> None:
    """What `unclip.data.emoji` reads: discs of many colours, in two styles."""
    entries = []
    for i in range(count):
        hexcode, colour = f"{0x1F600 + i:X}", f"#{i * 8:02x}80{255 - i * 8:02x}"
        entries.append(
            {
                "hexcode": hexcode,
                "annotation": f"disc {i}",
                "tags": ["round", "disc"],
                "group": i % 9,
            }
        )
        for style in ("noto", "twemoji"):
            path = folder / f"packages/svgmoji__{style}/svg/{hexcode}.svg"
            path.parent.mkdir(parents=True, exist_ok=True)
            disc = f'<circle cx="18" cy="18" r="{9 + i % 9}" fill="{colour}"/>'
            path.write_text(
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 36 36">{disc}</svg>'
            )
    table = folder / "packages/svgmoji/emoji.json"
    table.parent.mkdir()
    table.write_text(json.dumps(entries))


@pytest.mark.filterwarnings("ignore:the prompt")  # the model of random weights has a short context
@pytest.mark.parametrize(
    "section", [name for name, text in sections().items() if blocks(text, "sh")]
)
def test_commands(section, reader, capsys):
    for words in commands(sections()[section]):
        rule(words)(words)


@pytest.mark.parametrize(
    "section", [name for name, text in sections().items() if blocks(text, "python")]
)
def test_python_blocks(section, reader):
    names: dict[str, object] = {}
    for block in blocks(sections()[section], "python"):
        exec(compile(block, "README.md", "exec"), names)
    if section == "In Python":
        assert Path("apple.png").is_file()


# -- what is said without being run


def test_it_holds_no_other_blocks_and_is_not_too_long():
    known = [block for language in ("sh", "python") for block in blocks(README, language)]
    assert len(known) + 1 == README.count("\n```") / 2  # and the tree
    assert len(README.splitlines()) < 200


def test_a_command_without_a_rule_is_noticed():
    with pytest.raises(ValueError):
        rule(["make", "pictures"])


def test_the_tree_is_that_of_the_repository():
    (tree,) = blocks(README, "")
    told, top = set(), ROOT
    for line in tree.splitlines():
        names = line.strip().split("   ")[0].split()  # what follows three spaces is said of them
        if line.startswith(" "):
            told |= {top / name for name in names}
        else:
            told |= {ROOT / name for name in names}
            top = ROOT / names[0]
    assert {path for path in told if not path.exists()} == set()
    assert {
        path for path in (ROOT / "unclip").iterdir() if path.is_dir() and path.name != "__pycache__"
    } <= told


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(
        r"\]\((?!https?://)([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8")
    ):
        there = (page.parent / target).resolve() if target else page
        assert there.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {
                re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings
            }


def test_configs_in_the_commands_use_the_rendered_data():
    configs = [
        word for words in commands(README) for word in words if word.startswith("configs/emoji/")
    ]
    for name in set(configs) - {"configs/emoji/model.yaml", "configs/emoji/model_dalle.yaml"}:
        data = yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
        assert data["data"]["path"].startswith("data/emoji/train-")
        assert data["val_data"]["path"].startswith("data/emoji/heldout-")
