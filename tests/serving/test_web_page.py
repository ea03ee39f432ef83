"""The web page in a real Chromium, against a server of models with random weights."""

from __future__ import annotations

import base64
import email
import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from email.message import Message
from html.parser import HTMLParser
from typing import get_args
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image
from serving_helpers import CONFIG, client, load, opened, pixels, png, serving, wait_until

from unclip.diffusion.repaint import PaintOptions
from unclip.image_io import encode_image
from unclip.serving.app import create_app
from unclip.serving.page import FILES
from unclip.serving.requests import Sampler

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "color_scheme": "dark"}
DONE = ".entry[data-status=done]"
TIMEOUT = 60_000  # ms, on a busy machine

# -- without a browser


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


# -- with a browser


class Recorder:
    """An application that keeps the bodies of the requests it passes on."""

    def __init__(self, app) -> None:
        self.app, self.state, self.requests = app, app.state, []

    async def __call__(self, scope, receive, send):
        body = bytearray()
        if scope["type"] == "http" and scope["method"] == "POST":
            kind = dict(scope["headers"])[b"content-type"].decode()
            self.requests.append((scope["path"], kind, body))

        async def recorded():
            message = await receive()
            body.extend(message.get("body", b""))
            return message

        await self.app(scope, recorded, send)

    def last(self) -> tuple[str, dict[str, str], dict[str, list[bytes]]]:
        """Return path, fields and files of the last request."""
        path, kind, body = self.requests[-1]
        if kind == "application/json":
            return path, json.loads(bytes(body)), {}
        form: Message = email.message_from_bytes(b"Content-Type: " + kind.encode() + b"\n\n" + body)
        fields: dict[str, str] = {}
        files: dict[str, list[bytes]] = {}
        for part in form.get_payload():
            assert isinstance(part, Message)
            name = part.get_param("name", header="content-disposition")
            data = part.get_payload(decode=True)
            if part.get_filename():
                files.setdefault(name, []).append(data)
            else:
                fields[name] = data.decode()
        return path, fields, files


@pytest.fixture(scope="module")
def app(load):
    return Recorder(create_app(replace(CONFIG, reconnect_seconds=5), load))


@pytest.fixture(scope="module")
def url(app):
    with serving(app) as url:
        yield url


@pytest.fixture(scope="module")
def chromium():
    api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium; install it, or set CHROMIUM to its path")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, url):
    """Open the page; at the end, check that nothing failed or was fetched from another host."""
    problems, contexts = [], []

    def open_page(address=url, expected=(), **options):
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 900}} | options)
        context.set_default_timeout(TIMEOUT)
        contexts.append(context)
        page = context.new_page()

        def check_request(request):
            if urlsplit(request.url).netloc != urlsplit(address).netloc:
                problems.append(request.url)

        def check_message(message):
            if message.type in ("error", "warning"):
                if not any(text in message.text for text in expected):
                    problems.append(message.text)

        page.on("request", lambda one: one.url.startswith("blob:") or check_request(one))
        page.on("console", check_message)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(address)
        page.wait_for_selector("html[data-ready]")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []


def generate(page, prompt="a red apple", **fields):
    """Fill in the form, press Enter and wait for the images."""
    page.check("[value=generate]")
    count = page.locator(DONE).count()
    for name, value in {"prompt": prompt, "seed": 3, **fields}.items():
        page.fill(f"#{name}", str(value))
    page.press("#prompt", "Enter")
    page.locator(DONE).nth(count).wait_for()


def choose(page, button, *files):
    """Click on a button that asks for a file, and choose one."""
    with page.expect_file_chooser() as chooser:
        page.click(button)
    chooser.value.set_files(
        [{"name": "image.png", "mimeType": "image/png", "buffer": data} for data in files]
    )


def image_of(page, tile=0) -> bytes:
    """Return the image of a tile, byte for byte."""
    source = page.locator(f"{DONE} .tile img").nth(tile).get_attribute("src")
    # The policy of the page does not allow fetching blob: URLs.
    with page.expect_download() as download:
        page.evaluate(
            "(href) => Object.assign(document.createElement('a'), {href, download: 'x'}).click()",
            source,
        )
    return download.value.path().read_bytes()


def test_enter_generates_the_images_of_the_api(visit, app, tiny_pipe):
    page = visit()
    assert page.is_visible("text=No images yet")
    generate(page, n=2, negative_prompt="a blue fish", steps=2, guidance=1.5)
    path, fields, _ = app.last()
    assert path == "/v1/images/generations"
    assert fields["negative_prompt"] == "a blue fish" and fields["guidance"] == 1.5
    assert page.locator(".tile").count() == 2 and not page.is_visible("text=No images yet")
    decoder = replace(tiny_pipe.options.decoder, steps=2, guidance=1.5)
    options = replace(tiny_pipe.options, decoder=decoder)
    expected = tiny_pipe(
        "a red apple", negative_prompt="a blue fish", num_images=2, seed=3, options=options
    )
    for k, image in enumerate(expected.images):
        assert (pixels(image_of(page, k)) == np.asarray(image)).all()


