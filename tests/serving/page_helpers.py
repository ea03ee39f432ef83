"""The web page in a real Chromium, against a server of models with random weights."""

from __future__ import annotations

import base64
import email
import json
import os
import shutil
from dataclasses import replace
from email.message import Message
from urllib.parse import urlsplit

import pytest
from serving_helpers import CONFIG, load, png, serving

from unclip.serving.app import create_app

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chrome")


FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]


DONE = ".entry[data-status=done]"
TIMEOUT = 60_000  # ms, on a busy machine


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


def open_mask(page):
    page.click("text=Paint mask")
    page.locator("#mask-canvas:focus").wait_for()


def use_mask(page):
    page.click("#mask-done")
    page.locator("#mask-canvas").wait_for(state="hidden")


def mask_point(page, x, y):
    """Return the position on the page of a point of a square image, as fractions of its side."""
    box = page.locator("#mask-canvas").bounding_box()
    side = min(box["width"], box["height"])
    left, top = box["x"] + (box["width"] - side) / 2, box["y"] + (box["height"] - side) / 2
    return left + x * side, top + y * side


def stroke(page, start, end):
    page.mouse.move(*mask_point(page, *start))
    page.mouse.down()
    page.mouse.move(*mask_point(page, *end), steps=5)
    page.mouse.up()


PASTE = """base64 => {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  const clipboardData = new DataTransfer();
  clipboardData.items.add(new File([bytes], "image.png", { type: "image/png" }));
  document.body.dispatchEvent(new ClipboardEvent("paste", { clipboardData, bubbles: true }));
}"""
