"""A diagnosis on stdout: the answer, a table of what was found, and below it causes and cures."""

from __future__ import annotations

from evenorm.doctor.diagnosis import Diagnosis
from evenorm.doctor.findings import Severity, alike, counted
from evenorm.doctor.text import group_lines, harm, harmless, layers, score_line

COLOURS = {Severity.ERROR: "bold red", Severity.WARNING: "yellow", Severity.NOTE: "dim"}
SHOWN = 40  # kinds of findings; JSON has all
WIDEST = 100  # columns of text


def show(diagnosis: Diagnosis, findings: bool = True) -> None:
    """Print the summary and the scores; the findings, worst first, in a table; and their causes and cures."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:  # a pipe has no width: 80 columns would break words that a script looks for
        console = Console(width=160)
    if findings:
        console.print(Text(harmless(diagnosis.summary), style="bold"))
    if diagnosis.scores is not None:
        console.print(Text(score_line(diagnosis.scores)))
    if not findings or not diagnosis.findings:
        return
    groups = alike(diagnosis.findings)
    measured = any(harm(group) for group in groups)
    shares = [Column("share of the loss", justify="right")] if measured else []
    table = Table("severity", "finding", Column("layers", overflow="fold"), *shares, box=SIMPLE_HEAD)
    for group in groups[:SHOWN]:
        severity = group[0].severity
        table.add_row(
            Text(str(severity), style=COLOURS[severity]),
            Text(group[0].code, no_wrap=True),
            Text(harmless(layers(group))),
            *([harm(group)] if measured else []),
        )
    console.print(table)
    for group in groups[:SHOWN]:
        heading, *told = group_lines(group, min(console.width, WIDEST))
        console.print(Text(heading, style=COLOURS[group[0].severity]))
        for line in told:
            console.print(Text(line), soft_wrap=True)
    if len(groups) > SHOWN:
        console.print(Text(f"and {counted(len(groups) - SHOWN, 'more kind')} of findings; --json has them all"))
