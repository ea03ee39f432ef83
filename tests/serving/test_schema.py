"""Requests that schemathesis derives from the OpenAPI schema, valid and invalid ones."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from PIL import Image
from serving_helpers import CONFIG, serving

from unclip.serving.app import create_app
from unclip.types import GenerationResult

ERROR_FIELDS = {"message", "type", "param", "code"}


class InstantPipe:
    """A pipeline that generates nothing: black images after one step."""

    def __init__(self, pipe):
        self.kind, self.name, self.options = pipe.kind, pipe.name, pipe.options
        self.decoder, self.upsamplers, self.clip = pipe.decoder, pipe.upsamplers, pipe.clip
        self.encode_image, self.inpainter = pipe.encode_image, pipe.inpainter

    def __call__(self, prompts, *, num_images, seed, **arguments):
        count = len(prompts) * num_images
        images, metadata = [Image.new("RGB", (16, 16))] * count, [{}] * count
        emb = torch.zeros(count, self.clip.emb_dim)
        return GenerationResult(images, seed[:count], [None] * count, emb, metadata)

    def variations(self, *, image_emb, **arguments):
        return self([None] * len(image_emb), **arguments)

    def inpaint(self, images, masks, prompts, **arguments):
        return self([None] * len(images), **arguments)

    def image_to_image(self, images, prompts, **arguments):
        return self([None] * len(images), **arguments)


@pytest.mark.slow
def test_responses_follow_the_schema(tiny_pipe):
    schemathesis = pytest.importorskip("schemathesis")  # which takes seconds
    import hypothesis
    from schemathesis.specs.openapi import checks

    # A schema cannot say that an image must be decodable, or that an edit needs a mask.
    not_expressed = [checks.positive_data_acceptance]
    quick = hypothesis.settings(
        max_examples=15, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    statuses = Counter()

    def check(case):
        response = case.call_and_validate(excluded_checks=not_expressed)
        statuses[response.status_code] += 1
        if response.status_code >= 400:
            assert set(response.json()["error"]) == ERROR_FIELDS

    app = create_app(CONFIG, lambda name, device, dtype: InstantPipe(tiny_pipe))
    with serving(app) as url:
        api = schemathesis.openapi.from_url(f"{url}/openapi.json")
        for found in api.get_all_operations():
            quick(hypothesis.given(case=found.ok().as_strategy())(check))()
    assert statuses[200] >= 3 and statuses[400] > 20, statuses
    assert not set(statuses) & {422, 500}, statuses
