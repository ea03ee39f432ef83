"""A foreign checkpoint as a table of rules: strict and complete on the way in, the exact inverse on the way out.

A rule maps names there to names here. A name is a tensor's, or a module's: its `weight` and `bias` then go along.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

import torch
from einops import rearrange
from torch import Tensor, nn

from unclip.weights import fit_error

# H heads, P parts (query, key, value), D rows of one head

M = TypeVar("M", bound=nn.Module)
Tensors = Sequence[Tensor]
LEAVES = ("", ".weight", ".bias")


@dataclass(frozen=True)
class Rule:
    """Tensors there -> tensors here, and back; `forth` and `back` are each other's inverse."""

    there: tuple[str, ...]
    here: tuple[str, ...]
    forth: Callable[[Tensors], Tensors] = tuple
    back: Callable[[Tensors], Tensors] = tuple


def move(there: str, here: str, lead: int = 0, trail: int = 0) -> Rule:
    """The same values; there, tensors have `lead` axes of length 1 in front and (but for vectors) `trail` behind."""
    return Rule(
        (there,), (here,), lambda x: [_drop(x[0], lead, trail)], lambda x: [_add(x[0], lead, trail)]
    )


def transpose(there: str, here: str) -> Rule:
    """A matrix that multiplies from the left there and from the right here."""
    return Rule(
        (there,), (here,), lambda x: [x[0].mT.contiguous()], lambda x: [x[0].mT.contiguous()]
    )


def fuse(there: Sequence[str], here: str) -> Rule:
    """Equal Linears there are one here, its rows theirs in order."""
    return Rule(
        tuple(there), (here,), lambda x: [torch.cat(list(x))], lambda x: x[0].chunk(len(there))
    )


def split(there: str, here: Sequence[str]) -> Rule:
    """One Linear there is several equal ones here, its rows theirs in order."""
    return Rule(
        (there,), tuple(here), lambda x: x[0].chunk(len(here)), lambda x: [torch.cat(list(x))]
    )


def by_head(there: str, here: str, heads: int, parts: int = 3, trail: int = 0) -> Rule:
    """There the rows are grouped by head and each head has its q, k, v (ADM, Karlo); here all q, then all k, all v."""

    def forth(x: Tensors) -> Tensors:
        return [rearrange(_drop(x[0], 0, trail), "(h p d) ... -> (p h d) ...", h=heads, p=parts)]

    def back(x: Tensors) -> Tensors:
        return [_add(rearrange(x[0], "(p h d) ... -> (h p d) ...", h=heads, p=parts), 0, trail)]

    return Rule((there,), (here,), forth, back)


def under(there: str, here: str, rules: Iterable[Rule]) -> list[Rule]:
    """The rules of a part, for the whole: every name gets its side's prefix (with its dot; "" for none)."""
    return [
        Rule(
            tuple(there + n for n in rule.there),
            tuple(here + n for n in rule.here),
            rule.forth,
            rule.back,
        )
        for rule in rules
    ]


def to_here(
    state: Mapping[str, Tensor],
    rules: Iterable[Rule],
    shapes: Mapping[str, torch.Size],
    source: str | Path,
    ignored: Sequence[str] = (),
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> dict[str, Tensor]:
    """A foreign state under our names. ValueError unless every tensor finds a place and every place a tensor.

    shapes: of all tensors that are wanted here. ignored: patterns of names there that hold nothing learned
    ("*.position_ids"). dtypes: what to cast to, by names here. Tensors are taken, and cast, rule by rule, so that a
    state that reads them from a file (`weights.TensorFile`) is never in memory twice. The error names what is missing,
    unexpected or of another shape, as it is called there.
    """
    left, out = set(state), {}
    missing, misshaped = [], []
    for rule in rules:
        for leaf in LEAVES:
            places = [name + leaf for name in rule.here]
            if places[0] not in shapes:
                continue
            names = [name + leaf for name in rule.there]
            if absent := [name for name in names if name not in left]:
                missing += absent
                out |= dict.fromkeys(places)
                continue
            left.difference_update(names)
            given = [state[name] for name in names]
            try:
                made = rule.forth(given)
            except (RuntimeError, ValueError):  # rows that don't divide
                made = given
            fits = [tuple(tensor.shape) for tensor in made] == [
                tuple(shapes[place]) for place in places
            ]
            if not fits:
                wanted = rule.back([torch.empty(shapes[place], device="meta") for place in places])
                pairs = zip(names, given, wanted, strict=True)
                wrong = [
                    (n, tuple(x.shape), tuple(w.shape)) for n, x, w in pairs if x.shape != w.shape
                ]
                misshaped += [
                    f"{name} is {shape}, expected {expected}" for name, shape, expected in wrong
                ]
            if dtypes is not None:
                made = [
                    tensor.to(dtypes[place]) for place, tensor in zip(places, made, strict=False)
                ]
            out |= zip(places, made, strict=False)
    unexpected = [
        name
        for name in state
        if name in left and not any(fnmatchcase(name, pattern) for pattern in ignored)
    ]
    if missing or unexpected or misshaped:
        raise fit_error(source, missing, unexpected, misshaped)
    assert not (nowhere := [name for name in shapes if name not in out]), f"no rule gives {nowhere}"
    return out


def build(
    network: Callable[[Any], M],
    config: Any,
    state: Mapping[str, Tensor],
    rules: Iterable[Rule],
    source: str | Path,
    dtype: torch.dtype = torch.float32,
    ignored: Sequence[str] = (),
) -> M:
    """The network with a foreign state, in eval mode: parameters in `dtype`, buffers (statistics) in float32."""
    with torch.device("meta"):
        module = network(config)
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    own = module.state_dict()
    shapes, dtypes = (
        {name: getattr(tensor, kind) for name, tensor in own.items()} for kind in ("shape", "dtype")
    )
    module.load_state_dict(to_here(state, rules, shapes, source, ignored, dtypes), assign=True)
    return module.eval()


def to_there(state: Mapping[str, Tensor], rules: Iterable[Rule]) -> dict[str, Tensor]:
    """Our state under the foreign names: the inverse of `to_here`."""
    left, out = dict(state), {}
    for rule in rules:
        for leaf in LEAVES:
            if rule.here[0] + leaf in left:
                given = [left.pop(name + leaf) for name in rule.here]
                out |= zip([name + leaf for name in rule.there], rule.back(given), strict=True)
    assert not left, f"no rule takes {sorted(left)}"
    return out


def _drop(x: Tensor, lead: int, trail: int) -> Tensor:
    trail = min(trail, max(x.ndim - 1, 0))
    shape = x.shape[lead : x.ndim - trail]
    return x.reshape(shape) if shape.numel() == x.numel() else x


def _add(x: Tensor, lead: int, trail: int) -> Tensor:
    return x.reshape((1,) * lead + tuple(x.shape) + (1,) * (trail if x.ndim > 1 else 0))
