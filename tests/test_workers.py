"""Pooling over real processes on gloo: equal to one process, the same bits everywhere, and no hang."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import evenorm
import workers_battery


def run(function: object, world: int, folder: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=function, args=(rank, world, str(folder))) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=240)
        if process.is_alive():
            process.kill()


@pytest.mark.parametrize("world", [2, 3])
def test_the_battery(world: int, tmp_path: Path) -> None:
    """All checks in one test a world: starting its processes costs more than most checks do."""
    run(workers_battery.main, world, tmp_path)
    wrong = {}
    for rank in range(world):
        path = tmp_path / f"outcome-{world}-{rank}.json"
        results = json.loads(path.read_text()) if path.exists() else {}
        for name in workers_battery.CHECKS:
            text = results.get(name, "this worker never came to it")
            if text:
                wrong[f"{name}, rank {rank}"] = text
    assert not wrong, "\n".join(f"{name}: {text}" for name, text in wrong.items())


def test_the_example_equals_one_process() -> None:
    pytest.importorskip("sklearn", reason="the example takes its data from scikit-learn")
    script = Path(__file__).parent.parent / "examples" / "train_ddp.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    source = os.pathsep.join([str(script.parent.parent / "src"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": source}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 workers: accuracy 9" in done.stdout


def test_a_killed_worker_is_named(tmp_path: Path) -> None:
    run(workers_battery.killed, 2, tmp_path)
    told = json.loads((tmp_path / "killed.json").read_text())
    assert "rank 1 did not come to pooling number 1" in told["verified"]
    assert "within 3 s" in told["verified"]
    assert told["bare"] != "went on"


def test_without_torch_distributed() -> None:
    layer = evenorm.BatchNorm1d(3, process_group="world")
    with pytest.raises(ValueError, match=r"process_group needs torch\.distributed to be initialised in training"):
        layer(torch.randn(4, 3))
    assert layer.eval()(torch.randn(4, 3)).shape == (4, 3)


def test_bad_groups() -> None:
    with pytest.raises(ValueError, match="process_group must be None, 'world' or a torch ProcessGroup, got 'all'"):
        evenorm.BatchNorm1d(3, process_group="all")
    with pytest.raises(ValueError, match="give either virtual_batch_size"):
        evenorm.BatchNorm1d(3, process_group="world", virtual_batch_size=4)
    with pytest.raises(ValueError, match="group must be None"):
        evenorm.set_process_group(nn.BatchNorm1d(3), "all")
    split = nn.Sequential(nn.BatchNorm1d(3), evenorm.BatchNorm1d(3, virtual_batch_size=4))
    with pytest.raises(ValueError, match="1 splits its batch"):
        evenorm.set_process_group(split, "world")
    assert type(split[0]) is nn.BatchNorm1d


def test_torchs_conversion_to_sync_batch_norm_is_loud() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), evenorm.BatchNorm2d(4, activation="relu"))
    with pytest.raises(TypeError, match="set_process_group"):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert list(model.named_children())
