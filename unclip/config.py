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
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import pydantic
import yaml
from annotated_types import Ge, Gt, Interval, Le, Lt, MinLen, MultipleOf
from typing_extensions import dataclass_transform

T = TypeVar("T")
# A plain dataclass takes the config of the type around it: hence list[cls].
_STRICT = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False)

Place = tuple[str | int, ...]  # ("optim", "lr"); ("levels", 0, "channels")

PositiveInt = Annotated[int, Ge(1)]
NonNegativeInt = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Fraction = Annotated[float, Interval(ge=0, le=1)]
PositiveFraction = Annotated[float, Interval(gt=0, le=1)]
DropRate = Annotated[float, Interval(ge=0, lt=1)]  # probability of dropping something in training


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def config(cls: type[T]) -> type[T]:
    """Make `cls` a frozen dataclass whose values are checked against their annotations.

    Checked on construction: bounds such as `Annotated[int, Ge(1)]`, also of the elements of a
    tuple, and `Literal` choices. A violation is a ValueError "steps is 0; expected at least 1". The
    class's own `__post_init__` runs afterwards, for checks across fields.
    """
    own = getattr(cls, "__post_init__", None)

    def __post_init__(self: Any) -> None:
        for name, hint in _hints(cls).items():
            _check(name, getattr(self, name), hint)
        if own is not None:
            own(self)

    cls.__post_init__ = __post_init__  # type: ignore[attr-defined]
    return dataclasses.dataclass(frozen=True)(cls)


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """The annotations of a dataclass's fields; resolved late, as they may name later classes."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _check(name: str, value: Any, hint: Any) -> None:
    """ValueError if `value` violates the bounds or choices in the annotation `hint`."""
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
            raise ValueError(f"{name} is {_short(value)}; expected {expected}")
    elif origin is Literal and value not in args:
        *others, last = map(repr, args)
        expected = f"{', '.join(others)} or {last}" if others else last
        raise ValueError(f"{name} is {_short(value)}; expected {expected}")
    elif origin in (tuple, list) and isinstance(value, (tuple, list)):
        items = [args[0]] * len(value) if len(args) == 1 or args[-1] is ... else args
        for i, (element, item) in enumerate(zip(value, items, strict=False)):
            _check(f"{name}[{i}]", element, item)


def _flat(item: Any) -> Iterable[Any]:
    return item if isinstance(item, Interval) else (item,)


def _satisfies(value: Any, bound: Any) -> bool:
    """Compare a value, which may be NaN or of another type, with one bound."""
    if isinstance(bound, MinLen):
        return len(value) >= bound.min_length
    try:
        if not math.isfinite(value):
            return False
    except TypeError:
        return False
    match bound:
        case Ge(ge):
            return bool(value >= ge)
        case Gt(gt):
            return bool(value > gt)
        case Le(le):
            return bool(value <= le)
        case Lt(lt):
            return bool(value < lt)
        case MultipleOf(multiple_of):
            return value % multiple_of == 0
    raise AssertionError(f"bound {bound} is not supported")


def _expected(bound: Any) -> str:
    """A bound in words; pydantic's errors give the same text through `_PYDANTIC_BOUNDS`."""
    match bound:
        case Ge(limit):
            return f"at least {limit:g}"
        case Gt(limit):
            return f"more than {limit:g}"
        case Le(limit):
            return f"at most {limit:g}"
        case Lt(limit):
            return f"less than {limit:g}"
        case MultipleOf(factor):
            return f"a multiple of {factor:g}"
        case MinLen(length):
            return f"at least {length} entr{'y' if length == 1 else 'ies'}"
    raise AssertionError(f"bound {bound} is not supported")


# pydantic's error types -> the bound that was violated
_PYDANTIC_BOUNDS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "greater_than_equal": lambda ctx: Ge(ctx["ge"]),
    "greater_than": lambda ctx: Gt(ctx["gt"]),
    "less_than_equal": lambda ctx: Le(ctx["le"]),
    "less_than": lambda ctx: Lt(ctx["lt"]),
    "multiple_of": lambda ctx: MultipleOf(ctx["multiple_of"]),
    "too_short": lambda ctx: MinLen(ctx["min_length"]),
}


