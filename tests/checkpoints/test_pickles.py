"""The pickle reader: contents of torch.save files are read, and nothing in them is executed."""

from __future__ import annotations

import argparse
import functools
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bombs import BOMBS
from torch import Tensor, nn

from unclip.checkpoints.pickles import Stub, read_checkpoint
from unclip.checkpoints.states import module_state, read_state
from unclip.weights import TensorFile, write_safetensors

DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.uint8,
    torch.bool,
]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4), tail=nn.Sequential(nn.PReLU(4))
        )
    )


def content() -> dict[str, Any]:
    base = torch.arange(24.0)
    tensors = {str(dtype): torch.arange(6).to(dtype) for dtype in DTYPES}
    views = {
        "transposed": base.view(4, 6).T,
        "part": base[5:9],
        "scalar": torch.tensor(3.0),
        "none": torch.empty(0, 3),
    }
    plain = {
        "step": 7,
        "lr": 1e-4,
        "names": ["a", ("b", None)],
        "bytes": b"\x00\xff",
        "set": {1, 2},
    }
    return {"state_dict": {**tensors, **views, "parameter": nn.Parameter(torch.ones(2))}, **plain}


def assert_same(ours: Any, theirs: Any) -> None:
    if isinstance(theirs, Tensor):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    elif isinstance(theirs, dict):
        assert isinstance(ours, dict) and list(ours) == list(theirs)
        for key in theirs:
            assert_same(ours[key], theirs[key])
    else:
        assert type(ours) is type(theirs) and ours == theirs


def save_plain(value: Any, file: Path) -> None:
    file.write_bytes(pickle.dumps(value))


WRITERS = {
    "zip": torch.save,
    "legacy": functools.partial(torch.save, _use_new_zipfile_serialization=False),
    "protocol 4": functools.partial(torch.save, pickle_protocol=4),
    "pickle": save_plain,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_tensors_and_plain_values_are_read_unchanged(kind: str, tmp_path: Path) -> None:
    WRITERS[kind](content(), tmp_path / "file")
    assert_same(read_checkpoint(tmp_path / "file"), content())


@pytest.mark.parametrize("kind", WRITERS)
def test_a_state_dict_equals_the_saved_one(kind: str, tmp_path: Path) -> None:
    WRITERS[kind](network().state_dict(), tmp_path / "file.pt")
    assert_same(read_checkpoint(tmp_path / "file.pt"), dict(network().state_dict()))


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_shared_storages_stay_shared(kind: str, tmp_path: Path) -> None:
    x = torch.zeros(4)
    WRITERS[kind]([x, x[2:]], tmp_path / "file")
    whole, part = read_checkpoint(tmp_path / "file")
    whole.fill_(5)
    assert part.tolist() == [5, 5]


def test_a_zip_file_is_mapped_copy_on_write(tmp_path: Path) -> None:
    file = tmp_path / "file.ckpt"
    torch.save({"x": torch.ones(1000)}, file)
    before = file.read_bytes()
    x, same = (read_checkpoint(file)["x"] for _ in range(2))
    x.fill_(2)
    assert same.sum() == 1000 and file.read_bytes() == before


@pytest.mark.parametrize("compressed", ["data.pkl", "data/0"])
def test_a_compressed_zip_file_is_refused(compressed: str, tmp_path: Path) -> None:
    """PyTorch writes none, and an entry can expand to a thousand times its size."""
    torch.save({"x": torch.zeros(10_000)}, tmp_path / "stored")
    with (
        zipfile.ZipFile(tmp_path / "stored") as a,
        zipfile.ZipFile(tmp_path / "small", "w") as b,
    ):
        for name in a.namelist():
            kind = zipfile.ZIP_DEFLATED if name.endswith(compressed) else zipfile.ZIP_STORED
            b.writestr(name, a.read(name), kind)
    with pytest.raises(ValueError, match=f"{compressed} is compressed"):
        read_checkpoint(tmp_path / "small")


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_a_pickled_module_gives_its_state_dict(kind: str, tmp_path: Path) -> None:
    WRITERS[kind](network(), tmp_path / "encoder.pkl")
    module = read_checkpoint(tmp_path / "encoder.pkl")
    assert isinstance(module, Stub) and module.type_name == "torch.nn.modules.container.Sequential"
    assert_same(module_state(module), dict(network().state_dict()))


def test_non_persistent_buffers_are_left_out(tmp_path: Path) -> None:
    module = nn.Linear(2, 2)
    module.register_buffer("ramp", torch.arange(2.0), persistent=False)
    torch.save(module, tmp_path / "file")
    assert set(module_state(read_checkpoint(tmp_path / "file"))) == {"weight", "bias"}


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning"
)  # torch.jit is deprecated, its files remain
def test_a_torchscript_archive_gives_its_state_dict(tmp_path: Path) -> None:
    torch.jit.trace(network().eval(), torch.zeros(1, 3, 4, 4)).save(str(tmp_path / "ViT.pt"))
    module = read_checkpoint(tmp_path / "ViT.pt")
    assert module.type_name.startswith("__torch__.")
    assert_same(
        dict(sorted(module_state(module).items())), dict(sorted(network().state_dict().items()))
    )


