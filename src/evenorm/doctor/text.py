"""A diagnosis as plain text of at most 80 columns, safe to show in a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from evenorm.doctor.findings import Finding, Scores, alike, counted

WIDTH = 80
SHOWN = 12  # kinds of findings; the rest are counted
NAMED = 4  # layers of a kind; the rest are counted


def as_text(summary: str, scores: Scores | None, findings: Sequence[Finding]) -> str:
    """Return the summary, the scores, and the findings, worst first."""
    lines = textwrap.wrap(harmless(summary), WIDTH)
    if scores is not None:
        lines += ["", *textwrap.wrap(score_line(scores), WIDTH)]
    groups = alike(findings)
    for group in groups[:SHOWN]:
        lines += ["", *group_lines(group, WIDTH)]
    if len(groups) > SHOWN:
        more = counted(len(groups) - SHOWN, "more kind")
        lines += ["", f"and {more} of findings: to_dict() has them all"]
    return "\n".join(lines)


def harmless(text: str) -> str:
    """Return text with control characters, of terminals and of writing direction, shown by their codes."""
    return "".join(c if c.isprintable() or c == " " else c.encode("unicode_escape").decode() for c in text)


def score_line(scores: Scores) -> str:
    """Return the three scores in a sentence."""
    kinds = [("running", scores.running), ("exact", scores.exact), ("the batch's own", scores.batch)]
    told = ", ".join(f"{name} {_amount(scores, value)}" for name, value in kinds)
    return f"{scores.measure} on {counted(scores.samples, 'sample')} by statistics: {told}"


def layers(group: Sequence[Finding]) -> str:
    """Return the layers of findings of one kind, a few by name."""
    named = [found.layer for found in group if found.layer]
    more = f" and {len(named) - NAMED} more" if len(named) > NAMED else ""
    return ", ".join(named[:NAMED]) + more


def harm(group: Sequence[Finding]) -> str:
    """Return the share of the loss that findings explain together; "" where that was not measured."""
    known = [found.harm for found in group if found.harm is not None]
    return f"{sum(known):.0%}" if known else ""


def title(group: Sequence[Finding]) -> str:
    """Return code, layers and share of the harm of findings of one kind."""
    where, share = layers(group), harm(group)
    return f"{group[0].code}{where and f' in {where}'}{share and f' ({share} of the loss)'}"


def group_lines(group: Sequence[Finding], width: int) -> list[str]:
    """Return title, cause and cure of findings of one kind; where layers differ, those of the worst."""
    first = group[0]
    differ = len({found.cause for found in group}) > 1 and first.layer
    cause = f"in {first.layer}: {first.cause}" if differ else first.cause
    heading = f"{first.severity}: {title(group)}"
    parts = [(heading, "", "    "), (cause, "  ", "  "), (f"cure: {first.cure}", "  ", "    ")]
    return [
        line
        for text, start, other in parts
        for line in textwrap.wrap(harmless(text), width, initial_indent=start, subsequent_indent=other)
    ]


def _amount(scores: Scores, value: float) -> str:
    return f"{value:.4g}" if scores.measure == "loss" else f"{value:.1%}"
