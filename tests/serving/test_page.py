"""The server's page in a real browser: by keyboard, on a phone, and with nothing from elsewhere."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from bundles import MadeByCommands
from serving.served import Served

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
DESKTOP, PHONE = {"width": 1200, "height": 900}, {"width": 390, "height": 844}
STICKING_OUT = "() => document.documentElement.scrollWidth > innerWidth"
OUT = os.environ.get("SCREENSHOTS")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The system's Chromium where there is one, else the one that playwright has installed."""
    from playwright.sync_api import sync_playwright

    found = os.environ.get("BROWSER_PATH") or next(filter(None, map(shutil.which, BROWSERS)), None)
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def served(pixel: MadeByCommands) -> Iterator[Served]:
    with Served({"pixel": pixel.bundle}, slots=2, queue=4) as server:
        yield server


class Visit:
    """A page, and everything that it complained of or asked for elsewhere."""

    def __init__(self, browser: Any, url: str, viewport: dict[str, int], scheme: str = "light") -> None:
        self.complaints: list[str] = []
        self.page = browser.new_page(viewport=viewport, color_scheme=scheme)
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on(
            "request",
            lambda request: request.url.startswith((url, "data:")) or self.complaints.append(request.url),
        )
        self.page.goto(url)
        self.page.get_by_text("Ready").wait_for()

    def shot(self, name: str) -> None:
        if OUT:
            self.page.screenshot(path=f"{OUT}/{name}.png", full_page=True)


@pytest.mark.browser
@pytest.mark.parametrize(("viewport", "scheme"), [(DESKTOP, "light"), (PHONE, "dark")])
def test_a_picture_is_made_by_keyboard_alone(
    browser: Any, served: Served, viewport: dict[str, int], scheme: str
) -> None:
    visit = Visit(browser, served.url, viewport, scheme)
    page = visit.page
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Control+a")
    page.keyboard.type("7")
    page.keyboard.press("Enter")
    page.get_by_text("Done").wait_for()
    image = page.get_by_role("img", name="Image 1, done")
    assert image.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [8, 8]
    assert page.locator(".steps li").count() == 9
    assert page.locator(".steps li.done").count() == 9
    assert page.locator(".steps li.full").count() == 5
    assert "5 steps full, 4 cached; seed 0" in page.locator("section p").inner_text()
    assert not page.evaluate(STICKING_OUT)
    assert visit.complaints == []
    visit.shot(f"page-{scheme}")
    page.close()


@pytest.mark.browser
def test_plan_and_full_run_stand_side_by_side(browser: Any, served: Served) -> None:
    visit = Visit(browser, served.url, DESKTOP)
    page = visit.page
    page.get_by_label("Quality").select_option("both")
    page.get_by_label("Images").fill("2")
    page.get_by_role("button", name="Make").click()
    page.get_by_text("Done").wait_for()
    assert page.locator("section h2").all_inner_texts() == ["standard", "hd"]
    assert page.get_by_role("img").count() == 4
    boxes = [section.bounding_box() for section in page.locator("section").all()]
    assert boxes[0]["y"] == boxes[1]["y"]
    assert visit.complaints == []
    visit.shot("page-both")
    page.close()


@pytest.mark.browser
def test_a_refusal_and_a_stop_are_said(browser: Any, served: Served) -> None:
    visit = Visit(browser, served.url, PHONE)
    page = visit.page
    page.get_by_label("Class").fill("77")
    page.get_by_role("button", name="Make").click()
    page.get_by_text("must be a class label from 0 to 9").wait_for()
    page.get_by_label("Class").fill("7")
    with served.held():
        page.get_by_role("button", name="Make").click()
        page.get_by_text("waits").wait_for()
        page.get_by_role("button", name="Stop").click()
        page.get_by_text("Stopped").wait_for()
    assert served.engine.samples == (0, 0)
    page.close()


def test_the_page_and_its_parts_are_served_and_nothing_else(served: Served) -> None:
    with served.client() as client:
        page = client.get("/")
        assert page.headers["content-type"].startswith("text/html")
        assert "default-src 'none'" in page.headers["content-security-policy"]
        for name, kind in (("page.js", "text/javascript"), ("page.css", "text/css")):
            assert f"/static/{name}" in page.text
            assert client.get(f"/static/{name}").headers["content-type"].startswith(kind)
        for name in ("app.py", "..%2fapp.py", "index.html%00", "nothing"):
            assert client.get(f"/static/{name}").status_code == 404
