"""The real `openai` package against a server on a socket."""

from __future__ import annotations

import base64
import threading
import urllib.request

import pytest
from serving_helpers import CONFIG, load, opened, pixels, png, server, serving

from unclip.serving.app import create_app

openai = pytest.importorskip("openai")
KEY = "sk-0123456789abcdef"


@pytest.fixture
def sdk(server):
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as sdk:
        yield sdk


def test_generate_by_url_and_base64(sdk):
    result = sdk.images.generate(prompt="a red apple", n=2, extra_body={"seed": 7})
    assert len(result.data) == 2
    with urllib.request.urlopen(result.data[0].url) as response:
        by_url = response.read()
    encoded = sdk.images.generate(
        model="dall-e-2",
        prompt="a red apple",
        response_format="b64_json",
        size="256x256",
        quality="standard",
        extra_body={"seed": 7},
    )
    data = base64.b64decode(encoded.data[0].b64_json)
    assert opened(data).size == (256, 256) and opened(by_url).size == (16, 16)
    assert result._request_id.startswith("req_")


def test_edit_with_a_mask(sdk):
    image, mask = png(16), png(16, "RGBA")
    call = dict(prompt="a red apple", response_format="b64_json", extra_body={"seed": 7})
    for given in (image, [image], ("image.png", image, "image/png")):
        result = sdk.images.edit(image=given, mask=mask, **call)
        edited = pixels(base64.b64decode(result.data[0].b64_json))
        assert (edited[8:] == pixels(image)[8:]).all()
        assert (edited[:8] != pixels(image)[:8]).any()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_variation(sdk):
    result = sdk.images.create_variation(image=png(16), n=2, response_format="b64_json")
    assert [opened(base64.b64decode(one.b64_json)).size for one in result.data] == [(16, 16)] * 2


def test_streams_with_partial_images(sdk):
    call = dict(prompt="a red apple", stream=True, partial_images=2)
    events = list(sdk.images.generate(**call))
    assert [event.type for event in events] == [
        "image_generation.partial_image",
        "image_generation.partial_image",
        "image_generation.completed",
    ]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    assert all(opened(base64.b64decode(event.b64_json)) for event in events)
    assert events[-1].usage.total_tokens == 0
    events = list(sdk.images.edit(image=png(16, "RGBA"), **call))
    assert [event.type for event in events][-1] == "image_edit.completed"


def test_an_error_within_a_stream(sdk):
    call = dict(model="tiny-dalle", prompt="a", stream=True, extra_body={"steps": 3})
    with pytest.raises(openai.APIError, match="steps"):
        list(sdk.images.generate(**call))


def test_models(sdk):
    assert [model.id for model in sdk.models.list()] == ["tiny", "tiny-dalle"]
    assert sdk.models.retrieve("tiny").owned_by == "unclip"


@pytest.mark.parametrize(
    ("fields", "error", "param"),
    [
        ({"n": 15}, openai.BadRequestError, "n"),
        ({"size": "1x1"}, openai.BadRequestError, "size"),
        ({"prompt": ""}, openai.BadRequestError, "prompt"),
        ({"model": "gpt-9"}, openai.NotFoundError, "model"),
    ],
)
def test_errors_have_the_classes_of_the_sdk(sdk, fields, error, param):
    with pytest.raises(error) as caught:
        sdk.images.generate(**{"prompt": "a", **fields})
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"
    assert caught.value.request_id.startswith("req_")


def test_keys(load):
    with serving(create_app(CONFIG.__class__(models=("tiny",), api_keys=(KEY,)), load)) as url:
        with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY) as sdk:
            assert sdk.images.generate(prompt="a").data[0].url
        with openai.OpenAI(base_url=f"{url}/v1", api_key="sk-wrong") as sdk:
            with pytest.raises(openai.AuthenticationError) as caught:
                sdk.images.generate(prompt="a")
    assert caught.value.code == "invalid_api_key"


def test_overload_and_failures(load, tiny_pipe):
    gate = threading.Event()

    class Failing:
        def __getattr__(self, name):
            return getattr(tiny_pipe, name)

        def __call__(self, prompts, **arguments):
            assert gate.wait(20)
            raise RuntimeError("broken")

    config = CONFIG.__class__(models=("tiny",), max_queue=1, queue_seconds=0.5)
    app = create_app(config, lambda *_: Failing())
    with serving(app) as url:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as sdk:
            caught = []

            def generate():
                try:
                    sdk.images.generate(prompt="a")
                except openai.APIStatusError as error:
                    caught.append(error)

            first = threading.Thread(target=generate)
            first.start()
            while not app.state.engine._running:
                pass
            second = threading.Thread(target=generate)
            second.start()
            while not app.state.engine.queue.images:
                pass
            with pytest.raises(openai.RateLimitError) as full:
                sdk.images.generate(prompt="a")
            assert 1 <= int(full.value.response.headers["retry-after"]) <= 60
            second.join()
            gate.set()
            first.join()
    late, failed = caught
    assert isinstance(late, openai.InternalServerError) and late.status_code == 503
    assert isinstance(failed, openai.InternalServerError) and failed.status_code == 500
    assert failed.response.headers["x-should-retry"] == "false"
