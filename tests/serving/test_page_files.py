"""The files of the web page, and its modules in Node.js."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from typing import get_args

import numpy as np
import pytest
from serving_helpers import client, load, opened, pixels, png

from unclip.diffusion.repaint import PaintOptions
from unclip.image_io import encode_image
from unclip.serving.page import FILES
from unclip.serving.requests import Sampler


class Tags(HTMLParser):
    """Collects (tag, attributes) and the text of scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inline = ""

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] in ("script", "style"):
            self.inline += data.strip()


def parsed_page() -> Tags:
    tags = Tags()
    tags.feed(FILES["index.html"].read_text(encoding="utf-8"))
    return tags


def test_files_are_served_under_a_strict_policy(client):
    for path in ("/", *(f"/page/{name}" for name in FILES)):
        response = client.get(path)
        assert response.status_code == 200
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "*" not in policy
    assert client.get("/page/__init__.py").status_code == 404
    assert client.get("/page/..%2fapp.py").status_code == 404


def test_page_has_no_inline_code_and_names_existing_files():
    page = parsed_page()
    assert page.inline == ""
    for tag, attributes in page.tags:
        assert not any(name == "style" or name.startswith("on") for name in attributes), tag
        for address in filter(None, (attributes.get("src"), attributes.get("href"))):
            assert address.removeprefix("page/") in FILES


def test_modules_import_existing_files_only():
    for name, path in FILES.items():
        text = path.read_text(encoding="utf-8")
        for address in re.findall(r'from "(.+)"', text):
            assert address.removeprefix("./") in FILES, name
        addresses = set(re.findall(r"https?://[^\s\"')]+", text))
        assert addresses <= {"http://www.w3.org/2000/svg"}, name


READ = """
globalThis.document = { baseURI: "http://localhost/" };
const { readSettings } = await import(process.argv[1]);
const data = (await import("node:fs")).readFileSync(process.argv[2]);
console.log(JSON.stringify(await readSettings(new Blob([data]))));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no Node.js")
def test_settings_of_a_png_have_the_prior_and_its_use(tiny_pipe, tmp_path):
    prior = replace(tiny_pipe.options.prior.with_steps(3), guidance=1.5)
    options = replace(tiny_pipe.options, prior=prior, prior_candidates=3, embedding="text")
    result = tiny_pipe("a blue fish", seed=11, options=options, progress=False)
    file = tmp_path / "image.png"
    file.write_bytes(encode_image(result.images[0], metadata=result.metadata[0]))
    command = ["node", "--input-type=module", "-e", READ, FILES["png.js"].as_uri(), str(file)]
    done = subprocess.run(command, capture_output=True, check=True, text=True)
    expected = {"prompt": "a blue fish", "seed": 11, "steps": options.decoder.steps}
    expected |= {"embedding": "text", "prior_candidates": 3}
    expected |= {"prior_steps": 3, "prior_guidance": 1.5}
    assert expected.items() <= json.loads(done.stdout).items()


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no Node.js")
def test_prompts_of_a_png_are_those_of_its_operation(tiny_pipe, tiny_dalle, tmp_path):
    image = opened(png(16))
    texts = {"prompt": "a blue fish", "negative_prompt": "a red apple"}
    given = {**texts, "seed": 11, "progress": False}
    guided = replace(tiny_dalle.options, guidance=2.0)
    varied = {"mode": "vary", "vary_prompt": "a blue fish", "negative_prompt": "a red apple"}
    edited = {"mode": "edit", **texts, "strength": 0.5}
    cases = [
        (tiny_pipe.variations(image, **given), varied),
        (tiny_dalle.variations(image, **given, options=guided), varied | {"image": {}}),
        (tiny_pipe.image_to_image(image, strength=0.5, **given), edited | {"image": {}}),
        (tiny_dalle.complete(image, **given, options=guided), None),
        (tiny_dalle.variations(image, **given, options=guided, keep=0.5), None),
    ]
    for result, expected in cases:
        file = tmp_path / "image.png"
        file.write_bytes(encode_image(result.images[0], metadata=result.metadata[0]))
        command = ["node", "--input-type=module", "-e", READ, FILES["png.js"].as_uri(), str(file)]
        done = subprocess.run(command, capture_output=True, check=False, text=True)
        if expected is None:
            assert "This page cannot repeat the operation" in done.stderr
        else:
            assert expected.items() <= json.loads(done.stdout).items()


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no Node.js")
def test_painting_options_of_a_png_are_sent_with_its_edit(client, tiny_pipe, tmp_path):
    painting = PaintOptions(resamples=2, strength=0.5)
    hole = opened(png(mode="RGBA"))
    result = tiny_pipe.inpaint(opened(png()), hole, "a fish", painting=painting, progress=False)
    entry = result.metadata[0] | {"picture": None, "mask": None}
    file = tmp_path / "image.png"
    file.write_bytes(encode_image(result.images[0], metadata=entry))
    defaults = json.dumps(client.get("/v1/models/tiny").json()["options"])
    arguments = [FILES["png.js"].as_uri(), str(file), defaults]
    command = ["node", "--input-type=module", "-e", SEND, *arguments]
    done = subprocess.run(command, capture_output=True, check=True, text=True)
    sent = json.loads(done.stdout)
    assert sent["text"] == "painting resamples 2" and sent["fields"]["strength"] == 0.5
    assert json.loads(sent["fields"]["options"]) == {"painting": {"resamples": 2}}


SEND = (
    READ.rpartition("console")[0]
    + """
