"""A user's own data, whatever its kind. Nothing in a file is run or unpickled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from evenorm.lab.own.arrays import idx_images, read_idx, read_npz
from evenorm.lab.own.pictures import read_pictures
from evenorm.lab.own.raw import MOST_BYTES, Raw
from evenorm.lab.own.tables import read_table

Reader: TypeAlias = "Callable[[Path, str | None, Sequence[str]], Raw]"

# The first that fits reads.
_KINDS: tuple[tuple[Callable[[Path], bool], Reader], ...] = (
    (lambda path: path.suffix.lower() in (".csv", ".tsv", ".txt", ".parquet") and path.is_file(), read_table),
    (lambda path: path.suffix.lower() == ".npz" and path.is_file(), read_npz),
    (lambda path: "idx3" in path.name and path.is_file(), read_idx),
    (lambda path: path.is_dir() and bool(idx_images(path)), read_idx),
    (lambda path: path.is_dir(), read_pictures),
)


def read(path: Path, target: str | None = None, drop: Sequence[str] = ()) -> Raw:
    """Read a file or a folder.

    Args:
        path: a CSV or Parquet table, an .npz file, an IDX file of images with its labels beside it, a folder of
            such files, or a folder of pictures with a folder for each class.
        target: the column of a table, or the array of an .npz file, that is to be predicted.
        drop: columns that are no inputs.

    Raises:
        ValueError: no such kind, or a content that cannot be used.
        OSError: a file that is not there or cannot be opened.
    """
    path = path.expanduser().resolve()
    if not path.exists():
        raise FileNotFoundError(f"there is nothing at {path}")
    if path.is_file() and path.stat().st_size > MOST_BYTES:
        raise ValueError(
            f"{path} has {path.stat().st_size / 2**30:.1f} GiB, more than the 4 GiB that are read; take a part"
        )
    for fits, reader in _KINDS:
        if fits(path):
            try:
                return reader(path, target, drop)
            except MemoryError as error:
                raise ValueError(
                    f"{path} says it holds more than fits into memory; take a part, or load it again"
                ) from error
    raise ValueError(
        f"{path} is no .csv, .parquet, .npz or IDX (idx3-ubyte) file, nor a folder of pictures by class"
    )
