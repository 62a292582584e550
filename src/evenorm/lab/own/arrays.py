"""Arrays: .npz files, and the IDX files that MNIST comes in."""

from __future__ import annotations

import gzip
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from evenorm.lab.own.raw import MOST_BYTES, Array, Raw, drawn, drawn_note, single

PAIRS = (("x", "y"), ("X", "y"), ("data", "target"), ("images", "labels"))
PARTS = (("x_train", "y_train"), ("x_test", "y_test"))  # put together: the split is drawn anew
LABELS, IMAGES = 0x0801, 0x0803  # the first four bytes of an IDX file: unsigned bytes, in one or three dimensions


def read_npz(path: Path, target: str | None, drop: Sequence[str] = ()) -> Raw:
    """Read an .npz file: x (samples, ...) and y (samples,), under one of the usual pairs of names.

    Raises:
        ValueError: no such arrays, arrays of objects, which only unpickling could read, or too much of either.
    """
    size, arrays = _unpacked(path, drop)
    if size > MOST_BYTES:
        raise ValueError(
            f"{path} unpacks to {size / 2**30:.1f} GiB, more than the 4 GiB that are read; take a part"
        )
    strange = [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]
    if strange:
        raise ValueError(
            f"{path}: {', '.join(strange)} is no array; save arrays: numpy.savez('data.npz', x=x, y=y)"
        )
    x, y = _pair(path, arrays, target)
    return _from_arrays(path.name, x, y, pictures=x.ndim > 2)


def _unpacked(path: Path, drop: Sequence[str]) -> tuple[int, dict[str, Array]]:
    """Return how large the arrays of a file become, and the arrays, or none where that is too large."""
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > MOST_BYTES:
            return size, {}
        with np.load(path, allow_pickle=False) as found:
            return size, {name: found[name] for name in found.files if name not in drop}
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise ValueError(f"{path} is no .npz file, or a damaged one: {error}") from error
    except ValueError as error:
        if "Object arrays" in str(error):  # numpy's words for what it would have to unpickle
            raise ValueError(
                f"{path} holds Python objects, which are not read; save arrays: numpy.savez('data.npz', x=x, y=y)"
            ) from error
        raise ValueError(f"{path} is no .npz file, or a damaged one: {error}") from error


def _pair(path: Path, arrays: dict[str, Array], target: str | None) -> tuple[Array, Array]:
    if target is not None:
        others = [name for name in arrays if name != target]
        if target not in arrays or len(others) != 1:
            raise ValueError(
                f"{path} holds {', '.join(arrays)}; with --target it must hold that array and one other"
            )
        return arrays[others[0]], arrays[target]
    if all(name in arrays for names in PARTS for name in names):
        x, y = ([arrays[names[side]] for names in PARTS] for side in (0, 1))
        return np.concatenate(x), np.concatenate(y)
    for x_name, y_name in PAIRS:
        if x_name in arrays and y_name in arrays:
            return arrays[x_name], arrays[y_name]
    raise ValueError(
        f"{path} holds {', '.join(arrays) or 'nothing'}; name the arrays x (samples, ...) and y (samples,)"
    )


def read_idx(path: Path, target: str | None, drop: Sequence[str] = ()) -> Raw:
    """Read IDX images with their labels: one file of images, or all below a folder, training and test together.

    Raises:
        ValueError: images without labels, or a file that is not what its head says.
    """
    if target is not None or drop:
        raise ValueError(f"{path} holds IDX images with labels: --target and --drop are for tables")
    images = [path] if path.is_file() else idx_images(path)
    x = [_idx(file, IMAGES) for file in images]
    y = [_idx(_labels_of(file), LABELS) for file in images]
    return _from_arrays(path.name, np.concatenate(x), np.concatenate(y), pictures=True)


def idx_images(folder: Path) -> list[Path]:
    """Return the IDX files of images in a folder; of the same file packed and unpacked, the unpacked one."""
    found = {file.name.removesuffix(".gz"): file for file in sorted(folder.glob("*images*idx3*"), reverse=True)}
    return sorted(found.values())


def _labels_of(images: Path) -> Path:
    name = images.name.replace("images", "labels").replace("idx3", "idx1")
    for labels in (
        images.with_name(name),
        images.with_name(name.removesuffix(".gz")),
        images.with_name(f"{name}.gz"),
    ):
        if labels.exists() and labels != images:
            return labels
    raise ValueError(f"{images} needs its labels beside it, {name}")


def _idx(path: Path, kind: int) -> Array:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            (magic,) = struct.unpack(">i", file.read(4))
            if magic != kind:
                raise ValueError(
                    f"{path} begins with 0x{magic & 0xFFFFFFFF:08x}, not with 0x{kind:08x} as such an IDX file does"
                )
            shape = struct.unpack(f">{kind & 0xFF}i", file.read(4 * (kind & 0xFF)))
            size = int(np.prod(shape, dtype=np.int64))
            if min(shape) < 0 or size > MOST_BYTES:
                raise ValueError(f"{path} says it holds {shape} values; more than 4 GiB are not read")
            content = file.read(size + 1)
    except (struct.error, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} ends too early or is no IDX file: {error}") from error
    if len(content) != size:
        more = "more" if len(content) > size else f"{len(content)}"
        raise ValueError(f"{path} should hold {size} values, by its head, and holds {more}; load it again")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _from_arrays(name: str, x: Array, y: Array, *, pictures: bool) -> Raw:
    if x.ndim < 2 or y.ndim != 1 or len(x) != len(y):
        raise ValueError(f"{name}: x must be (samples, ...) and y (samples,), got {x.shape} and {y.shape}")
    if x.dtype.kind not in "biuf" or y.dtype.kind not in "biufU":
        raise ValueError(f"{name}: x must hold numbers and y numbers or text, got {x.dtype} and {y.dtype}")
    rows, chosen = len(x), drawn(len(x), int(np.prod(x.shape[1:])))
    if chosen is not None:
        x, y = x[chosen], y[chosen]
    flat = single(x.reshape(len(x), -1))
    return Raw(
        name,
        flat / 255 if x.dtype == np.uint8 and pictures else flat,
        np.empty((len(flat), 0), np.str_),
        y if y.dtype.kind == "U" else y.astype(np.float64),
        tuple(f"x[{index}]" for index in range(flat.shape[1])),
        pictures=pictures,
        notes=() if chosen is None else (drawn_note(rows, len(x)),),
    )
