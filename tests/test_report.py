"""The report as text: what stands in it, what cannot, and how it is written."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy
import pytest

pytest.importorskip("plotly", reason="the report needs the extra evenorm[lab]")
pytest.importorskip("jinja2", reason="the report needs the extra evenorm[lab]")

from evenorm.lab.interval_plot import interval_plot
from evenorm.lab.layer_page import LayerView, slider_limits
from evenorm.lab.page_data import (
    interval_numbers,
    minus,
    number,
    p_value,
    plain,
    script_json,
    visible,
    without_links,
)
from evenorm.lab.report import render_report, write_report
from evenorm.lab.report_words import WORDS
from evenorm.lab.results import Table, Verdict
from report_cases import ENVIRONMENT, HOSTILE, analyses, hostile, layer_view, placement, speed


class Elements(HTMLParser):
    """Every start tag with its attributes, and the text of the page outside scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.open.append(tag)
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        if self.open and tag == self.open[-1]:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if not self.open:
            self.text.append(data)
        elif self.open == ["script"]:
            self.scripts[-1] += data

    def named(self, *tags: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.found if tag in tags]


def rendered(*cases: Any, **options: Any) -> str:
    return render_report(cases or analyses(), environment=ENVIRONMENT, **{"layer": layer_view(), **options})


def page_data(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="report-data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    data: dict[str, Any] = json.loads(found.group(1))
    return data


def texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from texts(item)


def test_every_text_of_an_analysis_is_on_the_page() -> None:
    text = "".join(Elements(rendered()).text).replace("\N{NO-BREAK SPACE}", " ")
    for analysis in analyses():
        shown = asdict(replace(analysis, figures=(), experiment="", configuration={}))
        for part in texts({key: value for key, value in shown.items() if key != "verdict"}):
            expected = part.value if isinstance(part, Verdict) else minus(part)
            assert part in Verdict._value2member_map_ or expected in text, part
        for figure in analysis.figures:
            assert figure.title in text
            assert figure.caption in text


def test_the_document_s_sentences_are_marked_as_korean() -> None:
    elements = Elements(rendered())
    korean = [attributes for attributes in elements.named("p") if attributes.get("lang") == "ko"]
    assert len(korean) == len(analyses()) + 1


def test_a_later_paper_s_claim_needs_no_korean() -> None:
    case = placement()
    page = rendered(replace(case, claim=replace(case.claim, korean="")), layer=None)
    assert 'lang="ko"' not in page
    assert WORDS["en"]["claim_later"] in page


def test_equal_results_give_equal_bytes() -> None:
    assert rendered() == rendered()


def test_without_a_layer_there_is_no_layer_section() -> None:
    page = rendered(layer=None)
    assert 'id="layer"' not in page
    assert 'href="#layer"' not in page
    assert page_data(page)["layer"] is None


def test_a_report_needs_an_analysis() -> None:
    with pytest.raises(ValueError, match="at least one analysis, got none"):
        render_report([], environment=ENVIRONMENT)


def test_an_unknown_language_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="one of en, ko, got 'fr'"):
        rendered(language="fr")


def test_a_card_shows_a_comparison_of_its_verdict() -> None:
    held, cannot_tell = (replace(speed().endpoints[0], name=name) for name in ("it holds", "it cannot be told"))
    endpoints = held, replace(cannot_tell, verdict=Verdict.INCONCLUSIVE)
    for verdict, name in ((Verdict.REPRODUCED, held.name), (Verdict.INCONCLUSIVE, cannot_tell.name)):
        page = rendered(replace(speed(), verdict=verdict, endpoints=endpoints))
        assert re.findall(r'class="card-number">.*?<p class="soft small">(.*?)</p>', page, re.DOTALL) == [name]
    none_alike = replace(speed(), verdict=Verdict.CONTRADICTED, endpoints=endpoints)
    assert none_alike.key is held
    assert replace(none_alike, endpoints=()).key is None


