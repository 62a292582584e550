"""Files that appear complete or not at all, with the rights that any new file gets. A leaf."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def write(
    path: Path, content: bytes, *, replace: bool = True, remedy: str = "make room, or choose another place"
) -> None:
    """Write a file by way of one beside it, which is on the disk before it takes the name.

    A link by that name is replaced, not followed, and nothing else is left whatever happens, Ctrl-C too.

    Args:
        path: of the file, in a folder that is there.
        content: all of it.
        replace: whether a file that is there is replaced.
        remedy: what the user can do where it fails.

    Raises:
        FileExistsError: there is a file, and `replace` is False.
        OSError: no space left, or no leave to write; what was there is still there.
    """
    temporary = _beside(path)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if not replace and path.exists():
            raise FileExistsError(f"{path} has appeared meanwhile, and was left as it is; choose another place")
        temporary.replace(path)
    except FileExistsError:
        raise
    except OSError as error:
        told = f"{path} could not be written: {error.strerror or error}; {remedy}"
        raise OSError(error.errno, told) from error
    finally:
        _remove(temporary)


def probe(path: Path) -> None:
    """Prove, before the work, that a file of this name can be written: in its folder, or where that would be made.

    Raises:
        OSError: it cannot.
    """
    temporary = _beside(next(folder for folder in path.absolute().parents if folder.exists()) / path.name)
    try:
        temporary.write_bytes(b"")
    except OSError as error:
        raise OSError(error.errno, f"{path} cannot be written: {error.strerror}") from error
    finally:
        _remove(temporary)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
