"""CSV and Parquet tables, read by polars once every line was found to be one. A leaf."""

from __future__ import annotations

import csv
from pathlib import Path

import polars
from polars.exceptions import PanicException, PolarsError

MISSING = ["", "NA", "N/A", "NaN", "nan", "null", "NULL", "None", "?"]  # what a CSV writes for no value


def read(path: Path, least: int = 1) -> tuple[polars.DataFrame, str]:
    """Return a table and what separates its columns; a comma for Parquet.

    Args:
        path: ``.parquet``, or text in UTF-8 whose columns are separated by commas, semicolons or tabs.
        least: how many columns it must have.

    Raises:
        ValueError: a file that is no such table.
    """
    try:
        if path.suffix.lower() == ".parquet":
            return polars.read_parquet(path), ","
        separator = _check_lines(path, least)
        # No length to infer from: a column of whole numbers may have its first fraction in the last row.
        table = polars.read_csv(path, separator=separator, null_values=MISSING, infer_schema_length=None)
        return table, separator
    except (PolarsError, PanicException) as error:  # polars panics over some damaged Parquet files
        told = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} cannot be read as a table: {told}") from error


def _check_lines(path: Path, least: int) -> str:
    """Return the separator of a table whose lines all hold as many fields as its head.

    polars fills up short lines in silence, and names no line where one is too long.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            head = file.readline(1_000_000)
            if "\0" in head:
                raise ValueError(_no_utf_8(path, 0))
            separator = max(",;\t", key=head.count)
            width = len(next(csv.reader([head], delimiter=separator), []))
            lines = csv.reader(file, delimiter=separator)
            for row in lines:
                if row and len(row) != width:
                    raise ValueError(
                        f"{path}, line {lines.line_num + 1}: {len(row)} fields, but the head has {width}; mend the "
                        "line, or put quotes around a field that holds the separator"
                    )
    except UnicodeDecodeError as error:
        raise ValueError(_no_utf_8(path, error.object[error.start])) from error
    except csv.Error as error:
        raise ValueError(f"{path} cannot be read as a table: {error}") from error
    if width < least:
        raise ValueError(
            f"{path} has {width} column{'s' * (width != 1)} in its first line; a table needs a head and a comma "
            "between columns"
        )
    return separator


def _no_utf_8(path: Path, byte: int) -> str:
    """Return what is wrong and how to mend it; UTF-16 begins with 0xff or 0xfe, or has a 0x00 in each letter."""
    likely, *others = ["utf-16", "cp1252", "cp949"] if byte in (0xFF, 0xFE, 0) else ["cp949", "cp1252", "utf-16"]
    return (
        f"{path} is not UTF-8: it holds the byte 0x{byte:02x}; convert it: iconv -f {likely} -t utf-8 {path.name} "
        f"> converted.csv (or -f {', -f '.join(others)}, whichever it is)"
    )
