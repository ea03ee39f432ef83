"""Screenshots of the server's page with the bundled model: assets/page/*.png.

    python assets/build_page_screenshots.py [--chromium PATH]

Needs the extra `dev` and a Chromium.
"""

from __future__ import annotations

import argparse
import io
import shutil
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import uvicorn
from PIL import Image
from playwright.sync_api import Browser, Error, Page, Playwright, sync_playwright

from unclip.files import exit_on_error
from unclip.image_io import open_image
from unclip.serving.app import create_app
from unclip.serving.config import ServerConfig

FOLDER = Path(__file__).parent / "page"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]
PROMPTS = ("a smiling cat, blob emoji", "a green heart in noto style", "a birthday cake")
MAX_BYTES = 150_000
SIZES = {"desktop": (1280, 860), "phone": (390, 844)}


def start_server() -> str:
    """Serve the bundled model in a thread, and return the address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    app = create_app(ServerConfig(port=port))
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_config=None))
    threading.Thread(target=server.run, daemon=True).start()
    while not (server.started and app.state.engine.ready):
        time.sleep(0.1)
    return f"http://127.0.0.1:{port}/"


def save(page: Page, name: str) -> None:
    """Write what is visible, with the largest palette that keeps the file small."""
    image = open_image(io.BytesIO(page.screenshot()))
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.png"
    for colors in (256, 192, 128, 96, 64):
        image.quantize(colors, dither=Image.Dither.NONE).save(path, optimize=True)
        if path.stat().st_size < MAX_BYTES:
            return
    raise ValueError(f"{path} has {path.stat().st_size} bytes; expected less than {MAX_BYTES}")


def generate(page: Page, prompt: str, n: int) -> None:
    count = page.locator(".entry[data-status=done]").count()
    page.fill("#prompt", prompt)
    page.fill("#seed", "7")
    page.fill("#n", str(n))
    page.press("#prompt", "Enter")
    page.locator(".entry[data-status=done]").nth(count).wait_for(timeout=120_000)


def hide_message(page: Page) -> None:
    page.evaluate("() => document.getElementById('toast').hidePopover()")
    page.mouse.move(1, 1)


def desktop(page: Page) -> None:
    """The history after a mix, and the mask editor."""
    for prompt in PROMPTS:
        generate(page, prompt, 1)
    generate(page, "a red apple", 4)
    page.locator(".wide .tile").first.click()
    page.click("[data-action=edit]")
    canvas = page.locator("#mask-canvas")
    canvas.wait_for()
    box = canvas.bounding_box()
    assert box is not None
    left, top = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(left - 160, top - 60)
    page.mouse.down()
    for x, y in ((0, -110), (130, -60), (60, 20), (-100, 40)):
        page.mouse.move(left + x, top + y, steps=12)
    page.mouse.up()
    time.sleep(0.3)
    save(page, "mask")
    page.click("#mask-done")
    for tile in (0, 4 + PROMPTS[::-1].index("a green heart in noto style")):
        page.locator(".tile").nth(tile).click()
        page.click("[data-action=mix]")
    page.locator("[aria-label='Remove second image']").wait_for()
    page.fill("#n", "4")
    page.click("#generate")
    page.locator(".entry[data-status=done]").nth(4).wait_for(timeout=120_000)
    page.evaluate("() => [window, composer].forEach((one) => one.scrollTo(0, 0))")
    hide_message(page)
    save(page, "desktop")


def phone(page: Page) -> None:
    generate(page, PROMPTS[0], 1)
    generate(page, "a red apple", 4)
    page.evaluate("() => document.querySelector('.history').scrollIntoView()")
    hide_message(page)
    save(page, "phone-history")
    page.evaluate("() => scrollTo(0, 0)")
    save(page, "phone")


def start_chromium(playwright: Playwright, path: str | None) -> Browser:
    try:
        return playwright.chromium.launch(executable_path=path, args=FLAGS)
    except Error as error:
        given = f"cannot start {path or 'a Chromium'} ({str(error).splitlines()[0]})"
        raise ValueError(f"{given}; give --chromium PATH") from None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chromium", default=shutil.which("chromium"))
    path = parser.parse_args(arguments).chromium
    with exit_on_error(), sync_playwright() as playwright:
        browser = start_chromium(playwright, path)
        url = start_server()
        for name, (width, height) in SIZES.items():
            scheme = "dark" if name == "phone" else "light"
            page = browser.new_page(
                viewport={"width": width, "height": height}, color_scheme=scheme
            )
            page.goto(url)
            page.wait_for_selector("html[data-ready]")
            (phone if name == "phone" else desktop)(page)
        browser.close()


if __name__ == "__main__":
    main()
