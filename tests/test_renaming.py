"""Rename tables: what goes in comes out again, and what does not fit is named."""

from __future__ import annotations

import pytest
import torch

from unclip.checkpoints.renaming import Rule, by_head, fuse, move, split, to_here, to_there, under

RULES = [
    move("embed", "positions", lead=1),
    move("conv", "linear", trail=1),
    fuse(("q", "k"), "qk"),
    split("both", ("left", "right")),
    by_head("qkv", "attention.qkv", heads=2),
    *under("old.", "new.", [move("norm", "norm")]),
]


def foreign() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "embed": (1, 3, 4),
        "conv.weight": (5, 4, 1),
        "conv.bias": (5,),
        "q.weight": (4, 4),
        "k.weight": (4, 4),
        "both.weight": (6, 2),
        "qkv.weight": (12, 4),
        "qkv.bias": (12,),
        "old.norm.weight": (4,),
        "old.norm.bias": (4,),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def shapes_here() -> dict[str, torch.Size]:
    shapes = {
        "positions": (3, 4),
        "linear.weight": (5, 4),
        "linear.bias": (5,),
        "qk.weight": (8, 4),
        "left.weight": (3, 2),
        "right.weight": (3, 2),
        "attention.qkv.weight": (12, 4),
        "attention.qkv.bias": (12,),
        "new.norm.weight": (4,),
        "new.norm.bias": (4,),
    }
    return {name: torch.Size(shape) for name, shape in shapes.items()}


def test_round_trip_is_the_identity() -> None:
    state = foreign()
    here = to_here(state, RULES, shapes_here(), "x.ckpt")
    assert {name: tensor.shape for name, tensor in here.items()} == shapes_here()
    back = to_there(here, RULES)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_rows_by_head_are_sorted_by_part() -> None:
    rows = torch.arange(12).reshape(12, 1).expand(12, 4)  # head 0: q 0 1, k 2 3, v 4 5; head 1: q 6 7, ...
    here = to_here({**foreign(), "qkv.weight": rows}, RULES, shapes_here(), "x.ckpt")
    assert here["attention.qkv.weight"][:, 0].tolist() == [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]


def test_fused_and_split_rows_keep_their_order() -> None:
    state = foreign()
    here = to_here(state, RULES, shapes_here(), "x.ckpt")
    assert torch.equal(here["qk.weight"], torch.cat([state["q.weight"], state["k.weight"]]))
    assert torch.equal(here["right.weight"], state["both.weight"][3:])


def test_every_fault_is_named_as_the_file_calls_it() -> None:
    state = foreign()
    del state["k.weight"], state["old.norm.bias"]
    state["extra"] = torch.zeros(1)
    state["conv.weight"] = torch.zeros(5, 3, 1)
    with pytest.raises(ValueError) as error:
        to_here(state, RULES, shapes_here(), "x.ckpt")
    text = str(error.value)
    assert text.startswith("x.ckpt does not fit: missing: k.weight, old.norm.bias; unexpected: ")
    assert "extra" in text and "conv.weight is (5, 3, 1), expected (5, 4, 1)" in text
    assert "\n" not in text


@pytest.mark.parametrize(("name", "shape"), [("qkv.weight", (11, 4)), ("both.weight", (5, 2)), ("embed", (2, 3, 4))])
def test_rows_that_do_not_divide_are_a_shape_fault(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="of another shape: " + name):
        to_here({**foreign(), name: torch.zeros(shape)}, RULES, shapes_here(), "x.ckpt")


def test_what_is_ignored_is_named_by_a_pattern() -> None:
    state = {**foreign(), "text.position_ids": torch.arange(3)}
    here = to_here(state, RULES, shapes_here(), "x.ckpt", ignored=("*.position_ids",))
    assert here.keys() == shapes_here().keys()


def test_a_rule_that_is_forgotten_is_our_own_fault() -> None:
    with pytest.raises(AssertionError, match="no rule gives"):
        to_here({}, [], {"x": torch.Size([1])}, "x.ckpt")
    with pytest.raises(AssertionError, match="no rule takes"):
        to_there({"x": torch.zeros(1)}, [Rule(("a",), ("b",))])