@pytest.mark.slow
def test_partial_images_are_shown_before_the_final_one(visit):
    page = visit(expected=["ERR_ABORTED"])
    page.fill("#prompt", "a red apple")
    page.fill("#steps", "400")
    page.click("#generate")
    page.locator(".pending img[alt=Preview]").wait_for()
    page.locator(".progress p:has-text('of 400')").wait_for()
    page.keyboard.press("Escape")
    page.locator(".entry[data-status=cancelled]").wait_for()


@pytest.mark.slow
def test_escape_cancels_the_job_on_the_server(visit, app):
    page = visit(expected=["ERR_ABORTED"])
    page.fill("#prompt", "a red apple")
    page.fill("#steps", "1000")
    page.press("#prompt", "Enter")
    page.locator(".progress p:has-text('step')").wait_for()
    page.keyboard.press("Escape")
    page.locator(".entry[data-status=cancelled]").wait_for()
    wait_until(lambda: app.state.engine.idle, seconds=5)
    page.click("text=Run again")
    page.locator(".progress p:has-text('step')").wait_for()
    page.click(".progress button")
    page.locator(".entry[data-status=cancelled]").wait_for()
    assert page.locator(".entry").count() == 1
    wait_until(lambda: app.state.engine.idle, seconds=5)


def test_history_survives_a_reload(visit, app):
    page = visit(expected=["ERR_ABORTED"])
    generate(page, n=2, steps=2, guidance=1.5, negative_prompt="a blue fish")
    before = image_of(page, 1)
    page.fill("#steps", "1000")
    page.fill("#negative_prompt", "")
    page.press("#prompt", "Enter")
    page.locator(".progress p:has-text('step')").wait_for()
    another = page.context.new_page()
    another.goto(page.url)
    page.close()
    page = another
    page.locator(DONE).wait_for()
    assert page.is_visible("text=Interrupted when the page was closed.")
    assert image_of(page, 1) == before
    page.locator(f"{DONE} [aria-label^='Use settings']").click()
    values = {"prompt": "a red apple", "negative_prompt": "a blue fish", "n": "2", "seed": "3"}
    for name, value in {**values, "steps": "2", "guidance": "1.5"}.items():
        assert page.input_value(f"#{name}") == value
    page.locator(f"{DONE} [aria-label^=Delete]").click()
    assert page.locator(DONE).count() == 0
    page.click("text=Undo")
    assert page.locator(DONE).count() == 1
    page.click("#clear")
    page.locator("text=History cleared.").wait_for()
    page.reload()
    page.locator("text=No images yet").wait_for()
    wait_until(lambda: app.state.engine.idle, seconds=5)


@pytest.mark.slow
def test_jobs_survive_a_reload(visit, app):
    page = visit(expected=["ERR_ABORTED"])
    metrics = app.state.engine.metrics
    images = metrics.images.labels("tiny", "generations")._value
    sampled, cancelled = images.get(), metrics.cancellations._value.get()
    for steps in ("300", "301", "20"):  # one runs, and two wait
        page.fill("#prompt", "a red apple")
        page.fill("#steps", steps)
        page.press("#prompt", "Enter")
    page.locator(".progress p:has-text('step')").wait_for()
    page.reload()
    jobs = page.locator(".entry[data-status=running]")
    page.locator(".progress p:has-text('step')").wait_for()
    assert jobs.count() == 3
    jobs.filter(has_text="Steps 301").locator("text=Cancel").click()
    page.locator(".entry[data-status=cancelled]", has_text="Steps 301").wait_for()
    page.locator(DONE, has_text="Steps 300").wait_for()
    page.locator(DONE, has_text="Steps 20").wait_for()
    assert images.get() == sampled + 2  # none was begun again
    assert metrics.cancellations._value.get() == cancelled + 1
    page.reload()
    page.locator(DONE).nth(1).wait_for()
    assert page.locator(".entry").count() == 3 and page.locator(f"{DONE} .tile img").count() == 2


@pytest.mark.slow
def test_a_grid_is_completed_after_a_reload(visit, app):
    page = visit(expected=["ERR_ABORTED"])
    page.fill("#prompt", "a red apple")
    page.click("#grid summary")
    page.select_option("[name=x_name]", "steps")
    page.fill("[name=x_values]", ", ".join(map(str, range(100, 108))))
    page.click("#generate")
    page.locator(".tile:not(.pending)").first.wait_for()
    page.reload()
    page.locator(DONE).wait_for()
    assert page.locator(f"{DONE} .tile img").count() == 8


