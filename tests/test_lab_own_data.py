"""A user's own data: read, refused with a reason, split, and preprocessed by what the training part says."""

from __future__ import annotations

import gzip
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars
import pytest
import torch
from PIL import Image

from evenorm.lab.own.preparing import OwnData, prepare
from evenorm.lab.own.reading import read

ROWS = 120


def columns(rows: int = ROWS) -> dict[str, list[object]]:
    draw = np.random.default_rng(0)
    size = draw.normal(size=rows)
    return {
        "size": [None if index % 10 == 3 else float(value) for index, value in enumerate(size)],
        "colour": [("red", "green", None, "blue")[index % 4] for index in range(rows)],
        "old": [bool(index % 3) for index in range(rows)],
        "kind": ["big" if value > 0 else "small" for value in size],
        "price": [float(3 * value + 1) for value in size],
    }


def csv_file(folder: Path, **changed: list[object]) -> Path:
    path = folder / "table.csv"
    polars.DataFrame({**columns(), **changed}).write_csv(path)
    return path


def test_a_table_is_the_same_data_as_csv_and_as_parquet(tmp_path: Path) -> None:
    polars.DataFrame(columns()).write_parquet(tmp_path / "table.parquet")
    one, other = (prepare(read(path, "kind")) for path in (csv_file(tmp_path), tmp_path / "table.parquet"))
    assert one.name.split()[1] == other.name.split()[1]  # the hash of the content
    assert one.name.startswith("table.csv ")
    assert one.classes == ("big", "small")
    assert (one.train_rows, one.test_rows) == (96, 24)


def test_what_was_changed_is_other_data(tmp_path: Path) -> None:
    names = {prepare(read(csv_file(tmp_path), target)).name for target in ("kind", "price")}
    changed = columns()["size"]
    changed[5] = 7.0
    names.add(prepare(read(csv_file(tmp_path, size=changed), "kind")).name)
    names.add(prepare(read(csv_file(tmp_path), "kind", ["old"])).name)
    assert len(names) == 4


def test_gaps_get_the_median_of_the_training_part_and_a_mark(tmp_path: Path) -> None:
    data = prepare(read(csv_file(tmp_path), "kind", ["price", "old", "colour"]))
    for seed in range(3):
        split = data.split(seed)
        values, gaps, nothing = split.x_train.T
        assert not nothing.any()  # a third column, for the products
        assert 0 < gaps.sum() < ROWS / 5
        known = np.median(values[gaps == 0].numpy())
        torch.testing.assert_close(values[gaps == 1], torch.full_like(values[gaps == 1], float(known)))
        filled = split.x_test[split.x_test[:, 1] == 1, 0]
        torch.testing.assert_close(filled, torch.full_like(filled, float(known)))  # not the test part's own


def test_every_seed_has_its_split_of_a_small_table_and_the_same_columns(tmp_path: Path) -> None:
    rare = ["one of a kind" if index == 7 else "red" for index in range(ROWS)]
    data = prepare(read(csv_file(tmp_path, colour=rare), "kind"))
    assert data.redrawn
    splits = [data.split(seed) for seed in range(10)]
    assert data.split(3) is splits[3]
    assert len({split.x_train.shape for split in splits}) == 1
    assert not torch.equal(splits[0].y_train, splits[1].y_train)
    assert all(torch.isfinite(split.x_test).all() for split in splits)


def test_a_large_table_has_one_split(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.zeros((2000, 128), np.float32), y=np.arange(2000) % 3)
    data = prepare(read(tmp_path / "data.npz"))
    assert data.split(0) is data.split(5)
    assert data.classes == ("0", "1", "2")


@pytest.mark.parametrize(
    ("target", "task", "expected"),
    [
        (["u", "v"] * 60, None, "classification"),
        ([index % 20 for index in range(ROWS)], None, "classification"),
        ([index % 21 for index in range(ROWS)], None, "regression"),
        ([index % 20 + 0.5 for index in range(ROWS)], None, "regression"),
        ([index % 20 for index in range(ROWS)], "regression", "regression"),
    ],
)
def test_the_task_is_read_off_the_target(
    target: list[object], task: str | None, expected: str, tmp_path: Path
) -> None:
    data = prepare(read(csv_file(tmp_path, kind=target), "kind"), task)
    assert data.task == expected
    assert data.split(0).y_train.dtype == (torch.int64 if data.classes else torch.float32)
    if not data.classes:  # standardised by the training part
        assert float(data.split(0).y_train.mean()) == pytest.approx(0, abs=1e-6)
        assert float(data.split(0).y_train.std(correction=0)) == pytest.approx(1, abs=1e-6)


