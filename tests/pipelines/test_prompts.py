"""Mixtures of prompts and negative prompts."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from unclip.pipelines.provenance import regenerate
from unclip.pipelines.request import PromptBatch, describe_prompt, generators_from
from unclip.types import StageOptions

APPLE, FISH = "a red apple", "a blue fish"


def difference(a, b) -> int:
    return int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max())


@pytest.fixture
def generate(invertible_pipe):
    return lambda *args, **kwargs: invertible_pipe(*args, seed=1, progress=False, **kwargs)


# -- words


def test_texts_of_mixtures_are_ordered_by_position():
    batch = PromptBatch.of([{APPLE: 3, FISH: 1}, "a cat", {"x": 1, "y": 1, "z": 2}])
    assert batch.texts == [APPLE, "a cat", "x", FISH, "a cat", "y", APPLE, "a cat", "z"]
    expected = torch.tensor([[0.75, 1.0, 0.25], [0.25, 0.0, 0.25], [0.0, 0.0, 0.5]])
    torch.testing.assert_close(batch.weights, expected)
    assert batch[1:2].texts == ["a cat"] and batch[1:2].weights is None
    assert [describe_prompt(prompt) for prompt in batch.prompts[:2]] == [
        f"3 {APPLE} + 1 {FISH}",
        "a cat",
    ]


@pytest.mark.parametrize("weight", [np.float32(2), np.int64(2), Fraction(2)])
def test_weights_are_any_real_numbers(weight):
    assert PromptBatch.of({APPLE: weight}).metadata() == [{"prompt": {APPLE: 2.0}}]


def test_negative_prompts_are_shared_or_one_for_each():
    assert PromptBatch.of([APPLE, FISH], "grey").negative == ["grey", "grey"]
    assert PromptBatch.of([APPLE, FISH], ["a", "b"])[1:].negative == ["b"]
    assert PromptBatch.of(APPLE).metadata() == [{"prompt": APPLE}]
    assert PromptBatch.of({APPLE: 1}, "grey").metadata() == [
        {"prompt": {APPLE: 1.0}, "negative_prompt": "grey"}
    ]


@pytest.mark.parametrize(
    ("prompt", "negative", "message"),
    [
        ({}, None, "list of prompts is empty"),
        ({"a": 0}, None, "weights of the mixture are"),
        ({"a": 1, "b": -2}, None, "a sum above 0"),
        ({"a": float("nan")}, None, "expected numbers"),
        ({"a": "much"}, None, "expected numbers"),
        ({"a": True}, None, "expected numbers"),
        ({1: 1}, None, "prompt 0 is 1"),
        ([{"a": 1}, 3], None, "prompt 1 is 3, of type int"),
        ([["a", "b"], {"c": 1}], None, r"prompt 0 is \['a', 'b'\], of type list; expected"),
        ("a", ["b", "c"], "2 negative prompts for 1 prompts"),
        ("a", 5, "prompt is of type int"),
    ],
)
def test_invalid_prompts_are_rejected(prompt, negative, message):
    with pytest.raises(ValueError, match=message):
        PromptBatch.of(prompt, negative)


# -- arithmetic


def test_the_prior_mixes_predictions(invertible_pipe):
    """After one step from the same noise, the embedding is the mean of both prompts' embeddings."""
    options = StageOptions(steps=1, guidance=2.0)

    def emb(texts, weights=None):
        text = invertible_pipe.encode_text(texts)
        generated = {
            "generators": generators_from([3]),
            "options": options,
            "candidates": 1,
            "weights": weights,
        }
        return invertible_pipe.sample_prior(text, **generated)

    mixed = emb([APPLE, FISH], torch.tensor([[0.25], [0.75]]))
    torch.testing.assert_close(mixed, 0.25 * emb([APPLE]) + 0.75 * emb([FISH]))


