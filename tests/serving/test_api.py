"""The three calls, their fields, their responses and their errors."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import TINY_OPTIONS
from PIL import Image
from scripts import ROOT
from serving_helpers import CONFIG, client, client_of, load, opened, pixels, png

import unclip
from unclip.config import to_dict
from unclip.diffusion.repaint import PaintOptions
from unclip.image_io import read_metadata, read_source_type

GENERATIONS, EDITS, VARIATIONS = (
    f"/v1/images/{name}" for name in ("generations", "edits", "variations")
)


def test_the_documentation_lists_the_statuses_of_the_schema(client):
    page = (ROOT / "unclip/serving/README.md").read_text()
    listed = page.partition("**Errors**")[2].partition("**Streaming**")[0]
    responses = client.get("/openapi.json").json()["paths"][GENERATIONS]["post"]["responses"]
    assert [status for status in responses if status not in listed] == ["200"]


def images_of(response):
    assert response.status_code == 200, response.text
    return [base64.b64decode(entry["b64_json"]) for entry in response.json()["data"]]


def generate(client, **fields):
    body = {"prompt": "a red apple", "response_format": "b64_json", "seed": 3, **fields}
    return client.post(GENERATIONS, json=body)


def error_of(response, status, param=None, code=None):
    """Return the message, after checking everything else of an error."""
    assert response.status_code == status, response.text
    assert response.headers["x-request-id"].startswith("req_")
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["code"]) == (param, code)
    return error["message"]


def events_of(response):
    """Return the events of a stream as (kind, fields)."""
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    assert not any(line.startswith(("id:", "retry:")) for line in response.text.splitlines())
    events = []
    for block in response.text.strip().split("\n\n"):
        lines = [line for line in block.splitlines() if not line.startswith(":")]
        if lines:
            kind = lines[0].removeprefix("event: ")
            events.append((kind, json.loads(lines[-1].removeprefix("data: "))))
    return events


# -- generations


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


def test_listed_samplers_are_accepted(client):
    samplers = client.get("/v1/models/tiny").json()["samplers"]
    assert {"ddim", "unipc"} <= {*samplers}
    for sampler in samplers:
        assert len(images_of(generate(client, sampler=sampler))) == 1


# -- edits


def edit(client, image=None, mask=None, **fields):
    files = {"image": png(mode="RGBA") if image is None else image}
    files |= {} if mask is None else {"mask": mask}
    data = {"prompt": "a red apple", "response_format": "b64_json", "seed": "3", **fields}
    return client.post(EDITS, files=files, data=data)


@pytest.mark.parametrize("size", [16, 24, 40])
def test_kept_pixels_equal_the_upload(client, size):
    image = png(size)
    results = images_of(edit(client, image, png(size, "RGBA"), n="2"))
    assert len(results) == 2
    for data in results:
        assert opened(data).size == (size, size)
        assert (pixels(data)[size // 2 :] == pixels(image)[size // 2 :]).all()
        assert (pixels(data)[: size // 2] != pixels(image)[: size // 2]).any()


def test_the_images_own_alpha_is_the_mask(client):
    image = png(16, "RGBA")
    (data,) = images_of(edit(client, image))
    (masked,) = images_of(edit(client, png(16), image))
    assert (pixels(data)[8:] == pixels(image)[8:]).all()
    assert (pixels(masked)[8:] == pixels(image)[8:]).all()


def test_a_mask_of_16_bits_is_split_at_mid_grey(client):
    pixels_16 = np.full((16, 16), 600, np.uint16)  # nearly black
    pixels_16[:8] = 2**15 + 600
    file = io.BytesIO()
    Image.fromarray(pixels_16).save(file, "PNG")
    (data,) = images_of(edit(client, png(16), file.getvalue()))
    assert (pixels(data)[8:] == pixels(png(16))[8:]).all()
    assert (pixels(data)[:8] != pixels(png(16))[:8]).any()


@pytest.mark.parametrize("size", [16, 40])
def test_a_dalle_inpaints(client, tiny_dalle, size):
    image, mask = png(size), png(size, "RGBA", seed=1)
    data = images_of(edit(client, image, mask, model="tiny-dalle", n="2", strength="1"))
    hole = Image.new("L", (size, size))
    hole.paste(255, (0, 0, size, size // 2))
    call = {"num_images": 2, "seed": 3, "progress": False}
    expected = tiny_dalle.inpaint(opened(image), hole, "a red apple", **call)
    for one, same_seed in zip(data, expected.images, strict=True):
        assert (pixels(one) == np.asarray(same_seed)).all()
        assert (pixels(one)[size // 2 :] == pixels(image)[size // 2 :]).all()


def test_json_edits_take_data_urls(client):
    encoded = base64.b64encode(png(16, "RGBA")).decode()
    body = {"prompt": "a red apple", "response_format": "b64_json", "seed": 3}
    expected = images_of(edit(client))
    for image in (
        {"image": f"data:image/png;base64,{encoded}"},
        {"image": encoded},
        {"images": [{"image_url": f"data:image/png;base64,{encoded}"}]},
    ):
        assert images_of(client.post(EDITS, json={**body, **image})) == expected


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


def test_strength_without_a_mask_changes_the_whole_image(client, tiny_pipe):
    (data,) = images_of(edit(client, png(16), strength="0.5"))
    image = opened(png(16))
    call = dict(strength=0.5, seed=3, progress=False)
    (expected,) = tiny_pipe.image_to_image(image, "a red apple", **call).images
    assert (pixels(data) == np.asarray(expected)).all()


def encode(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_an_opaque_alpha_channel_is_no_mask(client):
    white = Image.new("L", (16, 16))
    white.paste(255, (0, 0, 8, 16))
    (data,) = images_of(edit(client, png(16), encode(white.convert("RGBA"))))
    assert [data] == images_of(edit(client, png(16), encode(white)))
    assert (pixels(data)[:, :8] != pixels(png(16))[:, :8]).any()
    opaque = encode(opened(png(16)).convert("RGBA"))
    (data,) = images_of(edit(client, opaque, strength="0.5"))
    (expected,) = images_of(edit(client, png(16), strength="0.5"))
    assert (pixels(data) == pixels(expected)).all()
    assert "no transparent pixels" in error_of(edit(client, opaque), 400, "image")


@pytest.mark.parametrize(
    ("image", "mask", "param", "message"),
    [
        (png(16), None, "image", "got RGB"),
        (png(16), png(24, "RGBA"), "mask", "same size"),
        (b"GIF89a", None, "image", "PNG"),
        (b"", None, "image", "PNG"),
        (png(16)[:60], png(16, "RGBA"), "image", "damaged"),
        (png(16), b"nonsense", "mask", "PNG"),
    ],
)
def test_invalid_images(client, image, mask, param, message):
    assert message in error_of(edit(client, image, mask), 400, param)


def test_missing_image_and_prompt(client):
    error_of(client.post(EDITS, data={"prompt": "a"}, files={"x": b"y"}), 400, "image")
    error_of(client.post(EDITS, files={"image": png(mode="RGBA")}), 400, "prompt")
    error_of(client.post(VARIATIONS, json={}), 400, "image")


# -- variations


def vary(client, *images, **fields):
    files = [("image" if len(images) == 1 else "image[]", image) for image in images]
    return client.post(VARIATIONS, files=files, data={"response_format": "b64_json", **fields})


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


# -- streams


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


# -- images in the metadata


def test_uploads_are_not_written_into_results(client, tmp_path):
    (data,) = images_of(edit(client))
    (tmp_path / "image.png").write_bytes(data)
    (entry,) = read_metadata(tmp_path / "image.png")
    assert entry["operation"] == "inpaint"
    assert entry["picture"] is None and entry["mask"] is None
    assert CONFIG.metadata


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


def test_painting_options_are_among_those_of_an_edit(client, tiny_pipe):
    image, mask = png(16), png(16, "RGBA")
    options = json.dumps({"painting": {"resamples": 2, "strength": 0.5}, "decoder": {"steps": 2}})
    (data,) = images_of(edit(client, image, mask, options=options, strength="0.8"))
    hole = Image.new("L", (16, 16))
    hole.paste(255, (0, 0, 16, 8))
    usual, painting = tiny_pipe.options, PaintOptions(resamples=2, strength=0.8)
    call = {"options": replace(usual, decoder=usual.decoder.with_steps(2)), "painting": painting}
    expected = tiny_pipe.inpaint(opened(image), hole, "a red apple", **call, seed=3, progress=False)
    assert (pixels(data) == np.asarray(expected.images[0])).all()
    listed = client.get("/v1/models/tiny").json()["options"]["painting"]
    assert listed == to_dict(PaintOptions(trained=False))
    generate(client, model="tiny-dalle")  # loads it
    assert "painting" not in client.get("/v1/models/tiny-dalle").json()["options"]
    for painting, part, fact in (
        ({"resample": 2}, mask, "resamples"),
        ({"resamples": 65}, mask, "resamples is 65"),
        (3, mask, "painting"),
        ({"resamples": 2}, None, "with a mask"),
    ):
        fields = {"options": json.dumps({"painting": painting}), "strength": "0.5"}
        assert fact in error_of(edit(client, image, part, **fields), 400, "options")


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
