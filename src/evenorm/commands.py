"""The commands: each calls one public function and prints its result; results on stdout, all else on stderr.

A command is a function under `@app.command()`, which imports what it needs itself, so that `evenorm --help`
loads nothing heavy. Any command takes --debug, which shows the traceback behind an error.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evenorm.calibrate_command import calibrate
from evenorm.doctor_command import doctor
from evenorm.fold_command import fold

if TYPE_CHECKING:
    from evenorm.lab.experiment import Scale
    from evenorm.lab.results import Analysis

app = typer.Typer(
    name="evenorm",
    help="Batch normalization for PyTorch, done completely.",
    epilog="Every command takes --debug, which shows the traceback behind an error.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
lab = typer.Typer(no_args_is_help=True)
app.add_typer(lab, name="lab", help="Measure the claims made for batch norm on real data.")
app.command()(calibrate)
app.command()(doctor)
app.command()(fold)

QUICK_SEEDS, SEEDS = 4, 10

Names = Annotated[
    list[str] | None, typer.Argument(metavar="[NAME]...", help="Experiments; all where none is named.")
]
Quick = Annotated[bool, typer.Option("--quick", help="Fewer seeds, fewer steps: a look, not a verdict.")]
Seeds = Annotated[int | None, typer.Option(help=f"Paired seeds. [default: {SEEDS}, with --quick {QUICK_SEEDS}]")]
Jobs = Annotated[int, typer.Option(help="Stacks of trials trained at the same time, one thread each.")]
Out = Annotated[Path, typer.Option(help="The folder of trials and report.")]
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
        _print_json(
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
    _print_table(("experiment", "question", "trials stored"), rows)


@lab.command("run")
def run_(
    names: Names = None,
    quick: Quick = False,
    seeds: Seeds = None,
    jobs: Jobs = 2,
    out: Out = Path("results"),
    as_json: Json = False,
) -> None:
    """Train the trials that are not stored yet, print the verdicts, and write the report."""
    if jobs < 1:
        raise ValueError(f"--jobs is the number of stacks trained at the same time, at least 1, got {jobs}")
    scale = _scale(quick, seeds)
    from evenorm.lab import run
    from evenorm.lab.store import Store

    experiments, store = run.choose(names or []), Store(out)
    try:
        analyses = run.run(experiments, scale, store, jobs)
    except KeyboardInterrupt:
        print(
            "\nevenorm lab: interrupted; finished trials are stored. Go on with the same command.", file=sys.stderr
        )
        raise typer.Exit(130) from None
    _finish(analyses, run.write(analyses, scale, store, out), as_json)


@lab.command("report")
def report_(
    names: Names = None,
    quick: Quick = False,
    seeds: Seeds = None,
    out: Out = Path("results"),
    as_json: Json = False,
) -> None:
    """Write the report again from stored trials, without training."""
    scale = _scale(quick, seeds)
    from evenorm.lab import run
    from evenorm.lab.store import Store

    store = Store(out)
    analyses = run.report(run.choose(names or []), scale, store)
    _finish(analyses, run.write(analyses, scale, store, out), as_json)


@app.command()
def info(as_json: Json = False) -> None:
    """Tell the versions at work and the engines found, and why one is missing."""
    import evenorm

    found = evenorm.info()
    if as_json:
        _print_json(dataclasses.asdict(found))
    else:
        print(found)


@app.command()
def bench(
    blocks: Annotated[
        list[str] | None, typer.Argument(metavar="[BLOCK]...", help="bn, bn-relu, bn-add-relu, bn-silu.")
    ] = None,
    rows: Annotated[str, typer.Option(help="Only rows whose shape contains this, such as 56 or last.")] = "",
    dtype: Annotated[str, typer.Option(help="float32, float64, bfloat16 or float16.")] = "float32",
    evaluation: Annotated[bool, typer.Option("--eval", help="Evaluation, forward alone.")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Time torch.compile of torch.nn's as well.")] = False,
    rounds: Annotated[int, typer.Option(help="Rounds; in each, all contenders run in turn.")] = 15,
    threads: Annotated[int | None, typer.Option(help="Threads; all of torch's where not given.")] = None,
    as_json: Json = False,
) -> None:
    """Check every case against float64, then time it against torch.nn."""
    from evenorm.bench import command

    plan = command.plan(blocks or [], rows, dtype, not evaluation, compiled, rounds)
    status = command.run(plan, threads, _print_json if as_json else None)
    raise typer.Exit(status)


def _scale(quick: bool, seeds: int | None) -> Scale:
    if seeds is not None and not 2 <= seeds <= 1000:
        raise ValueError(f"--seeds must lie between 2, which an interval needs at least, and 1000; got {seeds}")
    from evenorm.lab.experiment import Scale

    return Scale(seeds=seeds or (QUICK_SEEDS if quick else SEEDS), quick=quick)


def _finish(analyses: Sequence[Analysis], path: Path, as_json: bool) -> None:
    if as_json:
        _print_json({"experiments": [_numbers(analysis) for analysis in analyses], "report": str(path)})
        return
    rows = [
        (
            analysis.experiment if index == 0 else "",
            endpoint.name,
            f"{endpoint.estimate:.3g} ({endpoint.low:.3g} to {endpoint.high:.3g})",
            f"{endpoint.margin:g}",
            f"{endpoint.p_value:.2g}",
            endpoint.verdict.value,
        )
        for analysis in analyses
        for index, endpoint in enumerate(analysis.endpoints)
    ]
    _print_table(("experiment", "comparison", "difference (95 %)", "margin", "p", "verdict"), rows)
    for analysis in analyses:
        print(f"{analysis.experiment}: {analysis.verdict.value}. {analysis.answer}")
    print(f"report: {path}")


def _numbers(analysis: Analysis) -> dict[str, Any]:
    """Return an analysis without its plots."""
    content = dataclasses.asdict(analysis)
    del content["figures"]
    return content


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False))


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, box=SIMPLE_HEAD)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: square brackets in a cell are no markup
    console = Console()
    if not console.is_terminal:  # a pipe has no width: 80 columns would break words that a script looks for
        console = Console(width=200)
    console.print(table)
