from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from evenorm.lab.store import STALE_SECONDS, Store
from evenorm.lab.trials import Trial

TRIAL = Trial("speed", 1, "none", 0, 0.1)
RECORD = {"accuracy": [0.1, None, 0.9], "diverged": 0.0}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "results")
    store.prepare(["speed"])
    return store


def test_what_was_saved_is_loaded(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert store.load(TRIAL) is None
    store.save(TRIAL, RECORD)
    assert store.load(TRIAL) == RECORD
    assert store.path(TRIAL).name == f"{TRIAL.digest()}.json"
    assert [path.name for path in store.path(TRIAL).parent.iterdir()] == [store.path(TRIAL).name]
    assert capsys.readouterr().err == ""


def change(name: str, value: object) -> object:
    def edit(text: str) -> str:
        return json.dumps({**json.loads(text), name: value})

    return edit


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: "null",
        lambda text: "\x00" * len(text),
        lambda text: text.replace("0.9", "0.8"),
        change("record", None),
        change("sha256", "0"),
        change("configuration", {**TRIAL.configuration(), "seed": 1}),
    ],
)
def test_a_damaged_file_is_named_once_and_not_believed(
    store: Store, capsys: pytest.CaptureFixture[str], damage: object
) -> None:
    store.save(TRIAL, RECORD)
    path = store.path(TRIAL)
    path.write_text(damage(path.read_text()))  # type: ignore[operator]
    assert store.load(TRIAL) is None
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1
    assert str(path) in warning
    assert "warning" in warning
    store.save(TRIAL, RECORD)
    assert store.load(TRIAL) == RECORD


def test_bytes_that_are_no_text_are_not_believed(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    store.path(TRIAL).write_bytes(b"\xff\xfe{}")
    assert store.load(TRIAL) is None
    assert "damaged" in capsys.readouterr().err


def test_a_failed_write_leaves_the_old_file_and_no_other(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.save(TRIAL, RECORD)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        store.save(TRIAL, {"accuracy": []})
    assert store.load(TRIAL) == RECORD
    assert len(list(store.path(TRIAL).parent.iterdir())) == 1


def test_numbers_that_json_has_not_are_refused_before_writing(store: Store) -> None:
    with pytest.raises(ValueError, match="JSON"):
        store.save(TRIAL, {"loss": float("nan")})
    assert list(store.path(TRIAL).parent.iterdir()) == []


def test_leftovers_of_a_killed_run_go_and_those_of_a_living_one_stay(store: Store) -> None:
    folder = store.path(TRIAL).parent
    old, young = folder / ".0123.99.tmp", folder / ".4567.99.tmp"
    for leftover in (old, young):
        leftover.write_text("half a tri")
    before = time.time() - STALE_SECONDS - 60
    os.utime(old, (before, before))
    store.prepare(["speed"])
    assert sorted(path.name for path in folder.iterdir()) == [young.name]


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("a file")
    with pytest.raises(OSError, match="results"):
        Store(tmp_path / "results").prepare(["speed"])
