"""Generations: their images, fields, formats and sizes."""

from __future__ import annotations

import base64
import json
from dataclasses import replace

import numpy as np
import pytest
from api_helpers import GENERATIONS, VARIATIONS, error_of, generate, images_of
from PIL import Image
from serving_helpers import client, client_of, load, opened, pixels, png

import unclip
from unclip.image_io import read_metadata, read_source_type


def test_images_equal_those_of_the_pipeline(client, tiny_pipe):
    response = generate(client, n=2)
    expected = tiny_pipe("a red apple", num_images=2, seed=3, progress=False)
    for data, image in zip(images_of(response), expected.images, strict=True):
        assert (pixels(data) == np.asarray(image)).all()
    assert [entry["seed"] for entry in response.json()["data"]] == [3, 4]
    assert response.headers["x-unclip-model"] == "tiny"
    assert response.headers["openai-version"] == "2020-10-01"
    assert int(response.headers["openai-processing-ms"]) >= 0


def test_results_are_fetched_by_url(client):
    body = {"prompt": "a red apple", "n": 2}
    urls = [entry["url"] for entry in client.post(GENERATIONS, json=body).json()["data"]]
    assert len(set(urls)) == 2
    for url in urls:
        assert url.startswith("http://127.0.0.1/v1/files/")
        found = client.get(url)
        assert found.headers["content-type"] == "image/png"
        assert opened(found.content).size == (16, 16)


@pytest.mark.parametrize("model", [None, "auto", "dall-e-2", "tiny"])
def test_the_first_model_is_the_default(client, model):
    assert generate(client, model=model).headers["x-unclip-model"] == "tiny"


def test_another_model_is_chosen_by_name(client, tiny_dalle):
    (data,) = images_of(generate(client, model="tiny-dalle", guidance=1.5))
    options = {**vars(tiny_dalle.options), "guidance": 1.5}
    options = type(tiny_dalle.options)(**options)
    (image,) = tiny_dalle("a red apple", seed=3, options=options, progress=False).images
    assert (pixels(data) == np.asarray(image)).all()


def test_extensions_change_the_image(client):
    (plain,) = images_of(generate(client))
    for fields in (
        {"steps": 2},
        {"guidance": 1},
        {"sampler": "ancestral"},
        {"negative_prompt": "a blue fish"},
        {"seed": 4},
    ):
        (changed,) = images_of(generate(client, **fields))
        assert (pixels(changed) != pixels(plain)).any(), fields


def test_the_prior_and_its_use_are_chosen(client, tiny_pipe):
    base = tiny_pipe.options
    prior = replace(base.prior.with_steps(3), guidance=1.5)
    for fields, options in (
        ({"embedding": "text"}, replace(base, embedding="text")),
        (
            {"prior_steps": 3, "prior_guidance": 1.5, "prior_candidates": 3, "steps": 2},
            replace(base, prior=prior, prior_candidates=3, decoder=base.decoder.with_steps(2)),
        ),
    ):
        (data,) = images_of(generate(client, **fields))
        (image,) = tiny_pipe("a red apple", seed=3, options=options, progress=False).images
        assert (pixels(data) == np.asarray(image)).all(), fields
    message = error_of(generate(client, model="tiny-dalle", prior_steps=3), 400, "prior_steps")
    assert "tiny-dalle is of kind dalle, which has no prior_steps" in message


def test_the_best_candidates_are_kept(client, tiny_pipe):
    response = generate(client, n=2, num_candidates=4)
    call = dict(num_images=2, num_candidates=4, seed=3, progress=False)
    expected = tiny_pipe("a red apple", **call)
    for data, image in zip(images_of(response), expected.images, strict=True):
        assert (pixels(data) == np.asarray(image)).all()
    assert [entry["score"] for entry in response.json()["data"]] == expected.scores


def test_an_embedding_can_be_returned_and_decoded(client):
    first = generate(client, return_embedding=True)
    text = first.json()["data"][0]["image_embedding"]
    numbers = np.frombuffer(base64.b64decode(text), "<f4").tolist()
    (again,) = images_of(generate(client, image_embedding=text, prompt=None))
    (by_list,) = images_of(
        client.post(
            VARIATIONS,
            json={"image_embedding": numbers, "response_format": "b64_json", "seed": 3},
        )
    )
    assert (pixels(again) == pixels(by_list)).all()
    assert "seed" in first.json()["data"][0]


def test_a_variation_is_repeated_from_its_embedding_and_layout():
    pipe = unclip.load("emoji")
    steps = replace(pipe.options, decoder=replace(pipe.options.decoder, steps=2))
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    variation = pipe.variations(noise, seed=3, options=steps, progress=False)
    entry = variation.metadata[0]
    fields = {"image_embedding": entry["image_emb"], "steps": 2, "model": "emoji"}
    with client_of(lambda *_: pipe, models=("emoji",)) as client:
        (again,) = images_of(generate(client, layout=entry["layout"], **fields))
        (without,) = images_of(generate(client, **fields))
        response = generate(client, layout=[0.5], **fields)
        assert "expected (1, 3, 16, 16)" in error_of(response, 400)
        assert generate(client, layout=[0.5], steps=1).headers["x-unclip-ignored"] == "layout"
    assert (pixels(again) == np.asarray(variation.images[0])).all()
    assert (pixels(without) != pixels(again)).any()


