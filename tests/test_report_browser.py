"""The report in a real browser: drawn, silent, closed to the outside, and usable on a phone."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("plotly", reason="the report needs the extra evenorm[lab]")
pytest.importorskip("playwright", reason="the browser is driven by playwright")
if shutil.which("chromium") is None:
    pytest.skip("no chromium on the path", allow_module_level=True)

from playwright.sync_api import Browser, Page

from evenorm.lab.report import write_report
from report_cases import ENVIRONMENT, analyses, hostile, layer_view
from report_picture import browser, draw_all, take_picture

FIGURES = sum(len(analysis.figures) for analysis in analyses())


@dataclass
class Opened:
    """A page, and all that it said and asked for."""

    page: Page
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def assert_quiet(self, path: Path) -> None:
        assert self.said == []
        assert self.asked == [path.as_uri()]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    return write_report(analyses(), path, environment=ENVIRONMENT, layer=layer_view())


@pytest.fixture(scope="module")
def shared(chromium: Browser, path: Path) -> Iterator[Opened]:
    """One page for all tests that leave it as they found it: loading a page takes longer than most tests."""
    context = chromium.new_context(
        viewport={"width": 1280, "height": 900},
        reduced_motion="reduce",
        permissions=["clipboard-read", "clipboard-write"],
    )
    opened = listening(Opened(context.new_page()))
    opened.page.goto(path.as_uri())
    draw_all(opened.page)
    yield opened
    context.close()


@pytest.fixture
def page(shared: Opened) -> Page:
    """The shared page, its layer as at first, at its top."""
    shared.page.locator("input[value=sigmoid]").check()
    slide(shared.page, "gamma", 1)
    slide(shared.page, "beta", 0)
    shared.page.evaluate("scrollTo(0, 0)")
    return shared.page


@pytest.fixture
def visit(chromium: Browser) -> Iterator[Callable[..., Opened]]:
    contexts = []

    def open_page(path: Path, **options: Any) -> Opened:
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        opened = listening(Opened(context.new_page()))
        opened.page.goto(path.as_uri())
        return opened

    yield open_page
    for context in contexts:
        context.close()


def listening(opened: Opened) -> Opened:
    opened.page.on("console", lambda message: opened.said.append(f"{message.type}: {message.text}"))
    opened.page.on("pageerror", lambda error: opened.said.append(f"error: {error}"))
    opened.page.on("request", lambda request: opened.asked.append(request.url))
    return opened


def histogram(page: Page, stage: str) -> str:
    return page.locator(f"#stage-{stage} .histogram").get_attribute("d") or ""


def slide(page: Page, slider: str, value: float) -> None:
    """Set a slider as a drag does: its value, and the event."""
    page.locator(f"#{slider}").evaluate(
        "(input, value) => { input.value = value; input.dispatchEvent(new Event('input')); }", value
    )


def readout(page: Page) -> list[str]:
    return page.locator("#layer-readout dt").all_inner_texts()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 380])
def test_every_plot_is_drawn_in_silence_nothing_leaves_the_page_and_nothing_scrolls_sideways(
    visit: Callable[..., Opened], path: Path, width: int, scheme: str
) -> None:
    opened = visit(path, viewport={"width": width, "height": 800}, color_scheme=scheme)
    draw_all(opened.page)
    drawn = opened.page.locator(".plot").evaluate_all(
        "plots => plots.filter(plot => plot.querySelector('.main-svg .trace, .main-svg .bars')).length"
    )
    assert drawn == FIGURES
    assert opened.page.locator("#layer-curve .curve").count() == 1
    opened.page.locator("summary").evaluate_all("all => all.forEach(summary => summary.click())")
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    blank = opened.page.context.new_page()
    assert len(opened.page.screenshot()) > 3 * len(blank.screenshot())
    opened.assert_quiet(path)


def test_plots_far_below_wait_until_they_are_near(visit: Callable[..., Opened], path: Path) -> None:
    page = visit(path, viewport={"width": 1280, "height": 400}).page
    assert page.locator(".plot").last.locator(".main-svg").count() == 0
    page.locator(".plot").last.scroll_into_view_if_needed()
    page.locator(".plot").last.locator(".main-svg").first.wait_for()


def test_a_tablet_with_touch_has_no_sideways_scroll_either(visit: Callable[..., Opened], path: Path) -> None:
    page = visit(path, viewport={"width": 768, "height": 1024}, has_touch=True).page
    draw_all(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 768


def test_the_first_screen_shows_title_and_verdicts(page: Page) -> None:
    for selector in ("h1", ".tally", ".card >> nth=0", ".card .interval >> nth=0"):
        box = page.locator(selector).bounding_box()
        assert box is not None
        assert 0 <= box["y"] < 900 - box["height"]
    assert page.locator(".card").count() == len(analyses())


def colours(page: Page, selector: str) -> tuple[str, str]:
    script = "e => [getComputedStyle(document.body).backgroundColor, getComputedStyle(e).fill]"
    background, fill = page.locator(selector).first.evaluate(script)
    return background, fill


def test_light_and_dark_differ_in_page_and_plots_and_the_choice_is_kept(
    visit: Callable[..., Opened], path: Path
) -> None:
    opened = visit(path, color_scheme="light")
    page = opened.page
    draw_all(page)
    light = colours(page, ".plot .xtick text")
    page.locator("#theme").click()
    dark = colours(page, ".plot .xtick text")
    assert light[0] != dark[0]
    assert light[1] != dark[1]
    page.reload()
    draw_all(page)
    assert colours(page, ".plot .xtick text") == dark
    assert opened.said == []


def test_a_system_that_turns_dark_turns_the_plots_dark(visit: Callable[..., Opened], path: Path) -> None:
    page = visit(path, color_scheme="light").page
    draw_all(page)
    light = colours(page, ".plot .xtick text")
    page.emulate_media(color_scheme="dark")
    assert colours(page, ".plot .xtick text")[1] != light[1]


def test_a_plot_has_no_button_that_sends_it_anywhere(page: Page) -> None:
    buttons = page.locator(".plot").first.locator(".modebar-btn")
    assert buttons.evaluate_all("all => all.map(button => button.dataset.title)") == [
        "Download plot as a PNG",
        "Zoom",
        "Pan",
        "Reset axes",
    ]
    assert page.locator(".modebar-btn[href]").count() == 0


def test_a_plot_can_be_saved_as_a_picture(page: Page, shared: Opened) -> None:
    with page.expect_download() as waiting:
        page.locator(".plot .modebar-btn").first.dispatch_event("click")
    assert waiting.value.path().read_bytes().startswith(b"\x89PNG")
    assert shared.said == []


def test_a_choice_in_a_plot_s_menu_outlasts_a_change_of_colours(visit: Callable[..., Opened], path: Path) -> None:
    page = visit(path).page
    draw_all(page)
    plot = page.locator("#plot-0-1")
    plot.locator(".updatemenu-header").click()
    plot.locator(".updatemenu-dropdown-button").nth(1).click()
    page.wait_for_function("document.querySelectorAll('#plot-0-1 .scatterlayer .trace').length === 1")
    page.locator("#theme").click()
    assert plot.locator(".scatterlayer .trace").count() == 1
    assert plot.locator(".updatemenu-header text").first.text_content() == "with"


def test_a_colour_made_for_white_paper_is_readable_on_black(visit: Callable[..., Opened], tmp_path: Path) -> None:
    case = analyses()[0]
    trace = {"type": "scatter", "mode": "lines", "x": [1, 2], "y": [1, 2], "line": {"color": "#000080"}}
    figure = replace(case.figures[0], plotly={"data": [trace]})
    path = write_report([replace(case, figures=(figure,))], tmp_path / "r.html", environment=ENVIRONMENT)
    strokes = {}
    for scheme in ("light", "dark"):
        page = visit(path, color_scheme=scheme).page
        draw_all(page)
        style = page.locator(".scatterlayer .js-line").evaluate("line => getComputedStyle(line).stroke")
        strokes[scheme] = [int(channel) for channel in style[4:-1].split(",")]
    assert strokes["light"] == [0, 0, 128]
    assert sum(strokes["dark"]) > 300


# The layer ---------------------------------------------------------------------------------------------------


def test_the_layer_starts_on_the_straight_stretch(page: Page) -> None:
    straight, explained, saturated = (int(float(text.split()[0])) for text in readout(page))
    layer = layer_view()
    inside = [abs((value - layer.mean) / layer.std) <= 1 for value in layer.pre_activations]
    assert straight == round(100 * sum(inside) / len(inside))
    assert explained > 95
    assert saturated == 0


def test_the_sliders_move_the_inputs_and_the_outputs_but_not_what_came_before(page: Page) -> None:
    before = {stage: histogram(page, stage) for stage in ("before", "standardised", "scaled", "after")}
    curve = page.locator("#layer-curve .histogram").get_attribute("d")
    slide(page, "gamma", 4)
    assert page.locator("#gamma-value").inner_text() == "4.00"
    assert page.locator("#layer-curve .histogram").get_attribute("d") != curve
    for stage, moved in {"before": False, "standardised": False, "scaled": True, "after": True}.items():
        assert (histogram(page, stage) != before[stage]) == moved
    scaled = histogram(page, "scaled")
    slide(page, "beta", -2)
    assert page.locator("#beta-value").inner_text() == "−2.00"
    assert histogram(page, "scaled") != scaled
    assert "mean −2.00, std 4.00" in page.locator("#stage-scaled-text").inner_text()


def test_the_sliders_work_from_the_keyboard(page: Page) -> None:
    page.locator("#gamma").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#gamma-value").inner_text() == "1.01"


def test_the_activation_changes_the_curve(page: Page) -> None:
    curves = set()
    for name in ("sigmoid", "tanh", "relu"):
        page.locator(f"input[value={name}]").check()
        curves.add(page.locator("#layer-curve .curve").get_attribute("d"))
    assert len(curves) == 3


def test_the_learned_values_are_one_press_away(page: Page) -> None:
    page.locator("#learned").click()
    page.locator("#gamma-value", has_text="2.34").wait_for()
    assert page.locator("#beta-value").inner_text() == "−0.71"
    page.locator("#neutral").click()
    page.locator("#gamma-value", has_text="1.00").wait_for()


# Taking the numbers away -------------------------------------------------------------------------------------


def download(page: Page, selector: str) -> str:
    with page.expect_download() as waiting:
        page.locator(selector).first.click()
    return waiting.value.path().read_text(encoding="utf-8-sig")


def test_the_numbers_can_be_downloaded(page: Page, shared: Opened) -> None:
    data = json.loads(download(page, "#download-json"))
    assert [analysis["experiment"] for analysis in data["analyses"]] == [a.experiment for a in analyses()]
    rows = list(csv.DictReader(io.StringIO(download(page, "#download-csv"))))
    endpoints = [endpoint for analysis in analyses() for endpoint in analysis.endpoints]
    assert [float(row["estimate"]) for row in rows] == [endpoint.estimate for endpoint in endpoints]
    assert [row["verdict"] for row in rows] == [endpoint.verdict.value for endpoint in endpoints]
    assert shared.said == []


def test_a_plot_s_points_can_be_downloaded(page: Page) -> None:
    rows = list(csv.DictReader(io.StringIO(download(page, "[data-analysis='1'] + figcaption .figure-data"))))
    trace = analyses()[1].figures[0].plotly["data"][0]
    assert [float(row["y"]) for row in rows] == trace["y"]
    assert [row["x"] for row in rows] == trace["x"]


def test_the_command_can_be_copied(page: Page) -> None:
    page.locator(".copy").first.click()
    page.locator(".copy", has_text="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == analyses()[0].command


def test_paper_shows_every_plot_in_light_and_every_detail(visit: Callable[..., Opened], path: Path) -> None:
    opened = visit(path, color_scheme="dark")
    assert opened.page.locator(".plot .main-svg").count() < 3 * FIGURES
    opened.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert opened.page.locator(".plot").evaluate_all("all => all.every(plot => plot.querySelector('.main-svg'))")
    assert opened.page.locator("details:not([open])").count() == 0
    opened.page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert opened.page.locator("details[open]").count() == 0
    assert len(opened.page.pdf(format="A4")) > 50_000
    opened.assert_quiet(path)


# Hostile text, other languages, pictures ---------------------------------------------------------------------


def test_hostile_text_stays_text(visit: Callable[..., Opened], tmp_path: Path) -> None:
    path = write_report([hostile()], tmp_path / "hostile.html", environment=ENVIRONMENT, layer=layer_view())
    opened = visit(path, viewport={"width": 380, "height": 800})
    draw_all(opened.page)
    assert opened.page.title() == "Batch norm, claim by claim · evenorm"
    assert opened.page.locator("img").count() == 0
    assert opened.page.locator(".plot a").count() == 0
    assert "<img src=x onerror=" in opened.page.locator(".plot .xtitle").first.text_content()
    assert "</script><img src=x" in opened.page.locator("h3").first.inner_text()
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= 380
    opened.assert_quiet(path)


def test_a_formula_in_a_name_is_text_in_the_spreadsheet(visit: Callable[..., Opened], tmp_path: Path) -> None:
    case = analyses()[0]
    endpoint = replace(case.endpoints[0], name='=HYPERLINK("x")', estimate=-1.5)
    path = write_report([replace(case, endpoints=(endpoint,))], tmp_path / "r.html", environment=ENVIRONMENT)
    row = next(csv.DictReader(io.StringIO(download(visit(path).page, "#download-csv"))))
    assert row["name"] == '\'=HYPERLINK("x")'
    assert row["estimate"] == "-1.5"


def test_the_page_in_korean(visit: Callable[..., Opened], tmp_path: Path) -> None:
    path = write_report(
        analyses(), tmp_path / "ko.html", environment=ENVIRONMENT, layer=layer_view(), language="ko"
    )
    opened = visit(path, viewport={"width": 380, "height": 800})
    draw_all(opened.page)
    assert opened.page.locator("h1").inner_text() == "배치 정규화, 주장 하나하나"
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= 380
    opened.assert_quiet(path)


def test_without_scripts_the_verdicts_and_numbers_stand(visit: Callable[..., Opened], path: Path) -> None:
    page = visit(path, java_script_enabled=False).page
    assert page.locator(".card .interval").count() == len(analyses())
    assert page.locator("noscript").is_visible()


def test_a_picture_for_the_readme(chromium: Browser, path: Path, tmp_path: Path) -> None:
    picture = take_picture(chromium, path, tmp_path / "docs" / "report.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 20_000