def test_rows_without_a_target_and_of_rare_classes_are_left_out_and_said_to_be(tmp_path: Path) -> None:
    target: list[object] = ["u", "v"] * 60
    target[3] = None
    target[5:8] = ["rare"] * 3
    data = prepare(read(csv_file(tmp_path, kind=target), "kind"))
    assert len(data.target) == ROWS - 4
    assert [note.split()[0] for note in data.notes] == ["1", "3"]
    assert all(note.korean for note in data.notes)


def text_file(content: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / "table.csv"
        path.write_bytes(content)
        return path

    return write


LINES = b"a,b,kind\n" + b"1,2,x\n3,4,y\n" * 40


@pytest.mark.parametrize(
    ("write", "target", "says"),
    [
        (csv_file, "sort", r"no column 'sort'; its columns are size, colour, old, kind, price"),
        (csv_file, None, r"--target must name the column"),
        (lambda folder: csv_file(folder, kind=["x"] * ROWS), "kind", "one class only, 'x'"),
        (lambda folder: csv_file(folder, size=[None] * ROWS), "kind", r"no row has a value in size.*--drop 'size'"),
        (lambda folder: csv_file(folder, price=[5.25] * ROWS), "price", "the target is 5.25 in every row"),
        (lambda folder: csv_file(folder, price=[float(i) for i in range(1, ROWS)] + [None]), "price", ""),
        (text_file(b"a,kind\n" + b"1,x\n2,y\n" * 5), "kind", "10 rows can be used, and at least 50"),
        (text_file(LINES + b"1,2\n"), "kind", "line 82: 2 fields, but the head has 3"),
        (text_file(LINES + b"1,2,x,9\n"), "kind", "line 82: 4 fields, but the head has 3"),
        (text_file(LINES + "1,2,가\n".encode("cp949")), "kind", r"not UTF-8.*0xb0.*iconv -f cp949"),
        (text_file(LINES.decode().encode("utf-16")), "kind", "not UTF-8"),
        (text_file(b""), "kind", "has 0 column"),
        (text_file(b"\x00" * 100), "kind", "table.csv"),
        (text_file(b"a,kind\n" + b"1,\n" * 60), "kind", "0 rows can be used"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused_with_the_reason(
    write: Callable[[Path], Path], target: str | None, says: str, tmp_path: Path
) -> None:
    path = write(tmp_path)
    if not says:
        assert prepare(read(path, target)).task == "regression"
        return
    with pytest.raises(ValueError, match=says):
        prepare(read(path, target))


def test_a_table_with_decimal_commas_is_the_table_with_points(tmp_path: Path) -> None:
    draw = np.random.default_rng(0).normal(size=ROWS)
    lines = [f"{value:.4f};{index};{'big' if value > 0 else 'small'}" for index, value in enumerate(draw)]
    (tmp_path / "points.csv").write_text("\n".join(["size;count;kind", *lines]))
    (tmp_path / "commas.csv").write_text("\n".join(["size;count;kind", *lines]).replace(".", ","))
    points, commas = (read(tmp_path / f"{name}.csv", "kind") for name in ("points", "commas"))
    np.testing.assert_array_equal(points.numbers, commas.numbers)
    assert commas.categories.size == 0
    assert [str(note) for note in commas.notes] == ["Commas were read as decimal points in size: 1,005 is 1.005."]
    assert points.notes == ()
    np.testing.assert_array_equal(
        read(tmp_path / "commas.csv", "size").target, read(tmp_path / "points.csv", "size").target
    )


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([f"{index % 9}%" for index in range(ROWS)], "most of it looks like numbers, '0%'"),
        ([f"{index % 9 + 1},005" for index in range(ROWS)], "most of it looks like numbers, '1,005'"),  # thousands
        ([str(index) if index != 7 else "seven" for index in range(ROWS)], "looks like numbers, 'seven'"),
        ([f"row {index}" for index in range(ROWS)], "an identifier?"),
    ],
)
def test_text_that_is_perhaps_none_has_a_note(values: list[object], says: str, tmp_path: Path) -> None:
    (note,) = read(csv_file(tmp_path, colour=values), "kind").notes
    assert says in note
    assert "colour" in note
    assert note.korean


def test_too_few_rows_come_with_the_reason(tmp_path: Path) -> None:
    path = csv_file(tmp_path, kind=[f"row {index}" for index in range(ROWS)])
    with pytest.raises(ValueError, match=r"0 rows can be used.*120 rows of 120 classes with fewer than 5 rows"):
        prepare(read(path, "kind"))


def test_a_target_of_lists_is_refused(tmp_path: Path) -> None:
    polars.DataFrame({"a": range(60), "kind": [[1, 2]] * 60}).write_parquet(tmp_path / "table.parquet")
    with pytest.raises(ValueError, match=r"the target 'kind' holds List.*neither numbers nor text"):
        read(tmp_path / "table.parquet", "kind")


def test_a_member_that_is_no_array_is_named(tmp_path: Path) -> None:
    path = tmp_path / "pickles.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x", b"text")
        archive.writestr("y.npy", b"text as well")
    with pytest.raises(ValueError, match="x, y is no array"):
        read(path)
    np.savez(path, a=np.zeros((60, 2)))
    with pytest.raises(ValueError, match="name the arrays x"):
        read(path)


def pictures(folder: Path, sizes: tuple[int, ...] = (8, 40), mode: str = "L") -> Path:
    draw = np.random.default_rng(0)
    for index in range(60):
        side = sizes[index % len(sizes)]
        path = folder / "pictures" / ("cat", "dog")[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        channels = () if mode == "L" else (3,)
        Image.fromarray(draw.integers(0, 255, (side, side, *channels), dtype=np.uint8)).save(path)
    return folder / "pictures"


@pytest.mark.parametrize(("mode", "inputs"), [("L", 32 * 32), ("RGB", 32 * 32 * 3)])
def test_pictures_of_any_size_are_rows_of_pixels(mode: str, inputs: int, tmp_path: Path) -> None:
    data = prepare(read(pictures(tmp_path, mode=mode)))
    assert data.classes == ("cat", "dog")
    assert data.split(0).features == inputs
    assert 0 <= data.numbers.min() < data.numbers.max() <= 1
    assert "32×32" in data.notes[0]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


def bomb(path: Path) -> None:
    """A picture that says it is 60 000 by 60 000 pixels."""
    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    import zlib

    chunk = b"IHDR" + head
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)))


