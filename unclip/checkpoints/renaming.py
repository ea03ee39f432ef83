"""Foreign checkpoints as tables of rules: strict on import, the exact inverse on export.

A rule maps foreign names to our names. A name is a tensor's, or a module's with `weight` and
`bias`.
"""

# h heads, p parts (query, key, value), d head width

from __future__ import annotations

import re
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from einops import rearrange
from torch import Tensor, nn

from unclip.checkpoints.folders import weight_files
from unclip.checkpoints.states import read_state
from unclip.weights import TensorFile, fit_error, meta_device

M = TypeVar("M", bound=nn.Module)
Tensors = Sequence[Tensor]
LEAVES = ("", ".weight", ".bias")


@dataclass(frozen=True)
class Rule:
    """Foreign tensors <-> our tensors; `convert` and `invert` are inverse to each other."""

    foreign: tuple[str, ...]
    ours: tuple[str, ...]
    convert: Callable[[Tensors], Tensors] = tuple
    invert: Callable[[Tensors], Tensors] = tuple


def move(foreign: str, ours: str, lead: int = 0, trail: int = 0) -> Rule:
    """Rename a tensor or module.

    Foreign tensors may have `lead` axes of length 1 in front and, but for vectors, `trail` behind.
    """
    return Rule(
        (foreign,),
        (ours,),
        lambda x: [_drop_axes(x[0], lead, trail)],
        lambda x: [_add_axes(x[0], lead, trail)],
    )


def transpose(foreign: str, ours: str) -> Rule:
    """Transpose a matrix."""

    def transposed(x: Tensors) -> Tensors:
        return [x[0].mT.contiguous()]

    return Rule((foreign,), (ours,), transposed, transposed)


def fuse(foreign: Sequence[str], ours: str) -> Rule:
    """Stack the rows of several equal Linears into one."""
    n = len(foreign)
    return Rule(tuple(foreign), (ours,), lambda x: [torch.cat(list(x))], lambda x: x[0].chunk(n))


def by_head(foreign: str, ours: str, heads: int, parts: int = 3, trail: int = 0) -> Rule:
    """Reorder rows grouped by head, each with its q, k, v (ADM, Karlo), to all q, all k, all v."""

    def convert(x: Tensors) -> Tensors:
        rows = _drop_axes(x[0], 0, trail)
        return [rearrange(rows, "(h p d) ... -> (p h d) ...", h=heads, p=parts)]

    def invert(x: Tensors) -> Tensors:
        rows = rearrange(x[0], "(p h d) ... -> (h p d) ...", h=heads, p=parts)
        return [_add_axes(rows, 0, trail)]

    return Rule((foreign,), (ours,), convert, invert)


def prefixed(foreign: str, ours: str, rules: Iterable[Rule]) -> list[Rule]:
    """Put a prefix (with its dot) in front of the names of each side."""
    return [
        replace(
            rule,
            foreign=tuple(foreign + name for name in rule.foreign),
            ours=tuple(ours + name for name in rule.ours),
        )
        for rule in rules
    ]


def repeated(foreign: str, ours: str, depth: int, rules: Sequence[Rule]) -> list[Rule]:
    """Apply `rules` to each of `depth` blocks; prefixes are formats such as "layers.{}."."""
    return [r for i in range(depth) for r in prefixed(foreign.format(i), ours.format(i), rules)]


def without_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names start with a prefix, without it."""
    return {name[len(prefix) :]: x for name, x in state.items() if name.startswith(prefix)}


def count(names: Iterable[str], pattern: str) -> int:
    """Count the distinct values of a pattern's first group: blocks in r"layers\\.(\\d+)"."""
    return len({found[1] for name in names if (found := re.match(pattern, name))})


@contextmanager
def expecting(what: str, source: str | Path) -> Iterator[None]:
    """Raise a ValueError that names the tensor if the body finds one missing (KeyError)."""
    try:
        yield
    except KeyError as error:
        fault = f"{source} is not {what}: the tensor {error.args[0]} is missing"
        raise ValueError(fault) from None


