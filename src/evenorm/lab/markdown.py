"""The results as a page of Markdown: verdicts, comparisons, and the machine they were measured on; no plots."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from evenorm.lab.page_data import interval_numbers, minus, number, p_value, visible
from evenorm.lab.report_words import words
from evenorm.lab.results import Analysis, Endpoint


def results_page(analyses: Sequence[Analysis], environment: Mapping[str, str], language: str = "en") -> str:
    """Return the page, of analyses and an environment in the language."""
    vocabulary = words(language)
    head = [f"# {vocabulary['title']}", ", ".join(f"{name}: {value}" for name, value in environment.items()) + "."]
    glance = _table(
        (vocabulary["claim"], vocabulary["verdict"], vocabulary["ours"]),
        ([f"[{a.title}](#{_anchor(a.title)})", vocabulary[a.verdict.value], a.answer] for a in analyses),
    )
    sections = (part for analysis in analyses for part in _section(analysis, vocabulary))
    return "\n\n".join([*head, glance, *sections]) + "\n"


def _section(analysis: Analysis, vocabulary: Mapping[str, str]) -> list[str]:
    claim = analysis.claim
    parts = [f"## {_safe(analysis.title)}", f"> {_exactly(claim.korean) or _safe(claim.english)}"]
    parts.append(f"**{vocabulary[analysis.verdict.value]}.** {_safe(analysis.answer)}")
    if analysis.endpoints:
        columns = [vocabulary[name] for name in ("comparison", "interval", "margin", "p_value", "seeds", "verdict")]
        parts.append(_table(columns, (_row(endpoint, vocabulary) for endpoint in analysis.endpoints)))
    if analysis.published:
        rows = ([published.value, published.setting, published.source] for published in analysis.published)
        columns = [vocabulary[f"published_{name}"] for name in ("value", "setting", "source")]
        parts.append(_table(columns, rows))
    parts += [f"{vocabulary['rule']}: {_safe(analysis.rule)}", "    " + " ".join(visible(analysis.command).split())]
    return parts


def _row(endpoint: Endpoint, vocabulary: Mapping[str, str]) -> list[str]:
    middle, low, high = interval_numbers(endpoint.estimate, endpoint.low, endpoint.high)
    return [
        f"{endpoint.name} ({endpoint.unit})",
        f"{middle} ({low} … {high})",
        number(endpoint.margin),
        p_value(endpoint.p_value),
        str(endpoint.seeds),
        vocabulary[endpoint.verdict.value],
    ]


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(
        "| " + " | ".join(_safe(cell) if cell != "---" else cell for cell in line) + " |" for line in lines
    )


def _safe(text: str) -> str:
    """Return text that stays one line and one cell, and makes no element."""
    return _exactly(minus(text))


def _exactly(text: str) -> str:
    """Return it so, with no other minus."""
    plain = " ".join(visible(text).split())
    return plain.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def _anchor(title: str) -> str:
    return "".join(letter for letter in title.lower().replace(" ", "-") if letter.isalnum() or letter in "-_")
