"""`unclip.compile`: the same answers as before, from weights that are laid out anew or through torch.compile."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from conftest import scrambled, tiny_prior
from safetensors.torch import load_file
from torch import nn

import unclip
from unclip.models.cpu.packing import (
    PackedConv2d,
    PackedLayer,
    PackedLinear,
    PackedUpConv2d,
    can_pack,
    pack,
)
from unclip.models.unet import UpConv2d

packs = pytest.mark.skipif(not can_pack(torch.float32), reason="this PyTorch has no oneDNN")
packs_bf16 = pytest.mark.skipif(
    not can_pack(torch.bfloat16), reason="no oneDNN, or a CPU that it has no bf16 for"
)


def pixels(pipe, **changes) -> np.ndarray:
    drawn = pipe(["a red apple", "a blue fish"], num_images=2, seed=3, progress=False, **changes)
    return np.stack([np.asarray(image, dtype=int) for image in drawn.images])


def layers() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "linear": nn.Linear(32, 48),
            "conv": nn.Conv2d(16, 32, 3, padding=1),
            "strided": nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
            "up": UpConv2d(16, 24),
        }
    ).to(memory_format=torch.channels_last)


def picture(name: str, dtype: torch.dtype) -> torch.Tensor:
    if name == "linear":
        return torch.randn(2, 5, 32).to(dtype)
    return torch.randn(2, 16, 8, 8).to(dtype).to(memory_format=torch.channels_last)


@packs
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=packs_bf16)])
@pytest.mark.parametrize("name", ["linear", "conv", "strided", "up"])
@torch.no_grad()
def test_a_layer_answers_as_before(name, dtype):
    exact = layers().to(dtype)
    packed = copy.deepcopy(exact)
    pack(packed)
    assert isinstance(packed[name], PackedLayer) == (name != "linear" or dtype == torch.bfloat16)
    x = picture(name, dtype)
    answer, expected = packed[name](x), exact[name](x)
    if name != "up":
        assert torch.equal(answer, expected)
        return
    wide = copy.deepcopy(exact[name]).float()(x.float())
    error, usual = ((y.float() - wide).abs().max() for y in (answer, expected))
    assert error <= (
        1e-5 if dtype == torch.float32 else 4 * usual
    )  # sums of weights are rounded, as weights were


@packs_bf16
@torch.no_grad()
def test_packed_layers_hold_and_give_back_their_weights():
    exact = layers().bfloat16()
    packed = copy.deepcopy(exact)
    pack(packed)
    assert [type(layer) for layer in packed.values()] == [
        PackedLinear,
        PackedConv2d,
        PackedConv2d,
        PackedUpConv2d,
    ]
    state = packed.state_dict()
    assert state.keys() == exact.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in exact.state_dict().items())
    torch.manual_seed(1)
    other = {name: torch.randn_like(tensor) for name, tensor in state.items()}
    for again in (packed, copy.deepcopy(packed)):
        again.load_state_dict(other, strict=True)
        exact.load_state_dict(other)
        x = picture("conv", torch.bfloat16)
        assert torch.equal(again["conv"](x), exact["conv"](x))
    with pytest.raises(
        ValueError, match="compiled for the CPU and cannot be moved or cast"
    ):
        packed.to(torch.float32)


@packs
def test_on_the_cpu_pictures_and_files_stay_the_same(tiny_pipe, tmp_path):
    pipe = copy.deepcopy(tiny_pipe)
    assert unclip.compile(pipe) is pipe and pipe.compiled
    assert any(isinstance(layer, PackedLayer) for layer in pipe.decoder.modules())
    assert np.abs(pixels(pipe) - pixels(tiny_pipe)).max() <= 1
    assert np.abs(pixels(copy.deepcopy(pipe)) - pixels(pipe)).max() == 0
    for one, name in ((pipe, "compiled"), (tiny_pipe, "plain")):
        one.save_pretrained(tmp_path / name)
    for network in pipe.networks():
        saved, exact = (
            load_file(tmp_path / name / network / "model.safetensors")
            for name in ("compiled", "plain")
        )
        assert saved.keys() == exact.keys() and all(
            torch.equal(saved[name], exact[name]) for name in exact
        )


@packs_bf16
def test_another_prior_is_compiled_too(tiny_pipe):
    pipe = copy.deepcopy(tiny_pipe).to(dtype=torch.bfloat16)
    torch.manual_seed(6)
    plain, pipe.prior = copy.deepcopy(pipe), scrambled(tiny_prior())
    plain.prior = copy.deepcopy(pipe.prior)
    unclip.compile(plain)
    compiled = unclip.compile(copy.deepcopy(pipe))
    compiled.prior = copy.deepcopy(pipe.prior)
    assert isinstance(compiled.prior.head, PackedLinear)
    emb = [p("a red apple", seed=0, progress=False).image_emb for p in (plain, compiled, pipe)]
    assert torch.equal(emb[0], emb[1]) and torch.equal(emb[0], emb[2])


def test_where_the_cpu_knows_no_bf16_nothing_is_changed(tiny_pipe, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    pipe = unclip.compile(copy.deepcopy(tiny_pipe).to(dtype=torch.bfloat16))
    assert not pipe.compiled and not any(
        isinstance(layer, PackedLayer) for layer in pipe.decoder.modules()
    )


@packs_bf16
def test_dalle_draws_the_same(tiny_dalle):
    plain = copy.deepcopy(tiny_dalle).to(dtype=torch.bfloat16)
    pipe = unclip.compile(copy.deepcopy(plain))
    assert any(isinstance(layer, PackedLayer) for layer in pipe.dalle.modules())
    assert np.abs(pixels(pipe) - pixels(plain)).max() == 0


def test_through_torch_compile_the_pictures_are_the_same(tiny_pipe):
    """The backend that only traces: each step in one graph, and with texts of one length, as the others are given."""
    pipe = unclip.compile(copy.deepcopy(tiny_pipe), backend="eager", fullgraph=True)
    assert pipe.compiled and pipe.static_shapes
    lengths, condition = set(), pipe.prior.condition
    pipe.prior.condition = lambda text: lengths.add(text.mask.shape[1]) or condition(text)
    pictures = [p("a red apple", seed=0, progress=False).images[0] for p in (pipe, tiny_pipe)]
    assert np.abs(np.subtract(*(np.asarray(picture, dtype=int) for picture in pictures))).max() <= 2
    assert 24 in lengths  # the whole context, pads and all


def test_what_a_compiled_model_cannot_do_is_told(tiny_pipe):
    pipe = copy.deepcopy(tiny_pipe)
    pipe._prepare = lambda network: None
    for call, message in {
        lambda: pipe.to(
            dtype=torch.bfloat16
        ): r"the networks are compiled; call to\(\) before unclip.compile\(\)",
        lambda: (
            pipe.quantize()
        ): r"the networks are compiled; call quantize\(\) before unclip.compile\(\)",
        lambda: (
            pipe.offload()
        ): "the networks are compiled",
        lambda: unclip.compile(
            pipe.decoder
        ): "compile got a Decoder; expected a pipeline",
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
