"""`unclip.compile`: the same outputs from packed weights, or through torch.compile."""

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

needs_packing = pytest.mark.skipif(not can_pack(torch.float32), reason="this PyTorch has no oneDNN")
needs_bf16_packing = pytest.mark.skipif(
    not can_pack(torch.bfloat16), reason="no oneDNN, or no bf16 on this CPU"
)


def generate(pipe, **changes) -> np.ndarray:
    result = pipe(["a red apple", "a blue fish"], num_images=2, seed=3, progress=False, **changes)
    return np.stack([np.asarray(image, dtype=int) for image in result.images])


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


def make_input(name: str, dtype: torch.dtype) -> torch.Tensor:
    if name == "linear":
        return torch.randn(2, 5, 32).to(dtype)
    return torch.randn(2, 16, 8, 8).to(dtype).to(memory_format=torch.channels_last)


@needs_packing
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bf16_packing)]
)
@pytest.mark.parametrize("name", ["linear", "conv", "strided", "up"])
@torch.no_grad()
def test_packed_layers_give_the_same_outputs(name, dtype):
    exact = layers().to(dtype)
    packed = copy.deepcopy(exact)
    pack(packed)
    assert isinstance(packed[name], PackedLayer) == (name != "linear" or dtype == torch.bfloat16)
    x = make_input(name, dtype)
    output, expected = packed[name](x), exact[name](x)
    if name != "up":
        assert torch.equal(output, expected)
        return
    exact_output = copy.deepcopy(exact[name]).float()(x.float())
    error, usual = ((y.float() - exact_output).abs().max() for y in (output, expected))
    # the sums of weights are rounded like the weights
    assert error <= (1e-5 if dtype == torch.float32 else 4 * usual)


@needs_bf16_packing
@torch.no_grad()
def test_packed_layers_have_the_original_state_dict():
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
        x = make_input("conv", torch.bfloat16)
        assert torch.equal(again["conv"](x), exact["conv"](x))
    with pytest.raises(ValueError, match="compiled for the CPU and cannot be moved or cast"):
        packed.to(torch.float32)


@needs_packing
def test_compiled_cpu_pipeline_gives_the_same_images_and_files(tiny_pipe, tmp_path):
    pipe = copy.deepcopy(tiny_pipe)
    assert unclip.compile(pipe) is pipe and pipe.compiled
    assert any(isinstance(layer, PackedLayer) for layer in pipe.decoder.modules())
    assert np.abs(generate(pipe) - generate(tiny_pipe)).max() <= 1
    assert np.abs(generate(copy.deepcopy(pipe)) - generate(pipe)).max() == 0
    for one, name in ((pipe, "compiled"), (tiny_pipe, "plain")):
        one.save_pretrained(tmp_path / name)
    for network in pipe.networks():
        saved, exact = (
            load_file(tmp_path / name / network / "model.safetensors")
            for name in ("compiled", "plain")
        )
        assert saved.keys() == exact.keys()
        assert all(torch.equal(saved[name], exact[name]) for name in exact)


@needs_bf16_packing
def test_a_prior_set_later_is_compiled(tiny_pipe):
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


def test_nothing_is_packed_without_bf16_support(tiny_pipe, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    pipe = unclip.compile(copy.deepcopy(tiny_pipe).to(dtype=torch.bfloat16))
    assert not pipe.compiled
    assert not any(isinstance(layer, PackedLayer) for layer in pipe.decoder.modules())


@needs_bf16_packing
def test_compiled_dalle_gives_the_same_images(tiny_dalle):
    plain = copy.deepcopy(tiny_dalle).to(dtype=torch.bfloat16)
    pipe = unclip.compile(copy.deepcopy(plain))
    assert any(isinstance(layer, PackedLayer) for layer in pipe.dalle.modules())
    assert np.abs(generate(pipe) - generate(plain)).max() == 0


def test_torch_compile_gives_the_same_images(tiny_pipe):
    """With a backend that only traces: each step is one graph, with texts of static length."""
    pipe = unclip.compile(copy.deepcopy(tiny_pipe), backend="eager", fullgraph=True)
    assert pipe.compiled and pipe.runtime.static_shapes
    lengths, condition = set(), pipe.prior.condition
    pipe.prior.condition = lambda text: lengths.add(text.mask.shape[1]) or condition(text)
    images = [p("a red apple", seed=0, progress=False).images[0] for p in (pipe, tiny_pipe)]
    assert np.abs(np.subtract(*(np.asarray(image, dtype=int) for image in images))).max() <= 2
    assert 24 in lengths  # padded to the context length


def test_compiled_models_cannot_be_changed(tiny_pipe):
    pipe = copy.deepcopy(tiny_pipe)
    pipe.runtime.prepare(lambda network: None)
    for call, message in {
        lambda: pipe.to(
            dtype=torch.bfloat16
        ): r"the networks are compiled; call to\(\) before unclip.compile\(\)",
        lambda: (
            pipe.quantize()
        ): r"the networks are compiled; call quantize\(\) before unclip.compile\(\)",
        lambda: pipe.offload(): "the networks are compiled",
        lambda: unclip.compile(pipe.decoder): "compile got a Decoder; expected a pipeline",
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
