"""Strict YAML and JSON <-> frozen dataclasses; errors name the file, the line and the key.

The dataclass is the only schema. Unknown keys, missing keys, values of the wrong type, NaN and
infinity are errors. Overrides such as "optim.lr=1e-4" replace single values.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import operator
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from annotated_types import Ge, Gt, Interval, Le, Lt, MinLen, MultipleOf
from typing_extensions import dataclass_transform

from unclip.files import printable, read_text, replace_text, shorten
from unclip.safe_yaml import KeyPath, parse_yaml

T = TypeVar("T")
_STRICT = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False)

MAX_CONFIG = 2**16  # bytes
MAX_ERRORS = 20  # errors that are reported

PositiveInt = Annotated[int, Ge(1)]
NonNegativeInt = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Fraction = Annotated[float, Interval(ge=0, le=1)]
PositiveFraction = Annotated[float, Interval(gt=0, le=1)]
ProperFraction = Annotated[float, Interval(ge=0, lt=1)]
DropRate = ProperFraction  # probability of dropping something in training


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def config(cls: type[T]) -> type[T]:
    """Make `cls` a frozen dataclass whose values are checked against their annotations.

    Checked on construction: bounds such as `Annotated[int, Ge(1)]`, also of the elements of a
    tuple, and `Literal` choices. A violation raises a ValueError such as "steps is 0; expected
    at least 1". The class's own `__post_init__` runs afterwards, for checks across fields.
    """
    own = getattr(cls, "__post_init__", None)

    def __post_init__(self: Any) -> None:
        for name, hint in _hints(cls).items():
            _check(name, getattr(self, name), hint)
        if own is not None:
            own(self)

    cls.__post_init__ = __post_init__  # type: ignore[attr-defined]
    return dataclasses.dataclass(frozen=True)(cls)


def check_multiple(name: str, value: int, **divisors: int) -> None:
    """Raise ValueError unless all named divisors divide a value of a config."""
    for divisor, n in divisors.items():
        if value % n:
            raise ValueError(f"{name} is {value}; expected a multiple of {divisor} = {n}")


# Arguments of diffusers and transformers -> ours.
OTHER_NAMES = {
    **dict.fromkeys(("generator", "generators", "seeds"), "seed"),
    "num_images_per_prompt": "num_images",
    **dict.fromkeys(("callback", "callback_on_step_end"), "on_step"),
    "torch_dtype": "dtype",
    "use_auth_token": "token",
}


def check_keywords(
    given: Iterable[str],
    known: Iterable[str],
    more: Iterable[str] = (),
    suggest: Callable[[str], str | None] = OTHER_NAMES.get,
) -> None:
    """Raise TypeError for an argument not in `known`.

    The error contains what `suggest` returns, else the closest name of `known` and `more`.
    """
    names = [*known, *more]
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, names, n=1, cutoff=0.7)  # not steps -> on_step
            other = suggest(name) or next(iter(close), None)
            hint = f"did you mean {other}?" if other else f"expected one of {', '.join(names)}"
            raise TypeError(f"unknown argument {name}; {hint}")


def unknown_key(key: str, names: Sequence[str]) -> str:
    """Describe a key that is not in `names`, with the closest of them, or all."""
    if close := difflib.get_close_matches(key.rpartition(".")[2], names, n=1):
        return f"{key} is unknown; did you mean {close[0]!r}?"
    return f"{key} is unknown" + (f"; expected one of: {', '.join(names)}" if names else "")


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """Return the annotations of a dataclass's fields; they may name classes defined later."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _check(name: str, value: Any, hint: Any) -> None:
    """Raise ValueError if `value` violates the bounds or choices in the annotation `hint`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        bounded = [member for member in args if typing.get_origin(member) in (Annotated, Literal)]
        if value is not None and len(bounded) == 1 and len(args) - (type(None) in args) == 1:
            _check(name, value, bounded[0])
    elif origin is Annotated:
        _check(name, value, args[0])
        bounds = [bound for item in args[1:] for bound in _flat(item)]
        if bounds and not all(_satisfies(value, bound) for bound in bounds):
            expected = " and ".join(_expected(bound) for bound in bounds)
            raise ValueError(f"{name} is {shorten(value)}; expected {expected}")
    elif origin is Literal and value not in args:
        *others, last = map(repr, args)
        expected = f"{', '.join(others)} or {last}" if others else last
        raise ValueError(f"{name} is {shorten(value)}; expected {expected}")
    elif origin in (tuple, list) and isinstance(value, (tuple, list)):
        items = [args[0]] * len(value) if len(args) == 1 or args[-1] is ... else args
        for i, (element, item) in enumerate(zip(value, items, strict=False)):
            _check(f"{name}[{i}]", element, item)


def _flat(item: Any) -> Iterable[Any]:
    """Split an Interval into its bounds."""
    return item if isinstance(item, Interval) else (item,)


# kind of bound -> the name of its limit, as in pydantic's errors too; check; description
_BOUNDS: dict[type, tuple[str, Callable[[Any, Any], Any], str]] = {
    Ge: ("ge", operator.ge, "at least {:g}"),
    Gt: ("gt", operator.gt, "more than {:g}"),
    Le: ("le", operator.le, "at most {:g}"),
    Lt: ("lt", operator.lt, "less than {:g}"),
    MultipleOf: ("multiple_of", lambda value, factor: value % factor == 0, "a multiple of {:g}"),
    MinLen: ("min_length", lambda value, length: len(value) >= length, "a length of at least {:g}"),
}
_PYDANTIC_BOUNDS: dict[str, type] = {  # by pydantic's type of error
    "greater_than_equal": Ge,
    "greater_than": Gt,
    "less_than_equal": Le,
    "less_than": Lt,
    "multiple_of": MultipleOf,
    "too_short": MinLen,
}


def _satisfies(value: Any, bound: Any) -> bool:
    """Compare a value, which may be NaN or of another type, with one bound."""
    name, check, _ = _BOUNDS[type(bound)]
    try:
        finite = isinstance(bound, MinLen) or isinstance(value, int) or math.isfinite(value)
        return finite and bool(check(value, getattr(bound, name)))
    except TypeError:
        return False


def _expected(bound: Any) -> str:
    name, _, text = _BOUNDS[type(bound)]
    return text.format(getattr(bound, name))


def load_config(path: str | Path, cls: type[T], overrides: Sequence[str] = ()) -> T:
    """Read a YAML or JSON file as a `cls`, with overrides such as "optim.lr=1e-4".

    Omitted sections take their defaults. An override inside an omitted section starts from the
    defaults of the section's class. Raises FileNotFoundError, or ValueError with one line for each
    error, naming the file, line and dotted key.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"config file {path} does not exist")
    data, lines = parse_yaml(read_text(path, MAX_CONFIG), str(path))
    overridden = {_override(data, override): f"--set {override}" for override in overrides}

    def locate(key_path: KeyPath) -> str:
        while key_path and key_path not in overridden and key_path not in lines:
            key_path = key_path[:-1]  # a missing key is reported at its section
        return overridden.get(key_path) or f"{path}:{lines.get(key_path, 1)}"

    return _validate(cls, data, locate)


