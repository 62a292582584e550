"""Files that commands and the laboratory write: whole or not at all, with an ordinary file's rights."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from evenorm import atomic


def failing(error: BaseException):
    def fail(*arguments: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_a_file_has_the_rights_of_any_new_one(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        atomic.write(tmp_path / "a", b"content")
        (tmp_path / "any").write_bytes(b"")
    finally:
        os.umask(before)
    assert (tmp_path / "a").read_bytes() == b"content"
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "any").stat().st_mode)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
@pytest.mark.parametrize("call", ["os.fsync", "pathlib.Path.replace"])
def test_what_fails_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, call: str
) -> None:
    (tmp_path / "a").write_bytes(b"old")
    monkeypatch.setattr(call, failing(error))
    with pytest.raises(type(error)) as told:
        atomic.write(tmp_path / "a", b"new", remedy="pray")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]
    if isinstance(error, OSError):
        assert str(told.value).endswith("a could not be written: No space left on device; pray")
        assert told.value.errno == errno.ENOSPC


def test_a_link_is_replaced_and_what_it_names_stays(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"old")
    (tmp_path / "link").symlink_to("old")
    atomic.write(tmp_path / "link", b"new")
    assert (tmp_path / "old").read_bytes() == b"old"
    assert (tmp_path / "link").read_bytes() == b"new"
    assert not (tmp_path / "link").is_symlink()


def test_a_file_that_appears_meanwhile_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: (tmp_path / "a").write_bytes(b"somebody's"))
    with pytest.raises(FileExistsError, match="has appeared meanwhile"):
        atomic.write(tmp_path / "a", b"mine", replace=False)
    assert (tmp_path / "a").read_bytes() == b"somebody's"
    assert os.listdir(tmp_path) == ["a"]


def test_a_probe_leaves_nothing(tmp_path: Path) -> None:
    atomic.probe(tmp_path / "a")
    assert os.listdir(tmp_path) == []
    atomic.probe(tmp_path / "not" / "there" / "yet")
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file.a cannot be written: Not a directory"):
        atomic.probe(tmp_path / "file" / "a")
    assert os.listdir(tmp_path) == ["file"]
