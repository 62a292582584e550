"""The commands: each calls one public function and prints its result; results on stdout, all else on stderr.

A command is a function under `@app.command()`, which imports what it needs itself, so that `evenorm --help`
loads nothing heavy. Any command takes --debug, which shows the traceback behind an error.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from evenorm.calibrate_command import calibrate
from evenorm.doctor_command import doctor
from evenorm.fold_command import fold
from evenorm.lab_command import lab
from evenorm.printing import print_json

app = typer.Typer(
    name="evenorm",
    help="Batch normalization for PyTorch, done completely.",
    epilog="Every command takes --debug, which shows the traceback behind an error.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(lab, name="lab", help="Measure the claims made for batch norm on real data.")
app.command()(calibrate)
app.command()(doctor)
app.command()(fold)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command()
def info(as_json: Json = False) -> None:
    """Tell the versions at work and the engines found, and why one is missing."""
    import evenorm

    found = evenorm.info()
    if as_json:
        print_json(dataclasses.asdict(found))
    else:
        print(found)


@app.command()
def bench(
    blocks: Annotated[
        list[str] | None,
        typer.Argument(metavar="[BLOCK]...", help="bn, bn-relu, bn-add-relu, bn-silu; options; on a GPU network."),
    ] = None,
    rows: Annotated[str, typer.Option(help="Only rows whose shape contains this, such as 56 or last.")] = "",
    dtype: Annotated[str, typer.Option(help="float32, float64, bfloat16 or float16.")] = "float32",
    evaluation: Annotated[bool, typer.Option("--eval", help="Evaluation, forward alone.")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Time torch.compile of torch.nn's as well.")] = False,
    rounds: Annotated[int, typer.Option(help="Rounds; in each, all contenders run in turn.")] = 15,
    threads: Annotated[int | None, typer.Option(help="Threads; all of torch's where not given.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    as_json: Json = False,
) -> None:
    """Check every case against float64, then time it against torch.nn."""
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {device!r}")
    if device == "cuda":
        from evenorm.bench import cuda

        if compiled or threads is not None:
            raise ValueError(
                "--compile and --threads are for --device cpu, leave them out; a GPU times torch.compile anyway"
            )
        told = print_json if as_json else None
        raise typer.Exit(cuda.run(blocks or [], rows, dtype, not evaluation, rounds, told))
    from evenorm.bench import command

    plan = command.plan(blocks or [], rows, dtype, not evaluation, compiled, rounds)
    status = command.run(plan, threads, print_json if as_json else None)
    raise typer.Exit(status)
