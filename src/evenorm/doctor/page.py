"""A diagnosis as one page that needs nothing from outside, in the style of the laboratory's report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jinja2
import plotly.offline
from markupsafe import Markup, escape

from evenorm.doctor.findings import Finding, LayerView, Scores, alike, counted
from evenorm.doctor.page_plots import figures
from evenorm.doctor.text import harmless, score_line, title
from evenorm.lab.page_data import minus, numeric, plain, script_json, without_links
from evenorm.lab.report import policy, source

SHOWN = 100  # kinds of findings, and layers of each; JSON has all
COLOURS = {"error": "CONTRADICTED", "warning": "WEAK", "note": "INCONCLUSIVE"}  # the report's classes
WORDS = {"command_copied": "Copied", "copy_command": "Copy"}  # that the page's script writes


def as_html(summary: str, scores: Scores | None, findings: Sequence[Finding], layers: Sequence[LayerView]) -> str:
    """Return the page as text; its scripts run by their hashes alone, and nothing is fetched."""
    scripts = [source("theme.js"), plotly.offline.get_plotlyjs(), source("page.js"), source("figures.js")]
    shown = [without_links(plain(figure)) for figure in figures(scores, layers)]
    of_network = sum(figure["of_network"] for figure in shown)
    groups = alike(findings)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("evenorm.doctor", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finished,
    )
    environment.filters["exactly"] = _exactly
    environment.tests["numeric"] = numeric
    return environment.get_template("doctor.html").render(
        summary=summary,
        groups=[_card(group) for group in groups[:SHOWN]],
        more=_more(len(groups), "kind"),
        scores=score_line(scores) if scores is not None else "",
        figures=shown,
        of_network=of_network,
        style=Markup(source("report.css")),
        scripts=[Markup(script) for script in scripts],
        policy=policy(scripts),
        data=Markup(script_json({"words": WORDS, "analyses": [{"figures": shown}]})),
    )


def _card(group: Sequence[Finding]) -> dict[str, Any]:
    """Return what the page shows of findings of one kind: the worst in words, all of them in numbers."""
    columns = list(dict.fromkeys(name for found in group for name in found.evidence))
    rows = [[found.layer, *(found.evidence.get(name, "") for name in columns)] for found in group[:SHOWN]]
    return {
        "title": title(group),
        "class": COLOURS[str(group[0].severity)],
        "found": group[0],
        "differ": len({found.cause for found in group}) > 1,
        "columns": ["layer", *columns],
        "rows": rows if columns else [],
        "more": _more(len(group), "layer"),
    }


def _more(number: int, noun: str) -> str:
    """Return how many of so many are not shown; "" where all are."""
    return counted(number - SHOWN, f"more {noun}") if number > SHOWN else ""


def _finished(value: Any) -> Any:
    """Return what an expression prints, without invisible characters and with a real minus."""
    return minus(harmless(value)) if isinstance(value, str) and not isinstance(value, Markup) else value


def _exactly(text: str) -> Markup:
    """Return what is copied and run, with no other minus."""
    return escape(harmless(text))
