"""Event files for TensorBoard hold each trial's curves, at the steps they were measured at."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from evenorm.lab import event_files
from evenorm.lab.trials import Record, Trial, settings

pytest.importorskip("tensorboardX", reason="event files need the extra evenorm[tensorboard]")

TRIAL = Trial("speed", 1, "batch norm/x", 3, 0.1, settings(steps=100))
RECORD: Record = {"accuracy": [0.25, None, 0.5, 0.75], "diverged": 0.0, "names": ["a", "b"]}


def scalars(path: Path) -> list[tuple[int, str, float]]:
    from tensorboardX.proto.event_pb2 import Event

    content, found = path.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        event = Event.FromString(content[12 : 12 + length])
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        content = content[16 + length :]
    return found


def test_a_trials_curves_are_written_once(tmp_path: Path) -> None:
    for _ in range(2):
        with event_files.event_files(tmp_path / "events") as watch:
            watch(TRIAL, RECORD)
    (path,) = (tmp_path / "events").rglob("events.*")
    place = path.relative_to(tmp_path / "events").parts
    assert place[:4] == ("speed", "batch norm_x", "rate 0.1", "seed 3")
    assert scalars(path) == [(25, "accuracy", 0.25), (75, "accuracy", 0.5), (100, "accuracy", 0.75)]


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_files, "find_spec", lambda name: None)
    with (
        pytest.raises(ValueError, match=r"pip install \"evenorm\[tensorboard\]\""),
        event_files.event_files(tmp_path),
    ):
        pass
