"""Uses one version of the `openai` package against a server; run by check_sdks.py.

python sdk_client.py http://127.0.0.1:8000/v1 KEY image.png mask.png
"""

import base64
import sys
import urllib.request
import warnings

import openai

warnings.simplefilter("ignore")
PNG = b"\x89PNG"


def old(url, key, image, mask):
    """Version 0.28: module-level functions."""
    openai.api_base, openai.api_key = url, key
    result = openai.Image.create(prompt="a red apple", n=2, size="256x256")
    assert len(result["data"]) == 2
    assert urllib.request.urlopen(result["data"][0]["url"]).read().startswith(PNG)
    result = openai.Image.create(prompt="a red apple", response_format="b64_json")
    assert base64.b64decode(result["data"][0]["b64_json"]).startswith(PNG)
    with open(image, "rb") as source, open(mask, "rb") as hole:
        openai.Image.create_edit(image=source, mask=hole, prompt="a red apple")
    with open(image, "rb") as source:
        openai.Image.create_variation(image=source)
    errors = openai.error
    raises(errors.InvalidRequestError, lambda: openai.Image.create(prompt="a", n=15))
    raises(errors.InvalidRequestError, lambda: openai.Image.create(prompt="a", model="gpt-9"))
    assert openai.Model.list()["data"][0]["object"] == "model"
    openai.api_key = "sk-wrong"
    raises(errors.AuthenticationError, lambda: openai.Image.create(prompt="a"))


def new(url, key, image, mask):
    """Version 1 and later: a client object."""
    sdk = openai.OpenAI(base_url=url, api_key=key, max_retries=0)
    result = sdk.images.generate(prompt="a red apple", n=2, size="256x256")
    assert len(result.data) == 2
    assert urllib.request.urlopen(result.data[0].url).read().startswith(PNG)
    call = {"prompt": "a red apple", "n": None, "extra_body": {"seed": 7}}
    result = sdk.images.generate(response_format="b64_json", **call)
    assert base64.b64decode(result.data[0].b64_json).startswith(PNG)
    with open(image, "rb") as source, open(mask, "rb") as hole:
        sdk.images.edit(image=source, mask=hole, prompt="a red apple")
    with open(image, "rb") as source:
        data = source.read()
    sdk.images.edit(image=data, mask=open(mask, "rb").read(), prompt="a red apple")
    sdk.images.create_variation(image=data)
    raises(openai.BadRequestError, lambda: sdk.images.generate(prompt="a", n=15))
    raises(openai.NotFoundError, lambda: sdk.images.generate(prompt="a", model="gpt-9"))
    wrong = openai.OpenAI(base_url=url, api_key="sk-wrong", max_retries=0)
    raises(openai.AuthenticationError, lambda: wrong.images.generate(prompt="a"))
    assert sdk.models.list().data[0].object == "model"
    try:
        events = list(sdk.images.generate(prompt="a", stream=True, partial_images=2))
    except TypeError:  # versions before streams of images
        return
    assert [event.type.split(".")[1] for event in events] == ["partial_image"] * 2 + ["completed"]
    with open(image, "rb") as source, open(mask, "rb") as hole:
        images = {"image": [source], "mask": hole}
        events = list(sdk.images.edit(prompt="a", stream=True, partial_images=1, **images))
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]


def raises(kind, call):
    try:
        call()
    except kind:
        return
    raise AssertionError(f"expected {kind.__name__}")


if __name__ == "__main__":
    (new if hasattr(openai, "OpenAI") else old)(*sys.argv[1:])
    print(f"openai {openai.__version__}: ok")
