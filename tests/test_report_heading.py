"""A report on a user's own data begins with the answers in plain words."""

from __future__ import annotations

from evenorm.lab.language import Text
from evenorm.lab.report import Heading, render_report
from evenorm.lab.report_words import WORDS
from report_cases import ENVIRONMENT, HOSTILE, analyses

HEADING = Heading(
    Text("On table.csv", "table.csv에서"),
    "What was done.",
    (("Does it help?", Text("Yes.", "그렇다.")), (HOSTILE, HOSTILE)),
)


def test_the_answers_stand_before_the_verdicts() -> None:
    page = render_report(analyses(), environment=ENVIRONMENT, heading=HEADING)
    assert "<title>On table.csv" in page
    assert page.index("<dd>Yes.</dd>") < page.index('id="verdicts"')
    assert f"<h1>{WORDS['en']['title']}" not in page


def test_the_heading_is_translated_and_escaped() -> None:
    page = render_report(analyses(), environment=ENVIRONMENT, heading=HEADING, language="ko")
    assert "<h1>table.csv에서</h1>" in page
    assert "<dd>그렇다.</dd>" in page
    assert "<img src=x" not in page
    assert "&lt;img src=x" in page
