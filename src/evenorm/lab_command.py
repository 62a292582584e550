"""The commands `evenorm lab`: list, run, report; results on stdout, progress on stderr."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evenorm.printing import print_json, print_table

if TYPE_CHECKING:
    from evenorm.lab.experiment import Scale
    from evenorm.lab.own.session import Asked
    from evenorm.lab.results import Analysis
    from evenorm.lab.run import Keep

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
Data = Annotated[
    Path | None,
    typer.Option(
        help="Your own: a CSV, Parquet, .npz or IDX file, or a folder of pictures by class.", show_default=False
    ),
]
Target = Annotated[str | None, typer.Option(help="The column of a table to be predicted.", show_default=False)]
Task = Annotated[
    str | None, typer.Option(help="classification or regression; read off the target.", show_default=False)
]
Drop = Annotated[list[str] | None, typer.Option(help="A column that is no input; may be repeated.")]
Budget = Annotated[
    float | None, typer.Option(help="Seconds for your own data, which the plan keeps to. [default: 300]")
]
Tensorboard = Annotated[
    Path | None, typer.Option(help="Write event files for TensorBoard below this folder.", show_default=False)
]
Markdown = Annotated[
    Path | None, typer.Option(help="Write the results as Markdown here as well.", show_default=False)
]
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
    data: Data = None,
    target: Target = None,
    task: Task = None,
    drop: Drop = None,
    budget: Budget = None,
    tensorboard: Tensorboard = None,
    markdown: Markdown = None,
    out: Out = Path("results"),
    lang: Lang = Language.en,
    as_json: Json = False,
) -> None:
    """Train the trials that are not stored yet, print the verdicts, and write the report."""
    asked = _asked(names, data, target, task, drop, quick, seeds, budget)
    _check_markdown(markdown)
    from evenorm.lab import run
    from evenorm.lab.machines import Machines
    from evenorm.lab.store import Store

    scale, machines, store = _scale(quick, seeds), Machines(jobs, backend, address), Store(out)
    try:
        with _watched(tensorboard) as watch:
            if asked is not None:
                from evenorm.lab.own.session import ask

                _finish_own(asked, ask(asked, store, machines, budget, watch), out, lang, as_json, markdown)
                return
            analyses = run.run(run.choose(names or []), scale, store, machines, watch=watch)
    except KeyboardInterrupt:
        print("\nevenorm lab: finished trials are stored. Go on with the same command.", file=sys.stderr)
        raise typer.Exit(130) from None
    _finish(analyses, run.write(analyses, scale, store, out, lang.value), lang, as_json, markdown)


@lab.command("report")
def report_(
    names: Names = None,
    quick: Quick = False,
    seeds: Seeds = None,
    data: Data = None,
    target: Target = None,
    task: Task = None,
    drop: Drop = None,
    markdown: Markdown = None,
    out: Out = Path("results"),
    lang: Lang = Language.en,
    as_json: Json = False,
) -> None:
    """Write the report again from stored trials, without training."""
    asked = _asked(names, data, target, task, drop, quick, seeds, None)
    _check_markdown(markdown)
    scale = _scale(quick, seeds)
    from evenorm.lab import run
    from evenorm.lab.store import Store

    store = Store(out)
    if asked is not None:
        from evenorm.lab.own.session import answer

        _finish_own(asked, answer(asked, store), out, lang, as_json, markdown)
        return
    analyses = run.report(run.choose(names or []), scale, store)
    _finish(analyses, run.write(analyses, scale, store, out, lang.value), lang, as_json, markdown)


def _asked(
    names: list[str] | None,
    data: Path | None,
    target: str | None,
    task: str | None,
    drop: list[str] | None,
    quick: bool,
    seeds: int | None,
    budget: float | None,
) -> Asked | None:
    """Return what is asked of a user's own data, or None.

    Raises:
        ValueError: options that do not go together.
    """
    if data is None:
        given = {"--target": target, "--task": task, "--drop": drop, "--budget": budget}
        strange = [option for option, value in given.items() if value]
        if strange:
            raise ValueError(f"{strange[0]} is for your own data: give it with --data")
        return None
    if quick or seeds is not None:
        raise ValueError(
            "--quick and --seeds are for the built-in experiments; with --data give --budget in seconds"
        )
    if budget is not None and not budget > 0:
        raise ValueError(f"--budget is in seconds, more than 0; got {budget:g}")
    from evenorm.lab.own.session import Asked

    return Asked(data, target, task, tuple(drop or ()), tuple(names or ()))


def _check_markdown(path: Path | None) -> None:
    """Refuse, before the training, what the results could not be written to after it."""
    if path is None:
        return
    from evenorm import atomic

    if path.is_dir():
        raise IsADirectoryError(f"--markdown {path} is a folder; give the name of a file")
    atomic.probe(path)


@contextmanager
def _watched(folder: Path | None) -> Iterator[Keep | None]:
    """Yield what writes every trial for TensorBoard, where that is asked for."""
    if folder is None:
        yield None
        return
    from evenorm.lab.event_files import event_files

    with event_files(folder) as watch:
        yield watch


def _scale(quick: bool, seeds: int | None) -> Scale:
    if seeds is not None and not 2 <= seeds <= 1000:
        raise ValueError(f"--seeds must lie between 2, which an interval needs at least, and 1000; got {seeds}")
    from evenorm.lab.experiment import Scale

    return Scale(seeds=seeds or (QUICK_SEEDS if quick else SEEDS), quick=quick)


def _finish_own(
    asked: Asked, analyses: Sequence[Analysis], out: Path, lang: Language, as_json: bool, markdown: Path | None
) -> None:
    """Print the answers in plain words first, and write the page that begins with them."""
    from evenorm.lab import run
    from evenorm.lab.report import write_report

    heading = asked.heading(analyses)
    path = out / f"report-{asked.path.stem}.html"
    write_report(analyses, path, environment=run.environment(), language=lang.value, heading=heading)
    _finish(analyses, path, lang, as_json, markdown, heading.advice)


def _finish(
    analyses: Sequence[Analysis],
    path: Path,
    lang: Language,
    as_json: bool,
    markdown: Path | None,
    advice: tuple[tuple[str, str], ...] = (),
) -> None:
    from evenorm.lab.language import translate
    from evenorm.lab.report import in_language

    analyses = [in_language(analysis, lang.value) for analysis in analyses]
    if markdown is not None:
        from evenorm.lab.markdown import results_page
        from evenorm.lab.report import write_page
        from evenorm.lab.run import environment

        write_page(markdown, results_page(analyses, translate(environment(), lang.value), lang.value))
    if as_json:
        print_json({"experiments": [_numbers(analysis) for analysis in analyses], "report": str(path)})
        return
    from evenorm.lab.table import show

    show(analyses, lang.value, translate(advice, lang.value))
    print(f"report: {path}")


def _numbers(analysis: Analysis) -> dict[str, Any]:
    """Return an analysis without its plots, as JSON has it: what is no number there, such as NaN, is null."""
    from evenorm.lab.page_data import plain

    content: dict[str, Any] = plain(dataclasses.replace(analysis, figures=()))
    del content["figures"]
    return content
