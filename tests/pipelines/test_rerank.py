"""Selection of the best candidates, for every kind of model and batch size."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from unclip.embeddings import normalise
from unclip.models.dalle.sampling import sample_codes
from unclip.pipelines import rerank
from unclip.pipelines.dalle.pipeline import DallePipeline
from unclip.pipelines.provenance import regenerate
from unclip.pipelines.rerank import BestOf, clip_scores
from unclip.types import CodeOptions, GenerationResult

PROMPTS = ["a red apple", "a blue fish"]


@pytest.fixture(params=["unclip", "dalle"])
def pipe(request, tiny_pipe, tiny_dalle):
    return {"unclip": tiny_pipe, "dalle": tiny_dalle}[request.param]


def cosines(pipe, images: list[Image.Image], prompt: str) -> torch.Tensor:
    text, image = pipe.clip.encode_text([prompt]).emb, pipe.clip.encode_image(images)
    return torch.cosine_similarity(text, image)


def test_the_best_of_all_candidates_are_kept(pipe):
    every = pipe(PROMPTS, num_images=7, seed=3, progress=False)
    kept = pipe(PROMPTS, num_candidates=7, num_images=3, seed=3, progress=False)
    assert kept.prompts == [PROMPTS[0]] * 3 + [PROMPTS[1]] * 3
    for p, prompt in enumerate(PROMPTS):
        scores = cosines(pipe, every.images[7 * p : 7 * p + 7], prompt)
        best = scores.argsort(descending=True)[:3]
        assert kept.seeds[3 * p : 3 * p + 3] == [3 + 7 * p + k for k in best.tolist()]
        assert kept.scores[3 * p : 3 * p + 3] == pytest.approx(scores[best].tolist(), abs=1e-5)
    assert len(kept.metadata) == len(kept.images) == 6
    assert [(entry["seed"], entry["candidates"]) for entry in kept.metadata] == [
        (seed, 7) for seed in kept.seeds
    ]
    assert [entry["score"] for entry in kept.metadata] == kept.scores


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_candidates_do_not_depend_on_the_batch(pipe, batch_size):
    drawing = {"num_candidates": 5, "num_images": 2, "seed": 0, "progress": False}
    together, apart = pipe(PROMPTS, **drawing), pipe(PROMPTS, batch_size=batch_size, **drawing)
    assert apart.seeds == together.seeds and apart.scores == pytest.approx(
        together.scores, abs=1e-3
    )


def test_the_best_image_equals_its_seed_alone(pipe):
    kept = pipe(PROMPTS, num_candidates=6, seed=0, progress=False)
    for k, prompt in enumerate(PROMPTS):
        alone = pipe(prompt, seed=kept.seeds[k], progress=False)
        assert cosines(pipe, alone.images, prompt).item() == pytest.approx(kept.scores[k], abs=1e-3)
        again = regenerate(pipe, kept.metadata[k], progress=False)
        assert (
            again.seeds == [kept.seeds[k]]
            and again.images[0].tobytes() == alone.images[0].tobytes()
        )


def test_scores_increase_with_candidates(pipe):
    scores = [
        pipe(PROMPTS[0], num_candidates=n, seed=0, progress=False).scores[0] for n in (1, 4, 16)
    ]
    assert scores[0] <= scores[1] <= scores[2] and scores[0] < scores[2]


def test_candidates_equal_to_images_are_sorted(pipe):
    every = pipe(PROMPTS[0], num_images=4, seed=0, progress=False)
    kept = pipe(PROMPTS[0], num_candidates=4, num_images=4, seed=0, progress=False)
    assert sorted(kept.seeds) == every.seeds and kept.scores == sorted(kept.scores, reverse=True)
    assert every.scores is None


def test_results_stay_aligned_with_their_images(tiny_pipe, tiny_dalle):
    kept = tiny_pipe(PROMPTS[0], num_candidates=6, num_images=2, seed=0, progress=False)
    every = tiny_pipe(PROMPTS[0], num_images=6, seed=0, progress=False)
    torch.testing.assert_close(kept.image_emb, every.image_emb[kept.seeds])
    kept = tiny_dalle(PROMPTS[0], num_candidates=6, num_images=2, seed=0, progress=False)
    every = tiny_dalle(PROMPTS[0], num_images=6, seed=0, progress=False)
    assert torch.equal(kept.codes, every.codes[kept.seeds])
    assert [image.tobytes() for image in kept.images] == [
        every.images[seed].tobytes() for seed in kept.seeds
    ]


def test_completions_are_ranked(tiny_dalle):
    photo = tiny_dalle(PROMPTS[1], seed=1, progress=False).images[0]
    drawing = {"keep": 0.5, "seed": 0, "progress": False}
    every = tiny_dalle.complete(photo, PROMPTS[0], num_images=5, **drawing)
    kept = tiny_dalle.complete(photo, PROMPTS[0], num_candidates=5, **drawing)
    assert kept.seeds == [int(cosines(tiny_dalle, every.images, PROMPTS[0]).argmax())]
    assert (
        regenerate(tiny_dalle, kept.metadata[0], progress=False).images[0].tobytes()
        == kept.images[0].tobytes()
    )


def test_a_mixture_is_scored_by_all_its_texts(tiny_pipe):
    mixture = {"a red apple": 3.0, "a blue fish": 1.0}
    kept = tiny_pipe([mixture, "a fish"], num_candidates=3, seed=0, progress=False)
    every = tiny_pipe([mixture, "a fish"], num_images=3, seed=0, progress=False)
    emb = tiny_pipe.clip.encode_text(list(mixture)).emb
    scores = torch.cosine_similarity(
        0.75 * emb[:1] + 0.25 * emb[1:], tiny_pipe.clip.encode_image(every.images[:3])
    )
    assert kept.scores[0] == pytest.approx(scores.max().item(), abs=1e-5)


def test_only_a_batch_and_the_best_images_are_in_memory(monkeypatch):
    """Seven candidates of two prompts each, in batches of four across prompts, with ties."""
    emb = torch.nn.functional.normalize(
        torch.randn(14, 8, generator=torch.Generator().manual_seed(0)), dim=1
    )
    emb[3] = emb[2]
    text, alive = emb[[2, 9]], []

    def batches():
        for start in range(0, 14, 4):
            seeds = list(range(start, min(start + 4, 14)))
            images = [Image.new("L", (1, 1), seed) for seed in seeds]
            yield GenerationResult(
                images, seeds, ["a"] * len(seeds), metadata=[{"seed": seed} for seed in seeds]
            )

    def encode(images):
        alive.append(len(images))
        return 5 * emb[[image.getpixel((0, 0)) for image in images]]

    monkeypatch.setattr(rerank, "CHUNK", 3)
    best = BestOf(encode, 2 * text, 2, 7)
    for batch in batches():
        best.add(batch)
    result = best.result()
    assert result.seeds[:2] == [2, 3] and result.seeds[2] == 9  # the first of equal scores
    assert result.scores[:2] == pytest.approx([1, 1]) and max(alive) == 3
    expected = (normalise(emb[7:]) @ text[1]).argsort(descending=True)[:2] + 7
    assert result.seeds[2:] == expected.tolist()


def test_scores_are_cosines(tiny_dalle):
    images = tiny_dalle(PROMPTS, seed=0, progress=False).images
    text = tiny_dalle.clip.encode_text(PROMPTS).emb
    expected = torch.cosine_similarity(text, tiny_dalle.clip.encode_image(images)).tolist()
    assert clip_scores(tiny_dalle.clip.encode_image, images, 3 * text) == pytest.approx(
        expected, abs=1e-5
    )


def test_ranking_with_offloaded_networks(tiny_pipe):
    import copy

    pipe = copy.deepcopy(tiny_pipe).offload()
    kept = pipe(PROMPTS, num_candidates=4, batch_size=3, seed=0, progress=False)
    assert (
        kept.seeds
        == tiny_pipe(PROMPTS, num_candidates=4, batch_size=3, seed=0, progress=False).seeds
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_candidates": 0}, "num_candidates is 0; expected a whole number of at least 1"),
        (
            {"num_candidates": 3, "num_images": 4},
            "num_candidates is 3; expected at least num_images, which is 4",
        ),
        ({"num_candidates": 2.5}, "num_candidates is 2.5; expected a whole number"),
        ({"num_candidates": 4, "num_images": 0}, "num_images is 0"),
    ],
)
def test_invalid_numbers_of_candidates_are_rejected(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe("a red apple", **arguments)


def test_each_image_is_the_best_of_its_own_candidates(tiny_dalle):
    """As if its generator had sampled K images and CLIP had chosen one; alone or in a batch."""
    options = CodeOptions(candidates=3)
    prompts = ["a red apple", "a blue fish"]
    both = tiny_dalle(prompts, num_images=2, seed=5, options=options, progress=False)
    assert len(both) == 4 and both.scores is None
    assert both.metadata[0]["options"]["candidates"] == 3
    for k, seed in enumerate(both.seeds):
        prompt = both.prompts[k]
        alone = tiny_dalle(prompt, seed=seed, options=options, batch_size=1, progress=False)
        assert torch.equal(alone.codes[0], both.codes[k])
        prefix = tiny_dalle.dalle.condition(tiny_dalle._tokens([prompt])).repeat_interleave(3)
        generator = torch.Generator().manual_seed(seed)
        codes = sample_codes(tiny_dalle.dalle, prefix, [generator] * 3, options)
        images = tiny_dalle.decode(codes)
        text_emb = tiny_dalle.clip.encode_text([prompt]).emb.expand(3, -1)
        scores = clip_scores(tiny_dalle.clip.encode_image, images, text_emb)
        assert torch.equal(codes[scores.index(max(scores))], both.codes[k])
    assert any(
        not torch.equal(codes, both.codes[k])
        for k, codes in enumerate(tiny_dalle(prompts, num_images=2, seed=5, progress=False).codes)
    )


def test_candidates_of_options_need_a_prompt_and_a_clip(tiny_dalle):
    options, calls = CodeOptions(candidates=2), []
    photo = tiny_dalle("a fish", seed=0, progress=False).images[0]
    one = tiny_dalle.complete(photo, seed=0, progress=False)
    same = tiny_dalle.complete(photo, seed=0, options=options, progress=False)
    assert torch.equal(one.codes, same.codes)  # nothing to compare with

    def drop_first(progress):
        calls.append(progress.preview)
        progress.dropped.add(0)

    kept = tiny_dalle("a fish", num_images=2, seed=0, options=options, on_step=drop_first)
    whole = tiny_dalle("a fish", num_images=2, seed=0, options=options, progress=False)
    assert torch.equal(kept.codes[1], whole.codes[1])
    assert not torch.equal(kept.codes[0], whole.codes[0])
    assert {len(preview) for preview in calls if preview is not None} == {2}  # one for each image
    counted = tiny_dalle("a fish", seed=0, num_candidates=2, options=options, progress=False)
    plain = tiny_dalle("a fish", seed=0, num_candidates=2, progress=False)
    assert torch.equal(counted.codes, plain.codes)  # num_candidates replaces the option
    parts = tiny_dalle.tokenizer, tiny_dalle.codec, tiny_dalle.dalle
    with pytest.raises(ValueError, match="candidates is 2; expected 1, because blind has no CLIP"):
        DallePipeline(*parts, name="blind")("a fish", options=options, progress=False)
