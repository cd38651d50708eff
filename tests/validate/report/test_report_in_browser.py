"""The page in a browser: complete at every width, in light and dark, without any request to the outside."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, sync_playwright

from tests.validate.report.test_report import crashed, dense, least, sample_report
from validate.report.html import render_html

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
_QUIET = ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
_WIDTHS = {"phone": 360, "tablet": 768, "desktop": 1440}

_PLOTS = """
() => [...document.querySelectorAll("main [role=img]")].map(plot => {
    const marks = [...plot.querySelectorAll("path, rect, line, use, text, i")];
    const seen = marks.map(mark => mark.getBoundingClientRect()).filter(box => box.width + box.height > 0);
    const {width, height} = plot.getBoundingClientRect();
    return {
        name: plot.getAttribute("aria-label"), width, height, marks: seen.length,
        left: Math.min(...seen.map(box => box.left)), right: Math.max(...seen.map(box => box.right)),
    };
})
"""
"""Every plot's name and size, and how many marks it has and how far they reach, in pixels."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Headless Chromium."""
    path = next((found for name in _BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip("no Chromium on this machine; install it (Debian: apt-get install chromium) to look at the report")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, chromium_sandbox=False, args=_QUIET)
        yield browser
        browser.close()


class Visit:
    """A page that was opened, and what it said and asked for."""

    def __init__(self, page: Page, path: Path) -> None:
        self.page = page
        self.said: list[str] = []
        self.asked_for: list[str] = []
        page.on("console", self._hear)
        page.on("pageerror", lambda error: self.said.append(str(error)))
        page.on("request", self._see)
        page.goto(path.as_uri())

    def _hear(self, message: ConsoleMessage) -> None:
        self.said.append(message.text)

    def _see(self, request: Request) -> None:
        self.asked_for.append(request.url)


_REPORTS: dict[str, Callable[[], dict[str, Any]]] = {
    "complete": sample_report,
    "one runtime crashed": lambda: crashed(sample_report(), "gguf"),
    "dense": lambda: dense(sample_report()),
    "least": least,
}


@pytest.mark.parametrize("make_report", _REPORTS.values(), ids=_REPORTS.keys())
def test_page(browser: Browser, make_report: Callable[[], dict[str, Any]], tmp_path: Path) -> None:
    """Silent, self-contained, readable; as wide as the screen, and every plot has marks that can be seen."""
    path = tmp_path / "report.html"
    path.write_text(render_html(make_report()), encoding="utf-8")
    visit = Visit(browser.new_page(), path)
    for scheme in ("light", "dark"):
        visit.page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        assert _contrast(visit.page) >= 4.5  # WCAG 2.1, success criterion 1.4.3
        for width in _WIDTHS.values():
            visit.page.set_viewport_size({"width": width, "height": 900})
            assert visit.page.evaluate("document.scrollingElement.scrollWidth") <= width
            for plot in visit.page.evaluate(_PLOTS):
                assert plot["marks"] > 0, plot
                assert plot["width"] > width / 4, plot
                assert plot["height"] > 5, plot
                assert plot["left"] >= 0, plot
                assert plot["right"] <= width, plot
    visit.page.close()
    assert visit.said == []
    assert visit.asked_for == [path.as_uri()]


def _contrast(page: Page) -> float:
    """Of body text and its ground, by WCAG's definition."""
    colours = page.evaluate(
        "() => { const {color, backgroundColor} = getComputedStyle(document.body); return [color, backgroundColor]; }"
    )
    darker, lighter = sorted(_luminance(colour) for colour in colours)
    return (lighter + 0.05) / (darker + 0.05)


def _luminance(colour: str) -> float:
    """Relative luminance of ``rgb(r, g, b)``."""
    parts = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return float(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