def test_a_negative_number_is_written_in_one_way_and_a_command_stays_as_it_is() -> None:
    analysis = replace(
        speed(),
        answer="It fell by -0.36 points (-0.63 to -.1), seeds 1000-1002.",
        command="evenorm lab run --data 'share -5 %.csv'",
        configuration={"rate": -1.5},
        claim=replace(speed().claim, korean="-1~1 사이"),
    )
    page = rendered(analysis)
    assert "It fell by −0.36 points (−0.63 to −.1), seeds 1000-1002." in page
    assert '<code id="command-0">evenorm lab run --data &#39;share -5 %.csv&#39;</code>' in page
    assert "<code>-1.5</code>" in page
    assert '<p lang="ko" class="original">-1~1 사이</p>' in page


def test_a_check_without_seeds_has_no_interval() -> None:
    exact = replace(speed().endpoints[0], estimate=0.258, low=0.258, high=0.258, p_value=math.nan, seeds=0)
    page = rendered(replace(speed(), endpoints=(exact,)))
    assert "<b>0.258</b>" in page
    assert '<span class="range">0.258 … 0.258</span>' not in page


def test_a_table_s_numbers_stay_on_their_line() -> None:
    table = Table("t", ("arm", "ratio", "words"), (("0.03", "12.3 (-1.0 to 13.8)", "not reached"),))
    page = rendered(replace(speed(), tables=(table,)))
    assert '<td class="number">12.3 (−1.0 to 13.8)</td><td>not reached</td>' in page


@pytest.mark.parametrize("language", sorted(WORDS))
def test_each_language_has_every_word_and_marks_the_page(language: str) -> None:
    assert WORDS[language].keys() == WORDS["en"].keys()
    page = rendered(language=language)
    assert f'<html lang="{language}">' in page
    assert WORDS[language]["verdicts"] in page


def test_no_word_of_the_table_is_unused() -> None:
    folder = Path(write_report.__code__.co_filename).parent / "templates"
    sources = "".join(path.read_text(encoding="utf-8") for path in folder.iterdir())
    built = {f"{verdict.value}{end}" for verdict in Verdict for end in ("", "_means")}
    built |= {f"stage_{key}" for key in ("before", "standardised", "scaled", "after")}
    built |= {"title", "lede"}  # read where the page is made
    assert [word for word in WORDS["en"] if f"words.{word}" not in sources and word not in built] == []


def test_sections_have_addresses_of_their_own_even_when_names_repeat() -> None:
    named = [replace(speed(), experiment=name) for name in ("a b", "a-b", "A b", "속도", "속도")]
    ids = [attributes["id"] for attributes in Elements(rendered(*named)).named("article")]
    assert len(set(ids)) == len(named)


# Hostile text ------------------------------------------------------------------------------------------------


def hostile_page() -> str:
    layer = replace(layer_view(), name=HOSTILE)
    return render_report([hostile()], environment={HOSTILE: HOSTILE}, layer=layer)


def test_hostile_text_makes_no_element_and_no_attribute() -> None:
    safe, attacked = Elements(rendered(hostile_twin(), layer=layer_view())), Elements(hostile_page())
    assert len(attacked.named("img")) == 0
    assert len(attacked.named("a")) == len(safe.named("a"))
    assert len(attacked.named("script")) == len(safe.named("script"))
    assert not any(key.startswith("on") for _, attributes in attacked.found for key in attributes)


def hostile_twin() -> Any:
    return json_twin(hostile())


def json_twin(value: Any) -> Any:
    """The same analysis with harmless text of its own in every place."""
    if isinstance(value, str) and not isinstance(value, Verdict):
        return "harmless"
    if isinstance(value, tuple):
        return tuple(json_twin(item) for item in value)
    if isinstance(value, dict):
        return {f"key {place}": json_twin(item) for place, item in enumerate(value.values())}
    if hasattr(value, "__dataclass_fields__"):
        kept = {"plotly"}
        fields = {name: getattr(value, name) for name in value.__dataclass_fields__}
        return replace(value, **{k: {} if k in kept else json_twin(v) for k, v in fields.items()})
    return value


