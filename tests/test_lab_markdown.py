"""The results as Markdown: every verdict and comparison, and no text that could be more than text."""

from __future__ import annotations

from dataclasses import replace

from evenorm.lab.markdown import results_page
from evenorm.lab.report_words import WORDS
from report_cases import ENVIRONMENT, analyses, hostile


def test_every_verdict_and_comparison_is_on_the_page() -> None:
    page = results_page(analyses(), ENVIRONMENT)
    for analysis in analyses():
        assert f"## {analysis.title}\n" in page
        assert f"**{WORDS['en'][analysis.verdict.value]}.** {analysis.answer}" in page
        assert f"    {analysis.command}\n" in page
        assert all(endpoint.name in page for endpoint in analysis.endpoints)
    assert "torch: 2.13.0" in page


def test_hostile_text_stays_one_line_of_text() -> None:
    page = results_page([hostile()], ENVIRONMENT)
    assert not [line for line in page.splitlines() if "<" in line and not line.startswith("    ")]  # or code
    assert "\x1b" not in page
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in rows} <= {4, 7}


def test_a_negative_number_has_a_real_minus() -> None:
    (analysis,) = (replace(one, answer="It fell by -0.36.", command="run -1") for one in analyses()[:1])
    analysis = replace(analysis, claim=replace(analysis.claim, korean="-1~1 사이"))
    page = results_page([analysis], ENVIRONMENT)
    assert "It fell by −0.36." in page
    assert "    run -1\n" in page
    assert "> -1~1 사이\n" in page  # as it was written


def test_a_title_is_made_safe_once() -> None:
    (analysis,) = (replace(one, title="x & y | z") for one in analyses()[:1])
    page = results_page([analysis], ENVIRONMENT)
    assert "| [x &amp; y \\| z](#" in page


def test_the_page_in_korean() -> None:
    assert results_page(analyses(), ENVIRONMENT, "ko").startswith("# 배치 정규화, 주장 하나하나")
