"""The doctor's page in a real browser: drawn, silent, closed to the outside, and usable on a phone."""

from __future__ import annotations

import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("plotly", reason="the page needs the extra evenorm[lab]")
pytest.importorskip("playwright", reason="the browser is driven by playwright")
if shutil.which("chromium") is None:
    pytest.skip("no chromium on the path", allow_module_level=True)

from playwright.sync_api import Browser, Page

import evenorm
from report_picture import browser, draw_all

NASTY = "<img src=x onerror=alert(1)></script><script>alert(2)</script>\x1b[31m\u202e"
SCORES, DEPTH, LAYERS = 1, 1, 3


@dataclass
class Opened:
    """A page, and all that it said and asked for."""

    page: Page
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)


def patient(nasty: str) -> tuple[nn.Module, list[Any]]:
    """Return a network of three stale layers, one of a strange name, and data."""
    torch.manual_seed(0)
    parts = OrderedDict[str, nn.Module]()
    for name in ("first", nasty, "a-name-of-a-layer-that-is-rather-long-for-a-telephone"):
        parts[f"linear {name}"] = nn.Linear(6, 6)
        parts[name] = nn.BatchNorm1d(6, momentum=0.01)
        parts[f"relu {name}"] = nn.ReLU()
    model = nn.Sequential(parts)
    x = 3 * torch.randn(640, 6) + 2
    with torch.no_grad():
        y = model(x).argmax(1)
    return model, list(zip(x.split(64), y.split(64), strict=True))


@pytest.fixture(scope="module")
def page_of_a_patient(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, data = patient(NASTY)
    path = tmp_path_factory.mktemp("doctor") / "page.html"
    path.write_text(evenorm.diagnose(model, data).to_html(), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as opened:
        yield opened


@pytest.fixture
def visit(chromium: Browser) -> Iterator[Callable[..., Opened]]:
    contexts = []

    def open_page(path: Path, **options: Any) -> Opened:
        contexts.append(chromium.new_context(**options))
        opened = Opened(contexts[-1].new_page())
        opened.page.on("console", lambda message: opened.said.append(f"{message.type}: {message.text}"))
        opened.page.on("pageerror", lambda error: opened.said.append(f"error: {error}"))
        opened.page.on("request", lambda request: opened.asked.append(request.url))
        opened.page.goto(path.as_uri())
        return opened

    yield open_page
    for context in contexts:
        context.close()


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (380, "dark")])
def test_all_is_drawn_in_silence_and_nothing_scrolls_sideways(
    visit: Callable[..., Opened], page_of_a_patient: Path, width: int, scheme: str
) -> None:
    opened = visit(page_of_a_patient, viewport={"width": width, "height": 800}, color_scheme=scheme)
    draw_all(opened.page)
    assert opened.page.locator(".plot .main-svg").count() >= SCORES + DEPTH + LAYERS
    assert opened.page.locator(".plot").count() == SCORES + DEPTH + LAYERS
    assert opened.page.locator(".plot").first.locator(".bars .point").count() == 3
    assert opened.page.locator(".plot").last.locator(".scatterlayer .point").count() == 4 * 6
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    for place in (".card h3", ".card code", ".lede", ".plot-figure h3", ".plot", ".card .scroll"):
        for box in opened.page.locator(place).evaluate_all("all => all.map(one => one.getBoundingClientRect())"):
            assert 0 <= box["left"] < box["right"] <= width, place
    assert opened.said == []
    assert opened.asked == [page_of_a_patient.as_uri()]


def test_a_name_from_a_stranger_stays_text(visit: Callable[..., Opened], page_of_a_patient: Path) -> None:
    opened = visit(page_of_a_patient)
    draw_all(opened.page)
    assert opened.page.locator("img").count() == 0
    shown = opened.page.locator(".card h3").all_inner_texts()
    harmless = NASTY.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")
    assert any(harmless in text for text in shown)
    assert harmless in opened.page.locator(".card td").all_inner_texts()
    assert opened.page.locator("#layers h3").nth(1).inner_text() == harmless
    assert "\u202e" not in opened.page.content()
    assert opened.said == []


def test_the_answer_stands_on_the_first_screen(visit: Callable[..., Opened], page_of_a_patient: Path) -> None:
    page = visit(page_of_a_patient, viewport={"width": 1200, "height": 800}).page
    box = page.locator(".lede").bounding_box()
    assert box is not None
    assert box["y"] + box["height"] < 800
    assert page.locator(".lede").inner_text().startswith("eval() loses ")
    assert page.locator(".card").count() > 0
    assert page.locator(".card table th").first.is_visible()


def test_without_scripts_the_findings_stand(visit: Callable[..., Opened], page_of_a_patient: Path) -> None:
    page = visit(page_of_a_patient, java_script_enabled=False).page
    assert page.locator(".card h3").count() > 0
    assert page.locator("noscript").is_visible()
