"""A picture of a written report, as README shows it: python tests/report_picture.py report.html picture.png."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, FloatRect, Page, sync_playwright


@contextmanager
def browser() -> Iterator[Browser]:
    """The system's Chromium, headless.

    Raises:
        ValueError: no Chromium is installed.
    """
    chromium = shutil.which("chromium")
    if chromium is None:
        raise ValueError("a picture of the report needs Chromium, and none is on the path; install chromium")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield opened
        finally:
            opened.close()


def draw_all(page: Page) -> None:
    """Scroll through the page, so that every plot is drawn, and back to the top."""
    for plot in page.locator(".plot").all():
        plot.scroll_into_view_if_needed()
        plot.locator(".main-svg").first.wait_for()
    page.evaluate("document.documentElement.style.scrollBehavior = 'auto'; scrollTo(0, 0)")


def take_picture(opened: Browser, report: Path, picture: Path) -> Path:
    """The opening of `report` and its first three verdicts as a PNG file, sharp on a high-density screen."""
    page = opened.new_page(viewport={"width": 1280, "height": 900}, device_scale_factor=1.5, color_scheme="light")
    page.goto(report.resolve().as_uri())
    picture.parent.mkdir(parents=True, exist_ok=True)
    card = page.locator(".card:nth-child(-n+3)").last.bounding_box()
    assert card is not None, "a report has at least one verdict"
    clip = {"x": 0.0, "y": 0.0, "width": 1280.0, "height": card["y"] + card["height"] + 16}
    page.screenshot(path=picture, full_page=True, clip=FloatRect(**clip))
    page.close()
    return picture


if __name__ == "__main__":
    with browser() as chromium:
        print(take_picture(chromium, Path(sys.argv[1]), Path(sys.argv[2])))
