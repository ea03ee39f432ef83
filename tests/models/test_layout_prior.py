"""The layout prior: principal components of small images, sampled for embedding and caption."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import EMB_DIM, TEXT_WIDTH, scrambled, tiny_clip
from PIL import Image
from test_layout import make_decoder

from unclip.checkpoints.store import load_component, save_component
from unclip.diffusion.losses import LossConfig
from unclip.diffusion.schedules import Schedule, ScheduleConfig
from unclip.image_io import to_tensor
from unclip.models.unclip.layout_prior import LayoutPrior, LayoutPriorConfig, layouts
from unclip.pipelines.provenance import regenerate
from unclip.pipelines.runtime import Runtime
from unclip.pipelines.unclip.pipeline import UnCLIPPipeline
from unclip.pipelines.unclip.stages import EncodedPrompts, LayoutStage
from unclip.training.losses import ConditionDropout, LayoutPriorLoss
from unclip.types import TextEncoding

SHAPE = LayoutPriorConfig(
    emb_dim=EMB_DIM, size=4, components=6, width=32, depth=2, dropout=0.0, steps=6
)


READER = replace(SHAPE, text_width=TEXT_WIDTH, text_heads=3)  # of CLIP's text states


def make_prior(config: LayoutPriorConfig = SHAPE) -> LayoutPrior:
    torch.manual_seed(0)
    network = scrambled(LayoutPrior(config), std=0.2)
    network.fit_components(torch.rand(40, 3, 4, 4) * 2 - 1)
    return network


def test_components_are_the_principal_ones_and_unit_variance_on_average():
    torch.manual_seed(0)
    network, factors = LayoutPrior(SHAPE), torch.randn(200, 6) * torch.tensor([3.0, 2, 1, 1, 1, 1])
    x = (factors @ torch.randn(6, 48) * 0.1 + 0.2).view(200, 3, 4, 4)  # six dimensions
    network.fit_components(x)
    codes = network.encode(x)
    torch.testing.assert_close(network.decode(codes), x, atol=1e-4, rtol=0)
    std = codes.std(0)
    assert (std[:-1] > std[1:] * 0.999).all() and std.square().mean().sqrt().item() < 1.2
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network.encode(x), codes)
        torch.testing.assert_close(network.decode(codes), x, atol=1e-4, rtol=0)
    spread = network.basis @ network.basis.T
    torch.testing.assert_close(spread, torch.eye(6), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="5 layouts; expected at least 6"):
        network.fit_components(x[:5])


def random_text(rows: int) -> TextEncoding:
    lengths = torch.arange(rows) % 4 + 2
    mask = torch.arange(6) < lengths[:, None]
    return TextEncoding(torch.randn(rows, EMB_DIM), torch.randn(rows, 6, TEXT_WIDTH), mask)


@pytest.mark.parametrize("config", [SHAPE, READER])
def test_nulls_replace_conditions(config):
    network, emb, text = make_prior(config), torch.randn(3, EMB_DIM), random_text(3)
    everything = torch.ones(3, dtype=torch.bool)
    without_text = network.condition(emb, text, None, everything).summary
    torch.testing.assert_close(without_text, network.condition(emb, None).summary)
    without_image = network.condition(emb, text, everything).summary
    torch.testing.assert_close(without_image, network.condition(None, text).summary)
    assert network.condition(None, None).summary.shape == (1, SHAPE.width)
    assert not torch.allclose(without_text, without_image)
    # The length of a caption's embedding does not matter.
    longer = replace(text, emb=3 * text.emb)
    torch.testing.assert_close(network.condition(None, longer).summary, without_image)


def test_text_states_are_read_up_to_the_end_of_the_text():
    network, text = make_prior(READER), random_text(3)
    summary = network.condition(None, text).summary
    torch.testing.assert_close(network.condition(None, text.trim()).summary, summary)
    padding = torch.where(text.mask[..., None], text.states, torch.full_like(text.states, 9.0))
    torch.testing.assert_close(
        network.condition(None, replace(text, states=padding)).summary, summary
    )
    other = network.condition(None, replace(text, states=text.states.flip(1))).summary
    assert ((other - summary).abs().amax(dim=1) > 1e-3).all()


@pytest.mark.parametrize("config", [SHAPE, READER])
def test_mixtures_weight_the_texts(config):
    network, text = make_prior(config), random_text(4)  # first texts of two mixtures, then second
    weights = torch.tensor([[1.0, 0.25], [0.0, 0.75]])
    mixed = network.condition(None, text, weights=weights).summary
    first, third = network.condition(None, text[:1]).summary, network.condition(None, text).summary
    torch.testing.assert_close(mixed[:1], first)
    assert not torch.allclose(mixed[1], third[1]) and not torch.allclose(mixed[1], third[3])


def test_layouts_are_those_of_the_batch():
    images = torch.rand(2, 3, 8, 8)
    pooled = torch.nn.functional.avg_pool2d(images, 2)
    torch.testing.assert_close(layouts({"image": images}, 4), pooled)
    torch.testing.assert_close(layouts({"layout": pooled.flatten(1)}, 4), pooled)
    with pytest.raises(ValueError, match="layouts of 48 numbers; expected 192, for model.size 8"):
        layouts({"layout": pooled.flatten(1)}, 8)
    with pytest.raises(ValueError, match="embeddings have no layouts; compute them with --layout"):
        layouts({"image_emb": images}, 8)


def test_training_learns_two_layouts_of_one_caption_instead_of_their_mean():
    """Half of the images are bright, half dark; nothing says which."""
    torch.manual_seed(0)
    config = LayoutPriorConfig(EMB_DIM, size=4, components=2, width=32, depth=2, guidance=1.0)
    network, clip = LayoutPrior(config), tiny_clip().requires_grad_(False)
    sides = torch.tensor([-0.8, 0.8]).repeat(32)
    images = sides[:, None, None, None] + 0.01 * torch.randn(64, 3, 8, 8)
    network.fit_components(layouts({"image": images}, 4))
    batch = {
        "image": images,
        "image_emb": torch.ones(64, EMB_DIM),
        "text_emb": torch.ones(64, EMB_DIM),
    }
    schedule, drop = Schedule(ScheduleConfig()), ConditionDropout(0.2, 0.4)
    loss = LayoutPriorLoss(network, clip, schedule, drop, LossConfig(), emb_noise=0.1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(300):
        optimizer.zero_grad()
        loss(network, batch)["loss"].backward()
        optimizer.step()
    network.eval()

    stage = LayoutStage(network, schedule, Runtime({"layout_prior": network}))
    generators = [torch.Generator().manual_seed(seed) for seed in range(40)]
    with torch.inference_mode():
        text = replace(random_text(40), emb=torch.ones(40, EMB_DIM))
        x = stage.sample(torch.ones(40, EMB_DIM), EncodedPrompts(text), generators)
    brightness = x.mean(dim=(1, 2, 3))
    assert (brightness.abs() > 0.5).float().mean() > 0.8
    assert 8 < (brightness > 0).sum() < 32


def make_pipe(own: UnCLIPPipeline, network: LayoutPrior | None) -> UnCLIPPipeline:
    torch.manual_seed(0)
    decoder = scrambled(make_decoder("layout"), std=0.02)
    torch.nn.init.normal_(decoder.extra_channel_weights()["layout"].data)
    return UnCLIPPipeline(
        own.clip, own.prior, decoder, own.upsamplers, own.options, layout_prior=network
    )


@pytest.mark.parametrize("config", [SHAPE, READER])
def test_a_pipeline_samples_layouts(config, invertible_pipe, tmp_path):
    network = make_prior(config)
    pipe, plain = make_pipe(invertible_pipe, network), make_pipe(invertible_pipe, None)
    result = pipe(["a red apple", "a blue fish"], num_images=2, seed=0, progress=False)
    alone = pipe("a blue fish", seed=3, progress=False)
    assert result.images[3].tobytes() == alone.images[0].tobytes()
    assert (
        alone.images[0].tobytes()
        != plain("a blue fish", seed=3, progress=False)[0].images[0].tobytes()
    )
    mixture = pipe({"a red apple": 1, "a blue fish": 1}, seed=3, progress=False)
    negative = pipe("a blue fish", negative_prompt="a red apple", seed=3, progress=False)
    varied = pipe.variations(image_emb=alone.image_emb, seed=3, progress=False)
    images = [one.images[0].tobytes() for one in (alone, mixture, negative, varied)]
    assert len(set(images)) == 4
    blind = [
        p.decode(None, p.encode_text("a"), generators=[torch.Generator().manual_seed(0)])
        for p in (pipe, plain)
    ]
    torch.testing.assert_close(*blind)  # without an embedding there is no layout

    pipe.save_pretrained(tmp_path / "model")
    again = UnCLIPPipeline.from_pretrained(tmp_path / "model")
    assert "layout_prior" in again.schedules
    image = again("a blue fish", seed=3, progress=False).images[0]
    assert image.tobytes() == alone.images[0].tobytes()
    image = again.quantize("int8")("a blue fish", seed=3, progress=False).images[0]
    assert image.size == alone.images[0].size


def test_variations_keep_the_layout_of_their_image(invertible_pipe):
    pipe, image = make_pipe(invertible_pipe, make_prior()), Image.new("RGB", (16, 16), "navy")
    image.paste("white", (0, 0, 8, 16))
    layout = pipe.encode_layout(image)
    assert layout.shape == (1, 3, 4, 4) and (layout[0, 0, :, 0] > layout[0, 0, :, -1] + 1).all()
    stage, emb = pipe.decoder_stage.layout_stage, pipe.encode_image(image)
    samples = {}
    for variation in (0.01, 0.5, 1.0):
        stage.network.config = replace(SHAPE, variation=variation)
        generators = [torch.Generator().manual_seed(0)]
        samples[variation] = stage.sample(emb, EncodedPrompts(), generators, like=layout)
    projected = stage.network.decode(stage.network.encode(layout)).clamp(-1, 1)
    distances = [(x - projected).abs().mean().item() for x in samples.values()]
    assert distances[0] < distances[1] < distances[2]

    result = pipe.variations(image, seed=3, progress=False)
    given = pipe.variations(image_emb=emb, layout=layout, seed=3, progress=False)
    free = pipe.variations(image_emb=emb, seed=3, progress=False)
    assert result.images[0].tobytes() == given.images[0].tobytes() != free.images[0].tobytes()
    other = pipe.variations(image, layout=-layout, seed=3, progress=False)
    assert other.images[0].tobytes() != given.images[0].tobytes()
    with pytest.raises(ValueError, match=r"layout is of shape \(1, 3, 2, 2\); expected"):
        pipe.variations(image, layout=torch.zeros(1, 3, 2, 2))
    again = regenerate(pipe, result.metadata[0])
    assert again.images[0].tobytes() == result.images[0].tobytes()


@pytest.mark.parametrize("size", [(32, 16), (16, 23)])
def test_layouts_of_images_and_tensors_are_equal(size, invertible_pipe):
    pipe = make_pipe(invertible_pipe, make_prior())
    image = Image.linear_gradient("L").rotate(60).resize(size).convert("RGB")
    x, layout = to_tensor([image]), pipe.encode_layout(image)
    for same in (x, x[0], [image], [x], [x[0]]):
        torch.testing.assert_close(pipe.encode_layout(same), layout)
    results = [pipe.variations(one, seed=3, progress=False) for one in (image, x)]
    assert np.abs(np.subtract(*[one.images[0] for one in results], dtype=int)).max() <= 2


def test_parts_that_do_not_fit_are_refused(invertible_pipe):
    own = invertible_pipe
    with pytest.raises(ValueError, match="the decoder takes no layout"):
        UnCLIPPipeline(own.clip, own.prior, own.decoder, own.upsamplers, layout_prior=make_prior())
    other = LayoutPrior(LayoutPriorConfig(emb_dim=5, size=4, components=6))
    with pytest.raises(ValueError, match="layout_prior has emb_dim 5, but CLIP has"):
        make_pipe(own, other)
    with pytest.raises(ValueError, match="layout_prior has text_width 7, but CLIP has"):
        make_pipe(own, LayoutPrior(replace(SHAPE, text_width=7)))


@pytest.mark.parametrize("config", [SHAPE, READER])
def test_a_saved_prior_is_the_same(config, tmp_path):
    network, emb, text = make_prior(config).eval(), torch.randn(2, EMB_DIM), random_text(2)
    save_component(network, tmp_path, torch.float16, ScheduleConfig())
    loaded = load_component(tmp_path)
    assert loaded.config == config
    torch.testing.assert_close(loaded.basis, network.basis, atol=1e-3, rtol=1e-3)
    x_t, t = torch.randn(2, 6), torch.tensor([10, 900])
    torch.testing.assert_close(
        loaded(x_t, t, emb, text), network(x_t, t, emb, text), atol=0.02, rtol=0.02
    )