def test_objects_of_other_classes_keep_arguments_and_state(tmp_path: Path) -> None:
    torch.save({"path": Path("/a/b"), "options": argparse.Namespace(lr=1.0)}, tmp_path / "file")
    found = read_checkpoint(tmp_path / "file")
    assert found["path"].args == ("/", "a", "b")
    assert found["options"].type_name == "argparse.Namespace" and found["options"].state == {
        "lr": 1.0
    }


class Call:
    """Pickled as a call of any function."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


class Named:
    """Pickled as the global "module.name", which need not exist."""

    def __init__(self, module: str, name: str) -> None:
        self.code = f"c{module}\n{name}\n".encode()


def by_hand(*parts: bytes | Named) -> bytes:
    return (
        b"\x80\x02"
        + b"".join(part.code if isinstance(part, Named) else part for part in parts)
        + b"."
    )


MARK, TUPLE, REDUCE, BUILD, EMPTY = b"(", b"t", b"R", b"b", b")"


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """A file that exists if something was executed."""
    return tmp_path / "canary"


def text(value: object) -> bytes:
    return b"X" + len(str(value)).to_bytes(4, "little") + str(value).encode()


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("nested", [False, True])
def test_calls_are_not_executed(kind: str, nested: bool, tmp_path: Path, canary: Path) -> None:
    call = Call(os.system, f"touch {canary}")
    WRITERS[kind]({"state_dict": [call]} if nested else call, tmp_path / "file")
    found = read_checkpoint(tmp_path / "file")
    found = found["state_dict"][0] if nested else found
    assert isinstance(found, Stub) and found.args == (f"touch {canary}",)
    assert not canary.exists()


@pytest.mark.parametrize(
    "function",
    [
        Named("builtins", "eval"),
        Named("builtins", "exec"),
        Named("__builtin__", "eval"),
        Named("torch._utils", "os.system"),
        Named("torch", "os.system"),
        Named("torch._utils", "_rebuild_tensor_v2.__globals__"),
        Named("torch.storage", "_load_from_bytes.__class__"),
        Named("unclip.checkpoints.pickles", "os.system"),
        Named("posix", "system"),
        Named("subprocess", "getoutput"),
    ],
    ids=lambda f: f.code.decode().strip(),
)
def test_names_are_never_imported(function: Named, tmp_path: Path, canary: Path) -> None:
    python = (
        f"open({str(canary)!r}, 'w').close()"
        if b"eval" in function.code or b"exec" in function.code
        else None
    )
    argument = text(python or f"touch {canary}")
    (tmp_path / "file").write_bytes(by_hand(function, MARK, argument, TUPLE, REDUCE))
    assert isinstance(read_checkpoint(tmp_path / "file"), Stub)
    assert not canary.exists()


def test_a_stub_cannot_be_called(tmp_path: Path, canary: Path) -> None:
    getter = Named("builtins", "getattr"), MARK, Named("os", "path"), text("system"), TUPLE, REDUCE
    (tmp_path / "file").write_bytes(by_hand(*getter, MARK, text(f"touch {canary}"), TUPLE, REDUCE))
    with pytest.raises(ValueError, match="is truncated or not a PyTorch checkpoint"):
        read_checkpoint(tmp_path / "file")
    assert not canary.exists()


def test_an_embedded_pickle_is_not_executed(tmp_path: Path, canary: Path) -> None:
    inner = pickle.dumps(Call(os.system, f"touch {canary}"))
    outer = (
        Named("torch.storage", "_load_from_bytes"),
        MARK,
        b"B" + len(inner).to_bytes(4, "little") + inner,
    )
    (tmp_path / "file").write_bytes(b"\x80\x03" + by_hand(*outer, TUPLE, REDUCE)[2:])
    assert isinstance(read_checkpoint(tmp_path / "file"), Stub)
    assert not canary.exists()


@pytest.mark.parametrize("name", ["_rebuild_tensor_v2", "_rebuild_parameter"])
def test_a_file_cannot_modify_the_allowed_functions(name: str, tmp_path: Path) -> None:
    changes = b"}" + text("__defaults__") + EMPTY + b"s"
    (tmp_path / "file").write_bytes(
        by_hand(Named("torch._utils", name), b"N", changes, b"\x86", BUILD)
    )
    with pytest.raises(ValueError, match="it modifies a function"):
        read_checkpoint(tmp_path / "file")


def test_a_tensor_cannot_reach_beyond_its_storage(tmp_path: Path) -> None:
    class Beyond:
        def __reduce__(self) -> tuple[Any, ...]:
            return torch._utils._rebuild_tensor_v2, (
                torch.zeros(4)._typed_storage(),
                2,
                (4,),
                (1,),
                False,
                OrderedDict(),
            )

    torch.save(Beyond(), tmp_path / "file")
    with pytest.raises(ValueError, match="out of bounds"):
        read_checkpoint(tmp_path / "file")


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_an_error_of_one_line(kind: str, kept: float, tmp_path: Path) -> None:
    file = tmp_path / "cut.ckpt"
    WRITERS[kind]({"x": torch.randn(500), "y": torch.randn(7)}, file)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(
        ValueError, match=r"cut\.ckpt is truncated or not a PyTorch checkpoint \(.+\); download"
    ) as error:
        read_checkpoint(file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "data",
    [b"<html>", b"PK\x03\x04", b"\x00" * 99],
)
def test_a_foreign_file_is_an_error_of_one_line(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "file.pt").write_bytes(data)
    with pytest.raises(ValueError, match=r"file\.pt is truncated or not a PyTorch checkpoint"):
        read_checkpoint(tmp_path / "file.pt")
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*absent"):
        read_checkpoint(tmp_path / "absent.pt")


def test_a_zip_file_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("cat.png", b"")
    with pytest.raises(ValueError, match=r"a zip file without data\.pkl"):
        read_checkpoint(tmp_path / "images.zip")


def test_limits_leave_room_for_the_optimizer_of_a_large_network(tmp_path: Path) -> None:
    names = [f"unet.blocks.{i}.attention.weight" for i in range(3000)]
    state = {name: torch.zeros(800) for name in names}
    kinds = ("exp_avg", "exp_avg_sq")
    moments = {i: {"step": i, **{k: torch.zeros(800) for k in kinds}} for i in range(3000)}
    optimizer = {"state": moments, "param_groups": [{"lr": 1e-4, "params": list(range(3000))}]}
    torch.save({"state_dict": state, "optimizer": optimizer}, tmp_path / "large.ckpt")
    assert list(read_state(tmp_path / "large.ckpt")) == names


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_refused_within_a_second_and_80_megabytes(kind: str, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")  # not on Windows
    (tmp_path / "bomb.pt").write_bytes(BOMBS[kind])
    usage = resource.getrusage(resource.RUSAGE_SELF)
    with pytest.raises(ValueError) as error:
        read_state(tmp_path / "bomb.pt")
    used = resource.getrusage(resource.RUSAGE_SELF)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
    assert used.ru_utime + used.ru_stime - usage.ru_utime - usage.ru_stime < 1
    assert used.ru_maxrss - usage.ru_maxrss < 80 * 1024  # peaks; in kB on Linux


@pytest.mark.parametrize(
    "wrap", [lambda module: module, nn.Module.state_dict, lambda m: {"state_dict": m.state_dict()}]
)
def test_a_wrapped_state_dict_is_found(wrap: Callable[[nn.Module], Any], tmp_path: Path) -> None:
    torch.save(wrap(network()), tmp_path / "file.ckpt")
    assert_same(read_state(tmp_path / "file.ckpt"), dict(network().state_dict()))


@pytest.mark.parametrize("wrapper", ["module.{}", "_orig_mod.{}", "module._orig_mod.{}"])
def test_names_lose_the_prefixes_of_wrappers(wrapper: str, tmp_path: Path) -> None:
    """Prefixes of DistributedDataParallel and torch.compile, in pickles and in safetensors."""
    state = dict(network().state_dict())
    wrapped = {wrapper.format(name): x.contiguous() for name, x in state.items()}
    torch.save({"state_dict": wrapped}, tmp_path / "file.ckpt")
    assert_same(read_state(tmp_path / "file.ckpt"), state)
    write_safetensors(wrapped, tmp_path / "file.safetensors")
    file = TensorFile(tmp_path / "file.safetensors")
    assert_same({name: file[name] for name in state}, state)
    # A submodule may be compiled alone; "module." is a wrapper only if it is on every name.
    inner = {"unet._orig_mod.a": "unet.a", "module.b": "module.b"}
    torch.save({name: torch.zeros(1) for name in inner}, tmp_path / "file.ckpt")
    assert list(read_state(tmp_path / "file.ckpt")) == list(inner.values())


@pytest.mark.parametrize("content", [{"epoch": 1, "loss": 0.5}, [1, 2], {}, {"state_dict": [1]}])
def test_a_checkpoint_without_a_state_dict_is_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "file.ckpt")
    with pytest.raises(
        ValueError, match=r"file\.ckpt holds a (dict|list).*; expected a state dict"
    ):
        read_state(tmp_path / "file.ckpt")


def test_only_a_module_has_a_state_dict(tmp_path: Path) -> None:
    torch.save({"a": 1}, tmp_path / "file")
    with pytest.raises(ValueError, match="the checkpoint is a dict of a; expected a module"):
        module_state(read_checkpoint(tmp_path / "file"))
