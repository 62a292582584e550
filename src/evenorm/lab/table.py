"""The verdicts on stdout: on a terminal sentences of its width, on a pipe a table that scripts can search."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from evenorm.lab.page_data import interval_numbers, minus, number, p_value, visible
from evenorm.lab.report_words import words
from evenorm.lab.results import Analysis, Endpoint, Verdict
from evenorm.printing import print_table, wide_console

COLOURS = {
    Verdict.REPRODUCED: "green",
    Verdict.WEAK: "yellow",
    Verdict.INCONCLUSIVE: "dim",
    Verdict.CONTRADICTED: "red",
}
WIDEST = 100  # columns of text
HEADS = {
    "en": ("experiment", "comparison", "difference (95 %)", "margin", "p", "verdict"),
    "ko": ("실험", "비교", "차이 (95 %)", "기준 폭", "p", "판정"),
}
BETWEEN = {"en": "{} to {}", "ko": "{} ~ {}"}  # the ends of an interval


def show(analyses: Sequence[Analysis], language: str, advice: Sequence[tuple[str, str]] = ()) -> None:
    """Print answers in plain words where there are some, then each verdict with its comparisons.

    Args:
        analyses: in the language.
        language: "en" or "ko".
        advice: pairs of question and answer, in the language.
    """
    console = wide_console()
    if console.is_terminal:
        _show_sentences(console, analyses, language, advice)
        return
    for question, told in advice:
        print(_safe(f"{question} {told}"))
    rows = [
        [analysis.experiment if index == 0 else "", *_cells(endpoint, language)]
        for analysis in analyses
        for index, endpoint in enumerate(analysis.endpoints)
    ]
    print_table(HEADS[language], rows)
    for analysis in analyses:
        print(_safe(f"{analysis.experiment}: {_word(analysis.verdict, language)}. {analysis.answer}"))


def _show_sentences(
    console: Console, analyses: Sequence[Analysis], language: str, advice: Sequence[tuple[str, str]]
) -> None:
    width = min(console.width, WIDEST)
    widest = max(cell_len(_word(verdict, language)) for verdict in Verdict)
    for question, told in advice:
        console.print(Text.assemble((_safe(question), "bold"), " ", _safe(told)), width=width)
    for analysis in analyses:
        verdict = _word(analysis.verdict, language), f"bold {COLOURS[analysis.verdict]}"
        parts = (f"{analysis.experiment}: ", "bold"), verdict, f". {_safe(analysis.answer)}"
        console.print(Text.assemble("\n", *parts), width=width)
        if not analysis.endpoints:
            continue
        lines = Table.grid(padding=(0, 2))
        lines.add_column(no_wrap=True, min_width=widest)
        lines.add_column(overflow="fold")  # its ellipsis would take the end of full lines of Korean
        for endpoint in analysis.endpoints:
            told = _safe(f"{endpoint.name} [{endpoint.bare_unit}]\n{_numbers(endpoint, language)}")
            lines.add_row(Text(_word(endpoint.verdict, language), COLOURS[endpoint.verdict]), Text(told))
        console.print(Padding(lines, (1, 0, 0, 2)), width=width)
    console.print()


def _numbers(endpoint: Endpoint, language: str) -> str:
    """Return the numbers of a comparison in a line; one without seeds has neither interval nor p."""
    vocabulary = words(language)
    middle, *ends = interval_numbers(endpoint.estimate, endpoint.low, endpoint.high)
    interval = [f"{vocabulary['interval']} {BETWEEN[language].format(*ends)}"] if endpoint.seeds else []
    p = [] if math.isnan(endpoint.p_value) else [f"p = {p_value(endpoint.p_value)}".replace("= <", "<")]
    return ", ".join([middle, *interval, f"{vocabulary['margin'].lower()} {number(endpoint.margin)}", *p])


def _cells(endpoint: Endpoint, language: str) -> list[str]:
    middle, *ends = interval_numbers(endpoint.estimate, endpoint.low, endpoint.high)
    return [
        _safe(endpoint.name),
        f"{middle} ({BETWEEN[language].format(*ends)})",
        number(endpoint.margin),
        p_value(endpoint.p_value),
        _word(endpoint.verdict, language),
    ]


def _word(verdict: Verdict, language: str) -> str:
    """Return a verdict as a terminal shows it: in English by its own name, which scripts look for."""
    return verdict.value if language == "en" else words(language)[verdict.value]


def _safe(text: str) -> str:
    return minus(visible(text))
