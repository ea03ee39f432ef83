"""Strict parsing of YAML and JSON into dataclasses, and errors that name their location."""

from __future__ import annotations

import json
import time
import warnings
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
from annotated_types import Ge, MinLen, MultipleOf

from unclip.config import (
    Fraction,
    PositiveInt,
    config,
    flatten,
    load_config,
    parse,
    save_json,
    to_dict,
)
from unclip.types import StageOptions


@dataclass(frozen=True)
class Optim:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float | None = 1.0


@config
class Level:
    channels: PositiveInt
    attention: bool = False


@dataclass(frozen=True)
class States:
    norm: bool = False
    kind: Literal["states"] = "states"


@dataclass(frozen=True)
class Transformer:
    depth: int
    kind: Literal["transformer"] = "transformer"


@dataclass(frozen=True)
class Config:
    name: str
    levels: tuple[Level, ...]
    text: States | Transformer = States()
    optim: Optim = Optim()


GOOD = """\
name: tiny
levels:
  - {channels: 64}
  - channels: 128
    attention: true
optim:
  lr: 1e-4
"""


def write_config(folder: Path, text: str) -> Path:
    file = folder / "run.yaml"
    file.write_text(text)
    return file


def error_message(folder: Path, text: str, *overrides: str) -> str:
    """Return the error for an invalid file, with `run.yaml` in place of its path."""
    file = write_config(folder, text)
    with pytest.raises(ValueError) as error:
        load_config(file, Config, overrides)
    return str(error.value).replace(str(file), "run.yaml")


def test_a_file_becomes_nested_dataclasses(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path, GOOD), Config)
    assert config == Config("tiny", (Level(64), Level(128, True)), optim=Optim(lr=1e-4))


def test_integers_are_valid_floats_and_null_is_none(tmp_path: Path) -> None:
    config = load_config(
        write_config(tmp_path, GOOD + "  clip_norm: null\n  betas: [0, 0.5]\n"), Config
    )
    assert config.optim.clip_norm is None
    assert config.optim.betas == (0.0, 0.5)
    assert isinstance(config.optim.betas[0], float)


def test_kind_selects_the_member_of_a_union() -> None:
    config = parse(Config, {"name": "a", "levels": [], "text": {"kind": "transformer", "depth": 2}})
    assert config.text == Transformer(2)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optim.lr=3e-4", 3e-4),
        ("optim.clip_norm=null", None),
        ("levels.1.channels=7", 7),
        ("name=a=b", "a=b"),
        ("text={kind: transformer, depth: 3}", Transformer(3)),
        ("text.norm=true", True),  # a section that the file omits
    ],
)
def test_override_replaces_one_value(tmp_path: Path, override: str, value: object) -> None:
    config = load_config(write_config(tmp_path, GOOD), Config, [override])
    found: object = config
    for key in override.partition("=")[0].split("."):
        found = found[int(key)] if isinstance(found, tuple) else getattr(found, key)
    assert found == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "  lrr: 3\n", "run.yaml:8: optim.lrr is unknown; did you mean 'lr'?"),
        (
            GOOD + "zzz: 3\n",
            "run.yaml:8: zzz is unknown; expected one of: name, levels, text, optim",
        ),
        (
            GOOD.replace("true", "1"),
            "run.yaml:5: levels.1.attention is 1; expected a valid boolean",
        ),
        (
            GOOD.replace("64", "'64'"),
            "run.yaml:3: levels.0.channels is '64'; expected a valid integer",
        ),
        (GOOD.replace("64", "0"), "run.yaml:3: levels.0.channels is 0; expected at least 1"),
        (GOOD.replace("name: tiny\n", ""), "run.yaml:1: name is missing"),
        (
            GOOD.replace("  - {channels: 64}", "  - {attention: true}"),
            "run.yaml:3: levels.0.channels is missing",
        ),
        (
            GOOD + "text: {kind: stats}\n",
            "run.yaml:8: text.kind is 'stats'; expected 'states' or 'transformer'",
        ),
        (GOOD + "text: {kind: transformer}\n", "run.yaml:8: text.depth is missing"),
        (
            GOOD + "text: {kind: states, nrom: true}\n",
            "run.yaml:8: text.nrom is unknown; did you mean 'norm'?",
        ),
        (GOOD + "name: again\n", "run.yaml:8: not valid YAML: 'name' is given twice; see line 1"),
        (
            GOOD + "a: [1\n",
            "run.yaml:9: not valid YAML: expected ',' or ']', but got '<stream end>'",
        ),
        ("- 1\n", "run.yaml:1: the config is [1]; expected a mapping"),
    ],
)
def test_errors_name_the_line_and_the_key(tmp_path: Path, text: str, message: str) -> None:
    assert error_message(tmp_path, text) == message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr=fast", "--set optim.lr=fast: optim.lr is 'fast'; expected a valid number"),
        ("optim.lrr=1", "--set optim.lrr=1: optim.lrr is unknown; did you mean 'lr'?"),
        ("optim.lr", "--set 'optim.lr': expected KEY=VALUE, such as optim.lr=1e-4"),
        ("levels.5.channels=1", "--set 'levels.5.channels=1': '5' does not exist in a list of 2"),
        ("name.first=1", "--set 'name.first=1': 'first' does not exist in 'tiny'"),
        ("optim.lr=[1", "--set 'optim.lr=[1': '[1' is not a valid YAML value"),
        (
            "optim.clip_norm=.nan",
            "--set optim.clip_norm=.nan: optim.clip_norm is nan; expected a finite number",
        ),
        (
            "optim.betas=[0, .inf]",
            "--set optim.betas=[0, .inf]: optim.betas.1 is inf; expected a finite number",
        ),
    ],
)
def test_errors_name_the_override(tmp_path: Path, override: str, message: str) -> None:
    assert error_message(tmp_path, GOOD, override) == message


