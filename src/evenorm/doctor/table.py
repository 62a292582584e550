"""A diagnosis as a table on stdout."""

from __future__ import annotations

from evenorm.doctor.diagnosis import Diagnosis
from evenorm.doctor.findings import Severity
from evenorm.doctor.text import harmless, score_line

COLOURS = {Severity.ERROR: "bold red", Severity.WARNING: "yellow", Severity.NOTE: "dim"}
SHOWN = 40  # findings; JSON has all


def show(diagnosis: Diagnosis, findings: bool = True) -> None:
    """Print the summary and the scores, and the findings, worst first, in a table."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
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
    table = Table("severity", "finding", "layer", "cause and cure", "share of the loss", box=SIMPLE_HEAD)
    for found in diagnosis.findings[:SHOWN]:
        told = Text(harmless(found.cause)).append("\ncure: " + harmless(found.cure), style="cyan")
        harm = "" if found.harm is None else f"{found.harm:.0%}"
        table.add_row(
            Text(str(found.severity), style=COLOURS[found.severity]),
            Text(found.code),
            Text(harmless(found.layer)),
            told,
            Text(harm, justify="right"),
        )
    console.print(table)
    if len(diagnosis.findings) > SHOWN:
        console.print(Text(f"and {len(diagnosis.findings) - SHOWN} more; --json has them all"))