@pytest.mark.parametrize("damage", [truncate, bomb, lambda path: path.write_bytes(b"no picture")])
def test_a_broken_picture_is_named(damage: Callable[[Path], None], tmp_path: Path) -> None:
    folder = pictures(tmp_path)
    damage(folder / "dog" / "7.png")
    with pytest.raises(ValueError, match=r"dog/7\.png"):
        read(folder)


def test_a_folder_without_classes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="each class needs a folder"):
        read(tmp_path / "empty")


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">i{array.ndim}i", 0x0800 + array.ndim, *array.shape) + array.tobytes()


def mnist(folder: Path) -> Path:
    """MNIST's four files with other pictures, one pair of them packed."""
    draw = np.random.default_rng(0)
    for part, count, packed in (("train", 60, ".gz"), ("t10k", 20, "")):
        pack = gzip.compress if packed else bytes
        images = draw.integers(0, 255, (count, 5, 4), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 4
        (folder / f"{part}-images-idx3-ubyte{packed}").write_bytes(pack(idx(images)))
        (folder / f"{part}-labels-idx1-ubyte{packed}").write_bytes(pack(idx(labels)))
    return folder


def test_mnists_files_are_read_together_or_one_alone(tmp_path: Path) -> None:
    whole = prepare(read(mnist(tmp_path)))
    assert (whole.numbers.shape, whole.classes) == ((80, 20), ("0", "1", "2", "3"))
    assert float(whole.numbers.max()) <= 1
    assert len(prepare(read(tmp_path / "train-images-idx3-ubyte.gz")).target) == 60


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("t10k-images-idx3-ubyte", b"\x00\x00", "ends too early"),
        ("t10k-images-idx3-ubyte", idx(np.zeros((20, 5, 4), np.uint8))[:-1], "should hold 400 values"),
        ("t10k-images-idx3-ubyte", idx(np.zeros(20, np.uint8)), "begins with 0x00000801"),
        ("t10k-images-idx3-ubyte", struct.pack(">4i", 0x0803, 2**31 - 1, 2**31 - 1, 1), "more than 4 GiB"),
        ("train-images-idx3-ubyte.gz", b"not packed", "no IDX file"),
    ],
)
def test_an_idx_file_that_is_not_what_it_says(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    (mnist(tmp_path) / name).write_bytes(content)
    with pytest.raises(ValueError, match=says):
        read(tmp_path)


def test_images_need_their_labels(tmp_path: Path) -> None:
    (mnist(tmp_path) / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(ValueError, match="needs its labels beside it, t10k-labels-idx1-ubyte"):
        read(tmp_path)


class Trap:
    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("sprung"),)


@pytest.mark.parametrize(
    ("arrays", "target", "says"),
    [
        ({"x": np.array([Trap()] * 60, dtype=object), "y": np.arange(60) % 2}, None, "Python objects"),
        ({"a": np.zeros((60, 2)), "b": np.zeros(60)}, None, "holds a, b; name the arrays"),
        ({"a": np.zeros((60, 2)), "b": np.zeros(60)}, "c", "holds a, b; with --target"),
        ({"x": np.zeros((60, 2)), "y": np.zeros(61)}, None, r"got \(60, 2\) and \(61,\)"),
        ({"x": np.zeros((60, 2), complex), "y": np.zeros(60)}, None, "must hold numbers"),
    ],
)
def test_arrays_that_cannot_be_used(
    arrays: dict[str, np.ndarray], target: str | None, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("data.npz", **arrays)
    with pytest.raises(ValueError, match=says):
        read(Path("data.npz"), target)
    assert not Path("sprung").exists()


def test_training_and_test_arrays_are_put_together(tmp_path: Path) -> None:
    parts = {"x_train": np.zeros((60, 4, 4)), "y_train": np.arange(60) % 2}
    parts |= {"x_test": np.ones((20, 4, 4)), "y_test": np.arange(20) % 2}
    np.savez(tmp_path / "data.npz", **parts)
    data: OwnData = prepare(read(tmp_path / "data.npz"))
    assert data.numbers.shape == (80, 16)


def test_what_is_no_data_is_refused_with_the_kinds(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no \.csv, \.parquet, \.npz or IDX"):
        read(tmp_path / "model.pt")
    with pytest.raises(FileNotFoundError, match="there is nothing at"):
        read(tmp_path / "none.csv")


def test_of_very_many_rows_some_are_drawn(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.arange(30_000.0)[:, None], y=np.arange(30_000) % 2)
    data = prepare(read(tmp_path / "data.npz"))
    assert len(data.target) == 20_000
    assert data.numbers.max() > 29_000
    assert "30,000" in data.notes[0]


def damaged(content: bytes, seed: int) -> bytes:
    """Cut short, with bytes changed, or with bytes put in."""
    draw = random.Random(seed)
    place = draw.randrange(len(content))
    if seed % 3 == 0:
        return content[:place]
    changed = bytearray(content)
    if seed % 3 == 1:
        changed[place] ^= draw.randrange(1, 256)
    else:
        changed[place:place] = draw.randbytes(draw.randrange(1, 30))
    return bytes(changed)


@pytest.mark.parametrize("name", ["table.csv", "table.parquet", "table.npz"])
def test_a_damaged_file_is_read_or_refused_and_nothing_else(name: str, tmp_path: Path) -> None:
    path, target = tmp_path / name, None if name.endswith("npz") else "kind"
    if name == "table.npz":
        np.savez_compressed(path, x=np.random.default_rng(0).random((60, 4)), y=np.arange(60) % 2)
    elif name == "table.parquet":
        polars.DataFrame(columns()).write_parquet(path)
    else:
        csv_file(tmp_path)
    whole, refused = path.read_bytes(), 0
    for seed in range(150):
        path.write_bytes(damaged(whole, seed))
        try:
            prepare(read(path, target))
        except (ValueError, OSError):
            refused += 1
    assert refused > 50


def test_of_wide_rows_fewer_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evenorm.lab.own.raw.MOST_NUMBERS", 600)
    np.savez(tmp_path / "data.npz", x=np.zeros((100, 10)), y=np.arange(100) % 2)
    assert len(prepare(read(tmp_path / "data.npz")).target) == 60
