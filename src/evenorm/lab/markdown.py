"""The results as a page of Markdown: verdicts, comparisons, and the machine they were measured on; no plots."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from evenorm.lab.page_data import interval_numbers, number, p_value, visible
from evenorm.lab.results import Analysis, Endpoint


def results_page(analyses: Sequence[Analysis], environment: Mapping[str, str]) -> str:
    """Return the page, of analyses in one language."""
    head = ["# Results as measured", ", ".join(f"{name}: {value}" for name, value in environment.items()) + "."]
    glance = _table(
        ("experiment", "verdict", "answer"),
        ([f"[{_safe(a.title)}](#{_anchor(a.title)})", a.verdict.value, a.answer] for a in analyses),
    )
    return "\n\n".join([*head, glance, *(part for analysis in analyses for part in _section(analysis))]) + "\n"


def _section(analysis: Analysis) -> list[str]:
    claim = analysis.claim
    parts = [f"## {_safe(analysis.title)}", f"> {_safe(claim.korean or claim.english)}"]
    parts.append(f"**{analysis.verdict.value}.** {_safe(analysis.answer)}")
    if analysis.endpoints:
        columns = ("comparison", "estimate (95 % interval)", "margin", "p", "seeds", "verdict")
        parts.append(_table(columns, map(_row, analysis.endpoints)))
    if analysis.published:
        rows = ([published.value, published.setting, published.source] for published in analysis.published)
        parts.append(_table(("published", "measured in", "source"), rows))
    parts += [f"Rule: {_safe(analysis.rule)}", "    " + " ".join(visible(analysis.command).split())]
    return parts


def _row(endpoint: Endpoint) -> list[str]:
    middle, low, high = interval_numbers(endpoint.estimate, endpoint.low, endpoint.high)
    return [
        f"{endpoint.name} ({endpoint.unit})",
        f"{middle} ({low} … {high})",
        number(endpoint.margin),
        p_value(endpoint.p_value),
        str(endpoint.seeds),
        endpoint.verdict.value,
    ]


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(
        "| " + " | ".join(_safe(cell) if cell != "---" else cell for cell in line) + " |" for line in lines
    )


def _safe(text: str) -> str:
    """Return text that stays one line and one cell, and makes no element."""
    plain = " ".join(visible(text).split())
    return plain.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def _anchor(title: str) -> str:
    return "".join(letter for letter in title.lower().replace(" ", "-") if letter.isalnum() or letter in "-_")