def import_state(
    state: Mapping[str, Tensor],
    rules: Iterable[Rule],
    shapes: Mapping[str, torch.Size],
    source: str | Path,
    ignored: Sequence[str] = (),
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> dict[str, Tensor]:
    """Return a foreign state under our names.

    shapes: of all expected tensors. ignored: patterns of foreign names without learned
    values ("*.position_ids"). dtypes: to cast to, by our names. Tensors are read and cast rule by
    rule, so that a lazy `state` (`weights.TensorFile`) is never in memory twice. Raises
    ValueError that lists missing, unexpected and misshaped tensors by their foreign names.
    """
    left, out = set(state), {}
    missing, misshaped = [], []
    for rule in rules:
        for leaf in LEAVES:
            ours = [name + leaf for name in rule.ours]
            if ours[0] not in shapes:
                continue
            foreign = [name + leaf for name in rule.foreign]
            if absent := [name for name in foreign if name not in left]:
                missing += absent
                out |= dict.fromkeys(ours)
                continue
            left.difference_update(foreign)
            given = [state[name] for name in foreign]
            try:
                converted = rule.convert(given)
            except (RuntimeError, ValueError):  # the rows cannot be divided
                converted = given
            if [x.shape for x in converted] != [torch.Size(shapes[name]) for name in ours]:
                expected = rule.invert([torch.empty(shapes[name], device="meta") for name in ours])
                misshaped += [
                    f"{name} is {tuple(x.shape)}, expected {tuple(y.shape)}"
                    for name, x, y in zip(foreign, given, expected, strict=True)
                    if x.shape != y.shape
                ]
            if dtypes is not None:
                converted = [x.to(dtypes[name]) for name, x in zip(ours, converted, strict=False)]
            out |= zip(ours, converted, strict=False)
    left = {name for name in left if not any(fnmatchcase(name, ignore) for ignore in ignored)}
    unexpected = [name for name in state if name in left]
    if missing or unexpected or misshaped:
        raise fit_error(source, missing, unexpected, misshaped)
    assert out.keys() >= shapes.keys(), f"no rule makes {sorted(shapes.keys() - out.keys())}"
    return out


def export_state(state: Mapping[str, Tensor], rules: Iterable[Rule]) -> dict[str, Tensor]:
    """Return our state under the foreign names: the inverse of `import_state`."""
    left, out = dict(state), {}
    for rule in rules:
        for leaf in LEAVES:
            if rule.ours[0] + leaf in left:
                given = [left.pop(name + leaf) for name in rule.ours]
                foreign = [name + leaf for name in rule.foreign]
                out |= zip(foreign, rule.invert(given), strict=True)
    assert not left, f"no rule takes {sorted(left)}"
    return out


def select(state: Mapping[str, Tensor], rules: Iterable[Rule]) -> dict[str, Tensor]:
    """Return the tensors of our state that the rules name."""
    names = {name + leaf for rule in rules for name in rule.ours for leaf in LEAVES}
    return {name: x for name, x in state.items() if name in names}


class Part(NamedTuple):
    """The foreign tensors of one part of a network, and the rules that rename them."""

    state: Mapping[str, Tensor]
    rules: Sequence[Rule]
    source: str | Path  # for error messages


def import_parts(
    own: Mapping[str, Tensor],
    parts: Iterable[Part],
    dtypes: Mapping[str, torch.dtype],
    ignored: Sequence[str] = (),
) -> dict[str, Tensor]:
    """Return the tensors of all parts under our names; own: our state dict, for the shapes."""
    tensors = {}
    for state, rules, source in parts:
        shapes = {name: x.shape for name, x in select(own, rules).items()}
        tensors |= import_state(state, rules, shapes, source, ignored, dtypes)
    return tensors


def build(
    network: Callable[[Any], M],
    config: Any,
    parts: Sequence[Part],
    dtype: torch.dtype = torch.float32,
    ignored: Sequence[str] = (),
) -> M:
    """Build a network from foreign tensors in eval mode: parameters in `dtype`, buffers in fp32.

    It is built on the meta device, so that only the loaded weights take memory.
    """
    with meta_device(parts[0].source if parts else "a config"):
        module = network(config)
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    own = module.state_dict()
    dtypes = {name: x.dtype for name, x in own.items()}
    module.load_state_dict(import_parts(own, parts, dtypes, ignored), assign=True)
    return module.eval()


def read_weights(folder: Path) -> Mapping[str, Tensor]:
    """Open the weights of a component (safetensors or .bin, one file or shards), read lazily."""
    shards: list[Any] = [
        TensorFile(file) if file.suffix == ".safetensors" else read_state(file)
        for file in weight_files(folder)
    ]
    return ChainMap(*shards)


def _drop_axes(x: Tensor, lead: int, trail: int) -> Tensor:
    trail = min(trail, max(x.ndim - 1, 0))
    shape = x.shape[lead : x.ndim - trail]
    return x.reshape(shape) if shape.numel() == x.numel() else x


def _add_axes(x: Tensor, lead: int, trail: int) -> Tensor:
    return x.reshape((1,) * lead + tuple(x.shape) + (1,) * (trail if x.ndim > 1 else 0))
