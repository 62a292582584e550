"""Files and names from strangers: read without running their code, and named where they are wrong."""

from __future__ import annotations

import argparse
import errno
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from evenorm.inputs import load_data, load_model, load_object, load_weights
from evenorm.outputs import check_out, save_weights

MODULE = """
import torch
from torch import nn

class Shop:
    @staticmethod
    def make():
        return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))

make = Shop.make
ready = make()
def broken(): raise LookupError("no such thing")
def leave(): raise SystemExit(3)
def number(): return 5
def batches(): return [torch.zeros(2, 4), torch.ones(2, 4)]
listed = batches()
"""


@pytest.fixture
def strangers(tmp_path, monkeypatch):
    """A folder with a module that no other test has, to be imported from there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != ""])
    (tmp_path / "strangers.py").write_text(MODULE)
    (tmp_path / "quits.py").write_text("import sys; sys.exit(0)")
    (tmp_path / "unfinished.py").write_text("import nowhere_to_be_found")
    yield tmp_path
    sys.modules.pop("strangers", None)


@pytest.mark.parametrize("spec", ["strangers:make", "strangers:ready", "strangers:Shop.make"])
def test_a_network_is_made_by_name(strangers, spec):
    assert isinstance(load_model(spec), nn.Sequential)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("strangers", ValueError, "--model must be package.module:name, got 'strangers'"),
        ("strangers:", ValueError, "must be package.module:name"),
        ("strangers:absent", ValueError, "strangers has no absent"),
        ("nowhere:make", ValueError, "importing nowhere failed: ModuleNotFoundError: No module named 'nowhere'"),
        ("unfinished:make", ValueError, "importing unfinished failed: .*nowhere_to_be_found"),
        ("strangers:broken", ValueError, "--model strangers:broken failed: LookupError: no such thing"),
        ("quits:make", ValueError, "--model quits:make: importing quits failed: SystemExit: 0"),
        ("strangers:leave", ValueError, "--model strangers:leave failed: SystemExit: 3"),
        ("strangers:number", TypeError, r"must make a torch.nn.Module, got int"),
        ("strangers:listed", TypeError, "is of type list, which cannot be called"),
    ],
)
def test_a_network_that_cannot_be_made(strangers, spec, error, message):
    with pytest.raises(error, match=message):
        load_model(spec)


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).state_dict()


WRITTEN = {
    "safetensors": lambda path: save_file(state(), path.with_suffix(".safetensors")),
    "state_dict": lambda path: torch.save(state(), path),
    "checkpoint": lambda path: torch.save({"epoch": 3, "state_dict": state(), "optimizer": {"lr": 0.1}}, path),
    "model": lambda path: torch.save({"model": state()}, path),
    "model_state_dict": lambda path: torch.save({"model_state_dict": state(), "loss": 0.5}, path),
    "legacy format": lambda path: torch.save(state(), path, _use_new_zipfile_serialization=False),
}


@pytest.mark.parametrize("write", WRITTEN.values(), ids=WRITTEN)
def test_weights_are_found_in_files_of_all_kinds(tmp_path, write):
    write(tmp_path / "weights.pt")
    (path,) = tmp_path.iterdir()
    found = load_weights(path)
    assert found.keys() == state().keys()
    assert all(torch.equal(found[key], value) for key, value in state().items())


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."])
def test_weights_are_loaded_into_the_network(strangers, prefix):
    torch.save({prefix + key: value for key, value in state(7).items()}, "weights.pt")
    model = load_model("strangers:make", strangers / "weights.pt")
    assert torch.equal(model[0].weight, state(7)["0.weight"])


def test_weights_of_an_averaged_network_are_loaded(strangers):
    averaged = torch.optim.swa_utils.AveragedModel(load_object("strangers:make", "--model")())
    torch.save(averaged.state_dict(), "swa.pt")
    model = load_model("strangers:make", strangers / "swa.pt")
    assert torch.equal(model[0].weight, averaged.module[0].weight)


def test_a_prefix_of_all_names_is_named(strangers):
    torch.save({"model." + key: value for key, value in state().items()}, "lightning.ckpt")
    with pytest.raises(ValueError, match=r"every name begins with `model\.`"):
        load_model("strangers:make", strangers / "lightning.ckpt")


def test_of_very_many_names_that_do_not_fit_three_are_told(strangers):
    torch.save(state() | {f"{index}.weight": torch.zeros(1) for index in range(2, 900)}, "other.pt")
    with pytest.raises(ValueError, match=r"898 not the network's: 2.weight, 3.weight, 4.weight, …$"):
        load_model("strangers:make", strangers / "other.pt")


def test_a_column_that_has_its_first_fraction_late_is_read(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("a,b\n" + "1,2\n" * 200 + "1.5,2\n")
    assert torch.cat(list(load_data(str(path))))[-1].tolist() == [1.5, 2]


@pytest.mark.parametrize(("name", "separator"), [("table.csv", ";"), ("table.tsv", "\t")])
def test_a_table_of_another_separator_is_read(tmp_path, name, separator):
    (tmp_path / name).write_text(f"a{separator}b\n1{separator}2.5\n")
    assert torch.cat(list(load_data(str(tmp_path / name)))).tolist() == [[1, 2.5]]


def test_weights_that_do_not_fit_are_named(strangers):
    wrong = state() | {"0.weight": torch.zeros(3, 5), "2.weight": torch.zeros(1)}
    del wrong["1.running_mean"]
    save_file(wrong, "wrong.safetensors")
    with pytest.raises(
        ValueError, match=r"wrong.safetensors does not fit strangers:make: .*1.running_mean"
    ) as told:
        load_model("strangers:make", strangers / "wrong.safetensors")
    assert "1 not the network's: 2.weight" in str(told.value)
    assert "0.weight (3, 5) where (3, 4) is required" in str(told.value)


def test_what_a_checkpoint_holds_beside_tensors_is_named_with_the_way_out(tmp_path):
    torch.save({"model": state(), "args": argparse.Namespace(lr=0.1)}, tmp_path / "args.pt")
    with pytest.raises(ValueError, match=r'argparse.Namespace.*torch.save\(checkpoint\["model"\]') as told:
        load_weights(tmp_path / "args.pt")
    assert "not written by torch.save" not in str(told.value)


def test_a_folder_is_no_file_of_weights(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder"):
        load_weights(tmp_path)


class Bomb:
    """What writes a file as soon as it is unpickled."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("legacy", [False, True, None], ids=["zip", "legacy", "bare pickle"])