def test_hostile_text_reaches_the_reader_as_text() -> None:
    text = "".join(Elements(hostile_page()).text)
    assert "</script><img src=x onerror=" in text
    assert "{{ 7*7 }}" in text
    assert "␛[31m" in text


def test_no_control_or_direction_character_is_left() -> None:
    page = hostile_page()
    assert not re.search(
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", page.split("<script>")[0]
    )
    assert "\u202e" not in page
    page.encode("utf-8")


def test_the_data_survives_hostile_text_unchanged_except_for_links_in_plots() -> None:
    data = page_data(hostile_page())["analyses"][0]
    assert data["claim"]["korean"] == HOSTILE
    assert "<a " not in data["figures"][0]["plotly"]["data"][0]["name"]


def test_only_the_scripts_of_the_package_may_run() -> None:
    page = hostile_page()
    elements = Elements(page)
    policy = next(a["content"] for a in elements.named("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["img-src"] == "data: blob:"
    assert "unsafe" not in rules["script-src"]
    run = [text for text in elements.scripts if text and not text.startswith("{")]
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in run]
    assert rules["script-src"].split() == [f"'sha256-{digest}'" for digest in hashes]
    assert not any("src" in attributes for attributes in elements.named("script"))


def test_nothing_on_the_page_points_outside() -> None:
    for tag, attributes in Elements(rendered()).found:
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            target = attributes.get(name)
            assert target is None or target.startswith(("#", "data:")), (tag, target)


# Writing -----------------------------------------------------------------------------------------------------


def test_the_report_is_written_where_asked_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "results" / "report.html"
    assert write_report(analyses(), path, environment=ENVIRONMENT) == path
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]
    assert path.read_text(encoding="utf-8") == render_report(analyses(), environment=ENVIRONMENT)


def test_a_failed_write_keeps_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("the old one")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_report(analyses(), path, environment=ENVIRONMENT)
    assert path.read_text() == "the old one"
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_a_folder_is_no_report(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is a folder; give a name such as .*report\.html"):
        write_report(analyses(), tmp_path, environment=ENVIRONMENT)


# Data and numbers --------------------------------------------------------------------------------------------


def test_plain_takes_arrays_packed_arrays_and_what_json_cannot_say() -> None:
    values = numpy.array([[1.5, float("nan")], [float("inf"), 2.0]])
    packed = {"bdata": base64.b64encode(values.astype("<f4").tobytes()).decode(), "dtype": "f4", "shape": "2, 2"}
    expected = [[1.5, None], [None, 2.0]]
    assert plain(values) == expected
    assert plain(packed) == expected
    assert plain({"verdict": Verdict.WEAK, "path": Path("a"), 3: (True, None, numpy.int64(7))}) == {
        "verdict": "WEAK",
        "path": "a",
        "3": [True, None, 7],
    }


def test_plain_names_what_it_cannot_hold() -> None:
    with pytest.raises(TypeError, match="cannot hold set"):
        plain({"x": {1, 2}})


def test_script_json_is_ascii_and_reads_back() -> None:
    text = script_json({"x": HOSTILE})
    assert text.isascii()
    assert not set("<>&") & set(text)
    assert json.loads(text) == {"x": HOSTILE}


def test_visible_leaves_ordinary_text_of_any_language_alone() -> None:
    ordinary = "평균 γ·β − 1 %\n\tعربي 日本 é 🙂"
    assert visible(ordinary) == ordinary


def test_without_links_keeps_plotly_s_other_markup() -> None:
    label = "%{x}<br><b>3</b><extra></extra> <abbr>"
    assert without_links({"hovertemplate": [label]}) == {"hovertemplate": [label]}
    assert without_links("<A HREF='x'>y</A>") == "&lt;A HREF='x'>y&lt;/A>"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.0, "0"),
        (-0.5, "−0.5"),
        (999.7, "1,000"),
        (0.1 + 0.2, "0.3"),
        (1e-7, "1e-07"),
        (math.nan, "–"),
        (-math.inf, "−∞"),
    ],
)
def test_number(value: float, expected: str) -> None:
    assert number(value) == expected


