"""Fields, bodies and routes of all calls: what is rejected, and what is ignored."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest
from api_helpers import (
    EDITS,
    GENERATIONS,
    VARIATIONS,
    encode,
    error_of,
    events_of,
    generate,
    images_of,
    vary,
)
from conftest import TINY_OPTIONS
from scripts import ROOT
from serving_helpers import client, client_of, load, png, serving

import unclip


def test_the_documentation_lists_the_statuses_of_the_schema(client):
    page = (ROOT / "unclip/serving/README.md").read_text()
    listed = page.partition("**Errors**")[2].partition("**Streaming**")[0]
    responses = client.get("/openapi.json").json()["paths"][GENERATIONS]["post"]["responses"]
    assert [status for status in responses if status not in listed] == ["200"]


def test_inapplicable_and_unknown_fields_are_listed(client):
    response = generate(client, quality="hd", style="vivid", background="transparent", user="me")
    assert response.headers["x-unclip-ignored"] == "quality, style, background"
    hostile = generate(client, **{"a\r\nset-cookie: b=c": 1})
    assert "set-cookie" not in hostile.headers
    assert hostile.headers["x-unclip-ignored"].startswith("a??set-cookie")


def test_fields_and_files_that_a_call_does_not_use_are_listed(client):
    form = {"prompt": "a red apple", "response_format": "b64_json"}
    image, mask = ("image.png", png(16), "image/png"), ("mask.png", png(16), "image/png")
    response = client.post(VARIATIONS, data=form, files={"image": image, "mask": mask})
    assert response.headers["x-unclip-ignored"] == "mask"
    response = client.post(GENERATIONS, data=form, files={"image": image})
    assert response.headers["x-unclip-ignored"] == "image"
    emb = base64.b64encode(np.ones(16, "<f4").tobytes()).decode()
    response = generate(client, image_embedding=emb, num_candidates=2, embedding="text")
    assert response.headers["x-unclip-ignored"] == "prompt, num_candidates, embedding"
    files = {"image": image}
    data = {"image_embedding": emb, "weights": "1", "response_format": "b64_json"}
    response = client.post(VARIATIONS, data=data, files=files)
    assert response.headers["x-unclip-ignored"] == "image, weights"


def test_images_that_cannot_be_stored_are_an_error_that_says_so(load, tmp_path, caplog):
    with client_of(load, storage=str(tmp_path / "results")) as client:
        (tmp_path / "results").rmdir()
        response = generate(client, stream=True, response_format="url")
        ((_, fields),) = events_of(response)
        assert fields["error"]["type"] == "server_error"
        assert "could not store the images" in fields["error"]["message"]
        assert "storing_failed" in caplog.text and "FileNotFoundError" in caplog.text
        assert "b64_json" in error_of(generate(client, response_format="url"), 500)
        assert generate(client, response_format="b64_json").status_code == 200


def test_strict_refuses_unknown_fields(load):
    with client_of(load, strict=True) as client:
        message = error_of(generate(client, quality="hd"), 400, "quality", "unknown_parameter")
        assert message == "Unknown parameter: 'quality'."
        assert "longer" in error_of(generate(client, prompt="a" * 1001), 400, "prompt")
        files = {"image": ("image.png", png(kind="JPEG"), "image/png")}
        assert "JPEG" not in error_of(client.post(VARIATIONS, files=files), 400, "image")
        for declared, status in (("image/png", 200), ("application/octet-stream", 400)):
            files = {"image": ("image.png", png(16), declared)}
            response = client.post(VARIATIONS, files=files)
            assert response.status_code == status
        message = error_of(response, 400, "image", "unsupported_file_mimetype")
        assert "'application/octet-stream'" in message
        message = error_of(vary(client, png(16), png(16)), 400, "image", "invalid_type")
        assert "image" in message
        assert generate(client).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"n": 15}, "n", "15 is greater than the maximum of 10 - 'n'"),
        ({"n": 0}, "n", "0 is less than the minimum of 1 - 'n'"),
        ({"n": "two"}, "n", "'n'"),
        ({"n": True}, "n", "'n'"),
        ({"prompt": None}, "prompt", "'prompt' is a required property"),
        ({"prompt": ""}, "prompt", "'' is too short - 'prompt'"),
        ({"prompt": ["a"]}, "prompt", "'prompt'"),
        ({"size": "300x200"}, "size", "'300x200' is not SxS with S from 16 to 2048"),
        ({"size": "9999x9999"}, "size", "'9999x9999' is not SxS with S from 16 to 2048"),
        ({"response_format": "gif"}, "response_format", "'gif'"),
        ({"seed": -1}, "seed", "-1 is less than the minimum of 0 - 'seed'"),
        ({"seed": 2**53}, "seed", "seed"),
        ({"steps": 0}, "steps", "steps"),
        ({"prior_steps": 0}, "prior_steps", "minimum of 1"),
        ({"embedding": "image"}, "embedding", "'image' is not one of"),
        ({"num_candidates": 1, "n": 2}, "num_candidates", "less than 'n'"),
        ({"image_embedding": "!"}, "image_embedding", "base64"),
        ({"image_embedding": [1.0]}, None, "expected 16"),
        ({"image_embedding": [1] * 70_000}, "image_embedding", "maximum of 65536"),
        ({"image_embedding": ["x"]}, "image_embedding", "valid number"),
        ({"image_embedding": [1.0], "layout": "!"}, "layout", "base64"),
        ({"image_embedding": [1.0] * 16, "layout": [1.0]}, None, "samples no layouts"),
    ],
)
def test_invalid_fields(client, fields, param, message):
    assert message in error_of(generate(client, **fields), 400, param)


def test_options_that_a_model_lacks(client):
    assert "steps" in error_of(generate(client, model="tiny-dalle", steps=3), 400, "steps")
    response = client.post(
        EDITS,
        files={"image": png()},
        data={"prompt": "a", "model": "tiny-dalle", "strength": "0.5"},
    )
    assert "send a mask, and no strength" in error_of(response, 400)


@pytest.mark.parametrize(
    "body",
    [
        "",
        "{",
        "[]",
        "3",
        '"a"',
        "[" * 100_000,
        "\xff",
        '{"prompt": "\\ud800"}',
        '{"prompt": "a", "guidance": Infinity}',
    ],
)
def test_malformed_json(client, body):
    response = client.post(
        GENERATIONS, content=body.encode("latin-1"), headers={"content-type": "application/json"}
    )
    error_of(response, 400)


def test_malformed_multipart(client):
    for content, kind in (
        (b"nonsense", "multipart/form-data; boundary=x"),
        (b"nonsense", "multipart/form-data"),
        (b"--x\r\n\r\n--x--", "multipart/form-data; boundary=x"),
        (b"a=b", "application/x-www-form-urlencoded"),
    ):
        response = client.post(EDITS, content=content, headers={"content-type": kind})
        assert response.status_code == 400, response.text
        assert response.json()["error"]["type"] == "invalid_request_error"


def test_unknown_routes_models_and_methods(client):
    error_of(client.get("/v1/nothing"), 404)
    error_of(client.get(GENERATIONS), 405)
    error_of(generate(client, model="gpt-9"), 404, "model", "model_not_found")
    error_of(client.get("/v1/models/gpt-9"), 404, "model", "model_not_found")


@pytest.mark.parametrize(
    "path",
    ["/", "/page/main.js", "/v1/models", "/v1/models/tiny", "/healthz", "/readyz", "/metrics"],
)
def test_head_has_the_status_and_headers_of_get(client, path):
    head, get = client.head(path), client.get(path)
    assert (head.status_code, head.headers["content-type"]) == (200, get.headers["content-type"])


def test_models(client):
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == ["tiny", "tiny-dalle"]
    model = client.get("/v1/models/tiny").json()
    assert (model["object"], model["owned_by"], model["size"]) == ("model", "unclip", 16)
    assert model["steps"] == TINY_OPTIONS.decoder.steps
    assert "edits" in model["operations"]


def test_null_is_a_missing_field_in_json_and_in_forms(client):
    names = ("model", "size", "steps", "guidance", "sampler", "strength", "output_compression")
    image = png(16, "RGBA")
    body = {"prompt": "null", "response_format": "b64_json", "seed": 3}
    in_json = {**body, **dict.fromkeys(names), "image": base64.b64encode(image).decode()}
    in_form = {**body, **dict.fromkeys(names, "null")}
    expected = client.post(EDITS, data=body, files={"image": image})
    for response in (
        client.post(EDITS, json=in_json),
        client.post(EDITS, data=in_form, files={"image": image}),
        client.post(EDITS, data={**in_form, "mask": "null"}, files={"image": image}),
    ):
        assert images_of(response) == images_of(expected)
        assert "x-unclip-ignored" not in response.headers
    assert b'"prompt": "null"' in images_of(expected)[0]
