"""The page in a real browser: nothing is fetched, nothing complains, nothing sticks out, on any screen."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report.folders import CHOSEN, DIGITS, edit, points_of_the_demo, write_search

from tc_deploy.plan import PLAN
from tc_deploy.report.page import write_report
from tc_deploy.search.record import Kind

pytestmark = pytest.mark.browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
DESKTOP, PHONE = {"width": 1200, "height": 900}, {"width": 390, "height": 844}
SECTIONS = ["pareto", "schedule", "tokens", "drift", "samples", "points", "provenance"]
ATTACK = "<script>alert(1)</script><img src=x onerror=alert(2)>"
OVERFLOWING = """
() => [...document.querySelectorAll("body *")]
  .filter(element => !element.closest("svg, .scroll") && element.getBoundingClientRect().right > innerWidth + 0.5)
  .map(element => element.tagName + "." + element.className)
"""
"""What sticks out to the right; what scrolls by itself may be wider inside."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The system's Chromium where there is one, else the one that playwright has installed."""
    from playwright.sync_api import sync_playwright

    found = os.environ.get("BROWSER_PATH") or next(filter(None, map(shutil.which, BROWSERS)), None)
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=found)
        yield running
        running.close()


@pytest.fixture
def report(tmp_path: Path) -> Path:
    output = tmp_path / "report.html"
    write_report(write_search(tmp_path / "digits"), output)
    return output


class Visit:
    """A page that was opened, and everything that it complained of or asked for."""

    def __init__(self, browser: Any, output: Path, viewport: dict[str, int], scheme: str = "light") -> None:
        self.complaints: list[str] = []
        self.page = browser.new_page(viewport=viewport, color_scheme=scheme)
        self.page.on("console", lambda message: self.complaints.append(f"console: {message.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        self.page.on("dialog", lambda dialog: self.complaints.append(f"dialog: {dialog.message}") or dialog.dismiss())
        self.page.on("request", lambda request: self._note(request.url, output.as_uri()))
        self.page.goto(output.as_uri(), wait_until="networkidle")

    def _note(self, url: str, own: str) -> None:
        if url != own and not url.startswith("data:"):
            self.complaints.append(f"request: {url}")

    def sections(self) -> list[str]:
        found = self.page.evaluate("() => [...document.querySelectorAll('section')].map(section => section.id)")
        return list(found)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_page_is_quiet_and_fits(browser: Any, report: Path, viewport: dict[str, int], scheme: str) -> None:
    visit = Visit(browser, report, viewport, scheme)
    assert visit.sections() == SECTIONS
    assert visit.page.evaluate("() => document.documentElement.scrollWidth") <= viewport["width"]
    assert visit.page.evaluate(OVERFLOWING) == []
    assert visit.page.evaluate("() => [...document.images].every(image => image.naturalWidth > 0)")
    assert visit.complaints == []
    visit.page.close()


def test_marks_are_drawn_and_say_what_they_are(browser: Any, report: Path) -> None:
    visit = Visit(browser, report, DESKTOP)
    points = [point for point in points_of_the_demo() if point.kind is not Kind.FULL]
    sizes = visit.page.evaluate(
        "() => [...document.querySelectorAll('#pareto .chart .mark')].map(mark => mark.getBoundingClientRect().width)"
    )
    assert len(sizes) == len(points)
    assert min(sizes) > 8
    titles = visit.page.locator("#pareto .chart title").all_text_contents()
    assert any(title.startswith(CHOSEN) for title in titles)
    assert visit.page.locator("#pareto .ring").count() == 1
    assert visit.page.locator("#pareto .front").count() == 1
    filled = visit.page.evaluate("() => getComputedStyle(document.querySelector('#tokens use')).fill")
    assert filled == "rgb(11, 98, 168)"
    visit.page.close()


def test_colours_follow_the_reader_s_choice(browser: Any, report: Path) -> None:
    papers = {}
    for scheme in ("light", "dark"):
        visit = Visit(browser, report, DESKTOP, scheme)
        papers[scheme] = visit.page.evaluate("() => getComputedStyle(document.body).backgroundColor")
        visit.page.emulate_media(media="print")
        papers[f"{scheme}, printed"] = visit.page.evaluate("() => getComputedStyle(document.body).backgroundColor")
        visit.page.close()
    white = "rgb(255, 255, 255)"
    assert papers["dark"] != white
    assert papers["light"] == papers["light, printed"] == papers["dark, printed"] == white


def test_a_name_that_is_a_script_stays_text(browser: Any, tmp_path: Path) -> None:
    folder = tmp_path / "digits"
    shutil.copytree(DIGITS, folder)
    edit(folder / PLAN, lambda plan: plan["model"].update(model_class=ATTACK))
    write_report(write_search(folder, remarks=(ATTACK,)), tmp_path / "report.html")
    visit = Visit(browser, tmp_path / "report.html", PHONE)
    assert ATTACK in visit.page.locator("header").inner_text()
    assert visit.page.locator("script").count() == 0
    assert visit.complaints == []
    visit.page.close()


def test_a_plan_alone(browser: Any, tmp_path: Path) -> None:
    write_report(DIGITS, tmp_path / "report.html")
    visit = Visit(browser, tmp_path / "report.html", PHONE)
    assert visit.sections() == ["schedule", "tokens", "provenance"]
    assert visit.page.evaluate(OVERFLOWING) == []
    assert visit.complaints == []
    visit.page.close()
