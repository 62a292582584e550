"""`evenorm bench`: choose what to run, show how far it is, print what was measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console

from evenorm.bench import options, table
from evenorm.bench.measure import DTYPES, Plan, measure, require_rounds
from evenorm.bench.rows import BLOCKS, ROWS
from evenorm.printing import show_progress, wide_console

OPTIONS = "options"  # the name of the block that compares the layer with itself


def plan(blocks: Sequence[str], rows: str, dtype: str, training: bool, compiled: bool, rounds: int) -> Plan:
    """Return the plan that the options describe.

    Raises:
        ValueError: an unknown block or dtype, no row that matches, fewer rounds than quartiles need, something
            that the prices of options cannot be combined with.
    """
    for block in blocks:
        if block not in (*BLOCKS, OPTIONS):
            raise ValueError(f"BLOCK must be one of {', '.join((*BLOCKS, OPTIONS))}, got {block!r}")
    if OPTIONS in blocks and (len(blocks) > 1 or compiled or not training):
        raise ValueError(
            f"{OPTIONS} compares the layer with itself in training: give no other BLOCK, --eval or --compile"
        )
    if dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    require_rounds(rounds)
    known = options.ROWS if OPTIONS in blocks else ROWS
    chosen = [row for row in known if rows.replace("x", "×") in row.name]
    if not chosen:
        raise ValueError(f"--rows {rows!r} is in none of the shapes: {', '.join(row.name for row in known)}")
    named = [] if OPTIONS in blocks else [BLOCKS[block] for block in blocks or BLOCKS]
    return Plan(chosen, named, dtype, training, compiled, rounds)


def run(plan: Plan, threads: int | None, print_json: Callable[[Any], None] | None) -> int:
    """Measure and print; return 0, or 1 where a result is further from float64 than torch's."""
    if threads is not None:
        if threads < 1:
            raise ValueError(f"--threads must be at least 1, got {threads}")
        torch.set_num_threads(threads)
    if not plan.blocks:
        return _run_options(plan, print_json)
    cases = len(plan.rows) * len(plan.blocks)
    results = show_progress(measure(plan), cases, lambda result: result.row)
    if print_json is not None:
        print_json(table.as_json(results, plan))
    else:
        console = _console()
        for block in plan.blocks:
            of_block = [result for result in results if result.block == block.name]
            console.print(table.as_table(of_block, plan, block.name), highlight=False)
    return 0 if all(result.right for result in results) else 1


def _run_options(plan: Plan, print_json: Callable[[Any], None] | None) -> int:
    found = list(options.prices(plan))
    if print_json is not None:
        print_json(table.as_json(found, plan))
        return 0
    console = _console()
    for row in plan.rows:
        of_row = [price for price in found if price.row == row.name]
        console.print(table.as_price_table(of_row, plan, row.name), highlight=False)
    return 0


def _console() -> Console:
    """Return the console of the results, with the machine on its first line."""
    console, about = wide_console(), table.machine()
    console.print(f"{about['processor']}, {about['threads']} threads, torch {about['torch']}", highlight=False)
    return console
