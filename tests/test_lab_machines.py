"""The same numbers from one process, from several, and from a Dask cluster; and workers that die."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest

from evenorm.lab import run
from evenorm.lab.experiment import Scale
from evenorm.lab.machines import Machines
from evenorm.lab.own.asking import Plan, experiments
from evenorm.lab.own.preparing import prepare
from evenorm.lab.own.questions import QUESTIONS
from evenorm.lab.own.raw import Raw
from evenorm.lab.own.training import EVALUATIONS
from evenorm.lab.store import Store
from evenorm.lab.trials import Record, Trial

pytest.importorskip("distributed", reason="clusters need the extra evenorm[cluster]")

SOURCE = Path(__file__).parent.parent / "src"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
OPTIONS = ("--no-nanny", "--no-dashboard")
PLAN = Plan(seeds=2, steps=EVALUATIONS, factor=64.0)


def go(folder: Path, machines: Machines, watch: Callable[[Trial, Record], None] | None = None) -> dict[str, bytes]:
    """Put a question to made-up data and return the stored trials."""
    draw = np.random.default_rng(0)
    numbers = draw.normal(size=(80, 5)).astype(np.float32)
    target = (numbers[:, 0] > 0).astype(float)
    data = prepare(Raw("made up.csv", numbers, np.empty((80, 0), np.str_), target, tuple("abcde")))
    asked = experiments({"overfitting": QUESTIONS["overfitting"]}, data, PLAN, "")
    run.run(asked, Scale(PLAN.seeds), Store(folder), machines, watch=watch)
    return {path.name: path.read_bytes() for path in (folder / "trials").rglob("*.json")}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    found = go(tmp_path_factory.mktemp("one"), Machines(1))
    assert len(found) == 4 * 3 * 5  # arms, rates, seeds
    return found


@contextmanager
def started(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "dask", *arguments],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=30)


@contextmanager
def cluster(workers: int) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """Yield the address of a scheduler on this machine, and its worker processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"tcp://127.0.0.1:{port}"
    with ExitStack() as stack:
        stack.enter_context(started("scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard"))
        found = [
            stack.enter_context(started("worker", address, *OPTIONS, "--nthreads", "1")) for _ in range(workers)
        ]
        wait_for(address, workers)
        yield address, found


def wait_for(address: str, workers: int, seconds: float = 60) -> None:
    from distributed import Client

    end = time.monotonic() + seconds
    while True:
        try:
            with Client(address, timeout=5, set_as_default=False) as client:
                if len(client.nthreads()) == workers:
                    return
        except OSError:
            pass
        assert time.monotonic() < end, "the cluster did not start"
        time.sleep(0.2)


def test_two_processes_give_the_numbers_of_one(expected: dict[str, bytes], tmp_path: Path) -> None:
    assert go(tmp_path, Machines(2)) == expected


def test_the_order_of_stacks_changes_nothing(
    expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ordered = run._stacks
    monkeypatch.setattr(run, "_stacks", lambda pending: dict(reversed(ordered(pending).items())))
    assert go(tmp_path, Machines(1)) == expected


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
def test_a_dask_cluster_gives_the_numbers_of_one_process_even_if_a_worker_dies(
    expected: dict[str, bytes], tmp_path: Path
) -> None:
    with cluster(workers=2) as (address, workers):
        assert go(tmp_path / "whole", Machines(backend="dask", address=address)) == expected
        killed = []

        def kill_one(trial: Trial, record: Record) -> None:
            if not killed:
                killed.append(trial)
                os.killpg(workers[0].pid, signal.SIGKILL)

        assert go(tmp_path / "killed", Machines(backend="dask", address=address), kill_one) == expected
        assert killed
        assert workers[0].wait(timeout=30) == -signal.SIGKILL


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
def test_a_cluster_that_cannot_serve_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no Dask scheduler answers at tcp://127\.0\.0\.1:9"):
        go(tmp_path, Machines(backend="dask", address="tcp://127.0.0.1:9"))
    with cluster(workers=0) as (address, _):
        machines = Machines(backend="dask", address=address)
        with pytest.raises(ValueError, match=r"has no workers; start some: dask worker"):
            go(tmp_path, machines)
        with started("worker", address, *OPTIONS, "--nthreads", "2"):
            wait_for(address, 1)
            with pytest.raises(ValueError, match=r"has 2 threads.*--nthreads 1"):
                go(tmp_path, machines)


def test_a_killed_process_costs_what_it_had_begun(
    expected: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from joblib.externals.loky import get_reusable_executor

    killed: list[int] = []

    def kill_one(trial: Trial, record: Record) -> None:
        if not killed:
            killed.extend(get_reusable_executor(reuse=True)._processes)
            os.kill(killed[0], signal.SIGKILL)

    assert go(tmp_path, Machines(2), kill_one) == expected
    assert killed
    assert "a worker was killed" in capsys.readouterr().err
