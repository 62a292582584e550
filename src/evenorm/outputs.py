"""Files that commands write: weights, complete or not at all; and never over another without being told to."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from evenorm import atomic

SUFFIXES = (".safetensors", ".pt", ".pth")
PAGES = (".html", ".htm")


def check_out(path: Path, force: bool) -> None:
    """Prove, before the work, that a file of weights may and can be written.

    Raises:
        ValueError: a name that says no format.
        OSError: a file that is there already, unless `force`; a folder that is missing or cannot be written.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"--out must end in {', '.join(SUFFIXES)}, got {path}")
    _check_place("--out", path, force)


def check_page(path: Path, force: bool, others: Iterable[Path | None] = ()) -> None:
    """Prove, before the work, that a page may and can be written.

    Args:
        path: of the page.
        force: whether a page that is there already is overwritten.
        others: files of weights, which a page never replaces.

    Raises:
        ValueError: a name that is not a page's, or one of the others'.
        OSError: as `check_out`.
    """
    if path.suffix.lower() not in PAGES:
        raise ValueError(f"--html must end in {' or '.join(PAGES)}, got {path}")
    if path.resolve() in {other.resolve() for other in others if other is not None}:
        raise ValueError(f"--html {path} is a file of weights, which a page never replaces; give another name")
    _check_place("--html", path, force)


def _check_place(option: str, path: Path, force: bool) -> None:
    if path.is_dir():
        raise IsADirectoryError(f"{option} {path} is a folder")
    if path.exists() and not force:
        raise FileExistsError(f"{path} is there already; --force overwrites it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent}")
    atomic.probe(path)


def save_weights(path: Path, state: Mapping[str, Tensor], force: bool = False) -> None:
    """Write a state_dict to a file, which appears complete or not at all.

    Raises:
        ValueError: a state_dict with more than tensors in it, for safetensors.
        OSError: as `check_out`, or no space left; what was there is still there.
    """
    check_out(path, force)
    atomic.write(path, _content(path, state), replace=force)


def _content(path: Path, state: Mapping[str, Tensor]) -> bytes:
    if path.suffix != ".safetensors":
        buffer = io.BytesIO()
        torch.save({key: _at_home(value) for key, value in state.items()}, buffer)
        return buffer.getvalue()
    from safetensors.torch import save

    strange = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if strange:
        raise ValueError(f"safetensors holds tensors only, {strange[0]} is none; write a .pt file")
    # Copies: the format refuses tensors that share memory, as tied weights do.
    copies = {key: _at_home(value).clone(memory_format=torch.contiguous_format) for key, value in state.items()}
    return save(copies, metadata={"format": "pt"})


def _at_home(value: Tensor) -> Tensor:
    return value.detach().cpu() if isinstance(value, Tensor) else value