def parse(cls: type[T], data: dict[str, Any], where: str = "config") -> T:
    """Validate plain data, as read from JSON, into the dataclass `cls`.

    Raises ValueError with one line for each error, starting with `where`.
    """
    return _validate(cls, data, lambda key_path: where)


def to_dict(config: Any) -> dict[str, Any]:
    """Convert a dataclass to plain JSON types: tuples become lists and paths become strings."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def save_json(config: Any, path: str | Path) -> None:
    """Write a dataclass, or plain data, as indented JSON; an old file remains on failure."""
    data = to_dict(config) if dataclasses.is_dataclass(config) else config
    replace_text(Path(path), json.dumps(data, indent=2) + "\n")


def flatten(data: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested plain data: {"optim.lr": 1e-4, "levels.0.channels": 64}."""
    if not isinstance(data, (dict, list)) or not data:
        return {prefix: data}
    flat: dict[str, Any] = {}
    for name, value in data.items() if isinstance(data, dict) else enumerate(data):
        flat |= flatten(value, f"{prefix}.{name}" if prefix else str(name))
    return flat


def parse_override(override: str, example: str = "optim.lr=1e-4") -> tuple[list[str], Any]:
    """Split "a.b=value" into its keys and its value, which is read as YAML."""
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise ValueError(f"--set {override!r}: expected KEY=VALUE, such as {example}")
    try:
        value, _ = parse_yaml(text, name) if text.strip() else (None, {})
    except ValueError:
        raise ValueError(f"--set {override!r}: {text!r} is not a valid YAML value") from None
    return keys, value


