"""Sentences in two languages: a str in English, and Korean wherever a reader asks for it."""

from __future__ import annotations

import copy
import json
import pickle

import pytest

from evenorm.lab.language import Text, translate
from evenorm.lab.results import Claim, Table

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