@dataclass(frozen=True)
class Run:
    model: States | Transformer
    optim: Optim = Optim()
    tuning: Optim | None = None


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("clip_norm=1", "did you mean 'optim.clip_norm' or 'tuning.clip_norm'?"),
        ("norm=true", "did you mean 'model.norm'?"),
        ("optim.depth=3", "did you mean 'model.depth'?"),
        ("model.depth=3", "expected one of: norm, kind"),  # a key of the other member of the union
        ("optims=1", "did you mean 'optim'?"),
        ("other=1", "expected one of: model, optim, tuning"),
    ],
)
def test_a_key_of_another_section_is_suggested(tmp_path: Path, override: str, hint: str) -> None:
    file = write_config(tmp_path, "model: {kind: states}\n")
    with pytest.raises(ValueError) as error:
        load_config(file, Run, [override])
    assert str(error.value).partition(" is unknown; ")[2] == hint


def test_all_errors_are_reported_at_once(tmp_path: Path) -> None:
    text = error_message(tmp_path, GOOD.replace("64", "x") + "  lrr: 3\n")
    assert text.splitlines() == [
        "run.yaml:3: levels.0.channels is 'x'; expected a valid integer",
        "run.yaml:8: optim.lrr is unknown; did you mean 'lr'?",
    ]


def test_yaml_merge_keys_are_supported(tmp_path: Path) -> None:
    text = "name: a\nlevels: [&level {channels: 4}, {<<: *level, attention: true}]\n"
    assert load_config(write_config(tmp_path, text), Config).levels == (Level(4), Level(4, True))


