"""Sentences that exist in English and in Korean. A leaf: no torch."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

LANGUAGES = ("en", "ko")

Value = TypeVar("Value")


class Text(str):
    """An English sentence that carries its Korean: a str to whoever does not ask, both to the report.

    What is made of a Text by an f-string or by `join` is a plain str, in English alone: make a Text of the whole.
    """

    __slots__ = ("korean",)
    korean: str

    def __new__(cls, english: str, korean: str) -> Text:
        """Take the same sentence twice."""
        text = super().__new__(cls, english)
        text.korean = korean
        return text

    def __getnewargs__(self) -> tuple[str, str]:  # type: ignore[override]  # str is made of one, a Text of two
        """Return what a copy is made of."""
        return str(self), self.korean


def korean(text: str) -> str:
    """Return a sentence's Korean, or the sentence itself where it has none: to build a longer one of."""
    return text.korean if isinstance(text, Text) else text


def translate(value: Value, language: str) -> Value:
    """Return the value with every `Text` in it, however deep, as a plain str of the language ("en" or "ko")."""
    return _translate(value, language)  # type: ignore[no-any-return]  # the same shape comes back, which no type says


def _translate(value: Any, language: str) -> Any:
    if isinstance(value, Text):
        return value.korean if language == "ko" else str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        return dataclasses.replace(value, **{name: _translate(item, language) for name, item in fields.items()})
    if isinstance(value, dict):
        return {_translate(key, language): _translate(item, language) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_translate(item, language) for item in value)
    return value