@pytest.mark.slow
def test_a_lost_connection_is_made_again(visit, app):
    page = visit(expected=["ERR_"])
    page.fill("#prompt", "a red apple")
    page.fill("#steps", "300")
    page.route("**/v1/images/*", lambda route: route.fulfill(body=": ping\n\n"), times=1)
    page.click("#generate")
    page.locator("text=The connection was lost; trying again in 1 s").wait_for()
    page.locator(DONE).wait_for()


@pytest.mark.slow
def test_settings_are_read_from_a_png(visit, tiny_pipe):
    page = visit()
    result = tiny_pipe("a blue fish", negative_prompt="red", seed=11, progress=False)
    choose(page, "#load-png", encode_image(result.images[0], metadata=result.metadata[0]))
    page.locator("text=Settings loaded").wait_for()
    steps = str(tiny_pipe.options.decoder.steps)
    values = {"prompt": "a blue fish", "negative_prompt": "red", "seed": "11", "steps": steps}
    for name, value in values.items():
        assert page.input_value(f"#{name}") == value
    page.click("#generate")
    page.locator(DONE).wait_for()
    assert (pixels(image_of(page)) == np.asarray(result.images[0])).all()
    choose(page, "#load-png", png())
    page.locator("#form-error", has_text="no unclip settings").wait_for()
    choose(page, "#load-png", encode_image(result.images[0], metadata=[{"operation": "text_diff"}]))
    page.locator("#form-error", has_text='cannot repeat the operation "text_diff"').wait_for()


@pytest.mark.slow
def test_the_prior_of_a_png_is_restored(visit, app, tiny_pipe):
    page = visit()
    prior = replace(tiny_pipe.options.prior.with_steps(3), guidance=1.5)
    options = replace(tiny_pipe.options, prior=prior, embedding="text")
    result = tiny_pipe("a blue fish", seed=11, options=options, progress=False)
    choose(page, "#load-png", encode_image(result.images[0], metadata=result.metadata[0]))
    page.locator("text=Settings loaded").wait_for()
    page.click("#generate")
    page.locator(DONE).wait_for()
    expected = {"embedding": "text", "prior_steps": 3, "prior_guidance": 1.5}
    assert expected.items() <= app.last()[1].items()
    assert (pixels(image_of(page)) == np.asarray(result.images[0])).all()


@pytest.mark.slow
def test_other_options_of_a_png_are_shown_sent_and_removed(visit, app, tiny_pipe):
    page = visit()
    usual = tiny_pipe.options
    options = replace(usual, prior=replace(usual.prior, sampler="unipc"))
    result = tiny_pipe("a blue fish", seed=11, options=options, progress=False)
    choose(page, "#load-png", encode_image(result.images[0], metadata=result.metadata[0]))
    page.locator("#options", has_text="prior sampler unipc").wait_for()
    page.click("#generate")
    page.locator(DONE, has_text="Other options prior sampler unipc").wait_for()
    assert json.loads(app.last()[1]["options"]) == {"prior": {"sampler": "unipc"}}
    assert (pixels(image_of(page)) == np.asarray(result.images[0])).all()
    page.click("#options-clear")
    assert page.locator("#options-field").is_hidden()
    page.click("#generate")
    page.locator(DONE).nth(1).wait_for()
    assert "options" not in app.last()[1]


@pytest.mark.slow
def test_variation_is_repeated_from_its_png(visit, app, tiny_pipe):
    page = visit()
    image = Image.open(io.BytesIO(png(32)))
    result = tiny_pipe.variations(image, seed=5, progress=False)
    choose(page, "#load-png", encode_image(result.images[0], metadata=result.metadata[0]))
    page.click("#generate")
    page.locator(DONE).wait_for()
    assert app.last()[1]["image_embedding"]
    assert (pixels(image_of(page)) == np.asarray(result.images[0])).all()


def test_variation_with_prompts_is_repeated_from_its_png(visit, app, tiny_pipe):
    page = visit()
    page.fill("#prompt", "a green tree")  # of other modes
    page.check("[value=vary]")
    choose(page, "[data-slot=image] button", png(32))
    texts = {"prompt": "a blue fish", "negative_prompt": "a red apple"}
    for name, value in {"negative_prompt": "a red apple", "seed": "5"}.items():
        page.fill(f"#{name}", value)
    page.fill("#vary_prompt", "a blue fish")
    page.press("#vary_prompt", "Enter")
    page.locator(DONE, has_text="Prompt a blue fish").wait_for()
    path, fields, _ = app.last()
    assert path == "/v1/images/variations" and texts.items() <= fields.items()
    first = image_of(page)
    expected = tiny_pipe.variations(opened(png(32)), **texts, seed=5, progress=False)
    assert (pixels(first) == np.asarray(expected.images[0])).all()
    page.reload()
    choose(page, "#load-png", first)
    page.locator("text=Embedding from PNG").wait_for()
    page.click("#generate")
    page.locator(DONE).nth(1).wait_for()
    assert (pixels(image_of(page)) == pixels(first)).all()


