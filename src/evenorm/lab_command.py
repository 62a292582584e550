"""The commands `evenorm lab`: list, run, report; results on stdout, progress on stderr."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evenorm.printing import print_json, print_table

if TYPE_CHECKING:
    from evenorm.lab.experiment import Scale
    from evenorm.lab.results import Analysis, Verdict

lab = typer.Typer(no_args_is_help=True)


class Language(str, Enum):
    """The languages of the report, as the command line has them."""

    en = "en"
    ko = "ko"


QUICK_SEEDS, SEEDS = 4, 10

Names = Annotated[
    list[str] | None, typer.Argument(metavar="[NAME]...", help="Experiments; all where none is named.")
]
Quick = Annotated[bool, typer.Option("--quick", help="Fewer seeds, fewer steps: a look, not a verdict.")]
Seeds = Annotated[int | None, typer.Option(help=f"Paired seeds. [default: {SEEDS}, with --quick {QUICK_SEEDS}]")]
Jobs = Annotated[int, typer.Option(help="Stacks of trials trained at the same time, one thread each.")]
Backend = Annotated[str, typer.Option(help="Where stacks are trained: processes, dask or ray.")]
Address = Annotated[str | None, typer.Option(help="Of the cluster's scheduler, such as tcp://host:8786.")]
Out = Annotated[Path, typer.Option(help="The folder of trials and report.")]
Lang = Annotated[Language, typer.Option(help="Of verdicts and report: English or Korean.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@lab.callback()
def needs() -> None:
    """Refuse to begin what a missing package would stop at its end."""
    from importlib.util import find_spec

    for name in ("jinja2", "joblib", "plotly", "rich", "scipy", "sklearn"):
        if find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@lab.command("list")
def list_(quick: Quick = False, seeds: Seeds = None, out: Out = Path("results"), as_json: Json = False) -> None:
    """List the experiments, their questions, and how many of their trials are stored."""
    from evenorm.lab import run
    from evenorm.lab.store import Store

    counts = run.count(run.choose([]), _scale(quick, seeds), Store(out))
    if as_json:
        print_json(
            [
                {
                    "name": c.experiment.name,
                    "question": c.experiment.claim.question,
                    "stored": c.stored,
                    "trials": c.planned,
                }
                for c in counts
            ]
        )
        return
    rows = [(c.experiment.name, c.experiment.claim.question, f"{c.stored} of {c.planned}") for c in counts]
    print_table(("experiment", "question", "trials stored"), rows)


@lab.command("run")
def run_(
    names: Names = None,
    quick: Quick = False,
    seeds: Seeds = None,
    jobs: Jobs = 2,
    backend: Backend = "processes",
    address: Address = None,
    out: Out = Path("results"),
    lang: Lang = Language.en,
    as_json: Json = False,
) -> None:
    """Train the trials that are not stored yet, print the verdicts, and write the report."""
    from evenorm.lab import run
    from evenorm.lab.machines import Machines
    from evenorm.lab.store import Store

    scale, machines = _scale(quick, seeds), Machines(jobs, backend, address)

    experiments, store = run.choose(names or []), Store(out)
    try:
        analyses = run.run(experiments, scale, store, machines)
    except KeyboardInterrupt:
        print(
            "\nevenorm lab: interrupted; finished trials are stored. Go on with the same command.", file=sys.stderr
        )
        raise typer.Exit(130) from None
    _finish(analyses, run.write(analyses, scale, store, out, lang.value), lang, as_json)


@lab.command("report")
def report_(
    names: Names = None,
    quick: Quick = False,
    seeds: Seeds = None,
    out: Out = Path("results"),
    lang: Lang = Language.en,
    as_json: Json = False,
) -> None:
    """Write the report again from stored trials, without training."""
    scale = _scale(quick, seeds)
    from evenorm.lab import run
    from evenorm.lab.store import Store

    store = Store(out)
    analyses = run.report(run.choose(names or []), scale, store)
    _finish(analyses, run.write(analyses, scale, store, out, lang.value), lang, as_json)


def _scale(quick: bool, seeds: int | None) -> Scale:
    if seeds is not None and not 2 <= seeds <= 1000:
        raise ValueError(f"--seeds must lie between 2, which an interval needs at least, and 1000; got {seeds}")
    from evenorm.lab.experiment import Scale

    return Scale(seeds=seeds or (QUICK_SEEDS if quick else SEEDS), quick=quick)


_HEADS = {
    Language.en: ("experiment", "comparison", "difference (95 %)", "margin", "p", "verdict"),
    Language.ko: ("실험", "비교", "차이 (95 %)", "기준 폭", "p", "판정"),
}


def _finish(analyses: Sequence[Analysis], path: Path, lang: Language, as_json: bool) -> None:
    from evenorm.lab.report import in_language

    analyses = [in_language(analysis, lang.value) for analysis in analyses]
    if as_json:
        print_json({"experiments": [_numbers(analysis) for analysis in analyses], "report": str(path)})
        return
    rows = [
        (
            analysis.experiment if index == 0 else "",
            endpoint.name,
            f"{endpoint.estimate:.3g} ({endpoint.low:.3g} to {endpoint.high:.3g})",
            f"{endpoint.margin:g}",
            f"{endpoint.p_value:.2g}",
            _verdict(endpoint.verdict, lang),
        )
        for analysis in analyses
        for index, endpoint in enumerate(analysis.endpoints)
    ]
    print_table(_HEADS[lang], rows)
    for analysis in analyses:
        print(f"{analysis.experiment}: {_verdict(analysis.verdict, lang)}. {analysis.answer}")
    print(f"report: {path}")


def _verdict(verdict: Verdict, lang: Language) -> str:
    """Return a verdict as a terminal shows it: in English by its own name, which scripts look for."""
    from evenorm.lab.report_words import words

    return verdict.value if lang is Language.en else words(lang.value)[verdict.value]


def _numbers(analysis: Analysis) -> dict[str, Any]:
    """Return an analysis without its plots."""
    content = dataclasses.asdict(analysis)
    del content["figures"]
    return content
