"""assets/build_page_screenshots.py reports a missing browser."""

from __future__ import annotations

import pytest

pytest.importorskip("playwright")
build_page_screenshots = pytest.importorskip("build_page_screenshots")


def test_a_missing_chromium_is_one_line(monkeypatch):
    monkeypatch.setattr(build_page_screenshots, "start_server", lambda: pytest.fail("too early"))
    with pytest.raises(SystemExit) as stop:
        build_page_screenshots.main(["--chromium", "none"])
    (line,) = str(stop.value).splitlines()
    assert line.startswith("error: cannot start none") and "--chromium PATH" in line