LAUGHS = "\n".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]" for i in range(9))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("a0: &a0 [x]\n" + LAUGHS, "more values than a config can have"),
        ("a0: &a0 {x: 1}\n" + LAUGHS.replace("[", "{<<: [").replace("]", "]}"), "more values"),
        ("a: &a [*a]", "a value contains itself"),
        ("[" * 60_000, "nested too deeply"),
        ("- " * 30_000, "nested too deeply"),
        ("a: 1\nb: \0", r":2: .*'\\x00' is not allowed"),
        ("a: !!int", "'' is not a valid int"),
        ("a: !!bool foo", "'foo' is not a valid bool"),
        ("a: 2020-13-45", "'2020-13-45' is not a valid timestamp"),
        ("a: 0x" + "f" * 9000, ":1: Exceeds the limit"),
        ('"\\ud800": 1', ":1: Invalid JSON"),
        ("[1]: 2", "a key is a sequence; expected text"),
        ("{a: b}: 2", "a key is a mapping; expected text"),
        ("2001-01-01: 2", "a key is '2001-01-01'; expected text"),
        ("a: !!python/object/apply:os.abort []", "could not determine a constructor"),
        ("\xe9".encode("latin-1"), "is not UTF-8 text: .* at byte 0"),
        ("a: 1\n" * 20_000, "too large: 100,000 bytes"),
    ],
)
def test_hostile_yaml_is_refused_at_once_in_one_line(
    tmp_path: Path, text: str | bytes, fault: str
) -> None:
    (tmp_path / "run.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    started = time.process_time()
    with pytest.raises(ValueError, match=rf"run\.yaml.*{fault}") as error:
        load_config(tmp_path / "run.yaml", Config)
    assert time.process_time() - started < 1
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


def test_control_characters_of_a_config_are_escaped(tmp_path: Path) -> None:
    message = error_message(tmp_path, GOOD + '"\\e[31mname\\n2": 1\n')
    assert (
        message
        == r"run.yaml:8: \x1b[31mname\n2 is unknown; expected one of: name, levels, text, optim"
    )


def test_an_override_does_not_change_other_uses_of_an_anchor(tmp_path: Path) -> None:
    text = "name: a\nlevels: [&level {channels: 4}, *level, {<<: *level}]\n"
    config = load_config(write_config(tmp_path, text), Config, ["levels.0.channels=5"])
    assert config.levels == (Level(5), Level(4), Level(4))


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.yaml does not exist"):
        load_config(tmp_path / "absent.yaml", Config)


def test_json_round_trip(tmp_path: Path) -> None:
    config = Config("a", (Level(2), Level(3, True)), Transformer(4), Optim(betas=(0.5, 0.6)))
    save_json(config, tmp_path / "config.json")
    data = json.loads((tmp_path / "config.json").read_text())
    assert data == to_dict(config)
    assert data["levels"][1] == {"channels": 3, "attention": True}
    assert parse(Config, data) == config
    with pytest.raises(ValueError, match=r"^model: levels\.0\.channels is missing"):
        parse(Config, {"name": "a", "levels": [{}]}, where="model")


def test_flatten_returns_dotted_keys() -> None:
    assert flatten({"a": {"b": 1, "c": []}, "d": [2, {"e": None}]}) == {
        "a.b": 1,
        "a.c": [],
        "d.0": 2,
        "d.1.e": None,
    }


@config
class Bounded:
    size: Annotated[int, Ge(2), MultipleOf(2)] = 2
    rate: Fraction | None = None
    kind: Literal["a", "b"] = "a"
    grid: tuple[PositiveInt, ...] = (1, 1)
    levels: Annotated[tuple[Level, ...], MinLen(1)] = (Level(1),)

    def __post_init__(self) -> None:
        if self.size > 10 and self.kind == "b":
            raise ValueError(f"size is {self.size}; expected at most 10 for kind 'b'")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": 0}, "size is 0; expected at least 2"),
        ({"size": 3}, "size is 3; expected at least 2 and a multiple of 2"),
        ({"size": "large"}, "size is 'large'; expected at least 2"),
        ({"rate": 1.5}, "rate is 1.5; expected at least 0 and at most 1"),
        ({"rate": float("nan")}, "rate is nan; expected at least 0"),
        ({"kind": "c"}, "kind is 'c'; expected 'a' or 'b'"),
        ({"grid": (4, 0)}, r"grid\[1\] is 0; expected at least 1"),
        ({"levels": ()}, r"levels is \(\); expected a length of at least 1"),
        ({"size": 12, "kind": "b"}, "expected at most 10 for kind 'b'"),
    ],
)
def test_config_values_are_checked_on_construction(values, message):
    with pytest.raises(ValueError, match=message):
        Bounded(**values)
    if values.get("rate") == values.get("rate"):  # JSON has no NaN
        with pytest.raises(ValueError, match=next(iter(values))):
            parse(Bounded, values)


def test_values_within_the_bounds_are_accepted():
    assert Bounded(size=4, rate=0.5, grid=[2, 3]).grid == [2, 3]
    assert parse(Bounded, {"size": 4, "rate": None}) == Bounded(size=4)
    with pytest.raises(FrozenInstanceError):
        Bounded().size = 4


def test_a_violated_bound_in_a_file_names_the_key_and_the_bound():
    with pytest.raises(ValueError, match=r"here: levels\.0\.channels is 0; expected at least 1"):
        parse(Bounded, {"levels": [{"channels": 0}]}, "here")


def test_the_old_name_of_an_option_still_works():
    with pytest.warns(DeprecationWarning, match="cache_interval"):
        options = StageOptions(4, reuse=3)
    with pytest.warns(DeprecationWarning, match="cache_interval"):
        assert options.reuse == options.cache_interval == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # files with the old name load silently
        assert parse(StageOptions, {"steps": 4, "reuse": 3}) == options
