"""Bounded parsing of untrusted YAML, with the line of each value."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from unclip.files import printable, shorten

MAX_VALUES = 20_000  # in a text, aliases expanded
MAX_DEPTH, TOO_DEEP = 50, "nested too deeply"
KEY_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")

KeyPath = tuple[str | int, ...]  # ("optim", "lr"); ("levels", 0, "channels")


class _Loader(yaml.SafeLoader):
    """SafeLoader that also reads 1e-4 as a number (valid in YAML 1.2; YAML 1.1 needs 1.0e-4)."""

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        if self.flow_level > MAX_DEPTH:  # time grows with its square
            raise yaml.MarkedYAMLError(problem=TOO_DEEP, problem_mark=self.get_mark())
        super().fetch_flow_collection_start(TokenClass)

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, TypeError, OverflowError):  # "!!int x", 2001-99-99
            kind = node.tag.rpartition(":")[-1]
            raise _fault(node, f"{shorten(node.value)} is not a valid {kind}") from None


def _fault(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def parse_yaml(text: str, where: str) -> tuple[Any, dict[KeyPath, int]]:
    """Return the plain data in an untrusted YAML text, and the line of each value in it.

    Raises ValueError, with one line that starts with `where` and the line number, if the text is
    not valid, repeats a key, has a key that is not text, or has aliases that expand to more than
    `MAX_VALUES` values.
    """
    loader = None
    try:
        loader = _Loader(text)
        if (node := loader.get_single_node()) is None:
            return {}, {}
        _count(node, {})
        lines = dict(_line_numbers(node))
        return _without_aliases(loader.construct_document(node)), lines
    except yaml.reader.ReaderError as error:  # a character that YAML excludes
        line = text.count("\n", 0, error.position) + 1
        problem = f"the character {chr(error.character)!r} is not allowed"
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        problem = printable(error.problem)
    except RecursionError:
        line = loader.line + 1 if loader else 1
        problem = TOO_DEEP
    raise ValueError(f"{where}:{line}: not valid YAML: {problem}")


def _count(node: yaml.Node, counts: dict[yaml.Node, int]) -> int:
    """Return the number of values in a node, counting aliased values at every use."""
    if node not in counts:
        counts[node] = 0  # until its children are counted
        pairs = node.value if isinstance(node, yaml.MappingNode) else ()
        children = node.value if isinstance(node, yaml.SequenceNode) else sum(pairs, ())
        counts[node] = 1 + sum(_count(child, counts) for child in children)
    if not 0 < counts[node] <= MAX_VALUES:
        fault = "more values than a config can have" if counts[node] else "a value contains itself"
        raise _fault(node, fault)
    return counts[node]


def _line_numbers(node: yaml.Node, up: KeyPath = ()) -> Iterator[tuple[KeyPath, int]]:
    """Yield (key path, line number) of every value. Raises an error for a wrong or repeated key."""
    if isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key, value in node.value:
            name, line = key.value, key.start_mark.line + 1
            if key.tag not in KEY_TAGS:
                given = shorten(name) if isinstance(name, str) else f"a {key.id}"
                raise _fault(key, f"a key is {given}; expected text; put it in quotes")
            if name in first:
                raise _fault(key, f"{shorten(name)} is given twice; see line {first[name]}")
            first[name] = line
            yield (*up, name), line
            yield from _line_numbers(value, (*up, name))
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            yield (*up, i), value.start_mark.line + 1
            yield from _line_numbers(value, (*up, i))


def _without_aliases(data: Any) -> Any:
    """Copy data so that YAML anchors and aliases become separate objects."""
    if isinstance(data, dict):
        return {key: _without_aliases(value) for key, value in data.items()}
    return [_without_aliases(value) for value in data] if isinstance(data, list) else data
