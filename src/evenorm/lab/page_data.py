"""From results to what a page may hold: plain JSON, text without invisible characters, short numbers."""

from __future__ import annotations

import base64
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

import numpy

# Characters that act on a reader's terminal or turn the direction of the text around them: shown, never obeyed.
# A newline and a tab are layout; lone surrogates (file names that are not UTF-8) cannot be written at all.
_VISIBLE = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\t\n"}
_VISIBLE |= {code: f"⟨U+{code:04X}⟩" for code in (*range(0x7F, 0xA0), 0x061C, 0x200E, 0x200F)}
_VISIBLE |= {code: f"⟨U+{code:04X}⟩" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0xFEFF)}
_VISIBLE |= dict.fromkeys(range(0xD800, 0xE000), "\ufffd")

# Inside a script element the parser looks for "</script" and "<!--" whatever the language of its content.
_SCRIPT_SAFE = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})

# A hyphen before a number is a minus unless something stands right before it, as in 1000-1002 and 1e-05.
_NEGATIVE = re.compile(r"(?<![\w.)\]-])-(?=\.?\d)")


def visible(text: str) -> str:
    """The text with control and direction-changing characters replaced by a picture of them.

    >>> visible("a\\x1b[31mb")
    'a␛[31mb'
    """
    return text.translate(_VISIBLE)


def minus(text: str) -> str:
    """The text with a real minus sign before each negative number: a line may end after a hyphen, and not after it.

    >>> minus("-0.36 (-0.63 to -0.10), seeds 1000-1002")
    '−0.36 (−0.63 to −0.10), seeds 1000-1002'
    """
    return _NEGATIVE.sub("−", text)


def numeric(cell: object) -> bool:
    """Whether a table's cell is short and begins as a number does, so that it stays on one line.

    >>> numeric("12.3 (11.0 to 13.8)"), numeric("≥ 600"), numeric(1e-05), numeric("BN-x5")
    (True, True, True, False)
    """
    text = str(cell)
    return len(text) <= 24 and re.match(r"[-+−<>≤≥ ]*\d", text) is not None


def plain(value: Any) -> Any:
    """Dataclasses, enumerations, numpy and plotly's packed arrays as what JSON has; NaN and infinity as None.

    >>> plain({"x": (1, float("nan"))})
    {'x': [1, None]}

    Raises:
        TypeError: a value that is none of these.
    """
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, Mapping):
        if "bdata" in value and "dtype" in value:
            return plain(_unpacked(value))
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (numpy.ndarray, numpy.generic)):
        return plain(value.tolist())
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(
        f"a report holds text, numbers, lists, mappings and arrays, and cannot hold {type(value).__name__}; "
        "convert it where the analysis is made"
    )


def script_json(value: Any) -> str:
    """JSON that can stand inside a script element: ASCII, and without a character that could end the element.

    >>> script_json({"title": "</script>"})
    '{"title":"\\\\u003c/script\\\\u003e"}'
    """
    text = json.dumps(plain(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.translate(_SCRIPT_SAFE)


def without_links(value: Any) -> Any:
    """A plotly structure whose labels cannot hold a link: plotly understands `<a href=…>` in any label.

    >>> without_links({"name": "<a href='x'>y</a> <b>z</b>"})
    {'name': "&lt;a href='x'>y&lt;/a> <b>z</b>"}
    """
    if isinstance(value, str):
        return re.sub(r"<(?=\s*/?\s*a\b)", "&lt;", visible(value), flags=re.IGNORECASE)
    if isinstance(value, Mapping):
        return {without_links(key): without_links(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_links(item) for item in value]
    return value


def number(value: float) -> str:
    """A number as a reader wants it: three significant digits, a real minus sign, thousands apart.

    >>> number(-0.012345), number(0.5), number(12345.6), number(float("inf"))
    ('−0.0123', '0.5', '12,346', '∞')
    """
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    magnitude = abs(value)
    if magnitude >= 999.5:
        return minus(f"{value:,.0f}" if magnitude < 1e7 else f"{value:.2e}")
    return minus(f"{value:.3g}")


def interval_numbers(estimate: float, low: float, high: float) -> tuple[str, str, str]:
    """An estimate and its interval to the same digit: the second significant one of half the interval's width.

    >>> interval_numbers(0.1, -0.4, 0.6), interval_numbers(71.23, 64.83, 77.63)
    (('0.10', '−0.40', '0.60'), ('71.2', '64.8', '77.6'))
    """
    half = (high - low) / 2
    if not 1e-4 <= half < 999.5:
        return number(estimate), number(low), number(high)
    decimals = max(0, 1 - math.floor(math.log10(half)))

    def text(value: float) -> str:
        if not math.isfinite(value):
            return number(value)
        rounded = round(value, decimals) + 0.0  # adding zero turns −0 into 0
        return minus(f"{rounded:,.{decimals}f}")

    return text(estimate), text(low), text(high)


def p_value(value: float) -> str:
    """A p-value to the digits that matter.

    >>> p_value(0.001953), p_value(0.3), p_value(0.0000004)
    ('0.002', '0.30', '< 0.001')
    """
    if math.isnan(value):
        return "–"
    if value < 0.001:
        return "< 0.001"
    return f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def _unpacked(packed: Mapping[str, Any]) -> Any:
    """A typed array in plotly's base64 form as nested lists."""
    values = numpy.frombuffer(base64.b64decode(packed["bdata"]), dtype=numpy.dtype(packed["dtype"]))
    shape = packed.get("shape")
    if isinstance(shape, str):
        shape = tuple(int(size) for size in shape.split(","))
    return (values.reshape(shape) if shape else values).tolist()
