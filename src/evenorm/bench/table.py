"""What the benchmark prints: one table a block, the geometric mean under it, or JSON."""

from __future__ import annotations

import dataclasses
import math
import platform
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from evenorm.bench.measure import Plan, Result
from evenorm.bench.options import Price
from evenorm.environment import processor


def machine() -> dict[str, Any]:
    """Return what a reader has to know of the machine to make sense of the numbers."""
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "system": platform.platform(),
    }


def as_table(results: Sequence[Result], plan: Plan, block: str) -> Table:
    """Return the table of one block."""
    mode = "training, forward + backward" if plan.training else "evaluation, forward"
    table = Table(title=f"{block}, {plan.dtype}, {mode}", box=SIMPLE_HEAD, title_justify="left", pad_edge=False)
    table.padding = (0, 1, 0, 0)  # with a space each, all columns fit into 80
    table.add_column("shape", no_wrap=True)
    for name in ("torch", "compiled", "ours") if plan.compiled else ("torch", "ours"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("ratio", "±", "of copy", "error / torch's"):
        table.add_column(name, justify="right")
    for result in results:
        compiled = [] if result.compiled is None else [_time(result.compiled)]
        table.add_row(
            result.row,
            _time(result.theirs),
            *compiled,
            _time(result.ours),
            f"{result.ratio:.2f}",
            f"{result.spread:.0%}",
            f"{result.share:.0%}" if result.large else "",
            _errors(result),
            style=None if result.right else "bold red",
        )
    table.caption = summary(results)
    table.caption_justify = "left"
    return table


def as_price_table(prices: Sequence[Price], plan: Plan, row: str) -> Table:
    """Return the table of what each option costs at one shape."""
    title = f"{row}, {plan.dtype}, training, forward + backward"
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left", pad_edge=False)
    table.add_column("layer", no_wrap=True)
    for name in ("time", "of the plain layer's", "±"):
        table.add_column(name, justify="right")
    for price in prices:
        table.add_row(price.option, _time(price.seconds), f"{price.price:.2f}", f"{price.spread:.0%}")
    return table


def summary(results: Sequence[Result]) -> str:
    """Return the geometric mean of the ratios, and the least of those that are not dispatch alone."""
    mean = math.exp(math.fsum(math.log(result.ratio) for result in results) / len(results))
    large = [result.ratio for result in results if result.large]
    least = f", least of the larger rows {min(large):.2f}" if large else ""
    return f"torch's time / ours: geometric mean {mean:.2f}{least}"


def as_json(results: Iterable[Result] | Iterable[Price], plan: Plan) -> dict[str, Any]:
    """Return everything that was measured."""
    return {
        "machine": machine(),
        "dtype": plan.dtype,
        "mode": "train" if plan.training else "eval",
        "rounds": plan.rounds,
        "results": [dataclasses.asdict(result) for result in results],
    }


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.3g} ms"


def _errors(result: Result) -> str:
    relation = result.error_ours / result.error_theirs if result.error_theirs else math.inf
    return f"{relation:.2g}" if result.right else f"{relation:.2g} WRONG"