@pytest.mark.slow
def test_variation_of_dalle_is_repeated_from_its_png(visit, tiny_dalle):
    page = visit()
    options = replace(tiny_dalle.options, guidance=2.0)
    texts = {"prompt": "a blue fish", "negative_prompt": "a red apple"}
    result = tiny_dalle.variations(opened(png()), **texts, seed=5, options=options, progress=False)
    choose(page, "#load-png", encode_image(result.images[0], metadata=result.metadata[0]))
    page.locator("[data-slot=image] img").wait_for()
    page.click("#generate")
    page.locator(DONE).wait_for()
    assert (pixels(image_of(page)) == np.asarray(result.images[0])).all()


def shown(page):
    """Return which settings the form shows."""
    page.locator("summary", has_text="More settings").click()
    inputs = page.locator("#composer").locator("input:visible, select:visible, textarea:visible")
    names = inputs.evaluate_all("all => all.map(({ name }) => name)")
    page.locator("summary", has_text="More settings").click()
    return set(names) - {"mode", "prompt", "n", "seed", "guidance"}


def test_dalle_edits_with_a_mask(visit, app, tiny_dalle):
    page = visit()
    page.check("[value=edit]")
    page.fill("#strength", "0.5")  # of the other model
    page.select_option("#model", "tiny-dalle")
    generate(page)  # loads the model
    page.check("[value=edit]")
    page.locator("#strength").wait_for(state="hidden")
    assert shown(page) == {"negative_prompt"}
    original = png(64)
    choose(page, "[data-slot=image] button", original)
    texts = {"prompt": "a red apple", "negative_prompt": "a blue fish"}
    for name, value in {**texts, "guidance": "2"}.items():
        page.fill(f"#{name}", value)
    page.click("#generate")
    assert page.text_content("#mask-error") == "Paint a mask."
    open_mask(page)
    stroke(page, (0.3, 0.3), (0.7, 0.6))
    use_mask(page)
    page.click("#generate")
    page.locator(DONE).nth(1).wait_for()
    path, fields, files = app.last()
    assert path == "/v1/images/edits" and "strength" not in fields
    mask = opened(files["mask"][0])
    options = replace(tiny_dalle.options, guidance=2.0)
    expected = tiny_dalle.inpaint(
        opened(original), mask, **texts, seed=3, options=options, progress=False
    )
    assert (pixels(image_of(page)) == np.asarray(expected.images[0])).all()


@pytest.mark.slow
def test_fields_that_glide_lacks_are_hidden(visit):
    page = visit()
    [model] = page.request.get(f"{page.url}v1/models").json()["data"][:1]
    model |= {"kind": "glide", "operations": ["generations", "edits"]}
    page.route("**/v1/models", lambda route: route.fulfill(json={"data": [model]}))
    page.reload()
    page.locator("[value=vary]:disabled").wait_for()
    assert shown(page) == {"negative_prompt", "steps", "sampler"}
    page.check("[value=edit]")
    assert shown(page) == {"negative_prompt", "steps", "sampler"}


@pytest.mark.slow
def test_a_result_is_varied_by_a_model_that_can(visit):
    page = visit()
    generate(page)
    glide, dalle = page.request.get(f"{page.url}v1/models").json()["data"]
    glide |= {"kind": "glide", "operations": ["generations"]}
    page.route("**/v1/models", lambda route: route.fulfill(json={"data": models}))
    for models in ([glide, dalle], [glide]):
        page.reload()
        page.locator("[value=vary]:disabled").wait_for()
        page.locator(".tile").first.click()
        if dalle in models:
            page.click("[data-action=vary]")
            page.locator("[data-slot=image] img").wait_for()
            assert page.is_checked("[value=vary]") and page.is_enabled("[value=vary]")
            assert page.input_value("#model") == "tiny-dalle"
    for action in ("vary", "mix", "edit"):
        assert page.is_disabled(f"[data-action={action}]")
    page.keyboard.press("Escape")
    page.evaluate(PASTE, base64.b64encode(png()).decode())
    page.locator("#form-error", has_text="No model of this server offers edits").wait_for()