def _override(data: Any, override: str) -> KeyPath:
    """Apply one "a.b=value" to `data`; return its key path."""
    keys, value = parse_override(override)
    path: KeyPath = ()
    for name in keys[:-1]:
        key = find_key(data, name, f"--set {override!r}")
        if isinstance(data, dict) and data.get(key) is None:
            data[key] = {}
        data, path = data[key], (*path, key)
    key = find_key(data, keys[-1], f"--set {override!r}")
    data[key] = value
    return (*path, key)


def find_key(data: Any, key: str, where: str) -> str | int:
    """Return `key` as a key of the mapping, or an index into the list, `data`.

    Raises ValueError, starting with `where`, if there is no such index.
    """
    if isinstance(data, dict):
        return key
    if isinstance(data, list) and key.isdecimal() and int(key) < len(data):
        return int(key)
    kind = f"a list of {len(data)}" if isinstance(data, list) else repr(data)
    raise ValueError(f"{where}: {key!r} does not exist in {kind}")


def _validate(cls: type[T], data: Any, locate: Callable[[KeyPath], str]) -> T:
    # Strict JSON mode: 3 is a valid float and a list a valid tuple, but "3" is not a valid int.
    # The list around cls passes the pydantic config on to a standard dataclass.
    try:
        try:
            text = json.dumps(data, default=str)
        except (ValueError, TypeError, RecursionError) as error:  # a number of 5,000 digits
            raise ValueError(f"{locate(())}: {printable(error)}") from None
        adapter = pydantic.TypeAdapter[list[T]](list[cls], config=_STRICT)  # type: ignore[valid-type]
        return adapter.validate_json(f"[{text}]", strict=True)[0]
    except pydantic.ValidationError as error:
        raise ValueError("\n".join(_messages(cls, data, error, locate))) from None


def _messages(
    cls: type, data: Any, error: pydantic.ValidationError, locate: Callable[[KeyPath], str]
) -> list[str]:
    """Format each error as one line: its location, dotted key, given value and expectation."""
    messages: dict[str, None] = {}  # an ordered set
    entries = error.errors(include_url=False)[:MAX_ERRORS]
    if entries[0]["type"] == "json_invalid":  # half of a surrogate pair, which JSON can spell
        return [f"{locate(())}: {entries[0]['msg']}"]
    for entry in _relevant(entries):
        path, owner = _resolve(cls, data, entry["loc"][1:])
        name, kind = printable(".".join(map(str, path))) or "the config", entry["type"]
        if kind in ("unexpected_keyword_argument", "extra_forbidden"):
            text = _unknown(name, cls, owner)
        elif kind in ("missing", "missing_argument"):
            text = f"{name} is missing"
        elif kind == "value_error":  # raised by a __post_init__
            text = f"{name}: {entry['ctx']['error']}"
        else:
            if kind in _PYDANTIC_BOUNDS:
                limit, _, form = _BOUNDS[_PYDANTIC_BOUNDS[kind]]
                expected = form.format(entry["ctx"][limit])
            else:
                expected = entry["msg"].removeprefix("Input should be ")
                expected = expected.replace("an object", "a mapping")
                expected = expected.replace("a valid array", "a list")
            text = f"{name} is {shorten(entry['input'])}; expected {expected}"
        messages[f"{locate(path)}: {text}"] = None
    return list(messages)


