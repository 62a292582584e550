"""Sentences in two languages: a str in English, and Korean wherever a reader asks for it."""

from __future__ import annotations

import copy
import json
import pickle

import pytest

from evenorm.lab.language import Text, korean, translate
from evenorm.lab.results import Claim, Table
from readers_sentences import lacks_korean, untranslated
from report_cases import speed

HELLO = Text("hello", "안녕")


def test_is_the_english_sentence_to_whoever_does_not_ask() -> None:
    assert HELLO == "hello"
    assert json.dumps([HELLO]) == '["hello"]'


@pytest.mark.parametrize("again", [copy.deepcopy(HELLO), pickle.loads(pickle.dumps(HELLO))])
def test_keeps_its_korean_in_copies(again: Text) -> None:
    assert (again, again.korean) == ("hello", "안녕")


def test_is_translated_however_deep_it_lies() -> None:
    table = Table(HELLO, ("x", HELLO), (("1", HELLO),))
    assert translate({"a": [table, 3, None]}, "ko") == {
        "a": [Table("안녕", ("x", "안녕"), (("1", "안녕"),)), 3, None]
    }


def test_english_comes_out_as_a_plain_str() -> None:
    assert type(translate(HELLO, "en")) is str


def test_leaves_alone_what_has_no_second_language() -> None:
    claim = Claim("원문", "original", "paper", "why?")
    assert translate(claim, "ko") == claim


def test_a_sentence_can_be_built_of_another_in_both_languages() -> None:
    assert [korean(part) for part in (HELLO, "x")] == ["안녕", "x"]


@pytest.mark.parametrize(
    ("sentence", "lacking"),
    [
        ("training steps", True),
        (Text("training steps", "학습 단계"), False),
        (Text("training steps", "training steps"), True),  # not translated, only said to be
        ("ReLU, lr 0.1, 95 %", False),
        ("Ioffe & Szegedy 2015", False),
        ("≥ 3000", False),
    ],
)
def test_a_sentence_without_korean_is_seen(sentence: str, lacking: bool) -> None:
    assert lacks_korean(sentence) is lacking


def test_a_whole_analysis_is_walked() -> None:
    case = speed()
    found = untranslated(case)
    shown = {case.title, case.answer, case.rule, case.protocol, case.notes[0], case.claim.question}
    shown |= {
        case.endpoints[0].name,
        case.endpoints[0].favours,
        case.published[0].setting,
        case.tables[0].columns[1],
    }
    shown |= {case.figures[0].caption, "without batch norm", "learning rate", "both"}  # a trace, an axis, a menu
    assert shown <= set(found)
    assert case.claim.korean not in found
