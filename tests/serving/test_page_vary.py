"""Variations and mixtures on the web page in a real Chromium."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from page_helpers import DONE, PASTE, app, choose, chromium, generate, image_of, url, visit
from PIL import Image
from serving_helpers import load, opened, pixels, png, server

from unclip.image_io import encode_image


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