def test_an_interval_s_numbers_share_their_last_digit() -> None:
    assert interval_numbers(2.4, 2.19, 2.61) == ("2.40", "2.19", "2.61")
    assert interval_numbers(1.0, -math.inf, 2.0) == ("1", "−∞", "2")
    assert interval_numbers(3.0, 3.0, 3.0) == ("3", "3", "3")
    assert interval_numbers(-0.001, -0.4, 0.4) == ("0.00", "−0.40", "0.40")


def test_a_hyphen_within_a_word_or_between_numbers_is_no_minus() -> None:
    for text in ("1e-05", "64-100-10", "1000-1002", "x-1", "--5", "a - 5", "(3)-2", "BN-x5", "2026-11-23"):
        assert minus(text) == text
    assert minus("-1") == "−1"


def test_p_value() -> None:
    assert [p_value(value) for value in (1.0, 0.0215, 1 / 1024, 1e-5, math.nan)] == [
        "1.00",
        "0.021",
        "< 0.001",
        "< 0.001",
        "–",
    ]


# The little plot ---------------------------------------------------------------------------------------------


def test_the_interval_plot_keeps_the_order_of_its_marks() -> None:
    plot = interval_plot(speed().endpoints[0])
    assert plot.margin is not None
    assert plot.low is not None
    assert plot.estimate is not None
    assert plot.high is not None
    assert 0 < plot.zero < plot.margin < plot.low < plot.estimate < plot.high < plot.width


def test_the_zone_of_no_difference_ends_at_the_margin() -> None:
    plot = interval_plot(placement().endpoints[0])
    assert plot.band is not None
    assert sum(plot.band) == pytest.approx(plot.margin, abs=0.1)


def test_a_margin_for_no_worse_has_no_zone() -> None:
    assert interval_plot(speed().endpoints[2]).band is None


def test_open_and_missing_ends() -> None:
    endpoint = speed().endpoints[0]
    unbounded = interval_plot(replace(endpoint, low=-math.inf, high=math.inf))
    assert (unbounded.low, unbounded.high, unbounded.open_left, unbounded.open_right) == (None, None, True, True)
    missing = interval_plot(replace(endpoint, estimate=math.nan, low=math.nan, high=math.nan, margin=0.0))
    assert (missing.low, missing.estimate, missing.margin, missing.open_left) == (None, None, None, False)
    page = rendered(
        replace(speed(), endpoints=(replace(endpoint, low=math.nan, high=math.inf, estimate=math.nan),))
    )
    assert "nan" not in "".join(Elements(page).text)


# The layer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre_activations": [1.0]}, "at least two pre-activations, got 1"),
        ({"pre_activations": [1.0, math.nan]}, "finite numbers"),
        ({"gamma": math.inf}, "finite numbers"),
        ({"std": 0.0}, r"std must be positive, got 0\.0; pass sqrt"),
        ({"activation": "gelu"}, "one of sigmoid, tanh, relu, got 'gelu'"),
    ],
)
def test_a_layer_that_cannot_be_drawn_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(layer_view(), **change)


def test_the_sliders_reach_what_was_learned() -> None:
    limits = slider_limits(LayerView("unit", [0.0, 1.0], gamma=7.3, beta=-6.2, mean=0.5, std=0.5))
    assert limits["gamma"][0] <= 1 <= 7.3 < limits["gamma"][1]
    assert limits["beta"][0] < -6.2
