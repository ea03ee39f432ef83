"""8-bit weights: quantisation error, and which layers are not quantised."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from unclip.models.cpu.int8 import (
    MAX_INT8_ROWS,
    MIN_SIZE,
    Int8Conv2d,
    Int8Layer,
    Int8Linear,
    is_quantized,
    quantize,
)
from unclip.models.unet import UpConv2d
from unclip.pipelines.request import generators_from


def layers() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "linear": nn.Linear(96, 64),
            "plain": nn.Linear(64, 64, bias=False),
            "conv": nn.Conv2d(16, 32, 3, padding=1, stride=2),
            "up": UpConv2d(32, 32),
            "small": nn.Linear(8, MIN_SIZE // 8 - 1),
        }
    )


INPUTS = {
    "linear": (2, 5, 96),
    "plain": (3, 64),
    "conv": (2, 16, 8, 8),
    "up": (2, 32, 4, 4),
    "small": (2, 8),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(INPUTS))
@torch.no_grad()
def test_weight_error_is_at_most_half_a_step(name, dtype):
    exact = layers().to(dtype)
    quantized = copy.deepcopy(exact)
    quantize(quantized)
    if name == "small":
        assert type(quantized[name]) is nn.Linear
        return
    layer, weight = quantized[name], exact[name].weight.float()
    assert isinstance(layer, Int8Layer)
    assert layer.int8.dtype == torch.int8
    assert layer.int8.shape == weight.shape
    assert layer.dequantize(dtype).dtype == dtype
    step = weight.flatten(1).abs().amax(1) / 127
    error = (layer.dequantize(torch.float32) - weight).flatten(1).abs().amax(1)
    limit = 0.51 * step * (1 + 2**-8) + 127 * step * 2**-8  # the scale itself has 8 bits
    assert (error <= limit).all()
    assert error.max() > 0
    x = torch.randn(INPUTS[name]).to(dtype)
    output, expected = layer(x), exact[name](x)
    assert output.dtype == dtype and output.shape == expected.shape
    assert F.cosine_similarity(output.float().flatten(), expected.float().flatten(), dim=0) > 0.999


@torch.no_grad()
def test_few_rows_use_the_integer_kernel():
    linear = layers()["linear"]
    quantized = Int8Linear(linear)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.03)):
        network = copy.deepcopy(quantized).to(dtype)
        x = torch.randn(MAX_INT8_ROWS + 1, 96).to(dtype)
        few = torch.cat([network(x[:MAX_INT8_ROWS]), network(x[MAX_INT8_ROWS:])])
        torch.testing.assert_close(few, network(x), rtol=tolerance, atol=tolerance)


def test_images_stay_close(tiny_pipe):
    pipe = copy.deepcopy(tiny_pipe)
    assert pipe.quantize("int8") is pipe
    assert all(is_quantized(network) for network in pipe.networks().values())
    metadata = [one("a", seed=0, progress=False).metadata[0] for one in (pipe, tiny_pipe)]
    assert metadata[0]["quantized"] == "int8" and "quantized" not in metadata[1]
    assert not is_quantized(pipe.clip) and torch.equal(pipe.prior.emb_std, tiny_pipe.prior.emb_std)

    def generate(pipe):
        text, generators = pipe.encode_text("a red apple"), generators_from([0])
        emb = pipe.sample_prior(text, generators=generators)
        return emb, pipe.upsample(
            pipe.decode(emb, text, generators=generators), generators=generators
        )

    (emb, image), (exact_emb, exact_image) = generate(pipe), generate(tiny_pipe)
    assert 1 - 1e-2 < F.cosine_similarity(emb, exact_emb).item() < 1
    assert 0 < (image - exact_image).abs().mean() < 0.2


def test_weights_take_a_quarter_of_the_memory_of_float32():
    exact = nn.Sequential(nn.Linear(256, 256, bias=False), nn.Conv2d(64, 64, 3, bias=False))
    before = sum(tensor.nbytes for tensor in exact.state_dict().values())
    quantize(exact)
    assert isinstance(exact[1], Int8Conv2d)
    assert sum(tensor.nbytes for tensor in exact.state_dict().values()) < 0.27 * before


def test_quantized_models_cannot_be_saved(tiny_pipe, tmp_path):
    pipe = copy.deepcopy(tiny_pipe).quantize()
    with pytest.raises(ValueError, match=r"rounded to 8 bits; save .* before quantize\(\)"):
        pipe.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    with pytest.raises(ValueError, match="unknown kind of weights 'int4'; expected 'int8'"):
        pipe.quantize("int4")
    images = [pipe("a red apple", seed=0, progress=False).images[0].tobytes()]
    pipe.quantize().offload()  # quantising again has no effect
    images.append(pipe("a red apple", seed=0, progress=False).images[0].tobytes())
    assert images[0] == images[1]


def test_a_prior_that_is_added_later_is_quantized(tiny_pipe):
    pipe, prior = copy.deepcopy(tiny_pipe).quantize(), copy.deepcopy(tiny_pipe.prior)
    before = pipe("a", seed=0, progress=False)
    pipe.prior = prior
    assert is_quantized(prior)
    assert torch.equal(pipe("a", seed=0, progress=False).image_emb, before.image_emb)


def test_sizes_in_the_repr_do_not_change(tiny_pipe):
    assert repr(copy.deepcopy(tiny_pipe).quantize()) == repr(tiny_pipe)


def test_codec_of_dalle_is_not_quantized(tiny_dalle):
    pipe = copy.deepcopy(tiny_dalle)
    pipe.codec.more, pipe.dalle.more = nn.Linear(64, 64), nn.Linear(64, 64)
    pipe.quantize()
    assert is_quantized(pipe.dalle) and not is_quantized(pipe.codec)
    assert pipe("a", seed=0, progress=False).metadata[0]["quantized"] == "int8"
