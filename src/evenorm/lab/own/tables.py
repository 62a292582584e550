"""Tables: which columns are numbers, which are text, and what is to be predicted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars

from evenorm import tables
from evenorm.lab.language import Text
from evenorm.lab.own.raw import Array, Raw, drawn, drawn_note, single

DECIMAL_COMMA = r"^[+-]?\d+(,\d+)?([eE][+-]?\d+)?$"
NUMERIC_BUT = r"[\s%,€$£₩]"  # what a number may be wrapped in and still be meant as one
MOSTLY = 0.5  # of the values of a column of text: beyond, they are numbers with a stray among them
UNIQUE = 0.9  # of the rows: a column of text with so many different values is seldom a category


def read_table(path: Path, target: str | None, drop: Sequence[str] = ()) -> Raw:
    """Read a table; the target is one of its columns, all others but the dropped ones are inputs.

    Raises:
        ValueError: a column that is not there, holds nothing or nothing usable, or a file that is no such table.
    """
    if target is None:
        raise ValueError(f"--target must name the column of {path.name} that is to be predicted")
    table, separator = tables.read(path, least=2)
    table, notes = (table, []) if separator == "," else _with_decimal_points(table)
    known = ", ".join(table.columns[:20]) + (", …" if len(table.columns) > 20 else "")
    for name in (target, *drop):
        if name not in table.columns:
            raise ValueError(f"{path.name} has no column {name!r}; its columns are {known}")
    rows, chosen = len(table), drawn(len(table), len(table.columns))
    if chosen is not None:
        table = table[chosen]
    if table[target].dtype.is_nested() or table[target].dtype == polars.Binary:
        raise ValueError(
            f"{path.name}: the target {target!r} holds {table[target].dtype}, neither numbers nor text"
        )
    inputs = [column for column in table if column.name != target and column.name not in drop]
    if not inputs:
        raise ValueError(f"{path.name} has no column besides {target!r}: there is nothing to predict it from")
    _refuse_unusable(path.name, inputs)
    numbers = [column for column in inputs if _is_number(column.dtype)]
    categories = [column for column in inputs if not _is_number(column.dtype)]
    return Raw(
        path.name,
        np.stack([_numbers(c) for c in numbers], 1) if numbers else np.empty((len(table), 0), np.float32),
        np.stack([_texts(c) for c in categories], 1) if categories else np.empty((len(table), 0), np.str_),
        _target(table[target]),
        tuple(column.name for column in (*numbers, *categories)),
        notes=(
            *(() if chosen is None else (drawn_note(rows, len(table)),)),
            *notes,
            *(note for column in (*categories, table[target]) for note in _doubts(column)),
        ),
    )


def _with_decimal_points(table: polars.DataFrame) -> tuple[polars.DataFrame, list[Text]]:
    """Return a table whose columns of text such as 0,25 are numbers, and a note where there are any.

    Every value must be such a number, and the comma must not be what separates columns: a quoted "1,005" in such a
    table is more likely a thousand.
    """
    columns = []
    for column in table:
        if column.dtype != polars.String or not column.str.contains(",", literal=True).any():
            continue
        if column.drop_nulls().str.contains(DECIMAL_COMMA).all():
            columns.append(column.str.replace(",", ".", literal=True).cast(polars.Float64))
    if not columns:
        return table, []
    names = ", ".join(column.name for column in columns)
    note = Text(
        f"Commas were read as decimal points in {names}: 1,005 is 1.005.",
        f"{names} 열의 쉼표는 소수점으로 읽었다. 1,005는 1.005이다.",
    )
    return table.with_columns(columns), [note]


def _doubts(column: polars.Series) -> list[Text]:
    """Return a note where a column was read as text and is perhaps none: numbers in disguise, or identifiers."""
    values = column.drop_nulls()
    if column.dtype != polars.String or not len(values):
        return []
    bare = values.str.replace_all(NUMERIC_BUT, "").cast(polars.Float64, strict=False)
    name = column.name
    if bare.is_not_null().sum() > MOSTLY * len(bare):
        odd = values.filter(values.cast(polars.Float64, strict=False).is_null())
        example = f", {odd[0]!r}" if len(odd) else ""
        return [
            Text(
                f"Column {name} was read as text, though most of it looks like numbers{example}; mend it there.",
                f"{name} 열은 대부분 숫자로 보이지만 글로 읽었다{example}. 파일에서 고치면 숫자로 읽는다.",
            )
        ]
    if values.n_unique() > UNIQUE * len(column):
        return [
            Text(
                f"Column {name} was read as text, and nearly every row has a value of its own; an identifier? "
                "Leave it out with --drop.",
                f"{name} 열은 글로 읽었고 거의 모든 행의 값이 다르다. 식별자라면 --drop으로 뺀다.",
            )
        ]
    return []


def _refuse_unusable(name: str, inputs: Sequence[polars.Series]) -> None:
    for what, unusable in (
        ("no row has a value in", [c.name for c in inputs if c.null_count() == len(c)]),
        (
            "neither numbers nor text in",
            [c.name for c in inputs if c.dtype.is_nested() or c.dtype == polars.Binary],
        ),
    ):
        if unusable:
            options = " ".join(f"--drop '{column}'" for column in unusable)
            raise ValueError(f"{name}: {what} {', '.join(unusable)}; leave it out with {options}")


def _is_number(kind: polars.DataType) -> bool:
    return kind.is_numeric() or kind.is_temporal() or kind == polars.Boolean


def _numbers(column: polars.Series) -> Array:
    """Return a column as numbers; dates and times from 0 to 1, for float32 holds no microseconds since 1970."""
    if column.dtype.is_temporal():
        ticks = column.to_physical().cast(polars.Float64).to_numpy()
        return np.asarray((ticks - np.nanmin(ticks)) / (np.ptp(ticks[~np.isnan(ticks)]) or 1), np.float32)
    values = column.cast(polars.Float64).fill_null(float("nan")).to_numpy()
    return single(values)


def _texts(column: polars.Series) -> Array:
    return np.asarray(column.cast(polars.String).fill_null("").to_list(), dtype=np.str_)


def _target(column: polars.Series) -> Array:
    if column.dtype.is_numeric():
        return np.array(column.cast(polars.Float64).fill_null(float("nan")))
    return _texts(column)
