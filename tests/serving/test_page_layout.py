"""Layout and accessibility of the web page in a real Chromium."""

from __future__ import annotations

import os

import pytest
from page_helpers import app, chromium, generate, url, visit
from serving_helpers import load

PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "color_scheme": "dark"}


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