const api = await import(process.argv[1].replace("png.js", "api.js"));
const settings = await readSettings(new Blob([data]));
settings.options = api.otherOptions(settings.options, JSON.parse(process.argv[3]));
const { fields } = api.call(settings);
const text = settings.options && api.optionsText(settings.options);
console.log(JSON.stringify({ fields, text }));
"""
)


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no Node.js")
def test_options_without_a_field_are_sent_if_they_differ_from_the_models(
    client, tiny_pipe, tmp_path
):
    def call_of(options):
        result = tiny_pipe("a fish", seed=11, options=options, progress=False)
        file = tmp_path / "image.png"
        file.write_bytes(encode_image(result.images[0], metadata=result.metadata[0]))
        defaults = json.dumps(client.get("/v1/models/tiny").json()["options"])
        arguments = [FILES["png.js"].as_uri(), str(file), defaults]
        command = ["node", "--input-type=module", "-e", SEND, *arguments]
        done = subprocess.run(command, capture_output=True, check=True, text=True)
        return result, json.loads(done.stdout)

    assert "options" not in call_of(tiny_pipe.options)[1]["fields"]
    usual = tiny_pipe.options
    options = replace(
        usual,
        prior=replace(usual.prior, sampler="unipc"),
        decoder=replace(usual.decoder, guidance_interval=(0.25, 0.75)),
        upsamplers=tuple(one.with_steps(one.steps + 1) for one in usual.upsamplers),
    )
    result, sent = call_of(options)
    expected = "prior sampler unipc, decoder guidance interval 0.25 to 0.75, upsamplers 0 steps "
    assert sent["text"].startswith(expected)
    fields = sent["fields"] | {"model": "tiny", "response_format": "b64_json"}
    response = client.post("/v1/images/generations", json=fields)
    assert response.status_code == 200, response.text
    image = base64.b64decode(response.json()["data"][0]["b64_json"])
    assert (pixels(image) == np.asarray(result.images[0])).all()


def test_every_setting_has_a_field():
    ids = {attributes.get("id") for _, attributes in parsed_page().tags}
    settings = FILES["api.js"].read_text(encoding="utf-8").partition("SETTINGS = {")[2]
    names = re.findall(r"^  (\w+): \{ label", settings, re.MULTILINE)
    assert "prior_steps" in names and set(names) <= ids


def test_the_samplers_of_a_model_that_is_not_loaded_are_those_of_the_api():
    (names,) = re.findall(r"SAMPLERS = (\[.+\])", FILES["form.js"].read_text(encoding="utf-8"))
    assert tuple(json.loads(names)) == get_args(Sampler)
