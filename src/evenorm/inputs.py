"""What commands are given by name: networks, weights and data, from strangers perhaps.

Code is run only where the user names a module of his own; a file of weights or data never is.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

NESTED = ("state_dict", "model_state_dict", "model")  # where training scripts keep the weights in a checkpoint
PREFIXES = ("module.", "_orig_mod.")  # what DistributedDataParallel and torch.compile put before every name
COUNTER = "n_averaged"  # that torch.optim.swa_utils.AveragedModel keeps beside the names of its "module."
TABLES = (".csv", ".tsv", ".parquet")
EXAMPLES = 3  # of names that do not fit


def load_object(spec: str, option: str) -> Any:
    """Return what ``package.module:name`` means; modules in the current folder are found.

    Raises:
        ValueError: a spec of another form, a module that cannot be imported, or a name it does not have.
    """
    module_name, colon, name = spec.partition(":")
    if not (module_name and colon and name):
        raise ValueError(f"{option} must be package.module:name, got {spec!r}")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = import_module(module_name)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{option} {spec}: importing {module_name} failed: {_told(error)}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{option} {spec}: {module_name} has no {name}")
        found = getattr(found, part)
    return found


def load_model(spec: str, weights: Path | None = None) -> nn.Module:
    """Return the network that a factory makes, with the weights of a file.

    Args:
        spec: ``package.module:factory``; the factory is called without arguments. A network itself will do.
        weights: read by `load_weights`; they must fit, name by name and shape by shape. Prefixes of all names that
            come from DistributedDataParallel, torch.compile or AveragedModel are taken off, in whatever order.

    Raises:
        ValueError: what cannot be imported or called, or weights that do not fit.
        TypeError: a factory that makes something else.
    """
    found = load_object(spec, "--model")
    if not isinstance(found, nn.Module):
        found = _call(found, f"--model {spec}")
    if not isinstance(found, nn.Module):
        raise TypeError(f"--model {spec} must make a torch.nn.Module, got {type(found).__name__}")
    if weights is None:
        return found
    expected = found.state_dict()
    state = _without_prefixes(load_weights(weights), expected)
    try:
        found.load_state_dict(state)
    except RuntimeError as error:
        problems = _differences(state, expected) or " ".join(str(error).split())[:500]
        raise ValueError(f"{weights} does not fit {spec}: {problems}") from error
    return found


def _without_prefixes(state: dict[str, Tensor], expected: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return weights without what wrappers put before all names, one within another perhaps."""
    if COUNTER in state and COUNTER not in expected:
        state = {key: value for key, value in state.items() if key != COUNTER}
    while True:
        common = [prefix for prefix in PREFIXES if _begin(state, prefix) and not _begin(expected, prefix)]
        if not common:
            return state
        state = {key[len(common[0]) :]: value for key, value in state.items()}


def _begin(names: Iterable[str], prefix: str) -> bool:
    """Return whether there are names, and all begin so."""
    names = list(names)
    return bool(names) and all(name.startswith(prefix) for name in names)


def _differences(state: Mapping[str, Tensor], expected: Mapping[str, Any]) -> str:
    """Return in what weights differ from a network's: counts, and examples of each kind."""
    first = next(iter(state)).partition(".")[0] + "."
    if _begin(state, first) and not _begin(expected, first):
        return f"every name begins with `{first}`, and the network's do not; take it off and write the weights anew"
    tensors = {key: value for key, value in expected.items() if isinstance(value, Tensor) and not is_lazy(value)}
    kinds = {
        "missing": [key for key in expected if key not in state],
        "not the network's": [key for key in state if key not in expected],
        "of another shape": [
            f"{key} {tuple(state[key].shape)} where {tuple(value.shape)} is required"
            for key, value in tensors.items()
            if key in state and state[key].shape != value.shape
        ],
    }
    return "; ".join(
        f"{len(names)} {kind}: {', '.join(names[:EXAMPLES])}{', …' * (len(names) > EXAMPLES)}"
        for kind, names in kinds.items()
        if names
    )


def load_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by name, without running any code that it may hold.

    Args:
        path: ``.safetensors``, or anything that `torch.save` wrote: a state_dict, or a checkpoint that holds one
            under ``state_dict``, ``model_state_dict`` or ``model``.

    Raises:
        FileNotFoundError: there is no such file.
        IsADirectoryError: a folder.
        ValueError: a file that is damaged, holds code, or holds no state_dict.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, and a file of weights is required")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    if isinstance(content, Mapping):
        content = next((content[key] for key in NESTED if isinstance(content.get(key), Mapping)), content)
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{path} holds no state_dict but a {type(content).__name__}")
    strange = [
        str(key) for key, value in content.items() if not (isinstance(key, str) and isinstance(value, Tensor))
    ]
    if strange:
        raise ValueError(
            f"{path} holds no state_dict: {', '.join(strange[:5])} are no tensors; expected are tensors by name, "
            f"at the top or under {', '.join(NESTED)}"
        )
    return dict(content)


