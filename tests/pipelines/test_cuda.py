"""All pipelines and training steps on a CUDA device, which is emulated if there is none.

On the emulated device (see `emulated.py`), a tensor left on the CPU, a generator of another device
or mixed dtypes raise an error. Results must equal those of the CPU. Compilation, offloading and
kernels that exist on CUDA only are tested if there is a GPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    CONTEXT,
    EMB_DIM,
    TEXT_WIDTH,
    scrambled,
    tiny_clip,
    tiny_decoder,
    tiny_prior,
    tiny_unet,
    tiny_upsampler,
)
from emulated import HAS_GPU, DeviceMismatch, Generator, emulated_device, fake_networks
from PIL import Image
from scripts import ROOT
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorDeviceMismatchError

import unclip
from unclip.data.corruption import CorruptionConfig
from unclip.diffusion.inversion import InversionOptions
from unclip.diffusion.losses import LossConfig
from unclip.diffusion.schedules import Schedule
from unclip.models.codecs.discriminator import DiscriminatorConfig
from unclip.models.codecs.dvae import DVAE, DVAEConfig
from unclip.models.codecs.vqvae import VQVAE, ConvNetConfig, VQVAEConfig
from unclip.models.dalle.attention import Pattern, flex_attend, stream_mask
from unclip.models.dalle.transformer import DALLE, DALLEConfig
from unclip.models.unclip.ar_prior import ARPrior, ARPriorConfig
from unclip.models.unclip.decoder import Layout, LayoutConfig
from unclip.models.unclip.layout_prior import LayoutPrior, LayoutPriorConfig
from unclip.models.unclip.one_shot_prior import OneShotPrior, OneShotPriorConfig
from unclip.pipelines.unclip.latent import deterministic
from unclip.pipelines.unclip.pipeline import UnCLIPPipeline
from unclip.pipelines.unclip.probing import class_probabilities
from unclip.tokenizer import BPETokenizer
from unclip.training.codec import (
    AdversarialCodec,
    AdversarialConfig,
    Annealing,
    CodecLoss,
    PerceptualConfig,
)
from unclip.training.dalle import DALLELoss, DALLELossConfig
from unclip.training.ema import EMA
from unclip.training.inpainting import HoleConfig
from unclip.training.losses import (
    ARPriorLoss,
    CLIPLoss,
    ConditionDropout,
    DecoderLoss,
    LayoutLoss,
    LayoutPriorLoss,
    OneShotLossConfig,
    OneShotPriorLoss,
    PriorLoss,
    UpsamplerLoss,
)
from unclip.training.optim import OptimConfig, build_optimizer
from unclip.training.text_tower import TextTower, TextTowerConfig, TextTowerLoss
from unclip.types import GenerationResult, TextEncoding

LAYOUTS = LayoutPriorConfig(
    EMB_DIM, size=4, components=4, width=16, depth=1, steps=4, text_width=TEXT_WIDTH
)
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
MASK = Image.new("L", (16, 16))
MASK.paste(255, (4, 4, 12, 12))
CALL: dict[str, Any] = {"seed": 0, "progress": False}
INVERSION = InversionOptions(iterations=2)  # the second one combines two corrections
Operation = Callable[[Any], Any]
GPU = "cuda:0"
emulated_only = pytest.mark.skipif(HAS_GPU, reason="the device is not emulated")
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="there is no GPU")


def on_cuda(pipe: Any, operation: Operation, dtype: torch.dtype | None = None) -> list[np.ndarray]:
    """Apply an operation to a copy of the pipeline on the emulated device."""
    with emulated_device() as device:
        return arrays(operation(copy.deepcopy(pipe).to(device, dtype)))


def arrays(result: Any) -> list[np.ndarray]:
    """Return images and tensors of a result as arrays on the scale of 8-bit images."""
    if isinstance(result, GenerationResult):
        return [np.asarray(image, float) for image in result.images]
    if isinstance(result, torch.Tensor):
        return [result.detach().cpu().float().numpy() * 127.5]
    return [array for part in result for array in arrays(part)]


def assert_same(result: list[np.ndarray], expected: Any, tolerance: int = 1) -> None:
    for found, wanted in zip(result, arrays(expected), strict=True):
        assert np.abs(found - wanted).max() <= tolerance


# -- unCLIP


def stage_options(pipe: Any, **changes: Any) -> Any:
    options = replace(pipe.options, decoder=replace(pipe.options.decoder, **changes))
    return {"options": options, **CALL}


def few_steps(pipe: Any) -> dict[str, Any]:
    """Arguments of an inversion with 4 steps; the default has 50."""
    return {"options": deterministic(pipe.options, 4), "progress": False}


UNCLIP: dict[str, Operation] = {
    "prompts": lambda pipe: pipe(["a red apple", "a blue fish"], num_images=2, **CALL),
    "mixed prompts": lambda pipe: pipe({"a red apple": 1.0, "a fish": -0.5}, **CALL),
    "negative prompt": lambda pipe: pipe("a red apple", negative_prompt="a fish", **CALL),
    "ancestral": lambda pipe: pipe("a fish", **stage_options(pipe, sampler="ancestral")),
    "dpm++": lambda pipe: pipe("a fish", **stage_options(pipe, sampler="dpm++")),
    "unipc": lambda pipe: pipe("a fish", **stage_options(pipe, sampler="unipc")),
    "eta": lambda pipe: pipe("a fish", **stage_options(pipe, eta=0.5)),
    "cached features": lambda pipe: pipe("a fish", **stage_options(pipe, cache_interval=2)),
    "guidance variants": lambda pipe: pipe(
        "a fish",
        **stage_options(
            pipe, guidance_interval=(0.2, 0.9), guidance_rescale=0.5, dynamic_threshold=0.9
        ),
    ),
    "text embedding": lambda pipe: pipe(
        "a fish", options=replace(pipe.options, embedding="text"), **CALL
    ),
    "no embedding": lambda pipe: pipe(
        "a fish", options=replace(pipe.options, embedding="none"), **CALL
    ),
    "variations": lambda pipe: pipe.variations(PHOTO, num_images=2, **CALL),
    "variations of an embedding": lambda pipe: pipe.variations(
        image_emb=torch.linspace(-1, 1, EMB_DIM)[None], **CALL
    ),
    "reconstruct": lambda pipe: pipe.reconstruct(
        pipe.invert(PHOTO, inversion=INVERSION, **few_steps(pipe)), progress=False
    ),
    "random latent": lambda pipe: pipe.reconstruct(
        pipe.random_latent(
            pipe.encode_image(PHOTO), seed=0, options=deterministic(pipe.options, 4)
        ),
        progress=False,
    ),
    "imagine": lambda pipe: pipe.reconstruct(
        pipe.imagine("a red apple", seed=0, **few_steps(pipe)), progress=False
    ),
    "vary": lambda pipe: pipe.vary(PHOTO, eta=0.5, seed=0, inversion=INVERSION, **few_steps(pipe)),
    "interpolate": lambda pipe: pipe.interpolate(
        [PHOTO, PHOTO.rotate(90)], frames=3, seed=0, inversion=INVERSION, **few_steps(pipe)
    ),
    "interpolate prompts": lambda pipe: pipe.interpolate(
        prompts=["a red apple", "a fish"], frames=3, seed=0, **few_steps(pipe)
    ),
    "text diff": lambda pipe: pipe.text_diff(
        *(PHOTO, "a red apple", "a blue fish", 0.3),
        seed=0,
        inversion=INVERSION,
        **few_steps(pipe),
    ),
    "inpaint": lambda pipe: pipe.inpaint(PHOTO, MASK, "a red apple", **CALL),
    "outpaint": lambda pipe: pipe.outpaint(PHOTO, "a red apple", left=4, right=4, **CALL),
    "image to image": lambda pipe: pipe.image_to_image(PHOTO, "a red apple", **CALL),
    "stages": lambda pipe: stages(pipe, torch.Generator()),
    "classes": lambda pipe: class_probabilities(pipe, pipe.encode_image(PHOTO), ["red", "blue"]),
}


def stages(pipe: Any, generator: torch.Generator) -> torch.Tensor:
    generators = [generator.manual_seed(0)]
    emb = pipe.sample_prior(pipe.encode_text("a fish"), generators=generators)
    return pipe.upsample(pipe.decode(emb, generators=generators), generators=generators)


@pytest.mark.parametrize("operation", UNCLIP.values(), ids=UNCLIP)
def test_unclip(operation, invertible_pipe):
    assert_same(on_cuda(invertible_pipe, operation), operation(invertible_pipe))


@emulated_only
def test_generators_of_the_device(invertible_pipe):
    result = on_cuda(invertible_pipe, lambda pipe: stages(pipe, Generator()))
    assert_same(result, stages(invertible_pipe, torch.Generator()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_unclip_in_half_precision(dtype, invertible_pipe):
    """Mixed dtypes are errors; rounding moves the images."""
    for name in ("prompts", "unipc", "reconstruct", "inpaint", "text diff"):
        assert on_cuda(invertible_pipe, UNCLIP[name], dtype)


def test_int8_weights(invertible_pipe):
    def quantized(pipe: Any) -> GenerationResult:
        return pipe.quantize("int8")("a fish", **CALL)

    assert_same(on_cuda(invertible_pipe, quantized), quantized(copy.deepcopy(invertible_pipe)))


def test_images_on_the_device(invertible_pipe):
    image = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
    result = on_cuda(invertible_pipe, lambda pipe: pipe.variations(image.to(pipe.device), **CALL))
    assert_same(result, invertible_pipe.variations(image, **CALL))


@pytest.mark.parametrize("kind", ["autoregressive", "one-shot"])
def test_other_priors(kind, invertible_pipe):
    torch.manual_seed(0)
    sizes = {"width": 32, "depth": 2, "heads": 2}
    if kind == "autoregressive":
        prior: nn.Module = ARPrior(
            ARPriorConfig(EMB_DIM, TEXT_WIDTH, CONTEXT, **sizes, components=4, buckets=8)
        )
        emb, text_emb = torch.randn(2, 64, EMB_DIM)
        prior.codes.fit(emb, text_emb)
    else:
        prior = OneShotPrior(OneShotPriorConfig(EMB_DIM, TEXT_WIDTH, CONTEXT, **sizes))
    pipe = copy.deepcopy(invertible_pipe)
    pipe.prior = scrambled(prior).eval()
    assert_same(on_cuda(pipe, UNCLIP["prompts"]), UNCLIP["prompts"](pipe))


@pytest.mark.parametrize("operation", ["prompts", "variations"])
def test_sampled_layouts(operation, invertible_pipe):
    torch.manual_seed(0)
    own = invertible_pipe
    decoder = tiny_decoder(
        unet=tiny_unet(6, 3, context_dim=24),
        learned_variance=False,
        layout=LayoutConfig(EMB_DIM, size=4, width=16, depth=1),
    )
    network = scrambled(LayoutPrior(LAYOUTS)).eval()
    network.fit_components(torch.rand(20, 3, 4, 4))
    parts = own.clip, own.prior, scrambled(decoder).eval(), own.upsamplers, own.options
    pipe = UnCLIPPipeline(*parts, layout_prior=network)
    assert_same(on_cuda(pipe, UNCLIP[operation]), UNCLIP[operation](pipe))


# -- DALL-E and GLIDE

DALLE_OPERATIONS: dict[str, Operation] = {
    "prompts": lambda pipe: pipe(["a red apple", "a fish"], num_images=2, **CALL),
    "candidates": lambda pipe: pipe("a red apple", num_candidates=4, **CALL),
    "complete": lambda pipe: pipe.complete(PHOTO, "a red apple", keep=0.5, **CALL),
    "variations": lambda pipe: pipe.variations(PHOTO, keep=0.5, **CALL),
    "inpaint": lambda pipe: pipe.inpaint(
        PHOTO, PHOTO.convert("L").point([0] * 128 + [255] * 128), "a red apple", **CALL
    ),
    "likelihood": lambda pipe: pipe.elbo(PHOTO, "a red apple", seed=0).bits_per_dim,
}


@pytest.mark.parametrize("operation", DALLE_OPERATIONS.values(), ids=DALLE_OPERATIONS)
def test_dalle(operation, tiny_dalle):
    assert_same(on_cuda(tiny_dalle, operation), operation(tiny_dalle))


def test_glide(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests" / "checkpoints")
    from test_glide import folder, small_pipe

    pipe = small_pipe(folder.__wrapped__(tmp_path))

    def generate(pipe: Any) -> GenerationResult:
        return pipe(["a fish", "a dish"], **CALL)

    # The linear schedule ends at α = 0.006, which enlarges rounding errors of x_0.
    assert_same(on_cuda(pipe, generate), generate(pipe), tolerance=4)


# -- on a GPU only


@needs_gpu
@pytest.mark.parametrize(("dtype", "mean"), [("fp32", 0.5), ("bf16", 8), ("fp16", 4)])
def test_the_bundled_model_gives_the_images_of_the_cpu(dtype, mean):
    expected = unclip.load("emoji", "cpu")("a red apple", **CALL)
    with emulated_device():
        (image,) = arrays(unclip.load("emoji", GPU, dtype)("a red apple", **CALL))
    assert np.abs(image - arrays(expected)[0]).mean() <= mean  # of 255


@needs_gpu
@pytest.mark.parametrize("model", ["emoji", "emoji-dalle1"])
def test_compiled_steps_give_the_same_images(model):
    with emulated_device():
        pipe = unclip.load(model, GPU, "fp32")
        prompts = ["a red apple", "a ghost"]
        expected = pipe(prompts, **CALL)
        compiled = unclip.compile(pipe)
        for _ in range(2):  # the second call replays CUDA graphs
            assert_same(arrays(compiled(prompts, **CALL)), expected, tolerance=4)


@needs_gpu
def test_offloading_gives_the_same_image_with_less_memory():
    def peak(offload: bool) -> tuple[list[np.ndarray], int]:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        pipe = unclip.load("emoji", GPU, "fp32", offload=offload)
        result = arrays(pipe("a red apple", **CALL))
        return result, torch.cuda.max_memory_allocated() - before

    (image, resident), (same, offloaded) = peak(False), peak(True)
    assert_same([same[0]], torch.from_numpy(image[0] / 127.5), tolerance=1)
    assert offloaded < 0.9 * resident


@needs_gpu
@pytest.mark.parametrize("kind", ["row", "column", "conv"])
def test_compiled_block_sparse_attention_equals_masked_attention(kind):
    torch.manual_seed(0)
    pattern = Pattern(kind, (16, 16), kernel=5)
    length = 32 + 256
    q, k, v = torch.randn(3, 2, 2, length, 64, device=GPU)
    found = flex_attend(q, k, v, pattern, 32)
    mask = stream_mask(pattern, 32).to(GPU)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


# -- single networks under FakeTensorMode


def call_networks(networks: Any, device: torch.device) -> list[torch.Tensor]:
    prior, decoder, upsampler = networks

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype, device=device)

    t, drop = zeros(2, dtype=torch.long), zeros(2, dtype=torch.bool)
    mask = zeros(2, CONTEXT, dtype=torch.bool)
    text = TextEncoding(zeros(2, EMB_DIM), zeros(2, CONTEXT, TEXT_WIDTH), mask)
    return [
        prior(zeros(2, EMB_DIM), t, text, drop),
        decoder(zeros(2, 3, 8, 8), t, zeros(2, EMB_DIM), text, drop, drop),
        upsampler(zeros(2, 3, 16, 16), t, zeros(2, 3, 8, 8)),
    ]


@emulated_only
def test_networks_under_fake_tensor_mode():
    networks = tiny_prior(), tiny_decoder(), tiny_upsampler()
    with fake_networks(*networks) as device:
        outputs = call_networks(networks, device)
        assert {output.device for output in outputs} == {device}
        first = next(
            module
            for module in networks[1].modules()
            if module._parameters.get("weight") is not None
        )
        first._parameters["weight"] = nn.Parameter(first._parameters["weight"].cpu(), False)
        with pytest.raises(FakeTensorDeviceMismatchError):
            call_networks(networks, device)


# -- the emulation finds faults


@emulated_only
@pytest.mark.parametrize("part", ["clip", "prior", "decoder", "upsampler"])
def test_a_tensor_on_the_cpu_is_an_error(part, invertible_pipe):
    def broken(pipe: Any) -> Any:
        module = {
            "clip": pipe.clip,
            "prior": pipe.networks()["prior"],
            "decoder": pipe.networks()["decoder"],
            "upsampler": pipe.networks()["upsampler_0"],
        }[part]
        owner, name = next(
            (module, name)
            for module in module.modules()
            for name in module._parameters
            if module._parameters[name] is not None and module._parameters[name].dim() > 1
        )
        owner._parameters[name] = nn.Parameter(owner._parameters[name].cpu())
        return pipe("a fish", **CALL)

    with pytest.raises(DeviceMismatch):
        on_cuda(invertible_pipe, broken)


@emulated_only
def test_mismatched_tensors_generators_and_dtypes_are_errors():
    with emulated_device() as device:
        x = torch.ones(2, 3, device=device)
        with pytest.raises(DeviceMismatch):
            x + torch.ones(3)
        with pytest.raises(DeviceMismatch):
            torch.randn(2, device=device, generator=torch.Generator())
        with pytest.raises(RuntimeError, match="dtype"):
            x.half() @ x.T
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
        assert (x * torch.tensor(2.0)).sum().item() == 12
        assert x.cpu().numpy().sum() == 6


# -- training steps


def batch(size: int = 16) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, size, size, generator=generator) * 2 - 1
    return {"image": images, "caption": ["a red apple", "a fish", "a blue fish", "an apple"]}


def frozen_clip() -> nn.Module:
    return tiny_clip().requires_grad_(False).eval()


def prior_loss(clip: Any) -> tuple[nn.Module, Any]:
    prior = tiny_prior()
    return prior, PriorLoss(prior, clip, Schedule(), ConditionDropout(), LossConfig())


def ar_prior_loss(clip: Any) -> tuple[nn.Module, Any]:
    sizes = {"width": 32, "depth": 2, "heads": 2, "components": 4, "buckets": 8}
    prior = ARPrior(ARPriorConfig(EMB_DIM, TEXT_WIDTH, CONTEXT, **sizes))
    prior.codes.fit(*torch.randn(2, 64, EMB_DIM))
    return prior, ARPriorLoss(prior, clip, ConditionDropout(text=0.5))


def one_shot_loss(clip: Any) -> tuple[nn.Module, Any]:
    sizes = {"width": 32, "depth": 2, "heads": 2}
    prior = OneShotPrior(OneShotPriorConfig(EMB_DIM, TEXT_WIDTH, CONTEXT, **sizes))
    return prior, OneShotPriorLoss(prior, clip, ConditionDropout(text=0.3), OneShotLossConfig())


def decoder_loss(clip: Any) -> tuple[nn.Module, Any]:
    decoder = tiny_decoder()
    config = LossConfig(vb_weight=0.001)
    return decoder, DecoderLoss(decoder, clip, Schedule(), ConditionDropout(), config)


def inpainting_loss(clip: Any) -> tuple[nn.Module, Any]:
    decoder = tiny_decoder(
        unet=tiny_unet(10, 3, context_dim=24),
        learned_variance=False,
        prediction="v",
        inpaints=True,
        layout=LayoutConfig(EMB_DIM, size=4, width=16, depth=1),
    )
    return decoder, DecoderLoss(
        decoder,
        clip,
        Schedule(),
        ConditionDropout(),
        LossConfig(),
        holes=HoleConfig(),
        emb_noise=0.5,
        emb_mix=0.5,
        copy_paste=0.5,
        agreement=1.0,
    )


def upsampler_loss(clip: Any) -> tuple[nn.Module, Any]:
    upsampler = tiny_upsampler()
    corruption = CorruptionConfig(kind="blur")
    return upsampler, UpsamplerLoss(upsampler, Schedule(), corruption, LossConfig())


def layout_loss(clip: Any) -> tuple[nn.Module, Any]:
    layout = Layout(LayoutConfig(EMB_DIM, size=4, width=16, depth=1))
    return layout, LayoutLoss(layout, clip, 0.5)


def layout_prior_loss(clip: Any) -> tuple[nn.Module, Any]:
    network = LayoutPrior(LAYOUTS)
    drop, config = ConditionDropout(), LossConfig()
    return network, LayoutPriorLoss(network, clip, Schedule(), drop, config, 0.5, 0.2)


def text_tower_loss(clip: Any) -> tuple[nn.Module, Any]:
    network = TextTower(tiny_clip())
    return network, TextTowerLoss(network, clip, TextTowerConfig(base=""))


def clip_loss(clip: Any) -> tuple[nn.Module, Any]:
    trained = tiny_clip()
    return trained, CLIPLoss(trained)


def dvae_loss(clip: Any) -> tuple[nn.Module, Any]:
    config = DVAEConfig(image_size=16, vocab_size=8, width=8, groups=2, blocks=1, code_width=8)
    codec = DVAE(config)
    return codec, CodecLoss(codec, {"temperature": Annealing(1.0, 0.1, 10)})


def adversarial_loss(clip: Any) -> tuple[nn.Module, Any]:
    net = ConvNetConfig(width=16, factor=4, blocks=1, block_width=8)
    codec = VQVAE(VQVAEConfig(image_size=16, vocab_size=8, code_width=4, net=net))
    config = AdversarialConfig(weight=0.5, discriminator=DiscriminatorConfig(width=4, layers=1))
    model = AdversarialCodec(codec, config)
    return model, CodecLoss(
        codec, {}, clip.image_features, PerceptualConfig(weight=1.0), adversarial=config
    )


def dalle_loss(clip: Any) -> tuple[nn.Module, Any]:
    tokenizer = BPETokenizer.train(["a red apple"], 270, 12, marked=False)
    config = DVAEConfig(image_size=16, vocab_size=32, width=8, groups=2, blocks=1, code_width=8)
    codec = DVAE(config).requires_grad_(False).eval()
    dalle = DALLE(
        DALLEConfig(
            tokenizer.vocab_size,
            12,
            32,
            codec.grid,
            width=16,
            depth=2,
            heads=2,
            head_dim=8,
            kernel=3,
        )
    )
    dalle.codec = codec  # moves with the network
    return dalle, DALLELoss(dalle, tokenizer, codec, DALLELossConfig())


LOSSES = [
    prior_loss,
    ar_prior_loss,
    one_shot_loss,
    decoder_loss,
    inpainting_loss,
    upsampler_loss,
    layout_loss,
    layout_prior_loss,
    text_tower_loss,
    clip_loss,
    dvae_loss,
    adversarial_loss,
    dalle_loss,
]


def step(model: nn.Module, loss: Any, data: dict[str, Any]) -> float:
    """Take one training step with gradient clipping and EMA, as `fit` does; return the loss."""
    optimizer, ema = build_optimizer(model, OptimConfig(lr=1e-3)), EMA(model, 0.9)
    value = loss(model, data)["loss"]
    value.backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    ema.update()
    with ema.swapped_in():
        return float(value.detach())


@pytest.mark.parametrize("make", LOSSES, ids=lambda make: make.__name__)
def test_training_step(make):
    """On `meta`, because autograd needs the streams of a real CUDA device."""
    torch.manual_seed(0)
    clip = frozen_clip()
    model, loss = make(clip)
    with emulated_device("meta") as device:
        clip.to(device)
        model.to(device)
        value = step(model, loss, batch())
    assert np.isfinite(value)


@emulated_only
def test_a_condition_on_the_cpu_is_an_error_in_training():
    torch.manual_seed(0)
    clip = frozen_clip()
    prior, loss = prior_loss(clip)
    with emulated_device("meta") as device:
        prior.to(device)  # but not CLIP
        with pytest.raises(DeviceMismatch):
            step(prior, loss, batch())