@pytest.mark.slow
@pytest.mark.parametrize("operation", ["inpaint", "outpaint"])
def test_painting_is_repeated_from_its_png(visit, app, tiny_pipe, operation):
    page = visit()
    call = {"painting": PaintOptions(resamples=2), "seed": 5, "progress": False}
    if operation == "outpaint":
        result = tiny_pipe.outpaint(opened(png()), "a blue fish", left=8, bottom=1, **call)
        choose(page, "#load-png", encode_image(result.images[0], metadata=result.metadata[0]))
        page.locator("#form-error", has_text="cannot repeat").wait_for()  # in windows of 16 px
        result = tiny_pipe.outpaint(opened(png()), "a blue fish", left=8, right=4, **call)
    else:
        hole = Image.new("L", (16, 16))
        hole.paste(255, (0, 0, 8, 8))
        result = tiny_pipe.inpaint(opened(png()), hole, "a blue fish", **call)
    choose(page, "#load-png", encode_image(result.images[0], metadata=result.metadata[0]))
    page.locator("#options", has_text="painting resamples 2").wait_for()
    page.check("[value=generate]")
    page.locator("#options-field").wait_for(state="hidden")
    page.check("[value=edit]")
    page.click("#generate")
    page.locator(DONE, has_text="Other options painting resamples 2").wait_for()
    assert json.loads(app.last()[1]["options"]) == {"painting": {"resamples": 2}}
    first = image_of(page)
    assert (pixels(first) == np.asarray(result.images[0])).all()
    page.reload()
    page.click("[aria-label^='Use settings']")
    page.click("#generate")
    page.locator(DONE).nth(1).wait_for()
    assert (pixels(image_of(page)) == pixels(first)).all()


def open_mask(page):
    page.click("text=Paint mask")
    page.locator("#mask-canvas:focus").wait_for()


def use_mask(page):
    page.click("#mask-done")
    page.locator("#mask-canvas").wait_for(state="hidden")


def mask_point(page, x, y):
    """Return the position on the page of a point of the image, as fractions of its side."""
    box = page.locator("#mask-canvas").bounding_box()
    side = min(box["width"], box["height"])
    left, top = box["x"] + (box["width"] - side) / 2, box["y"] + (box["height"] - side) / 2
    return left + x * side, top + y * side


def stroke(page, start, end):
    page.mouse.move(*mask_point(page, *start))
    page.mouse.down()
    page.mouse.move(*mask_point(page, *end), steps=5)
    page.mouse.up()


def test_mask_is_painted_erased_and_uploaded_as_alpha(visit, app):
    page = visit()
    page.check("[value=edit]")
    original = png(64)
    choose(page, "[data-slot=image] button", original)
    open_mask(page)
    stroke(page, (0.1, 0.5), (0.9, 0.5))
    page.keyboard.press("e")
    stroke(page, (0.9, 0.4), (0.9, 0.6))
    stroke(page, (0.1, 0.5), (0.3, 0.5))
    page.click("#mask-undo")
    use_mask(page)
    page.fill("#prompt", "a red apple")
    page.fill("#seed", "3")
    page.click("#generate")
    page.locator(DONE).wait_for()
    path, fields, files = app.last()
    assert path == "/v1/images/edits" and fields["prompt"] == "a red apple"
    assert files["image"] == [original]
    mask = opened(files["mask"][0])
    alpha = np.asarray(mask)[..., 3]
    assert mask.mode == "RGBA" and mask.size == (64, 64) and set(np.unique(alpha)) == {0, 255}
    assert alpha[32, 10] == alpha[32, 32] == 0  # painted; the erased part at the left was undone
    assert alpha[32, 58] == alpha[8, 32] == alpha[56, 32] == 255  # erased, and never painted
    edited, kept = image_of(page), alpha == 255
    assert (pixels(edited)[kept] == pixels(original)[kept]).all()

    page.reload()
    choose(page, "#load-png", edited)  # has the prompt; uploads are not stored in it
    page.locator("text=Choose or drop an image").wait_for()
    assert page.input_value("#prompt") == "a red apple"
    page.click("[aria-label^='Use settings']")  # the history has the image and the mask too
    page.locator("[data-slot=image] canvas").wait_for()
    page.click("#generate")
    page.locator(DONE).nth(1).wait_for()
    assert (pixels(image_of(page, 0)) == pixels(edited)).all()


@pytest.mark.slow
def test_mask_is_painted_with_keys_and_zoomed(visit, app):
    page = visit()
    page.check("[value=edit]")
    choose(page, "[data-slot=image] button", png(64))
    open_mask(page)
    for key in ("ArrowRight", "ArrowDown", " "):
        page.keyboard.press(key)
    page.click("#zoom-in")
    page.locator("#zoom-fit:has-text('150 %')").wait_for()
    page.mouse.move(*mask_point(page, 0.5, 0.5))
    page.mouse.wheel(0, -200)
    page.click("#zoom-fit")
    page.locator("#zoom-fit:has-text('100 %')").wait_for()
    page.click("#mask-invert")
    use_mask(page)
    page.fill("#prompt", "a red apple")
    page.click("#generate")
    page.locator(DONE).wait_for()
    alpha = np.asarray(opened(app.last()[2]["mask"][0]))[..., 3]
    assert alpha[0, 0] == 0 and alpha[34, 34] == 255