def test_other_sizes_are_resized_with_a_note(client):
    response = generate(client, size="64x64")
    (data,) = images_of(response)
    assert opened(data).size == (64, 64)
    assert "16x16" in response.headers["x-unclip-note"]
    assert "64x64" in response.headers["x-unclip-note"]
    assert "x-unclip-note" not in generate(client, size="auto").headers


@pytest.mark.parametrize(("kind", "name"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_output_formats_carry_provenance(client, kind, name, tmp_path):
    fields = {} if kind == "png" else {"output_compression": 80}
    (data,) = images_of(generate(client, output_format=kind, **fields))
    file = tmp_path / f"image.{kind}"
    file.write_bytes(data)
    assert opened(data).format == name
    (entry,) = read_metadata(file)
    assert (entry["prompt"], entry["seed"]) == ("a red apple", 3)
    assert read_source_type(file) == "trainedAlgorithmicMedia"


@pytest.mark.parametrize("kind", ["gif", "svg"])
def test_formats_of_newer_models_give_a_png(client, kind):
    response = generate(client, output_format=kind, output_compression=80)
    (data,) = images_of(response)
    assert opened(data).format == "PNG"
    assert response.headers["x-unclip-ignored"] == "output_format, output_compression"


def test_metadata_can_be_turned_off(load, tmp_path):
    with client_of(load, metadata=False) as client:
        (data,) = images_of(generate(client))
    (tmp_path / "image.png").write_bytes(data)
    assert b"red apple" not in data
    with pytest.raises(ValueError):
        read_metadata(tmp_path / "image.png")
    assert read_source_type(tmp_path / "image.png") == "trainedAlgorithmicMedia"


def test_listed_samplers_are_accepted(client):
    samplers = client.get("/v1/models/tiny").json()["samplers"]
    assert {"ddim", "unipc"} <= {*samplers}
    for sampler in samplers:
        assert len(images_of(generate(client, sampler=sampler))) == 1


def test_options_of_all_stages_are_applied_before_the_other_fields(client, tiny_pipe, tmp_path):
    usual = tiny_pipe.options
    options = {"prior": {"sampler": "unipc"}, "decoder": {"steps": 2}, "upsamplers": [{"steps": 3}]}
    wanted = replace(
        usual,
        prior=replace(usual.prior, sampler="unipc"),
        decoder=usual.decoder.with_steps(4),
        upsamplers=(usual.upsamplers[0].with_steps(3),),
    )
    expected = tiny_pipe("a red apple", seed=3, options=wanted, progress=False).images[0]
    (image,) = images_of(generate(client, steps=4, options=options))
    assert (pixels(image) == np.asarray(expected)).all()
    form = {"options": json.dumps(options), "response_format": "b64_json"}
    (image,) = images_of(client.post(VARIATIONS, data=form, files={"image": png()}))
    (tmp_path / "varied.png").write_bytes(image)
    (entry,) = read_metadata(tmp_path / "varied.png")
    assert entry["options"]["upsamplers"][0]["steps"] == 3
    assert entry["options"]["decoder"]["steps"] == 2


@pytest.mark.parametrize(
    ("model", "options", "facts"),
    [
        ("tiny", "not JSON", ("'options'",)),
        ("tiny", [1], ("'options'",)),
        ("tiny", {"a": "b" * 70_000}, ("70", "65536", "'options'")),
        ("tiny", {"decoder": {"stepz": 2}}, ("options", "decoder.stepz", "steps")),
        ("tiny", {"decoder": 3}, ("options", "decoder")),
        ("tiny", {"decoder": {"steps": 0}}, ("options", "steps", "0")),
        ("tiny", {"upsamplers": [{"steps": 1001}]}, ("steps is 1001", "1000")),
        ("tiny", {"upsamplers": [{"steps": 2}] * 3}, ("upsamplers", "3")),
        ("tiny", {"prior": {"sampler": ["x"]}}, ("sampler", "['x']", "ddim")),
        ("tiny", {"prior_candidates": 65}, ("prior_candidates is 65", "64")),
        ("tiny-dalle", {"candidates": 10**9}, ("candidates is 1000000000", "64")),
        ("tiny-dalle", {"decoder": {"steps": 2}}, ("options", "decoder")),
        ("tiny", {"painting": {"resamples": 2}}, ("options", "painting")),
    ],
)
def test_wrong_options_are_rejected(client, model, options, facts):
    response = generate(client, model=model, options=options)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == "options"
    assert all(fact in error["message"] for fact in facts), error
