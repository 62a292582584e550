"""A folder of pictures, one folder a class, by Pillow."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from evenorm.lab.language import Text
from evenorm.lab.own.raw import Array, Raw, drawn, drawn_note

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"}
SIDE = 32  # pixels: larger pictures are made smaller, for a network that is trained some hundred times
MOST_PIXELS = 50_000_000  # of one picture, read off its head before any is decoded


def read_pictures(path: Path, target: str | None, drop: Sequence[str] = ()) -> Raw:
    """Read every picture below a folder; its class is the name of the folder it lies in.

    Raises:
        ValueError: a folder without pictures in folders, or a picture that is broken or too large.
    """
    if target is not None or drop:
        raise ValueError(f"{path} is a folder of pictures by class: --target and --drop are for tables")
    files = sorted(file for file in path.glob("*/**/*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise ValueError(
            f"{path} holds no pictures in folders; each class needs a folder: {path / 'cat' / '1.png'}"
        )
    chosen, found = drawn(len(files), SIDE * SIDE * 3), len(files)
    if chosen is not None:
        files = [files[index] for index in chosen]
    pixels = [_shrunk(file) for file in files]
    colour = any(picture.ndim == 3 for picture in pixels)
    side = max(picture.shape[0] for picture in pixels)
    rows = np.stack([_shaped(picture, side, colour).ravel() for picture in pixels])
    shape = f"{side}×{side}" + ("×3" if colour else "")
    note = Text(
        f"Every picture was made {shape} and fed as a row of pixels to a network without convolutions.",
        f"모든 그림을 {shape}로 줄여, 합성곱이 없는 신경망에 화소의 열로 넣었다.",
    )
    return Raw(
        path.name,
        rows.astype(np.float32) / 255,
        np.empty((len(rows), 0), np.str_),
        np.asarray([file.relative_to(path).parts[0] for file in files], dtype=np.str_),
        tuple(f"pixel {index}" for index in range(rows.shape[1])),
        pictures=True,
        notes=(note,) if chosen is None else (note, drawn_note(found, len(files))),
    )


def _shrunk(file: Path) -> Array:
    """Return a square of at most 32×32 bytes, (side, side) where it is grey, (side, side, 3) where it is not."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as picture:
                if picture.width * picture.height > MOST_PIXELS:
                    raise ValueError(
                        f"{file} has {picture.width}×{picture.height} pixels, more than 50 million are not read"
                    )
                side = min(SIDE, max(picture.size))
                picture.draft("RGB", (2 * side, 2 * side))  # a JPEG is decoded no larger than needed
                grey = picture.mode in ("1", "L", "LA", "I", "I;16")
                small = picture.convert("L" if grey else "RGB").resize((side, side), Image.Resampling.BILINEAR)
                return np.asarray(small)
    except (
        UnidentifiedImageError,
        OSError,
        SyntaxError,
        EOFError,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as error:
        raise ValueError(f"{file} cannot be read as a picture ({error}); remove it, or mend it") from error


def _shaped(picture: Array, side: int, colour: bool) -> Array:
    if picture.shape[0] != side:
        picture = np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BILINEAR))
    return np.repeat(picture[..., None], 3, 2) if colour and picture.ndim == 2 else picture