@pytest.mark.slow
def test_alpha_of_an_image_and_of_a_mask_file_is_used(visit, app):
    page = visit()
    page.check("[value=edit]")
    choose(page, "[data-slot=image] button", png(32, "RGBA"))
    page.locator("text=Change mask").wait_for()
    page.fill("#prompt", "a red apple")
    page.click("#generate")
    page.locator(DONE).wait_for()
    alpha = np.asarray(opened(app.last()[2]["mask"][0]).convert("RGBA"))[..., 3]
    assert (alpha[:16] == 0).all() and (alpha[16:] == 255).all()

    left = Image.new("L", (32, 32), 0)
    left.paste(255, (0, 0, 16, 32))
    file = io.BytesIO()
    left.save(file, "PNG")
    choose(page, "#import-mask", file.getvalue())
    page.click("#generate")
    page.locator(DONE).nth(1).wait_for()
    alpha = np.asarray(opened(app.last()[2]["mask"][0]))[..., 3]
    assert (alpha[:, :16] == 0).all() and (alpha[:, 16:] == 255).all()


@pytest.mark.slow
def test_mask_file_of_an_image_that_is_not_square_is_cropped_with_it(visit, app):
    page = visit()
    page.check("[value=edit]")
    photo, mask = Image.new("RGB", (64, 32), "red"), Image.new("L", (64, 32), 0)
    mask.paste(255, (16, 0, 32, 32))  # the left half of the central square
    for button, image in (("[data-slot=image] button", photo), ("#import-mask", mask)):
        file = io.BytesIO()
        image.save(file, "PNG")
        choose(page, button, file.getvalue())
        page.locator("text=Change mask" if image is mask else "text=Paint mask").wait_for()
    page.fill("#prompt", "a red apple")
    page.click("#generate")
    page.locator(DONE).wait_for()
    alpha = np.asarray(opened(app.last()[2]["mask"][0]))[..., 3]
    assert (alpha[:, :16] == 0).all() and (alpha[:, 16:] == 255).all()


@pytest.mark.slow
def test_a_wrong_value_of_a_hidden_field_is_not_checked(visit, app):
    page = visit()
    page.click("summary >> nth=0")
    page.fill("#num_candidates", "100")
    page.check("[value=vary]")
    choose(page, "[data-slot=image] button", png(32))
    page.click("#generate")
    page.locator(DONE).wait_for()
    assert "num_candidates" not in app.last()[1]


@pytest.mark.slow
def test_two_results_are_mixed_with_a_slider(visit, app, tiny_pipe):
    page = visit()
    generate(page)
    generate(page, "a blue fish")
    for tile in (1, 0):
        page.locator(".tile").nth(tile).click()
        page.click("[data-action=mix]")
    page.locator("#weight").fill("0.75")
    page.click("#generate")
    page.locator(DONE).nth(2).wait_for()
    path, fields, files = app.last()
    assert path == "/v1/images/variations" and fields["weights"] == "0.25,0.75"
    first, second = (np.asarray(opened(data).convert("RGB")) for data in files["image[]"])
    assert (first == np.asarray(tiny_pipe("a red apple", seed=3, progress=False).images[0])).all()
    assert (second == np.asarray(tiny_pipe("a blue fish", seed=3, progress=False).images[0])).all()


PASTE = """base64 => {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  const clipboardData = new DataTransfer();
  clipboardData.items.add(new File([bytes], "image.png", { type: "image/png" }));
  document.body.dispatchEvent(new ClipboardEvent("paste", { clipboardData, bubbles: true }));
}"""


@pytest.mark.slow
def test_images_are_pasted_from_the_clipboard(visit, app):
    page, images = visit(), [png(16, seed=k) for k in range(3)]
    for k, slot in enumerate(("image", "second")):  # varied, then mixed
        page.evaluate(PASTE, base64.b64encode(images[k]).decode())
        page.locator(f"[data-slot={slot}] img").wait_for()
    assert page.inner_text("#generate") == "Mix"
    page.check("[value=edit]")
    page.evaluate(PASTE, base64.b64encode(images[2]).decode())
    page.fill("#strength", "0.5")
    generated = page.locator(DONE).count()
    page.fill("#prompt", "a red apple")
    page.press("#prompt", "Enter")
    page.locator(DONE).nth(generated).wait_for()
    assert app.last()[2] == {"image": [images[2]]}


