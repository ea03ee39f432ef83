"""Priors without diffusion, and the decoder without a prior (unCLIP 5.1)."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    CONTEXT,
    EMB_DIM,
    TEXT_WIDTH,
    TINY_OPTIONS,
    scrambled,
    tiny_clip,
    tiny_decoder,
    tiny_prior,
)
from parity import randomize

import unclip
from unclip.checkpoints.store import save_component
from unclip.diffusion.schedules import ScheduleConfig
from unclip.models.unclip.ar_prior import ARPrior, ARPriorConfig
from unclip.models.unclip.one_shot_prior import OneShotPrior, OneShotPriorConfig
from unclip.pipelines.provenance import regenerate
from unclip.pipelines.unclip.pipeline import UnCLIPPipeline
from unclip.types import StageOptions

SIZES = (EMB_DIM, TEXT_WIDTH, CONTEXT, 32, 2, 2)
KINDS = ("ar", "one-shot", "noise")
K, V = 5, 16


def make_prior(kind: str):
    torch.manual_seed(1)
    if kind == "ar":
        prior = ARPrior(ARPriorConfig(*SIZES, components=K, buckets=V))
        emb = torch.randn(100, EMB_DIM)
        prior.fit(emb, emb + torch.randn(100, EMB_DIM))
    else:
        prior = OneShotPrior(
            OneShotPriorConfig(*SIZES, query="noise" if kind == "noise" else "learned")
        )
    return randomize(prior).eval()


@pytest.fixture(scope="module")
def own_pipe():
    """A model without upsamplers, whose prior the test may replace."""
    torch.manual_seed(0)
    clip, prior, decoder = (
        scrambled(network) for network in (tiny_clip(), tiny_prior(), tiny_decoder())
    )
    options = replace(TINY_OPTIONS, upsamplers=())
    schedules = {"prior": ScheduleConfig("linear")}
    return UnCLIPPipeline(
        clip, prior, decoder, [], options, schedules=schedules, name="own", licence="MIT"
    )


@pytest.fixture(params=KINDS)
def pipe(own_pipe, request):
    before = own_pipe.prior
    own_pipe.prior = make_prior(request.param)
    yield own_pipe
    own_pipe.prior = before
    assert (
        own_pipe.schedules["prior"].config.kind == "linear"
    )  # the schedule of the diffusion prior


def embeddings(pipe, prompts, **drawing):
    return pipe.sample_prior(pipe.encode_text(prompts), **drawing)


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_images_do_not_depend_on_their_batch(pipe):
    prompts = ["a red apple", "a blue fish"]
    batch = pipe(prompts, num_images=2, seed=5, progress=False)
    for k, seed in enumerate(batch.seeds):
        alone = pipe(prompts[k // 2], seed=seed, progress=False)
        torch.testing.assert_close(alone.image_emb[0], batch.image_emb[k], rtol=0, atol=1e-5)
    result = batch.image_emb.unflatten(0, (2, 2))
    assert not torch.allclose(result[0], result[1], atol=1e-3)
    same = torch.allclose(result[:, 0], result[:, 1], atol=1e-6)
    assert same == (pipe.prior.config == make_prior("one-shot").config)  # which is deterministic


def test_most_similar_candidate_is_kept(pipe):
    text = pipe.encode_text("a red apple")
    options = replace(pipe.options.prior, guidance=1.0)
    of_one = pipe.sample_prior(
        text, num_images=4, generators=seeded(3, 3, 3, 3), options=options, candidates=1
    )
    torch.testing.assert_close(of_one, of_one[:1].expand(4, -1), rtol=0, atol=1e-5)
    (generator,) = seeded(3)
    result = torch.cat(
        [
            pipe.sample_prior(text, generators=[generator], options=options, candidates=1)
            for _ in range(4)
        ]
    )
    best = pipe.sample_prior(text, generators=seeded(3), options=options, candidates=4)
    torch.testing.assert_close(best[0], result[(result @ text.emb[0]).argmax()], rtol=0, atol=1e-5)


def test_guidance_moves_away_from_the_null_or_negative_prompt(pipe):
    def result(guidance: float, **conditions):
        options = StageOptions(steps=1, guidance=guidance, temperature=0)
        return embeddings(
            pipe, "a red apple", generators=seeded(0), options=options, candidates=1, **conditions
        )

    fish, apple = pipe.encode_text("a blue fish"), pipe.encode_text("a red apple")
    assert not torch.allclose(result(1.0), result(4.0), atol=1e-4)
    assert not torch.allclose(result(4.0, negative=fish), result(4.0), atol=1e-4)
    torch.testing.assert_close(result(4.0, negative=apple), result(1.0), rtol=0, atol=1e-4)


def test_mixture_with_weight_one_equals_its_text(pipe):
    both = pipe.encode_text(["a red apple", "a blue fish"])
    given = {"generators": seeded(1), "candidates": 1}
    mixed = pipe.sample_prior(both, weights=torch.tensor([[1.0], [0.0]]), **given)
    given = {"generators": seeded(1), "candidates": 1}
    torch.testing.assert_close(mixed, pipe.sample_prior(both[:1], **given), rtol=0, atol=1e-4)


def test_progress_reports_every_step(pipe):
    steps = []
    pipe("a red apple", seed=0, on_step=steps.append, progress=False)
    prior = [progress for progress in steps if progress.stage == "prior"]
    assert [progress.step for progress in prior] == list(range(1, pipe.prior.steps + 1))
    assert {progress.num_steps for progress in prior} == {pipe.prior.steps}


def test_saved_pipelines_generate_the_same_images(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model/prior/schedule.json").exists()
    again = unclip.load(tmp_path / "model")
    assert type(again.prior) is type(pipe.prior) and "prior" not in again.schedules
    result = [
        one("a red apple", seed=1, progress=False).images[0].tobytes() for one in (pipe, again)
    ]
    assert result[0] == result[1]
    assert type(unclip.load_prior(tmp_path / "model").network) is type(pipe.prior)


def test_other_manipulations_and_dtypes_work(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    for again in (
        unclip.load(tmp_path / "model", dtype=torch.bfloat16),
        unclip.load(tmp_path / "model").quantize("int8"),
        unclip.load(tmp_path / "model").offload(),
        unclip.compile(unclip.load(tmp_path / "model")),
    ):
        assert embeddings(again, "a red apple").isfinite().all()
    latent = pipe.imagine(["a red apple"], seed=0, progress=False)
    assert latent.image_emb.shape == (1, EMB_DIM)
    assert (
        pipe.image_to_image(torch.zeros(3, 8, 8), "a red apple", seed=0, progress=False)
        .image_emb.isfinite()
        .all()
    )


def test_prior_is_loaded_alone_and_recorded_in_metadata(own_pipe, tmp_path):
    save_component(make_prior("ar"), tmp_path / "ar")
    before, own_pipe.prior = own_pipe.prior, unclip.load_prior(tmp_path / "ar")
    try:
        result = own_pipe("a red apple", seed=0, progress=False)
        assert result.metadata[0]["prior_model"] == str(tmp_path / "ar")
        assert (
            regenerate(own_pipe, result.metadata[0], progress=False).images[0].tobytes()
            == result.images[0].tobytes()
        )
    finally:
        own_pipe.prior = before
    assert "prior_model" not in own_pipe("a red apple", seed=0, progress=False).metadata[0]


def test_prior_of_another_clip_raises(own_pipe):
    with pytest.raises(ValueError, match="prior has emb_dim 8, but CLIP has 16"):
        own_pipe.prior = OneShotPrior(OneShotPriorConfig(8, *SIZES[1:]))


# -- without a prior (unCLIP 5.1)


def test_caption_embedding_is_scaled_to_the_length_of_image_embeddings(own_pipe):
    options = replace(own_pipe.options, embedding="text")
    own_pipe.prior.set_stats(torch.zeros(EMB_DIM), torch.full((EMB_DIM,), 3.0))
    result = own_pipe(
        ["a red apple", "a blue fish"], num_images=2, seed=0, options=options, progress=False
    )
    text_emb = own_pipe.encode_text(["a red apple", "a blue fish"]).emb.repeat_interleave(2, dim=0)
    assert F.cosine_similarity(result.image_emb, text_emb).min() > 1 - 1e-5
    torch.testing.assert_close(result.image_emb.norm(dim=-1), torch.full((4,), 12.0))
    again = regenerate(own_pipe, result.metadata[3], progress=False)
    torch.testing.assert_close(again.image_emb[0], result.image_emb[3])


def test_caption_alone_equals_a_dropped_embedding(own_pipe):
    text, steps = own_pipe.encode_text("a red apple"), []
    options = replace(own_pipe.options, embedding="none")
    result = own_pipe("a red apple", seed=0, options=options, on_step=steps.append, progress=False)
    assert result.image_emb is None and "prior" not in {progress.stage for progress in steps}
    with mock.patch.object(
        own_pipe.decoder, "condition", wraps=own_pipe.decoder.condition
    ) as condition:
        small = own_pipe.decode(None, text, generators=seeded(0))
    assert condition.call_args_list[0].args[2].tolist() == [True]
    assert condition.call_args_list[0].args[3] is None  # drop_text
    assert not torch.allclose(
        small, own_pipe.decode(torch.ones(1, EMB_DIM), text, generators=seeded(0)), atol=1e-3
    )
    pixels = (
        torch.frombuffer(bytearray(result.images[0].tobytes()), dtype=torch.uint8)
        .view(8, 8, 3)
        .permute(2, 0, 1)
    )
    assert (small[0].mul(127.5).add(127.5) - pixels).abs().max() <= 1
    assert own_pipe(["a", "b"], seed=0, options=options, progress=False).pick([1]).image_emb is None
    with pytest.raises(ValueError, match="image_emb and text are both None"):
        own_pipe.decode(None)


def test_model_without_a_prior_generates_from_captions(own_pipe):
    bare = UnCLIPPipeline(own_pipe.clip, None, own_pipe.decoder, [], own_pipe.options)
    assert bare(
        "a fish", seed=0, options=replace(bare.options, embedding="none"), progress=False
    ).images
    with pytest.raises(ValueError, match="the model has no prior"):
        bare("a fish", options=replace(bare.options, embedding="text"), progress=False)


def test_manipulations_reject_options_of_prompts(own_pipe):
    options = replace(own_pipe.options, embedding="none")
    with pytest.raises(ValueError, match="embedding is 'none'"):
        own_pipe.image_to_image(torch.zeros(3, 8, 8), "a fish", options=options, progress=False)
