"""Trials on disk: one small JSON file each, named by its configuration's hash, written all or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from evenorm import atomic
from evenorm.lab.trials import Record, Trial, canonical

# A temporary file this old belongs to no living run; a write takes milliseconds.
STALE_SECONDS = 3600.0


class Store:
    """The finished trials under `folder`/trials: `load`, `save`, and nothing in between."""

    def __init__(self, folder: Path) -> None:
        """Take the results folder, which need not exist yet."""
        self.folder = folder / "trials"

    def path(self, trial: Trial) -> Path:
        """Return where the trial is, or would be, stored."""
        return self.folder / trial.experiment / f"{trial.digest()}.json"

    def load(self, trial: Trial) -> Record | None:
        """Return the trial's record, or None where there is none or none that can be trusted.

        A file that is cut short, altered, or of another configuration is named on stderr.
        """
        path = self.path(trial)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            return _distrust(path, str(error))
        try:
            content = json.loads(text)
            record: Record = content["record"]
            if canonical(content["configuration"]) != canonical(trial.configuration()):
                return _distrust(path, "it holds another configuration than its name says")
            if content["sha256"] != _sha256(record):
                return _distrust(path, "its numbers do not match its checksum")
        except (ValueError, KeyError, TypeError) as error:
            return _distrust(path, f"{type(error).__name__}: {error}")
        return record

    def save(self, trial: Trial, record: Record) -> None:
        """Write the record to the trial's file, which appears complete or not at all.

        Raises:
            OSError: no space left, or no leave to write; what was stored before is still there.
        """
        path = self.path(trial)
        content = {"configuration": trial.configuration(), "record": record, "sha256": _sha256(record)}
        atomic.write(
            path,
            f"{canonical(content)}\n".encode(),
            remedy="finished trials are stored. Make room, and go on with the same command",
        )

    def prepare(self, experiments: list[str]) -> None:
        """Make the folders, prove that they can be written, and remove what a killed run left half-written.

        Raises `OSError` where a folder cannot be made or written.
        """
        for name in experiments:
            folder = self.folder / name
            folder.mkdir(parents=True, exist_ok=True)
            atomic.probe(folder / "trial.json")
            for leftover in folder.glob(".*.tmp"):
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - leftover.stat().st_mtime > STALE_SECONDS:
                        leftover.unlink()


def _sha256(record: Any) -> str:
    return hashlib.sha256(canonical(record).encode()).hexdigest()


def _distrust(path: Path, reason: str) -> Record | None:
    print(f"evenorm lab: warning: {path} is damaged ({reason}); that trial is trained again", file=sys.stderr)
    return None