@pytest.mark.slow
def test_grid_has_the_image_of_each_pair_of_values(visit, tiny_pipe):
    page = visit()
    page.fill("#prompt", "a red apple")
    page.click("#grid summary")
    page.select_option("[name=x_name]", "seed")
    page.fill("[name=x_values]", "3, 4, 5")
    page.select_option("[name=y_name]", "prompt")
    page.fill("[name=y_values]", "a red apple | a blue fish")
    page.click("#generate")
    page.locator(DONE).wait_for()
    assert page.locator("th[scope=col]").all_text_contents() == ["Prompt / Seed", "3", "4", "5"]
    assert page.locator("th[scope=row]").all_text_contents() == ["a red apple", "a blue fish"]
    expected = tiny_pipe("a blue fish", seed=5, progress=False).images[0]
    assert np.abs(pixels(image_of(page, 5)) - np.asarray(expected)).max() <= 2
    page.fill("[name=y_values]", "")
    page.click("#generate")
    assert page.text_content("#grid-error") == "Give values for prompt."


@pytest.mark.slow
def test_viewer_moves_with_arrows_and_varies_a_result(visit, app):
    page = visit()
    generate(page, n=2)
    page.locator(".tile").first.click()
    facts = page.locator("#viewer-facts div")
    facts.filter(has_text=re.compile("^Seed3$")).wait_for()
    page.keyboard.press("ArrowRight")
    facts.filter(has_text=re.compile("^Seed4$")).wait_for()
    facts.filter(has_text="Samplerddim").wait_for()  # from the PNG: the form left it open
    assert page.is_disabled("#next")
    page.click("[data-action=vary]")
    page.click("#generate")
    page.locator(DONE).nth(1).wait_for()
    path, _, files = app.last()
    assert path == "/v1/images/variations" and files["image"] == [image_of(page, 3)]


@pytest.mark.slow
def test_errors_of_the_api_are_shown_at_the_field(visit):
    page = visit(expected=["status of 400"])
    page.click("#generate")
    assert page.text_content("#prompt-error") == "Describe the image."
    message = "too large - 'guidance'"
    body = {"error": {"message": message, "type": "x", "param": "guidance", "code": None}}
    page.route("**/v1/images/*", lambda route: route.fulfill(status=400, json=body))
    page.fill("#prompt", "a red apple")
    page.click("#generate")
    page.locator(".entry[data-status=failed]").wait_for()
    assert page.text_content("#guidance-error") == message
    assert page.get_attribute("#guidance", "aria-invalid") is not None
    assert page.is_visible(f".state >> text={message}")


@pytest.mark.slow
def test_busy_server_is_asked_again(visit):
    page = visit(expected=["status of 429"])
    error = {"error": {"message": "full", "type": "x", "param": None, "code": None}}
    headers = {"Retry-After": "1"}
    page.route(
        "**/v1/images/*",
        lambda route: route.fulfill(status=429, json=error, headers=headers),
        times=1,
    )
    page.fill("#prompt", "a red apple")
    page.click("#generate")
    page.locator("text=The server is busy; trying again in 1 s").wait_for()
    page.locator(DONE).wait_for()


@pytest.mark.slow
def test_server_that_does_not_answer_is_reported(visit):
    page = visit(expected=["ERR_FAILED"])
    page.route("**/v1/**", lambda route: route.abort())
    page.reload()
    page.locator("#notice >> text=The server does not answer").wait_for()
    page.unroute("**/v1/**")
    page.click("text=Try again")
    page.locator("#notice").wait_for(state="hidden")


@pytest.mark.slow
def test_api_key_is_asked_for(visit, load):
    with serving(create_app(replace(CONFIG, api_keys=("right",)), load)) as url:
        page = visit(url, expected=["status of 401"])
        for key in ("wrong", "right"):
            page.locator("#key").wait_for()
            page.fill("#key", key)
            page.press("#key", "Enter")
            if key == "wrong":
                page.locator("#key-error:has-text('Incorrect API key')").wait_for()
        page.locator("#model option").first.wait_for(state="attached")
        generate(page)
        page.reload()
        page.locator("#model option").first.wait_for(state="attached")
        assert not page.is_visible("#key-dialog")


def copied(page, button):
    page.click(button)
    page.locator("#toast:has-text('Copied')").wait_for()
    return page.evaluate("() => navigator.clipboard.readText()")


