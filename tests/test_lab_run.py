from __future__ import annotations

import errno
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

from evenorm.lab import pulse, run
from evenorm.lab.experiment import Experiment, Scale
from evenorm.lab.experiments import EXPERIMENTS, speed
from evenorm.lab.machines import Machines
from evenorm.lab.progress import progress
from evenorm.lab.results import Analysis
from evenorm.lab.store import Store
from evenorm.lab.trials import Record, Trial

SOURCE = Path(__file__).parent.parent / "src"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
SMALL = ["lab", "run", "input-scale", "--quick", "--seeds", "2"]  # small and many: some seconds
PLANNED = len(EXPERIMENTS["input-scale"].plan(Scale(2, quick=True)))


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from evenorm.cli import main; main()", *arguments]


class Toy:
    """An experiment that counts what it trains."""

    def __init__(self) -> None:
        self.trained: list[Trial] = []
        self.fail_at: int | None = None

    def plan(self, scale: Scale) -> list[Trial]:
        return [Trial("toy", 1, arm, seed, 0.1) for arm in ("a", "b") for seed in scale.paired]

    def train(self, trials: Sequence[Trial]) -> list[Record]:
        if self.fail_at is not None and len(self.trained) >= self.fail_at:
            raise KeyboardInterrupt
        self.trained += trials
        return [{"value": trial.seed} for trial in trials]

    def analyse(self, records: Mapping[Trial, Record], scale: Scale) -> Analysis:
        values = {(trial.arm, trial.seed): record["value"] for trial, record in records.items()}
        assert values == {(arm, seed): seed for arm in ("a", "b") for seed in scale.paired}
        return "analysed"  # type: ignore[return-value]


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Toy:
    toy = Toy()
    experiment = Experiment("toy", "Toy", speed.CLAIM, toy.plan, toy.train, toy.analyse, stack_size=2)
    monkeypatch.setitem(EXPERIMENTS, "toy", experiment)
    return toy


def go(folder: Path, seeds: int = 4) -> list[Analysis]:
    return run.run([EXPERIMENTS["toy"]], Scale(seeds), Store(folder), Machines(1))


def test_a_second_run_trains_nothing(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert go(tmp_path) == ["analysed"]
    assert len(toy.trained) == 8
    assert "100 %" in capsys.readouterr().err
    assert go(tmp_path) == ["analysed"]
    assert len(toy.trained) == 8
    assert capsys.readouterr().err == ""


def test_more_seeds_train_only_the_new_ones(toy: Toy, tmp_path: Path) -> None:
    go(tmp_path, seeds=3)
    go(tmp_path, seeds=5)
    assert len(toy.trained) == len(set(toy.trained)) == 10


def test_a_damaged_trial_is_trained_again_and_no_other(
    toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    go(tmp_path)
    victim = toy.trained[3]
    path = Store(tmp_path).path(victim)
    path.write_text(path.read_text()[:40])
    capsys.readouterr()
    toy.trained.clear()
    assert go(tmp_path) == ["analysed"]
    assert toy.trained == [victim]
    assert capsys.readouterr().err.count("warning") == 1


def test_an_interrupted_run_keeps_what_was_finished(toy: Toy, tmp_path: Path) -> None:
    toy.fail_at = 4
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path)
    (counted,) = run.count([EXPERIMENTS["toy"]], Scale(4), Store(tmp_path))
    assert (counted.stored, counted.planned) == (4, 8)
    toy.fail_at = None
    go(tmp_path)
    assert len(toy.trained) == len(set(toy.trained)) == 8


def test_a_full_disk_keeps_what_was_finished_and_says_how_to_go_on(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, real = [], os.fsync

    def fill(descriptor: int) -> None:
        written.append(descriptor)
        if len(written) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fill)
    with pytest.raises(OSError, match=r"could not be written: No space left on device; finished trials are stored"):
        go(tmp_path)
    assert len(trial_files(tmp_path)) == 3
    assert list(tmp_path.rglob("*.tmp")) == []
    monkeypatch.setattr(os, "fsync", real)
    before = trial_files(tmp_path)
    go(tmp_path)
    after = trial_files(tmp_path)
    assert len(after) == 8
    assert before.items() <= after.items()


def test_when_the_time_is_up_what_was_finished_is_kept(toy: Toy, tmp_path: Path) -> None:
    with pytest.raises(run.OutOfTimeError, match=r"time is up with 3 of 4 stacks not trained.*the same command"):
        run.run([EXPERIMENTS["toy"]], Scale(4), Store(tmp_path), Machines(1), deadline=time.monotonic())
    assert len(trial_files(tmp_path)) == 2
    go(tmp_path)
    assert len(toy.trained) == len(set(toy.trained)) == 8


def test_every_trial_is_watched_whether_trained_now_or_stored_before(toy: Toy, tmp_path: Path) -> None:
    go(tmp_path, seeds=2)
    seen: list[Trial] = []
    watch = lambda trial, record: seen.append(trial)  # noqa: E731
    run.run([EXPERIMENTS["toy"]], Scale(4), Store(tmp_path), Machines(1), watch=watch)
    assert sorted(trial.digest() for trial in seen) == sorted(trial.digest() for trial in toy.plan(Scale(4)))


def test_report_trains_nothing_and_names_the_command(toy: Toy, tmp_path: Path) -> None:
    with pytest.raises(run.MissingTrialsError, match=r"8 of 8 .* evenorm lab run toy --seeds 4 --out"):
        run.report([EXPERIMENTS["toy"]], Scale(4), Store(tmp_path))
    go(tmp_path)
    toy.trained.clear()
    assert run.report([EXPERIMENTS["toy"]], Scale(4), Store(tmp_path)) == ["analysed"]
    assert toy.trained == []


def test_choose_keeps_the_registrys_order_and_refuses_unknown_names() -> None:
    assert [experiment.name for experiment in run.choose([])] == list(EXPERIMENTS)
    assert [experiment.name for experiment in run.choose(["inference", "speed"])] == ["speed", "inference"]
    with pytest.raises(ValueError, match=f"'sped'; choose from {', '.join(EXPERIMENTS)}"):
        run.choose(["sped"])


def test_progress_on_a_pipe_is_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(4.0) as shown:
        shown.advance("speed, none: 3 trials", 1.0)
        shown.advance("speed, none: 9 trials", 3.0)
        assert shown.folder is None  # nobody looks: no worker needs to tell
    lines = capsys.readouterr().err.splitlines()
    assert [line[:19] for line in lines] == ["evenorm lab:  25 %,", "evenorm lab: 100 %,"]
    assert lines[1].endswith("0 s left: speed, none: 9 trials")


def test_a_running_stack_tells_its_loss_and_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "SECONDS", 0.0)
    with pulse.pulse(str(tmp_path), "speed, none: 3 trials"):
        assert pulse.lines(str(tmp_path)) == ["speed, none: 3 trials"]
        pulse.beat(20, 100, torch.tensor([float("nan"), 0.25, 0.5]))
        assert pulse.lines(str(tmp_path)) == ["speed, none: 3 trials: step 20 of 100, loss 0.375"]
        pulse.beat(21, 100, torch.tensor([float("inf")]))
        assert pulse.lines(str(tmp_path)) == ["speed, none: 3 trials: step 21 of 100, all diverged"]
    assert pulse.lines(str(tmp_path)) == []
    pulse.beat(22, 100, torch.tensor([1.0]))  # nobody watches
    assert list(tmp_path.iterdir()) == []


