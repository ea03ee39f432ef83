"""The history of the web page in a real Chromium: jobs, reloads, PNG files."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from page_helpers import DONE, app, choose, chromium, generate, image_of, url, visit
from serving_helpers import load, pixels, png, server, wait_until

from unclip.image_io import encode_image


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