@pytest.mark.slow
def test_copied_commands_make_the_same_image(visit, tiny_pipe, tmp_path):
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    generate(page, prompt='an apple\'s "core"', steps=2)
    expected = pixels(image_of(page))
    if shutil.which("curl"):
        command = copied(page, "#copy-curl")
        done = subprocess.run(["bash", "-c", command], capture_output=True, check=True)
        data = base64.b64decode(json.loads(done.stdout)["data"][0]["b64_json"])
        assert (pixels(data) == expected).all()
    pytest.importorskip("openai")
    pytest.importorskip("requests")
    code = copied(page, "#copy-python")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert (pixels((tmp_path / "image-0.png").read_bytes()) == expected).all()

    result = tiny_pipe.variations(Image.open(io.BytesIO(png(32))), seed=5, progress=False)
    choose(page, "#load-png", encode_image(result.images[0], metadata=result.metadata[0]))
    page.locator("text=Settings loaded").wait_for()
    subprocess.run([sys.executable, "-c", copied(page, "#copy-python")], cwd=tmp_path, check=True)
    varied = pixels((tmp_path / "image-0.png").read_bytes())
    assert (varied == np.asarray(result.images[0])).all()

    page.click("[aria-label='Remove embedding']")
    choose(page, "[data-slot=image] button", png(32))
    page.fill("#vary_prompt", "a blue fish")
    page.fill("#negative_prompt", "a red apple")
    (tmp_path / "image.png").write_bytes(png(32))
    call = {"prompt": "a blue fish", "negative_prompt": "a red apple", "seed": 5}
    result = tiny_pipe.variations(opened(png(32)), **call, progress=False)
    subprocess.run([sys.executable, "-c", copied(page, "#copy-python")], cwd=tmp_path, check=True)
    varied = pixels((tmp_path / "image-0.png").read_bytes())
    assert (varied == np.asarray(result.images[0])).all()
    if shutil.which("curl"):
        command = ["bash", "-c", copied(page, "#copy-curl")]
        done = subprocess.run(command, capture_output=True, check=True, cwd=tmp_path)
        data = base64.b64decode(json.loads(done.stdout)["data"][0]["b64_json"])
        assert (pixels(data) == varied).all()


# -- layout and accessibility

CONTRAST = """() => {
    const channel = (v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const parse = (text) => text.match(/[\\d.]+/g).map(Number);
    const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
    const low = [];
    for (const element of document.querySelectorAll("body *")) {
        const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
        if (!own || !element.checkVisibility() || element.closest(":disabled, .hidden")) continue;
        let behind = element;
        while (behind && parse(getComputedStyle(behind).backgroundColor)[3] === 0) {
            behind = behind.parentElement;
        }
        const style = getComputedStyle(element);
        const colors = [style.color, getComputedStyle(behind).backgroundColor];
        const levels = colors.map((color) => light(parse(color)));
        const ratio = (Math.max(...levels) + 0.05) / (Math.min(...levels) + 0.05);
        if (ratio < 4.5) low.push(`${element.textContent.slice(0, 30)}: ${ratio.toFixed(2)}`);
    }
    return low;
}"""
INTERACTIVE = {"button", "checkbox", "combobox", "img", "radio", "slider", "spinbutton", "textbox"}
INTERACTIVE |= {"application", "dialog", "progressbar", "article", "form", "region"}
AXE = os.environ.get("AXE")  # path of axe.min.js of the npm package axe-core


def accessibility_problems(page):
    """Return controls without a name, text of low contrast, and findings of axe if AXE is set."""
    session = page.context.new_cdp_session(page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    problems = [
        f"{node['role']['value']} without a name: {node.get('description', {}).get('value')}"
        for node in nodes
        if not node["ignored"]
        and node["role"]["value"] in INTERACTIVE
        and not node.get("name", {}).get("value")
    ]
    problems += page.evaluate(CONTRAST)
    if AXE:
        with open(AXE, encoding="utf-8") as file:
            session.send("Runtime.evaluate", {"expression": file.read()})
        found = page.evaluate("async () => (await axe.run(document)).violations.map((v) => v.id)")
        problems += [f"axe: {name}" for name in found]
    return problems


@pytest.mark.parametrize("options", [{}, PHONE], ids=["desktop", "phone"])
@pytest.mark.slow
def test_page_is_accessible_and_fits_its_width(visit, options):
    page = visit(**options)
    page.emulate_media(reduced_motion="reduce")
    assert accessibility_problems(page) == []
    page.click("text=More settings")
    page.click("text=Parameter grid")
    page.fill("#prompt", "a very_long_word" * 20)
    page.fill("#n", "99")
    page.click("#generate")
    assert page.is_visible("#n-error")
    generate(page, prompt="a very_long_word" * 10, n=2)
    assert accessibility_problems(page) == []
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    page.locator(".tile").first.click()
    page.locator("#viewer-facts dt").first.wait_for()
    assert accessibility_problems(page) == []
    page.click("[data-action=edit]")
    page.locator("#mask-canvas").wait_for()
    assert accessibility_problems(page) == []
    page.keyboard.press("Escape")
    assert page.is_visible("[data-slot=image] img") and not page.is_visible("#mask-canvas")
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
