"""Caches leave outputs unchanged, and approximations are only those asked for."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from conftest import (
    CONTEXT,
    EMB_DIM,
    TEXT_WIDTH,
    TINY_OPTIONS,
    scrambled,
    tiny_decoder,
    tiny_prior,
    tiny_unet,
)
from conftest import tiny_upsampler as make_upsampler
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from unclip.diffusion.samplers import Estimator
from unclip.diffusion.schedules import Schedule
from unclip.models.layers import DenoiserCache
from unclip.pipelines.presets import preset
from unclip.pipelines.request import generators_from
from unclip.pipelines.unclip.pipeline import UnCLIPPipeline
from unclip.types import GLIDEOptions, StageOptions, TextEncoding

STEPS = [999, 600, 300, 0]


def make_text(batch: int = 2, tokens: int = 5) -> TextEncoding:
    states = torch.randn(batch, tokens, TEXT_WIDTH).double()
    return TextEncoding(
        torch.randn(batch, EMB_DIM).double(), states, torch.ones(batch, tokens, dtype=torch.bool)
    )


def network_and_context(kind: str):
    """Return a network in float64, its context for a batch of 2, and the shape of x_t."""
    torch.manual_seed(0)
    if kind == "prior":
        prior = scrambled(tiny_prior()).double()
        return prior, prior.condition(make_text()), (2, EMB_DIM)
    if kind == "decoder":
        decoder = scrambled(tiny_decoder()).double()
        return (
            decoder,
            decoder.condition(torch.randn(2, EMB_DIM).double(), make_text()),
            (2, 3, 8, 8),
        )
    return scrambled(make_upsampler()).double(), torch.randn(2, 3, 16, 16).double(), (2, 3, 16, 16)


@pytest.mark.parametrize("kind", ["prior", "decoder", "upsampler"])
@torch.no_grad()
def test_all_timesteps_are_embedded_at_once(kind, monkeypatch):
    network, context, shape = network_and_context(kind)
    time = network.time if kind == "prior" else network.unet.time
    embedded, cache = [], DenoiserCache(STEPS)
    handle = time.register_forward_hook(
        lambda _, args, output: embedded.append(args[0].flatten().tolist())
    )
    for t in STEPS:
        x = torch.randn(shape).double()
        network.denoise(x, t, context, cache)
    assert embedded == [STEPS]
    handle.remove()
    for t in (*STEPS, 450.5):  # some of diffusers' schedulers step between timesteps
        ts = torch.full((2,), t)
        expected = network.denoise(x, ts, context)
        torch.testing.assert_close(
            network.denoise(x, t, context, cache), expected, rtol=0, atol=1e-12
        )
        assert torch.equal(network.denoise(x, t, context), expected)


def test_captions_are_projected_once_per_call(tiny_pipe, monkeypatch):
    pipe = UnCLIPPipeline(tiny_pipe.clip, tiny_pipe.prior, tiny_pipe.decoder)
    rows = []
    unet = pipe.decoder.unet
    project = unet.project_context
    monkeypatch.setattr(
        unet,
        "project_context",
        lambda context, mask: rows.append(len(mask)) or project(context, mask),
    )
    options = replace(TINY_OPTIONS, upsamplers=())
    first = pipe("a red apple", num_images=3, seed=0, options=options, progress=False)
    assert rows == [3, 1]  # three images and one null
    assert (
        pipe("a red apple", num_images=3, seed=0, options=options, progress=False).images
        == first.images
    )
    assert rows == [3, 1, 3]  # the null is cached


def test_images_of_a_prompt_share_its_prefix(tiny_pipe):
    text = tiny_pipe.encode_text(["a red apple", "a fish"])
    shared, repeated = (tiny_pipe.prior.condition(one) for one in (text, text.repeat_interleave(3)))
    x, t = torch.randn(6, EMB_DIM), torch.full((6,), 500)
    torch.testing.assert_close(
        tiny_pipe.prior.denoise(x, t, shared),
        tiny_pipe.prior.denoise(x, t, repeated),
        rtol=0,
        atol=1e-6,
    )


@pytest.mark.parametrize("null_text", ["learned", "empty_prompt"])
def test_padding_is_not_computed(tiny_pipe, null_text):
    prior, decoder = (scrambled(make(null_text=null_text)) for make in (tiny_prior, tiny_decoder))
    pipe = UnCLIPPipeline(tiny_pipe.clip, prior, decoder)
    padded = UnCLIPPipeline(tiny_pipe.clip, prior, decoder)
    padded.runtime.static_shapes = True
    lengths, condition = [], prior.condition
    prior.condition = lambda text: lengths.append(text.mask.shape[1]) or condition(text)

    def generate(pipe: UnCLIPPipeline) -> tuple[torch.Tensor, torch.Tensor]:
        text, generators = pipe.encode_text("a red apple"), generators_from([0])
        emb = pipe.sample_prior(text, generators=generators, options=TINY_OPTIONS.prior)
        return emb, pipe.decode(emb, text, generators=generators, options=TINY_OPTIONS.decoder)

    for one, other in zip(generate(pipe), generate(padded), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
    trimmed, null, *padded_lengths = lengths
    assert 1 <= null <= 2 < trimmed < CONTEXT and CONTEXT in padded_lengths


def test_cached_null_follows_the_weights(tiny_pipe):
    pipe = copy.deepcopy(tiny_pipe)
    text = pipe.encode_text("a red apple")

    def generate() -> torch.Tensor:
        return pipe.sample_prior(text, generators=generators_from([0]), options=TINY_OPTIONS.prior)

    first = generate()
    assert torch.equal(generate(), first)
    pipe.prior.null_state.mul_(-1)
    assert not torch.equal(generate(), first)
    pipe.prior.null_state.mul_(-1)
    assert torch.equal(generate(), first)

    torch.manual_seed(5)
    pipe.prior = other = scrambled(tiny_prior())
    fresh = UnCLIPPipeline(pipe.clip, other, pipe.decoder)
    expected = fresh.sample_prior(text, generators=generators_from([0]), options=TINY_OPTIONS.prior)
    assert torch.equal(generate(), expected)


@torch.no_grad()
def test_guidance_interval():
    decoder, context, shape = network_and_context("decoder")
    null = context[[1, 0]]
    x, both = torch.randn(shape).double(), type(context).cat([context, null])
    for interval, guided in (((0.0, 1.0), True), ((0.2, 0.9), True), ((0.7, 0.9), False)):
        options = StageOptions(1, guidance=3.0, guidance_interval=interval)
        caches = DenoiserCache(STEPS), DenoiserCache(STEPS)
        estimate = Estimator(
            lambda x, t, cache=caches[0]: decoder.denoise(x, t, context, cache),
            Schedule(),
            options,
            "x0",
            learned_variance=True,
            denoise_both=lambda x, t, cache=caches[1]: decoder.denoise(x, t, both, cache),
            dtype=torch.float64,
        )
        cond, without = (decoder.denoise(x, 600, c)[:, :3] for c in (context, null))
        expected = without + 3 * (cond - without) if guided else cond
        torch.testing.assert_close(estimate(x, 600)[0], expected, rtol=0, atol=1e-11)


# -- deep features


@torch.no_grad()
def test_reused_deep_features_of_the_same_step_give_the_same_output():
    upsampler, low_res, shape = network_and_context("upsampler")
    x, cache = torch.randn(shape).double(), DenoiserCache([500, 499], interval=2)
    output = upsampler.denoise(x, 500, low_res, cache)
    deep = cache.deep_features(499)
    assert deep is not None
    cache.steps = {500: 1}  # as if the next step were at 500 again
    assert torch.equal(upsampler.denoise(x, 500, low_res, cache), output)
    deep.zero_()
    assert not torch.allclose(upsampler.denoise(x, 500, low_res, cache), output)


@pytest.mark.parametrize(
    ("interval", "calls", "computed"),
    [
        (1, STEPS, [999, 600, 300, 0]),
        (2, STEPS, [999, 300]),
        (3, STEPS, [999, 0]),
        (9, STEPS, [999]),
        (2, [999, 300, 0], [999, 300]),  # guidance on an interval skips timesteps
        (9, [300, 0, 999, 600], [300, 999]),  # back to more noise
        (9, [999, 450.5, 300], [999, 450.5, 300]),  # between timesteps
    ],
)
def test_deep_features_are_computed_at_every_nth_timestep(interval, calls, computed):
    found, cache = [], DenoiserCache(STEPS, interval)
    for t in calls:
        deep_features = cache.deep_features(t)
        if deep_features is None:
            found.append(t)
            deep_features = torch.zeros(1)
        cache.store(t, deep_features)
    assert found == computed


def test_cache_interval_needs_a_unet(tiny_pipe):
    options = replace(TINY_OPTIONS, prior=replace(TINY_OPTIONS.prior, cache_interval=2))
    with pytest.raises(ValueError, match="prior is a DiffusionPrior; expected cache_interval 1"):
        tiny_pipe("a red apple", options=options, progress=False)


# -- presets


def test_fast_preset_of_unclip(tiny_pipe):
    options = replace(
        TINY_OPTIONS,
        prior=StageOptions(steps=25, sampler="ancestral"),
        decoder=StageOptions(steps=25, guidance=8.0, sampler="ancestral"),
        upsamplers=(StageOptions(steps=7, sampler="ancestral"),),
    )
    assert preset("exact", options) is options
    fast = preset("fast", options)
    assert (fast.prior.steps, fast.decoder.steps, fast.upsamplers[0].steps) == (10, 10, 4)
    assert {fast.prior.sampler, fast.decoder.sampler, fast.upsamplers[0].sampler} == {"unipc"}
    assert fast.decoder.guidance == 8.0 and fast.decoder.guidance_interval == (0.2, 0.9)


def test_network_of_the_last_step_runs_only_at_the_last_step(tiny_pipe):
    upsampler = scrambled(make_upsampler(last_unet=tiny_unet(6, 3)))
    pipe = UnCLIPPipeline(tiny_pipe.clip, None, tiny_pipe.decoder, [upsampler])
    pipe.options = replace(pipe.options, upsamplers=(StageOptions(steps=7, sampler="ancestral"),))
    options = pipe.preset("fast").upsamplers
    assert (options[0].steps, options[0].sampler, options[0].cache_interval) == (3, "ancestral", 3)
    modulations = []
    forward = upsampler.last_unet.forward
    upsampler.last_unet.forward = lambda x, modulation, *args, **kwargs: (
        modulations.append(modulation) or forward(x, modulation, *args, **kwargs)
    )
    pipe.upsample(torch.zeros(1, 3, 8, 8), options=options)
    (modulation,) = modulations
    unet = upsampler.last_unet
    torch.testing.assert_close(modulation, unet.modulation(unet.time(torch.tensor([0]))))


def test_presets_of_other_pipelines(tiny_dalle):
    fast = preset("fast", GLIDEOptions())
    assert (fast.decoder.steps, fast.upsamplers[0].steps) == (40, 16)
    assert tiny_dalle.preset("exact") is tiny_dalle.options
    with pytest.raises(ValueError, match="preset is 'fast'; expected 'exact'"):
        tiny_dalle.preset("fast")
    with pytest.raises(ValueError, match="unknown preset 'faster'; expected one of exact, fast"):
        tiny_dalle.preset("faster")


# -- memory format and device synchronisation


def test_channels_last_gives_the_same_images(tiny_pipe):
    convolutions = [
        module.weight
        for network in (tiny_pipe.decoder, *tiny_pipe.upsamplers)
        for module in network.modules()
        if isinstance(module, nn.Conv2d)
    ]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in convolutions)
    text, emb = tiny_pipe.encode_text("a red apple"), torch.randn(1, EMB_DIM)

    def generate() -> torch.Tensor:
        generators = generators_from([3])
        return tiny_pipe.upsample(
            tiny_pipe.decode(emb, text, generators=generators), generators=generators
        )

    expected = generate()
    for weight in convolutions:
        weight.data = weight.data.contiguous()
    torch.testing.assert_close(generate(), expected, rtol=0, atol=1e-5)


class Synchronisations(TorchDispatchMode):
    """Count calls that read a number from a tensor, for which the host waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sampler", ["ancestral", "ddim"])
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.2, 0.9)])
def test_steps_do_not_synchronise_with_the_device(tiny_pipe, sampler, interval):
    """More steps read no more numbers from the device."""
    text, emb = tiny_pipe.encode_text("a red apple"), torch.randn(1, EMB_DIM)

    def count(steps: int) -> int:
        options = StageOptions(
            steps=steps, guidance=3.0, sampler=sampler, guidance_interval=interval
        )
        with Synchronisations() as mode:
            tiny_pipe.decode(emb, text, generators=generators_from([0]), options=options)
        return mode.count

    with Synchronisations() as mode:
        torch.ones(1).item()
    assert mode.count == 1
    count(2)  # fills caches that outlive a call
    assert count(2) == count(6)
