"""Variations, and mixtures of images."""

from __future__ import annotations

import json

import numpy as np
import pytest
from api_helpers import VARIATIONS, edit, error_of, images_of, vary
from serving_helpers import client, load, opened, pixels, png

import unclip


def test_variations_equal_those_of_the_pipeline(client, tiny_pipe):
    image = png(24)
    results = images_of(vary(client, image, n="2", seed="3"))
    call = dict(num_images=2, seed=3, progress=False)
    expected = tiny_pipe.variations(opened(image), **call).images
    for data, one in zip(results, expected, strict=True):
        assert np.abs(pixels(data) - np.asarray(one).astype(int)).max() <= 2


def test_variations_and_edits_take_prompts(client, tiny_pipe):
    texts = {"prompt": "a red apple", "negative_prompt": "a blue fish"}
    call = {**texts, "seed": 3, "progress": False}
    image = png(16)
    (varied,) = images_of(vary(client, image, seed="3", **texts))
    expected = tiny_pipe.variations(opened(image), **call)
    assert np.abs(pixels(varied) - np.asarray(expected.images[0]).astype(int)).max() <= 2
    (edited,) = images_of(edit(client, image, strength="0.5", **texts))
    emb = expected.metadata[0]["image_emb"]
    body = {"image_embedding": emb, "seed": 3, "response_format": "b64_json", **texts}
    response = client.post(VARIATIONS, json=body)
    assert "x-unclip-ignored" not in response.headers
    assert np.abs(pixels(images_of(response)[0]) - pixels(varied)).max() <= 2
    expected = tiny_pipe.image_to_image(opened(image), strength=0.5, **call).images[0]
    assert np.abs(pixels(edited) - np.asarray(expected).astype(int)).max() <= 2
    response = vary(client, image, model="tiny-dalle", **texts)
    assert "negative_prompt replaces the null of guidance" in error_of(response, 400)
    (fish,) = images_of(vary(client, image, model="tiny-dalle", prompt="a blue fish", seed="3"))
    (plain,) = images_of(vary(client, image, model="tiny-dalle", seed="3"))
    assert (pixels(fish) != pixels(plain)).any()


def test_weights_mix_images(client):
    first, second = png(16, seed=1), png(16, seed=2)
    (only_first,) = images_of(vary(client, first, seed="3"))
    (ends,) = images_of(vary(client, first, second, weights="1,0", seed="3"))
    assert np.abs(pixels(ends) - pixels(only_first)).max() <= 2
    (middle,) = images_of(vary(client, first, second, weights="0.5,0.5", seed="3"))
    assert (pixels(middle) != pixels(ends)).any()
    assert images_of(vary(client, first, second, first, weights="1,1,-0.5", seed="3"))


@pytest.mark.parametrize("weights", ["1", "1,-1", "a,b", "nan,1", "1,2,3"])
def test_invalid_weights(client, weights):
    error_of(vary(client, png(16), png(16), weights=weights), 400, "weights")


def test_a_dalle_varies_images_of_any_size(client):
    (data,) = images_of(vary(client, png(40), model="tiny-dalle", seed="3"))
    assert opened(data).size == (16, 16)