def _relevant(errors: Sequence[Any]) -> list[Any]:
    """Keep the errors of the union members whose `kind` or `type` matches the data.

    pydantic reports the errors of every member of a union of dataclasses. If no member matches, one
    error lists the possible kinds.
    """
    mismatched: dict[KeyPath, Any] = {}  # location of a union member -> the error of its kind
    kinds = ("literal_error", "missing", "missing_argument")
    unknown = ("unexpected_keyword_argument", "extra_forbidden")  # a member without a kind
    for error in errors:
        *parents, name = error["loc"]
        in_union = bool(parents) and str(parents[-1])[:1].isupper()  # pydantic adds its class
        if name in ("kind", "type") and error["type"] in kinds + unknown * in_union:
            mismatched[error["loc"][:-1]] = error
    relevant: list[Any] = []
    for error in errors:
        loc = error["loc"]
        member = next((loc[:i] for i in range(1, len(loc)) if loc[:i] in mismatched), None)
        if member is None:
            relevant.append(error)
            continue
        n = len(member)
        members = {e["loc"][:n] for e in errors if e["loc"][: n - 1] == member[:-1]}
        if members <= set(mismatched) and error is mismatched[min(members)]:
            ordered = [mismatched[m] for m in sorted(members)]
            expected = [e["ctx"]["expected"] for e in ordered if "ctx" in e]
            relevant.append({**error, "msg": " or ".join(expected) or error["msg"]})
    return relevant


def _unknown(key: str, cls: Any, owner: Any) -> str:
    """Describe an unknown key, with its name in other sections of `cls`, or similar in `owner`."""
    found = [other for other in _keys(cls, key.rpartition(".")[2]) if other != key]
    if found:
        shortest = sorted(dict.fromkeys(found), key=lambda other: other.count("."))[:3]
        return f"{key} is unknown; did you mean {' or '.join(map(repr, shortest))}?"
    names = [f.name for f in dataclasses.fields(owner)] if dataclasses.is_dataclass(owner) else []
    return unknown_key(key, names)


def _keys(hint: Any, name: str, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of all fields `name` in a section and its sections."""
    for section in filter(dataclasses.is_dataclass, _members(hint)):
        for field, inner in _hints(section).items():
            if field == name:
                yield prefix + field
            yield from _keys(inner, name, f"{prefix}{field}.")


def _members(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the annotation itself."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def _resolve(cls: Any, data: Any, loc: KeyPath) -> tuple[KeyPath, Any]:
    """Convert pydantic's location to (key path in the data, dataclass that owns its last key).

    pydantic adds the name of a union's member to the location, which is not a key of the data.
    """
    path: list[str | int] = []
    owner = None
    for i, key in enumerate(loc):
        options = _members(cls)
        classes: list[Any] = [option for option in options if dataclasses.is_dataclass(option)]
        if isinstance(data, list) and isinstance(key, int):
            items = [a for o in options for a in typing.get_args(o) if a is not Ellipsis]
            cls = items[min(key, len(items) - 1)] if items else None
            data = data[key] if key < len(data) else None
        elif len(classes) > 1 and key in (names := [c.__name__ for c in classes]):
            cls = classes[names.index(key)]
            continue
        elif isinstance(data, dict) and (key in data or i == len(loc) - 1):
            owner = classes[0] if classes else None
            cls = typing.get_type_hints(owner).get(str(key)) if owner else None
            data = data.get(key)
        else:
            continue
        path.append(key)
    return tuple(path), owner
