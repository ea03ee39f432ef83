"""Generation, grids, errors and copied commands on the web page in a real Chromium."""

from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from page_helpers import DONE, app, choose, chromium, generate, image_of, url, visit
from PIL import Image
from serving_helpers import CONFIG, load, opened, pixels, png, serving

from unclip.image_io import encode_image
from unclip.serving.app import create_app


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
