"""The commands of train/README.md run, and the tables of train/settings.md are those of the code.

`PYTHONPATH=.:tests python tests/training/test_train_readme.py` writes the tables.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import json
import os
import re
import sys
import textwrap
import tokenize
import typing
from pathlib import Path
from typing import Any

import pytest
from forks import fork, wait
from scripts import (
    ROOT,
    load_script,
    run_in_two_processes,
    run_script,
    shell_commands,
    write_shape_images,
)

from unclip import types
from unclip.cli.main import main as unclip_cli
from unclip.data import embeddings, resize
from unclip.data.shards import ShardWriter
from unclip.training import launch

PAGE, SETTINGS = ROOT / "train/README.md", ROOT / "train/settings.md"
SECTION = re.compile(r"(?<=<!-- settings -->\n).*(?=<!-- /settings -->)", re.DOTALL)
SCRIPTS = {
    "clip": "CLIPTraining",
    "prior": "PriorTraining",
    "ar_prior": "ARPriorTraining",
    "one_shot_prior": "OneShotPriorTraining",
    "layout": "LayoutTraining",
    "layout_prior": "LayoutPriorTraining",
    "decoder": "DecoderTraining",
    "upsampler": "UpsamplerTraining",
    "codec": "CodecTraining",
    "dalle": "DALLETraining",
    "bundle": "Parts",
}
ONE_STEP = (
    *("fit.steps=1", "fit.val_every=0", "fit.preview_every=0", "data.path=data/tiny"),
    *("val_data=null", "data.batch_size=2"),
)


def settings_tables() -> str:
    """Return a table of fields for each dataclass that the configs contain."""
    tables: dict[type, list[str]] = {}  # dataclass -> keys that contain it
    for script, name in SCRIPTS.items():
        for cls in nested(getattr(load_script(script), name)):
            add_tables(cls, f"{script}.py", tables)
    return "\n".join(table(cls, keys) for cls, keys in tables.items())


def add_tables(cls: type, key: str, tables: dict[type, list[str]]) -> None:
    if cls.__module__ == types.__name__:  # sampling options: unclip/README.md describes them
        return
    keys = tables.setdefault(cls, [])
    if key in keys:
        return
    keys.append(key)
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        for inner in nested(hints[field.name]):
            add_tables(inner, f"`{field.name}`", tables)


def nested(hint: Any) -> list[type]:
    """Return the dataclasses in a type."""
    if dataclasses.is_dataclass(hint):
        return [hint]
    return [cls for argument in typing.get_args(hint) for cls in nested(argument)]


def table(cls: type, keys: list[str]) -> str:
    lines = [f"## {cls.__name__}", "", f"In {', '.join(keys)}.", ""]
    lines += ["| key | type | default | |", "|---|---|---|---|"]
    described = {name: text for base in reversed(cls.__mro__) for name, text in comments(base)}
    for field in dataclasses.fields(cls):
        lines.append(f"{row(field)} {described.get(field.name, '')} |")
    return "\n".join(lines) + "\n"


def row(field: dataclasses.Field) -> str:
    kind = str(field.type).replace("|", "\\|")
    return f"| `{field.name}` | {kind} | {default(field)} |"


def default(field: dataclasses.Field) -> str:
    if (factory := field.default_factory) is launch.default_precision:  # depends on the machine
        return str(factory.__doc__)
    if field.default_factory is not dataclasses.MISSING:
        return f"`{json.dumps(plain(field.default_factory()))}`"
    if field.default is not dataclasses.MISSING:
        return f"`{json.dumps(plain(field.default))}`"
    return "required"


def plain(value: Any) -> Any:
    """Convert a default to JSON types; a dataclass to the values that differ from its defaults."""
    if dataclasses.is_dataclass(value):
        values = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        defaults = {field.name: field.default for field in dataclasses.fields(value)}
        return {name: plain(x) for name, x in values.items() if x != defaults[name]}
    return [plain(x) for x in value] if isinstance(value, tuple) else value


def comments(cls: type) -> list[tuple[str, str]]:
    """Return (field, comment) of a class body: comments above a field or at its end."""
    if not dataclasses.is_dataclass(cls):
        return []
    source = textwrap.dedent(inspect.getsource(cls))
    by_line = {
        token.start[0]: token.string.lstrip("# ").replace("|", "\\|")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    own_line = {n for n, line in enumerate(source.splitlines(), 1) if line.strip().startswith("#")}
    found = []
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign):
            first = node.lineno
            while first - 1 in own_line:
                first -= 1
            texts = [
                by_line[n] for n in range(first, (node.end_lineno or first) + 1) if n in by_line
            ]
            found.append((node.target.id, " ".join(texts)))
    return found


def test_every_setting_is_listed_with_type_default_and_comment():
    listed = SECTION.search(SETTINGS.read_text(encoding="utf-8"))[0]
    command = "PYTHONPATH=.:tests python tests/training/test_train_readme.py"
    assert listed.splitlines() == settings_tables().splitlines(), f"run {command}"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with the images of `data/tiny`, the configs and the bundled models."""
    pytest.importorskip("pyarrow")
    for name in ("tiny", "style"):
        captions = write_shape_images(tmp_path / "data" / name)
    (tmp_path / "data/shards").mkdir()
    with ShardWriter(tmp_path / "data/shards", "train", 6) as writer:
        for i, caption in enumerate(captions):
            image = (tmp_path / f"data/tiny/{i}.png").read_bytes()
            writer.write(str(i), {"png": image, "txt": caption})
    for name in ("assets", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(words: list[str]) -> None:
    """Run a command of the page as its section "What is tested" says."""
    launcher, *rest = words
    modules = {"unclip.data.embeddings": embeddings, "unclip.data.resize": resize}
    if words[:2] == ["python", "-m"]:
        modules[words[2]].main(words[3:])
    elif launcher == "unclip":
        assert unclip_cli([*rest, "--quiet"]) == 0
    elif "--num_processes" in words or launcher == "torchrun":
        index = next(i for i, word in enumerate(words) if word.endswith(".py"))
        script, output = ROOT / words[index], f"--set=fit.output=runs/tiny/{launcher}"
        arguments = *words[index + 1 :], output
        if launcher == "torchrun":
            run_in_two_processes(script, *arguments)
        else:
            assert wait(fork(lambda rank: run_script(script, *arguments), 2), 300) == [0, 0]
    else:
        script, *arguments = rest[1:] if launcher == "accelerate" else rest
        if any("assets/" in word for word in arguments):
            arguments += [f"--set={setting}" for setting in ONE_STEP]
        elif script != "train/bundle.py" and any("finetune" in word for word in arguments):
            arguments += ["--set=fit.steps=1", "--set=data.batch_size=2"]
        try:
            run_script(ROOT / script, *arguments)
        except SystemExit as stop:
            assert not stop.code, stop.code


@pytest.mark.filterwarnings("ignore:the prompt")  # the tiny model has a short context
def test_the_commands_run(folder):
    commands = shell_commands(PAGE.read_text(encoding="utf-8"))
    assert len(commands) > 20
    for words in commands:
        run(words)
    assert Path("circle.png").is_file() and Path("square.png").is_file()
    for name in ("prior_embeddings", "dalle_codes", "accelerate", "torchrun"):
        assert Path(f"runs/tiny/{name}/model").is_dir()


if __name__ == "__main__":
    os.chdir(ROOT)
    text = SETTINGS.read_text(encoding="utf-8")
    SETTINGS.write_text(SECTION.sub(lambda _: settings_tables(), text), encoding="utf-8")
    sys.exit()