def load_data(spec: str, target: str | None = None, batch_size: int = 100) -> Iterable[Any]:
    """Return an iterable of batches.

    Args:
        spec: ``package.module:loader``, an iterable or a function that returns one; a folder of ``.npy`` files,
            each with samples along its first dimension; or a CSV or Parquet file, each row a sample.
        target: the column of a table that is not an input.
        batch_size: samples a batch, where the loader does not say so itself.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: what cannot be imported, called or read, or a table with columns that are no numbers.
        TypeError: a loader that is no iterable.
    """
    if batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {batch_size}")
    path = Path(spec)
    table = path.suffix.lower() in TABLES
    if target is not None and not table:
        raise ValueError(f"--target names a column of a CSV or Parquet file; --data is {spec}")
    if path.is_dir():
        return Arrays(path, batch_size)
    if table:
        rows: tuple[Tensor, ...] = _read_table(path, target).split(batch_size)
        return rows
    if ":" not in spec:
        raise ValueError(
            f"--data must be package.module:loader, a folder of .npy files, or a CSV or Parquet file, got {spec!r}"
        )
    found = load_object(spec, "--data")
    data = _call(found, f"--data {spec}") if callable(found) else found
    if not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        raise TypeError(f"--data {spec} must give an iterable of batches, got {type(data).__name__}")
    batches: Iterable[Any] = data
    return batches


class Arrays:
    """The ``.npy`` files of a folder, by name, cut into batches; each is read as far as it is needed.

    Values keep their type, but for float64 and wider, which become float32; nothing is scaled.
    """

    def __init__(self, folder: Path, batch_size: int) -> None:
        """Find the files."""
        self.files = sorted(folder.glob("*.npy"))
        self.batch_size = batch_size
        if not self.files:
            raise ValueError(f"there is no .npy file in {folder}")

    def __iter__(self) -> Iterator[Tensor]:
        """Yield tensors of at most `batch_size` samples; a batch does not span two files."""
        import numpy

        for file in self.files:
            try:
                array = numpy.load(file, mmap_mode="r", allow_pickle=False)
            except (ValueError, EOFError) as error:
                raise ValueError(f"{file} cannot be read: {_told(error)}") from error
            if array.ndim == 0 or array.dtype.kind not in "fiub":
                raise ValueError(f"{file} must hold numbers, samples first, got {array.dtype} {array.shape}")
            # torch knows the processor's own order of bytes alone, and nothing wider than float64.
            known = array.dtype.newbyteorder("=") if array.dtype.itemsize <= 8 else numpy.dtype(numpy.float64)
            for start in range(0, len(array), self.batch_size):
                batch = torch.from_numpy(array[start : start + self.batch_size].astype(known))
                yield batch.float() if batch.dtype == torch.float64 else batch


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or no safetensors file: {error}") from error


def _read_pickle(path: Path) -> Any:
    try:
        with warnings.catch_warnings():  # of torch's, about formats, before it refuses them
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        reason = str(error).partition("WeightsUnpickler error: ")[2].partition("\n")[0].strip()
        raise ValueError(
            f"{path} is refused: it holds more than tensors, and to read that could run code of its author, or it "
            f"is damaged{f' ({reason})' if reason else ''}; ask for a state_dict, best as safetensors, or where "
            'the file is your own: torch.save(checkpoint["model"], "weights.pt")'
        ) from error
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is damaged, or no file of torch.save: {_told(error)}") from error


def _read_table(path: Path, target: str | None) -> Tensor:
    """Return the rows of a table as float32, (rows, columns), without the target."""
    import polars

    from evenorm import tables

    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, and a table is required")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    table, _ = tables.read(path)
    if target is not None and target not in table.columns:
        raise ValueError(f"{path} has no column {target!r}; it has {', '.join(table.columns)}")
    table = table.drop(target) if target is not None else table
    if not table.height or not table.width:
        raise ValueError(f"{path} has {table.height} rows and {table.width} columns of inputs")
    for column in table.iter_columns():
        if not (column.dtype.is_numeric() or column.dtype == polars.Boolean):
            raise ValueError(
                f"{path}: column {column.name!r} holds {column.dtype}, not numbers; if it is not an input: --target"
            )
        if column.null_count():
            raise ValueError(
                f"{path}: column {column.name!r} has {column.null_count()} missing values; fill them first"
            )
    return torch.from_numpy(table.cast(polars.Float32).to_numpy().copy())


def _call(function: Any, named: str) -> Any:
    if not callable(function):
        raise TypeError(f"{named} is of type {type(function).__name__}, which cannot be called")
    try:
        return function()
    except (Exception, SystemExit) as error:
        raise ValueError(f"{named} failed: {_told(error)}") from error


def _told(error: BaseException) -> str:
    """Return what an error says, in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