def test_code_in_a_file_is_not_run(tmp_path, legacy):
    path, mark = tmp_path / "evil.pt", tmp_path / "mark"
    content = {"state_dict": state(), "extra": Bomb(mark)}
    if legacy is None:
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"evil.pt is refused: it holds more than tensors"):
        load_weights(path)
    assert not mark.exists()


def test_a_whole_network_in_a_file_is_refused(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model.pt is refused: .*torch.nn.modules.linear.Linear"):
        load_weights(tmp_path / "model.pt")


def cut(path, suffix):
    torch.save(state(), path) if suffix == ".pt" else save_file(state(), path)
    path.write_bytes(path.read_bytes()[:-100])


DAMAGED = {
    "cut .safetensors": (".safetensors", lambda path: cut(path, ".safetensors")),
    "cut .pt": (".pt", lambda path: cut(path, ".pt")),
    "empty .safetensors": (".safetensors", lambda path: path.write_bytes(b"")),
    "empty .pt": (".pt", lambda path: path.write_bytes(b"")),
    "noise .safetensors": (".safetensors", lambda path: path.write_bytes(b"\xff" * 500)),
    "huge header .safetensors": (".safetensors", lambda path: path.write_bytes(b"\xff" * 7 + b"\x00{}")),
    "noise .pt": (".pt", lambda path: path.write_bytes(os.urandom(500))),
    "text .pt": (".pt", lambda path: path.write_text("weights")),
}


@pytest.mark.parametrize(("suffix", "write"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_named(tmp_path, suffix, write):
    path = tmp_path / f"weights{suffix}"
    write(path)
    with pytest.raises(ValueError, match=rf"weights{suffix} is (damaged|refused)"):
        load_weights(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds no state_dict but a list"),
        ({}, "holds no state_dict but a dict"),
        ({"epoch": 3, "weight": torch.ones(1)}, "epoch are no tensors; expected are tensors by name"),
    ],
)
def test_a_file_without_a_state_dict(tmp_path, content, message):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=message):
        load_weights(tmp_path / "other.pt")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*absent.pt"):
        load_weights(tmp_path / "absent.pt")


# ------ data


@pytest.mark.parametrize("spec", ["strangers:batches", "strangers:listed"])
def test_data_by_name(strangers, spec):
    assert [float(batch.sum()) for batch in load_data(spec)] == [0, 8]


@pytest.mark.parametrize("kind", [">f4", ">f8", ">i2", "<f2", "longdouble", "bool"])
def test_arrays_of_any_order_of_bytes_and_width(tmp_path: Path, kind: str) -> None:
    values = np.arange(6).reshape(3, 2).astype(kind)
    np.save(tmp_path / "values.npy", values)
    batches = list(load_data(str(tmp_path), batch_size=2))
    assert [len(batch) for batch in batches] == [2, 1]
    torch.testing.assert_close(torch.cat(batches).double(), torch.tensor(values.astype(np.float64)))
    assert batches[0].dtype != torch.float64


def test_a_folder_of_arrays(tmp_path):
    np.save(tmp_path / "b.npy", np.arange(12).reshape(6, 2))
    np.save(tmp_path / "a.npy", np.ones((5, 2)))
    (tmp_path / "notes.txt").write_text("no array")
    data = load_data(str(tmp_path), batch_size=4)
    for _ in range(2):  # can be read again
        assert [tuple(batch.shape) for batch in data] == [(4, 2), (1, 2), (4, 2), (2, 2)]
        assert [batch.dtype for batch in data] == [torch.float32] * 2 + [torch.int64] * 2
        assert torch.equal(torch.cat(list(data)[2:]), torch.arange(12).reshape(6, 2))


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_table(tmp_path, suffix):
    table = pl.DataFrame({"a": [1.0, 2.0, 3.0], "label": ["x", "y", "x"], "b": [4, 5, 6], "c": [True, False, True]})
    path = tmp_path / f"table{suffix}"
    (table.write_csv if suffix == ".csv" else table.write_parquet)(path)
    batches = list(load_data(str(path), target="label", batch_size=2))
    assert [batch.tolist() for batch in batches] == [[[1, 4, 1], [2, 5, 0]], [[3, 6, 1]]]
    assert batches[0].dtype == torch.float32
    with pytest.raises(ValueError, match=r"column 'label' holds String, not numbers; .*--target"):
        load_data(str(path))
    with pytest.raises(ValueError, match="has no column 'price'; it has a, label, b, c"):
        load_data(str(path), target="price")


def test_a_table_with_gaps(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("a,b\n1,2\n3,\n")
    with pytest.raises(ValueError, match="column 'b' has 1 missing values"):
        load_data(str(path))
    path.write_text("a,b\n")
    with pytest.raises(ValueError, match="0 rows"):
        load_data(str(path))


ROWS = "a,b\n1,2\n3,4\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            ROWS.encode("utf-16"),
            "is not UTF-8: it holds the byte 0xff; convert it: iconv -f utf-16 -t utf-8 table.csv >",
        ),
        (ROWS.encode("utf-16-le"), "it holds the byte 0x00; convert it: iconv -f utf-16 "),
        (ROWS.replace("a", "가").encode("cp949"), "it holds the byte 0xb0; convert it: iconv -f cp949 "),
        (b"a,b\n1,2\n3\n", "table.csv, line 3: 1 fields, but the head has 2"),
        (b"a,b\n1,2\n3,4,5\n", "table.csv, line 3: 3 fields, but the head has 2"),
        (b"a,b\n1,2\nNA,4\n", "column 'a' has 1 missing values"),
        (b"", "has 0 columns in its first line; a table needs a head"),
    ],
)
def test_a_table_of_another_kind_is_explained(tmp_path, content, message):
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_data(str(path))