class _Loader(yaml.SafeLoader):
    """SafeLoader that also reads 1e-4 as a number (YAML 1.2; YAML 1.1 wants 1.0e-4)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def load_config(path: str | Path, cls: type[T], overrides: Sequence[str] = ()) -> T:
    """Read the YAML (or JSON) file `path` as a `cls`; `overrides` are strings like "optim.lr=1e-4".

    A section that a file leaves out takes its default; an override in such a section starts from the defaults of the
    section's own class. Raises FileNotFoundError, or ValueError naming file:line and the dotted key of each fault.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no config file {path}")
    loader = _Loader(path.read_text(encoding="utf-8"))
    try:
        node = loader.get_single_node()
        lines = dict(_lines(node, str(path))) if node else {}
        data = _unshared(loader.construct_document(node)) if node else {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ValueError(
            f"{path}{line}: not valid YAML: {getattr(error, 'problem', None) or error}"
        ) from None
    finally:
        loader.dispose()

    overridden = {}
    for override in overrides:
        place = _override(data, override)
        overridden[place] = f"--set {override}"

    def locate(place: Place) -> str:
        while place and place not in overridden and place not in lines:
            place = place[:-1]  # a missing key is reported at the section it is missing from
        return overridden.get(place) or f"{path}:{lines.get(place, 1)}"

    return _validate(cls, data, locate)


def parse(cls: type[T], data: dict[str, Any], where: str = "config") -> T:
    """Validate plain data (as JSON gives it) into the dataclass `cls`; ValueErrors begin with `where`."""
    return _validate(cls, data, lambda place: where)


def to_dict(config: Any) -> dict[str, Any]:
    """The dataclass as plain JSON types: tuples become lists, paths strings."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def save_json(config: Any, path: str | Path) -> None:
    """Write a dataclass, or plain data, as indented JSON."""
    data = to_dict(config) if dataclasses.is_dataclass(config) else config
    Path(path).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def flatten(data: Any, prefix: str = "") -> dict[str, Any]:
    """Nested plain data as {"optim.lr": 1e-4, "levels.0.channels": 64}."""
    if isinstance(data, dict) and data:
        items = data.items()
    elif isinstance(data, list) and data:
        items = enumerate(data)
    else:
        return {prefix: data}
    return {
        k: v
        for name, x in items
        for k, v in flatten(x, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def _lines(node: yaml.Node, path: str, place: Place = ()) -> Iterator[tuple[Place, int]]:
    """(place, line from 1) of every value; refuses a key that is given twice, of which YAML keeps only the last."""
    if isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.value in first:
                raise ValueError(
                    f"{path}:{line}: {key.value!r} is given twice (first in line {first[key.value]})"
                )
            first[key.value] = line
            yield (*place, key.value), line
            yield from _lines(value, path, (*place, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            yield (*place, i), value.start_mark.line + 1
            yield from _lines(value, path, (*place, i))


def _unshared(data: Any) -> Any:
    """A copy in which no two places are one object, as YAML makes them of an anchor and its aliases."""
    if isinstance(data, dict):
        return {key: _unshared(value) for key, value in data.items()}
    return [_unshared(value) for value in data] if isinstance(data, list) else data


def _override(data: Any, override: str) -> Place:
    """Set one "a.b=value" inside `data`; the value is read as YAML. Returns the place that was set."""
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise ValueError(f"--set {override!r}: expected KEY=VALUE, such as optim.lr=1e-4")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise ValueError(f"--set {override!r}: {text!r} is not a valid YAML value") from None
    place: Place = ()
    for key in keys[:-1]:
        key = _key(data, key, override)
        if isinstance(data, dict) and data.get(key) is None:
            data[key] = {}
        data, place = data[key], (*place, key)
    key = _key(data, keys[-1], override)
    data[key] = value
    return (*place, key)


def _key(data: Any, key: str, override: str) -> str | int:
    if isinstance(data, dict):
        return key
    if isinstance(data, list) and key.isdecimal() and int(key) < len(data):
        return int(key)
    kind = f"a list of {len(data)}" if isinstance(data, list) else repr(data)
    raise ValueError(f"--set {override!r}: {key!r} is looked up in {kind}")


def _validate(cls: type[T], data: Any, locate: Callable[[Place], str]) -> T:
    # Strict JSON mode: 3 is a float, a list is a tuple, but "3" is no int and 1 no bool.
    try:
        text = json.dumps(data, default=str)
        adapter = pydantic.TypeAdapter[list[T]](list[cls], config=_STRICT)  # type: ignore[valid-type]
        return adapter.validate_json(f"[{text}]", strict=True)[0]
    except pydantic.ValidationError as error:
        raise ValueError("\n".join(_messages(cls, data, error, locate))) from None


def _messages(
    cls: type, data: Any, error: pydantic.ValidationError, locate: Callable[[Place], str]
) -> list[str]:
    """A line for each fault: place in the file, dotted key, what was given and what was expected."""
    messages: dict[str, None] = {}  # an ordered set
    for fault in _meant(error.errors(include_url=False)):
        place, owner = _resolve(cls, data, fault["loc"][1:])
        name, kind = ".".join(map(str, place)) or "the config", fault["type"]
        if kind in ("unexpected_keyword_argument", "extra_forbidden"):
            text = f"{name} is unknown{_nearest(str(place[-1]), owner)}"
        elif kind in ("missing", "missing_argument"):
            text = f"{name} is missing"
        elif kind == "value_error":  # raised by a __post_init__
            text = f"{name}: {fault['ctx']['error']}"
        elif kind in _PYDANTIC_BOUNDS:
            expected = _expected(_PYDANTIC_BOUNDS[kind](fault["ctx"]))
            text = f"{name} is {_short(fault['input'])}; expected {expected}"
        else:
            expected = (
                fault["msg"].removeprefix("Input should be ").replace("an object", "a mapping")
            )
            text = f"{name} is {_short(fault['input'])}; expected {expected.replace('a valid array', 'a list')}"
        messages[f"{locate(place)}: {text}"] = None
    return list(messages)


def _meant(faults: Sequence[Any]) -> list[Any]:
    """In a union of dataclasses every member reports its faults: keep those of the member whose `kind` matches.

    If none does, one fault says which kinds there are.
    """
    wrong: dict[Place, Any] = {}  # location of a member -> the fault of its kind
    for fault in faults:
        if fault["loc"][-1] in ("kind", "type") and fault["type"] in (
            "literal_error",
            "missing",
            "missing_argument",
        ):
            wrong[fault["loc"][:-1]] = fault
    meant: list[Any] = []
    for fault in faults:
        loc = fault["loc"]
        if (
            member := next((loc[:i] for i in range(1, len(loc)) if loc[:i] in wrong), None)
        ) is None:
            meant.append(fault)
            continue
        members = {
            f["loc"][: len(member)] for f in faults if f["loc"][: len(member) - 1] == member[:-1]
        }
        if members <= set(wrong) and fault is wrong[min(members)]:
            kinds = [wrong[m]["ctx"]["expected"] for m in sorted(members) if "ctx" in wrong[m]]
            meant.append({**fault, "msg": " or ".join(kinds) or fault["msg"]})
    return meant


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _nearest(key: str, owner: Any) -> str:
    names = [f.name for f in dataclasses.fields(owner)] if dataclasses.is_dataclass(owner) else []
    close = difflib.get_close_matches(key, names, n=1)
    return (
        f"; did you mean {close[0]!r}?"
        if close
        else f"; expected one of: {', '.join(names)}"
        if names
        else ""
    )


def _resolve(cls: Any, data: Any, loc: Place) -> tuple[Place, Any]:
    """pydantic's location -> (place in the data, the dataclass that owns its last key).

    pydantic puts the name of a union's member into the location; the data has no such key.
    """
    place: list[str | int] = []
    owner = None
    for i, key in enumerate(loc):
        options = (
            typing.get_args(cls)
            if typing.get_origin(cls) in (typing.Union, types.UnionType)
            else (cls,)
        )
        classes = [o for o in options if dataclasses.is_dataclass(o)]
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
        place.append(key)
    return tuple(place), owner
