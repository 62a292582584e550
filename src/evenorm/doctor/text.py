"""A diagnosis as plain text of at most 80 columns, safe to show in a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from evenorm.doctor.findings import Finding, Scores

WIDTH = 80
SHOWN = 12  # findings; the rest are counted


def as_text(summary: str, scores: Scores | None, findings: Sequence[Finding]) -> str:
    """Return the summary, the scores, and the findings, worst first."""
    lines = textwrap.wrap(harmless(summary), WIDTH)
    if scores is not None:
        lines += ["", *textwrap.wrap(score_line(scores), WIDTH)]
    for finding in findings[:SHOWN]:
        lines += ["", *_finding(finding)]
    if len(findings) > SHOWN:
        lines += ["", f"and {len(findings) - SHOWN} more findings: to_dict() has them all"]
    return "\n".join(lines)


def harmless(text: str) -> str:
    """Return text with control characters, of terminals and of writing direction, shown by their codes."""
    return "".join(c if c.isprintable() or c == " " else c.encode("unicode_escape").decode() for c in text)


def score_line(scores: Scores) -> str:
    """Return the three scores in a sentence."""
    kinds = [("running", scores.running), ("exact", scores.exact), ("the batch's own", scores.batch)]
    told = ", ".join(f"{name} {_amount(scores, value)}" for name, value in kinds)
    return f"{scores.measure} on {scores.samples} samples by statistics: {told}"


def title(finding: Finding) -> str:
    """Return severity, code, layer and share of the harm."""
    where = f" in {finding.layer}" if finding.layer else ""
    harm = "" if finding.harm is None else f" ({finding.harm:.0%} of the loss)"
    return f"{finding.severity}: {finding.code}{where}{harm}"


def _amount(scores: Scores, value: float) -> str:
    return f"{value:.4g}" if scores.measure == "loss" else f"{value:.1%}"


def _finding(finding: Finding) -> list[str]:
    parts = [(title(finding), "", "")]
    parts += [(finding.cause, "  ", "  "), (f"cure: {finding.cure}", "  ", "    ")]
    return [
        line
        for text, first, other in parts
        for line in textwrap.wrap(harmless(text), WIDTH, initial_indent=first, subsequent_indent=other)
    ]