class Code:
    def __reduce__(self):
        raise AssertionError("not to be pickled")


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("strangers", ValueError, "must be package.module:loader, a folder of .npy files, or a CSV"),
        ("strangers:number", TypeError, "must give an iterable of batches, got int"),
        ("strangers:broken", ValueError, "--data strangers:broken failed: LookupError"),
        ("absent.csv", FileNotFoundError, "there is no file absent.csv"),
        ("noise.parquet", ValueError, "noise.parquet cannot be read"),
        ("empty", ValueError, "there is no .npy file in empty"),
    ],
)
def test_data_that_cannot_be_had(strangers, spec, error, message):
    (strangers / "noise.parquet").write_bytes(os.urandom(100))
    (strangers / "empty").mkdir()
    with pytest.raises(error, match=message):
        load_data(spec)


def test_arrays_that_cannot_be_had(tmp_path):
    mark = tmp_path / "mark"
    np.save(tmp_path / "objects.npy", np.array([Bomb(mark)], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"objects.npy cannot be read"):
        list(load_data(str(tmp_path)))
    assert not mark.exists()
    (tmp_path / "objects.npy").write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(ValueError, match=r"objects.npy cannot be read"):
        list(load_data(str(tmp_path)))
    assert not mark.exists()
    (tmp_path / "objects.npy").write_bytes(b"\x93NUMPY noise")
    with pytest.raises(ValueError, match=r"objects.npy cannot be read"):
        list(load_data(str(tmp_path)))
    np.save(tmp_path / "objects.npy", np.array(["text"]))
    with pytest.raises(ValueError, match=r"objects.npy must hold numbers"):
        list(load_data(str(tmp_path)))


def test_options_that_have_no_meaning(tmp_path):
    with pytest.raises(ValueError, match="--target names a column"):
        load_data(str(tmp_path), target="label")
    with pytest.raises(ValueError, match="--batch-size must be at least 1"):
        load_data(str(tmp_path), batch_size=0)


FORBIDDEN = [Path("/proc/weights.pt"), Path("/dev/fd/weights.pt")]


# ------ files that are written


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_what_is_written_is_read_again(tmp_path, suffix):
    tied = torch.randn(3, 4)
    written = state() | {
        "tied": tied,
        "again": tied,
        "turned": tied.T,
        "half": tied.half(),
        "counter": torch.tensor(3),
    }
    path = tmp_path / f"new{suffix}"
    save_weights(path, written)
    found = load_weights(path)
    assert found.keys() == written.keys()
    assert all(torch.equal(found[key], value) and found[key].dtype == value.dtype for key, value in written.items())
    assert os.listdir(tmp_path) == [path.name]


def test_a_file_is_overwritten_by_force_alone(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_weights(path, {"a": torch.zeros(1)})
    with pytest.raises(FileExistsError, match="is there already; --force overwrites it"):
        save_weights(path, {"a": torch.ones(1)})
    assert load_file(path)["a"] == 0
    other = tmp_path / "other.safetensors"
    os.link(path, other)
    save_weights(path, {"a": torch.ones(1)}, force=True)
    assert load_file(path)["a"] == 1
    assert load_file(other)["a"] == 0  # a new file in the old one's place, not the old one written to


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt"])
def test_no_space_left(tmp_path, monkeypatch, name):
    path = tmp_path / name
    save_weights(path, {"a": torch.zeros(1)})

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"{name} could not be written: No space left on device"):
        save_weights(path, {"a": torch.ones(1)}, force=True)
    assert os.listdir(tmp_path) == [name]
    assert load_weights(path)["a"] == 0


def test_places_where_nothing_can_be_written(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"--out must end in .safetensors, .pt, .pth, got .*weights.bin"):
        check_out(tmp_path / "weights.bin", False)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*absent"):
        check_out(tmp_path / "absent" / "weights.pt", False)
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(IsADirectoryError, match="is a folder"):
        check_out(tmp_path / "folder.pt", True)
    with pytest.raises(OSError, match="cannot be written"):  # a file system that takes no files, even root's
        check_out(next(path for path in FORBIDDEN if path.parent.is_dir()), False)
    with pytest.raises(ValueError, match="safetensors holds tensors only, extra is none"):
        save_weights(tmp_path / "a.safetensors", {"extra": b"bytes"})
    assert os.listdir(tmp_path) == ["folder.pt"]
