"""Streams of events."""

from __future__ import annotations

import base64

from api_helpers import edit, error_of, events_of, generate, images_of, vary
from serving_helpers import client, load, opened, png


def test_partial_images_come_from_every_stage(client):
    response = generate(client, stream=True, partial_images=3)
    events = events_of(response)
    kinds = [kind for kind, _ in events]
    assert kinds == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    partials = [fields for _, fields in events[:3]]
    assert [fields["partial_image_index"] for fields in partials] == [0, 1, 2]
    assert [fields["size"] for fields in partials] == ["8x8", "8x8", "16x16"]
    for _, fields in events:
        assert {"created_at", "quality", "background", "output_format"} <= set(fields)
        assert opened(base64.b64decode(fields["b64_json"])).format == "PNG"
    assert events[-1][1]["usage"]["total_tokens"] == 0
    assert ': {"stage": "prior"' in response.text
    assert [base64.b64decode(events[-1][1]["b64_json"])] == images_of(generate(client))


def test_several_images_have_no_partials_unless_they_are_indexed(client):
    events = events_of(generate(client, stream=True, partial_images=2, n=2))
    assert [kind for kind, _ in events] == ["image_generation.completed"] * 2
    indexed = generate(client, stream=True, partial_images=1, n=2, indexed_partials=True)
    events = events_of(indexed)
    assert [fields["image_index"] for _, fields in events] == [0, 1, 0, 1]


def test_streamed_edits_and_variations(client):
    events = events_of(edit(client, stream="true", partial_images="1"))
    assert [kind for kind, _ in events] == ["image_edit.partial_image", "image_edit.completed"]
    events = events_of(vary(client, png(16), stream="true", response_format="url"))
    assert [kind for kind, _ in events] == ["image_variation.completed"]
    assert client.get(events[0][1]["url"]).status_code == 200


def test_errors_before_a_stream_have_their_status(client):
    error_of(generate(client, stream=True, n=99), 400, "n")


def test_an_error_within_a_stream_is_an_event(client):
    response = generate(client, stream=True, model="tiny-dalle", steps=3)
    ((_, fields),) = events_of(response)
    assert "steps" in fields["error"]["message"]
