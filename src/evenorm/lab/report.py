"""The report: analyses in, one HTML file out, that asks for nothing from outside and escapes all it prints."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
import plotly.offline
from markupsafe import Markup, escape

from evenorm import atomic
from evenorm.lab.interval_plot import interval_plot
from evenorm.lab.language import translate
from evenorm.lab.layer_page import LayerView, slider_limits
from evenorm.lab.page_data import (
    interval_numbers,
    minus,
    number,
    numeric,
    p_value,
    plain,
    script_json,
    visible,
    without_links,
)
from evenorm.lab.report_words import words
from evenorm.lab.results import Analysis, Verdict

_TEMPLATES = jinja2.PackageLoader("evenorm.lab", "templates")


@dataclass(frozen=True)
class Heading:
    """What stands over a report on a user's own data: the title, and first of all the answers in plain words."""

    title: str
    lede: str
    advice: tuple[tuple[str, str], ...] = ()  # question and answer


@dataclass(frozen=True)
class _Section:
    """An analysis with its place on the page."""

    anchor: str
    index: int
    analysis: Analysis


def write_report(
    analyses: Sequence[Analysis],
    path: Path,
    *,
    environment: Mapping[str, str],
    layer: LayerView | None = None,
    language: str = "en",
    heading: Heading | None = None,
) -> Path:
    """Write the report of `analyses` to `path` and return it; a reader never sees half a file.

    Args:
        analyses: one a claim, in the order of the page.
        path: the HTML file; folders on the way are made, an older report is replaced.
        environment: versions and machine, as the footer shall show them.
        layer: the trained unit to take apart; without it the page has no such section.
        language: of the whole page, "en" or "ko"; a sentence without a translation stays as it is.
        heading: where it is not the usual one.

    Raises:
        ValueError: no analyses, an unknown language, a path that is a folder.
        OSError: the file cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(
            f"the report is a file, but {path} is a folder; give a name such as {path / 'report.html'}"
        )
    page = render_report(analyses, environment=environment, layer=layer, language=language, heading=heading)
    write_page(path, page)
    return path


def write_page(path: Path, page: str) -> None:
    """Write a page to a file, which appears complete or not at all; folders on the way are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(path, page.encode())


def render_report(
    analyses: Sequence[Analysis],
    *,
    environment: Mapping[str, str],
    layer: LayerView | None = None,
    language: str = "en",
    heading: Heading | None = None,
) -> str:
    """The page as text: a pure function of its arguments, so that equal results give equal bytes.

    Raises:
        ValueError: no analyses, or an unknown language.
    """
    vocabulary = words(language)
    if not analyses:
        raise ValueError("a report needs at least one analysis, got none; run an experiment first: evenorm lab run")
    shown = [_without_links(in_language(analysis, language)) for analysis in analyses]
    environment, layer = translate(dict(environment), language), translate(layer, language)
    scripts = _scripts()
    data = {"words": vocabulary, "environment": environment, "analyses": shown, "layer": layer}
    return (
        _environment()
        .get_template("report.html")
        .render(
            words=vocabulary,
            language=language,
            sections=_sections(shown),
            tally=[(verdict, count) for verdict, count in _tally(shown).items() if count],
            verdicts=list(Verdict),
            environment=environment,
            heading=translate(heading, language) or Heading(vocabulary["title"], vocabulary["lede"]),
            layer=layer,
            limits=slider_limits(layer) if layer else None,
            style=Markup(source("report.css")),
            scripts=[Markup(script) for script in scripts],
            policy=policy(scripts),
            data=Markup(script_json(data)),
        )
    )


def in_language(analysis: Analysis, language: str) -> Analysis:
    """The analysis with every sentence in the language; the document's own stands in both."""
    translated = translate(analysis, language)
    if not analysis.claim.korean:
        return translated
    return replace(translated, claim=replace(translated.claim, english=str(analysis.claim.english)))


def _environment() -> jinja2.Environment:
    """Autoescape always, strict about names, and no invisible character from any expression."""
    environment = jinja2.Environment(
        loader=_TEMPLATES,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finished,
    )
    environment.filters.update(
        number=number,
        p_value=p_value,
        interval_plot=interval_plot,
        pairs=_configuration_pairs,
        exactly=_exactly,
    )
    environment.tests["numeric"] = numeric
    environment.globals["interval_numbers"] = interval_numbers
    return environment


def _finished(value: Any) -> Any:
    """What an expression prints: no invisible character, a real minus, a percent sign on the line of its number."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return minus(visible(value)).replace(" %", "\N{NO-BREAK SPACE}%")


def _exactly(text: str) -> Markup:
    """What is quoted, or copied and run: letter by letter as it is, but for what is invisible."""
    return escape(visible(text))


def source(name: str) -> str:
    """A style sheet or script of the package, as it is."""
    environment = jinja2.Environment(loader=_TEMPLATES, autoescape=True)
    return _TEMPLATES.get_source(environment, name)[0]


def _scripts() -> list[str]:
    """Every script of the page, the first for its head: the package's own and plotly's; no result is in any."""
    own = [source(name) for name in ("theme.js", "page.js", "figures.js", "downloads.js", "layer.js")]
    scripts = [own[0], plotly.offline.get_plotlyjs(), *own[1:]]
    assert not any("</script" in script.lower() for script in scripts), "a script would end its own element"
    return scripts


def policy(scripts: Sequence[str]) -> str:
    """A Content-Security-Policy under which these scripts alone may run, and nothing may be fetched.

    Each script is allowed by its hash: even if text got through unescaped, its handlers would not run.
    """
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def _without_links(analysis: Analysis) -> Analysis:
    """The analysis with every figure as plain JSON whose labels hold no link."""
    figures = tuple(replace(figure, plotly=without_links(plain(figure.plotly))) for figure in analysis.figures)
    return replace(analysis, figures=figures)


def _tally(analyses: Sequence[Analysis]) -> dict[Verdict, int]:
    """How many claims got which verdict, in the order of the verdicts."""
    counts = Counter(analysis.verdict for analysis in analyses)
    return {verdict: counts[verdict] for verdict in Verdict}


def _sections(analyses: Sequence[Analysis]) -> list[_Section]:
    """Each analysis with an address of its own within the page, from the experiment's name."""
    taken: set[str] = set()
    sections = []
    for index, analysis in enumerate(analyses):
        name = re.sub(r"[^a-z0-9]+", "-", analysis.experiment.lower()).strip("-") or "claim"
        anchor = f"claim-{name}"
        if anchor in taken:
            anchor = f"{anchor}--{index}"
        taken.add(anchor)
        sections.append(_Section(anchor, index, analysis))
    return sections


def _configuration_pairs(configuration: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The configuration as pairs of name and value, nested values as compact JSON."""
    return [
        (str(key), value if isinstance(value, str) else json.dumps(plain(value), ensure_ascii=False))
        for key, value in configuration.items()
    ]
