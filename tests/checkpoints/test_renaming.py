"""Rename tables: exact inverses, and errors that name what does not fit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from unclip.checkpoints.renaming import (
    Part,
    Rule,
    build,
    by_head,
    export_state,
    fuse,
    import_state,
    move,
    prefixed,
    transpose,
)

RULES = [
    move("embed", "positions", lead=1),
    move("conv", "linear", trail=1),
    fuse(("q", "k"), "qk"),
    by_head("qkv", "attention.qkv", heads=2),
    transpose("proj.weight", "proj"),
    *prefixed("old.", "new.", [move("norm", "norm")]),
]


def foreign() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "embed": (1, 3, 4),
        "conv.weight": (5, 4, 1),
        "conv.bias": (5,),
        "q.weight": (4, 4),
        "k.weight": (4, 4),
        "qkv.weight": (12, 4),
        "qkv.bias": (12,),
        "proj.weight": (3, 5),
        "old.norm.weight": (4,),
        "old.norm.bias": (4,),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def our_shapes() -> dict[str, torch.Size]:
    shapes = {
        "positions": (3, 4),
        "linear.weight": (5, 4),
        "linear.bias": (5,),
        "qk.weight": (8, 4),
        "attention.qkv.weight": (12, 4),
        "attention.qkv.bias": (12,),
        "proj": (5, 3),
        "new.norm.weight": (4,),
        "new.norm.bias": (4,),
    }
    return {name: torch.Size(shape) for name, shape in shapes.items()}


def test_export_inverts_import() -> None:
    state = foreign()
    ours = import_state(state, RULES, our_shapes(), "x.ckpt")
    assert {name: tensor.shape for name, tensor in ours.items()} == our_shapes()
    back = export_state(ours, RULES)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_rows_by_head_are_reordered_by_part() -> None:
    rows = (
        torch.arange(12).reshape(12, 1).expand(12, 4)
    )  # head 0: q 0 1, k 2 3, v 4 5; head 1: q 6 7, ...
    ours = import_state({**foreign(), "qkv.weight": rows}, RULES, our_shapes(), "x.ckpt")
    assert ours["attention.qkv.weight"][:, 0].tolist() == [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]


def test_fused_rows_keep_their_order() -> None:
    state = foreign()
    ours = import_state(state, RULES, our_shapes(), "x.ckpt")
    assert torch.equal(ours["qk.weight"], torch.cat([state["q.weight"], state["k.weight"]]))


def test_faults_are_listed_by_foreign_names() -> None:
    state = foreign()
    del state["k.weight"], state["old.norm.bias"]
    state["extra"] = torch.zeros(1)
    state["conv.weight"] = torch.zeros(5, 3, 1)
    with pytest.raises(ValueError) as error:
        import_state(state, RULES, our_shapes(), "x.ckpt")
    text = str(error.value)
    assert text.startswith("x.ckpt does not fit: missing: k.weight, old.norm.bias; unexpected: ")
    assert "extra" in text and "conv.weight is (5, 3, 1), expected (5, 4, 1)" in text
    assert "\n" not in text


@pytest.mark.parametrize(("name", "shape"), [("qkv.weight", (11, 4)), ("embed", (2, 3, 4))])
def test_rows_that_cannot_be_divided_are_misshaped(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="of another shape: " + name):
        import_state({**foreign(), name: torch.zeros(shape)}, RULES, our_shapes(), "x.ckpt")


def test_tensors_are_cast() -> None:
    state = foreign()
    dtypes = {
        name: torch.float64 if name == "qk.weight" else torch.bfloat16 for name in our_shapes()
    }
    ours = import_state(state, RULES, our_shapes(), "x.ckpt", dtypes=dtypes)
    assert {name: tensor.dtype for name, tensor in ours.items()} == dtypes
    assert torch.equal(ours["positions"], state["embed"][0].bfloat16())


def test_each_tensor_is_read_once() -> None:
    state, taken = foreign(), []

    class Reading(dict):
        def __getitem__(self, name: str) -> torch.Tensor:
            taken.append(name)
            return super().__getitem__(name)

    ours = import_state(Reading(state), RULES, our_shapes(), "x.ckpt")
    assert sorted(taken) == sorted(state) and ours.keys() == our_shapes().keys()


def test_ignored_names_are_patterns() -> None:
    state = {**foreign(), "text.position_ids": torch.arange(3)}
    ours = import_state(state, RULES, our_shapes(), "x.ckpt", ignored=("*.position_ids",))
    assert ours.keys() == our_shapes().keys()


def test_an_incomplete_table_is_an_assertion_error() -> None:
    with pytest.raises(AssertionError, match="no rule makes"):
        import_state({}, [], {"x": torch.Size([1])}, "x.ckpt")
    with pytest.raises(AssertionError, match="no rule takes"):
        export_state({"x": torch.zeros(1)}, [Rule(("a",), ("b",))])


def test_build_casts_parameters_and_keeps_buffers_in_float32() -> None:
    state = {"w": torch.randn(3, 2), "b": torch.randn(3), "mean": torch.ones(2).half()}

    class Scaled(nn.Linear):
        def __init__(self, size: int) -> None:
            super().__init__(size, 3)
            self.register_buffer("mean", torch.zeros(size))

    rules = [move("w", "weight"), move("b", "bias"), move("mean", "mean")]
    module = build(Scaled, 2, [Part(state, rules, "a.ckpt")], torch.bfloat16)
    assert not module.training and torch.equal(module.weight, state["w"].bfloat16())
    assert module.mean.dtype == torch.float32 and torch.equal(module.mean, torch.ones(2))
    with pytest.raises(ValueError, match=r"a\.ckpt does not fit: missing: b"):
        build(Scaled, 2, [Part({"w": state["w"], "mean": state["mean"]}, rules, "a.ckpt")])


def test_parts_that_cannot_be_joined_are_reported():
    parts = {"q.weight": torch.zeros(2, 3), "k.weight": torch.zeros(2, 4)}
    shapes, dtypes = {"qk.weight": torch.Size((4, 3))}, {"qk.weight": torch.float16}
    with pytest.raises(ValueError, match=r"k\.weight is \(2, 4\), expected \(2, 3\)$"):
        import_state(parts, [fuse(["q", "k"], "qk")], shapes, "a file", dtypes=dtypes)