def test_a_finished_stack_tells_its_middle_loss_if_it_has_one() -> None:
    assert (
        run._loss([{"train_loss": 0.5}, {"train_loss": None}, {"train_loss": 0.25}, {"train_loss": 1.0}])
        == ", loss 0.5"
    )
    assert run._loss([{"train_loss": [0.5, 0.25]}, {}]) == ""


def test_a_terminal_shows_a_line_for_each_running_stack(tmp_path: Path) -> None:
    """A pseudo-terminal, on which a real run is watched."""
    leader, follower = pty.openpty()
    arguments = command(*SMALL, "--jobs", "2", "--out", str(tmp_path))
    process = subprocess.Popen(arguments, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=follower)
    os.close(follower)
    seen = b""
    try:
        while chunk := os.read(leader, 65536):
            seen += chunk
    except OSError:  # the other end is closed
        pass
    os.close(leader)
    assert process.wait(timeout=60) == 0
    assert re.search(rb"input-scale, \w[\w ]*: \d+ trials: step \d+ of 300, loss [\d.]+", seen), seen[-3000:]


def trial_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "trials").rglob("*.json")}


def interruptible() -> None:
    """Let Ctrl-C through, as in a terminal: what runs in the background of a shell inherits that it is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for_trials(process: subprocess.Popen[str], folder: Path, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not list((folder / "trials").rglob("*.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small run, from beginning to end in one process."""
    folder = tmp_path_factory.mktemp("whole")
    subprocess.run(command(*SMALL, "--jobs", "1", "--out", str(folder)), env=ENVIRONMENT, check=True, timeout=300)
    return folder


def test_killed_at_any_point_no_finished_trial_is_lost(whole: Path, tmp_path: Path) -> None:
    arguments = command(*SMALL, "--jobs", "2", "--out", str(tmp_path))
    process = subprocess.Popen(
        arguments,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for_trials(process, tmp_path)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    finished = trial_files(tmp_path)
    assert 0 < len(finished) < PLANNED
    again = subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=True)
    assert "warning" not in again.stderr
    after = trial_files(tmp_path)
    assert len(after) == PLANNED
    assert {name: after[name] for name in finished} == finished
    assert (tmp_path / "report.html").exists()
    # Equal numbers, to the last bit, in one process or in two, at once or in two goes.
    assert after == trial_files(whole)


def test_ctrl_c_leaves_a_clean_state_and_says_how_to_go_on(tmp_path: Path) -> None:
    arguments = command(*SMALL, "--jobs", "2", "--out", str(tmp_path))
    process = subprocess.Popen(
        arguments,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=interruptible,
    )
    wait_for_trials(process, tmp_path)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers as well
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Go on with the same command" in errors
    assert "Traceback" not in errors
    assert "Warning" not in errors
    assert output == ""
    assert list((tmp_path / "trials").rglob("*.tmp")) == []
    scale, store = Scale(2, quick=True), Store(tmp_path)
    (counted,) = run.count(run.choose(["input-scale"]), scale, store)
    loaded = run.load(run.choose(["input-scale"]), scale, store)["input-scale"]
    assert 0 < counted.stored == sum(record is not None for record in loaded.values())
