"""Edits on the web page in a real Chromium: masks, strength and painting."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from api_helpers import encode
from page_helpers import (
    DONE,
    app,
    choose,
    chromium,
    generate,
    image_of,
    mask_point,
    open_mask,
    stroke,
    url,
    use_mask,
    visit,
)
from PIL import Image, ImageOps
from serving_helpers import load, opened, pixels, png

from unclip.diffusion.repaint import PaintOptions
from unclip.image_io import encode_image


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


def test_mask_of_an_image_that_is_not_square_is_changed(visit, app, tiny_pipe):
    page = visit()
    image, hole = Image.new("RGB", (16, 32), "red"), Image.new("L", (16, 32))
    hole.paste(255, (0, 0, 8, 8))
    result = tiny_pipe.inpaint(image, hole, "a blue fish", progress=False)
    choose(page, "#load-png", encode_image(result.images[0], metadata=result.metadata[0]))
    page.click("text=Change mask")
    page.locator("#mask-canvas:focus").wait_for()
    stroke(page, (0.5, 0.9), (0.55, 0.9))  # of the height of the canvas, and so of the image
    for _ in range(40):  # to the left edge, and past the side of a square
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("ArrowDown")
    page.keyboard.press(" ")
    use_mask(page)
    page.click("#generate")
    page.locator(DONE).wait_for()
    mask = opened(app.last()[2]["mask"][0])
    painted = np.asarray(mask)[..., 3] == 0
    assert mask.size == (16, 32) and painted[:8, :8].all() and not painted[10:24].any()
    assert painted[29, 8] and painted[31, 0]

    choose(page, "#import-mask", encode(ImageOps.invert(hole)))
    page.click("#generate")
    page.locator(DONE).nth(1).wait_for()
    painted = np.asarray(opened(app.last()[2]["mask"][0]))[..., 3] == 0
    assert (painted == (np.asarray(hole) == 0)).all()


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