def test_the_decoder_mixes_predictions(invertible_pipe):
    options, image_emb = StageOptions(steps=1, guidance=2.0), torch.ones(1, 16)

    def photo(texts, weights=None):
        text = invertible_pipe.encode_text(texts)
        generated = {"generators": generators_from([3]), "options": options, "weights": weights}
        return invertible_pipe.decode(image_emb, text, **generated)

    mixed = photo([APPLE, FISH], torch.tensor([[0.25], [0.75]]))
    expected = 0.25 * photo([APPLE]) + 0.75 * photo([FISH])
    inside = expected.abs() < 0.99  # elsewhere estimates are clipped
    torch.testing.assert_close(mixed[inside], expected[inside], rtol=0, atol=1e-4)
    assert inside.any()


# -- images


def test_a_mixture_of_one_equals_the_prompt(generate):
    plain = generate([APPLE, FISH])
    for prompts in ([{APPLE: 5.0}, FISH], [{APPLE: 1.0, FISH: 0.0}, FISH]):
        mixed = generate(prompts)
        assert max(difference(*pair) for pair in zip(plain.images, mixed.images, strict=True)) <= 2
    assert mixed.prompts == [f"1 {APPLE} + 0 {FISH}", FISH]


def test_mixtures_do_not_depend_on_the_batch_and_are_regenerated(generate, invertible_pipe):
    mixture = {APPLE: 1.0, FISH: 1.0}
    together = generate([mixture, FISH], num_images=3, negative_prompt="an apple")
    assert difference(together.images[0], generate(APPLE).images[0]) > 0
    alone = generate([mixture, FISH], num_images=3, negative_prompt="an apple", batch_size=2)
    assert max(difference(*pair) for pair in zip(together.images, alone.images, strict=True)) <= 2
    for k in (1, 4):
        again = regenerate(invertible_pipe, together.metadata[k], progress=False)
        assert difference(again.images[0], together.images[k]) <= 2
    assert (
        together.metadata[1]["prompt"] == mixture
        and together.metadata[1]["negative_prompt"] == "an apple"
    )


def test_the_negative_prompt_replaces_the_null(generate, invertible_pipe):
    plain = generate(APPLE)
    assert difference(generate(APPLE, negative_prompt=FISH).images[0], plain.images[0]) > 0
    options = invertible_pipe.options
    for stage in ("prior", "decoder"):
        other = "decoder" if stage == "prior" else "prior"
        guided = replace(options, **{other: replace(getattr(options, other), guidance=1.0)})
        with_negative = generate(APPLE, negative_prompt=FISH, options=guided)
        assert difference(with_negative.images[0], generate(APPLE, options=guided).images[0]) > 0, (
            stage
        )


def test_a_negative_prompt_equal_to_the_prompt_cancels_guidance(invertible_pipe):
    """cond + (scale − 1) (cond − negative) is cond where both are the same."""
    text = invertible_pipe.encode_text(APPLE)

    def emb(guidance, negative=None):
        options = StageOptions(steps=3, guidance=guidance)
        generated = {"generators": generators_from([3]), "options": options, "negative": negative}
        return invertible_pipe.sample_prior(text, **generated)

    torch.testing.assert_close(emb(5.0, text), emb(1.0), rtol=1e-4, atol=1e-4)


def test_the_number_of_negative_texts_is_checked(invertible_pipe):
    texts, two = (invertible_pipe.encode_text([APPLE] * n) for n in (4, 2))
    with pytest.raises(ValueError, match="2 negative texts for 4 texts; expected 1 or 4"):
        invertible_pipe.sample_prior(texts, negative=two)
    with pytest.raises(ValueError, match="2 negative texts for 4 images; expected 4"):
        invertible_pipe.decode(texts.emb, texts, negative=two)


def test_a_negative_prompt_without_guidance_is_rejected(generate, invertible_pipe):
    options = invertible_pipe.options
    stages = {
        stage: replace(getattr(options, stage), guidance=1.0) for stage in ("prior", "decoder")
    }
    with pytest.raises(ValueError, match="guidance is 1 in prior and decoder"):
        generate(APPLE, negative_prompt=FISH, options=replace(options, **stages))
    for embedding in ("text", "none"):  # which do not use the prior
        unguided = replace(options, decoder=stages["decoder"], embedding=embedding)
        with pytest.raises(ValueError, match="guidance is 1 in decoder; set it higher in decoder"):
            generate(APPLE, negative_prompt=FISH, options=unguided)
