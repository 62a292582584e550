"""`evenorm bench --device cuda` without a GPU: its logic with a clock that lies, and its one message."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

import evenorm
from evenorm.bench import cuda, network, peers
from evenorm.bench.contenders import Inputs, make_inputs, runner, theirs
from evenorm.bench.rows import BLOCKS, Row
from evenorm.cli import main


def clock(runs: Sequence[cuda.Run], repeats: int) -> float:
    """Run each once, and pretend that a call took a millisecond a run in rotation."""
    for run in runs:
        run()
    return 1e-3 * len(runs)


def slow_clock(runs: Sequence[cuda.Run], repeats: int) -> float:
    """Pretend that it took a second."""
    return 1.0


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> cuda.Machine:
    """A CPU that copies a gigabyte a second, and a torch that compiles nothing: that takes minutes."""
    monkeypatch.setattr(torch, "compile", lambda module, dynamic: module)
    monkeypatch.setattr(cuda.Machine, "copied", 1e9)
    return cuda.Machine("cpu", 4096, by_device=clock, by_host=slow_clock)


@pytest.mark.parametrize("training", [True, False])
def test_ours_is_right_and_all_run_on_the_same_inputs(training: bool, machine: cuda.Machine) -> None:
    row, block = Row((4, 3, 5, 5), channels_last=True), BLOCKS["bn-add-relu"]
    result = cuda.measure(row, block, "float32", training, 3, machine)
    assert result.right
    assert not result.host
    assert result.ratio == 1
    assert set(result.seconds) == {"ours", "eager", "eager, no cuDNN", "compiled"}
    sets = 1 + 2 * 4096 // 1200
    assert result.seconds["ours"] == pytest.approx(1e-3 * sets)
    floor = 3 + 4 * training  # tensors read or written, with a residual
    assert result.share == pytest.approx(floor * 1200 / (1e-3 * sets) / 1e9)


class OtherSideOfZero(nn.BatchNorm2d):
    """ReLU whose slope at 0 is 1, as rounding leaves it for one of some hundred million values."""

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        z = super().forward(x) + residual
        return torch.where(z >= 0, z, 0)


def test_a_sign_next_to_zero_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    row, block = Row((8, 2, 64, 64)), BLOCKS["bn-add-relu"]
    x, residual, cotangent = torch.randn(3, *row.shape, generator=torch.Generator().manual_seed(0)).sign()
    x[0, :, 0, 0], residual[0, :, 0, 0] = 0, 0
    x[4:] = -x[:4]  # so that the mean is 0 and z is too, there
    inputs = Inputs(x.requires_grad_(), residual.requires_grad_(), cotangent)
    monkeypatch.setattr(cuda, "ours", lambda row, block: OtherSideOfZero(row.shape[1]))
    assert cuda._error(row, block, True, inputs) < 1e-4
    monkeypatch.setattr(cuda, "NEAR_ZERO", 0.0)
    assert cuda._error(row, block, True, inputs) > 1e-1


def test_inputs_rotate_past_the_cache() -> None:
    assert cuda._sets(2**20, 50 * 2**20) * 2**20 > 2 * 50 * 2**20 or cuda._sets(2**20, 50 * 2**20) == cuda.MOST_SETS
    assert cuda._sets(60 * 2**20, 50 * 2**20) == 2
    assert cuda._sets(2**30, 50 * 2**20) == 1


class OfApex(nn.Module):
    """What apex's layer takes and gives: (N, H, W, C) without gaps, an addition only before a ReLU."""

    def __init__(self, channels: int, fuse_relu: bool = False) -> None:
        super().__init__()
        self.layer, self.fuse_relu = nn.BatchNorm2d(channels), fuse_relu

    def forward(self, x: torch.Tensor, z: torch.Tensor | None = None) -> torch.Tensor:
        assert x.is_contiguous()
        assert z is None or (z.is_contiguous() and self.fuse_relu)
        y = self.layer(x.movedim(-1, 1)) + (0 if z is None else z.movedim(-1, 1))
        return (y.relu() if self.fuse_relu else y).movedim(1, -1)


def test_peers_are_timed_where_they_are_installed_and_take_the_input(
    machine: cuda.Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = Row((4, 3, 5, 5), channels_last=True)
    assert not list(peers.installed(row, BLOCKS["bn"], torch.float16))
    for name in ("apex", "apex.contrib", "apex.contrib.groupbn"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "apex.contrib.groupbn.batch_norm", SimpleNamespace(BatchNorm2d_NHWC=OfApex))
    for block in ("bn", "bn-relu", "bn-add-relu"):
        assert "apex" in cuda.measure(row, BLOCKS[block], "float16", True, 3, machine).seconds
        ((_, peer),) = peers.installed(row, BLOCKS[block], torch.float16)
        inputs = make_inputs(row, BLOCKS[block], torch.float16)
        for found, expected in zip(
            runner(peer, inputs, True)(), runner(theirs(row, BLOCKS[block]), inputs, True)(), strict=True
        ):
            torch.testing.assert_close(found, expected)
    assert not list(peers.installed(row, BLOCKS["bn-silu"], torch.float16))
    assert not list(peers.installed(row, BLOCKS["bn"], torch.bfloat16))
    assert not list(peers.installed(Row(row.shape), BLOCKS["bn"], torch.float16))


def test_small_rows_are_timed_by_the_host(machine: cuda.Machine) -> None:
    result = cuda.measure(cuda.SMALL_ROWS[0], BLOCKS["bn"], "float32", True, 3, machine)
    assert result.host
    assert result.seconds == dict.fromkeys(("ours", "eager", "eager, no cuDNN", "compiled"), 1.0)


def test_a_copy_counts_what_is_read_and_what_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "COPIED", 1000)
    assert cuda.Machine("cpu", 4096, clock, clock).copied == pytest.approx(2000 / 1e-3)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_train_the_same_network(dtype: torch.dtype) -> None:
    size = network.Size(batch=8, side=64, width=16, blocks=(1, 2, 1, 1), classes=10)
    steps = network.make_steps(size, dtype, "cpu")
    losses = {name: torch.stack([step() for _ in range(3)]) for name, step in steps.items()}
    assert set(losses) == {"ours", "eager", "compiled", "ours, compiled"}
    assert losses["eager"][2] < losses["eager"][0]
    for found in losses.values():
        torch.testing.assert_close(found, losses["eager"], rtol=torch.finfo(dtype).eps ** 0.5, atol=0)


def test_the_network_is_a_resnet_50_with_all_taken_in() -> None:
    model = network.residual_network(network.Size())
    assert sum(parameter.numel() for parameter in model.parameters()) == 25_557_032
    small = network.residual_network(network.Size(width=2))
    name, converted = next(network.contenders(small))
    assert name == "ours"
    done = [layer for layer in converted.modules() if isinstance(layer, evenorm.BatchNorm2d)]
    assert len(done) == 53
    assert sum(layer.activation is None for layer in done) == 4  # before an addition that the way around does


def test_a_networks_steps_are_timed_by_the_device(machine: cuda.Machine) -> None:
    size = network.Size(batch=2, side=32, width=2, blocks=(1, 1), classes=3)
    seconds = cuda.network_seconds(size, torch.float32, 3, machine)
    assert seconds == dict.fromkeys(("ours", "eager", "compiled", "ours, compiled"), 1e-3)
    *_, header, rule, row = cuda.network_as_markdown(seconds)
    assert header.count("|") == rule.count("|") == row.count("|")
    assert "1.0 ms" in row
    assert not list(cuda.network_as_markdown({}))


def test_the_table_can_be_pasted() -> None:
    seconds = {"ours": 1e-3, "eager": 2e-3, "compiled": 1.5e-3}
    both = (10, seconds), (2**30, seconds | {"apex": 3e-3})
    results = [cuda.Result("8×3", "BatchNorm", size, False, took, 0.8, 0.1, size > 10) for size, took in both]
    of_host = cuda.Result("60×100", "BatchNorm", 10, True, {"ours": 2e-3, "eager": 1e-3}, 0.8, 0.1, True)
    _, header, rule, small, large, summary, title, *_, last = cuda.as_markdown([of_host, *results])
    assert "host" in title
    assert "geometric mean 0.50" in last
    assert header.count("|") == rule.count("|") == small.count("|") == large.count("|")
    assert "WRONG" in small
    assert "80%" in large
    assert "1.50" in large
    assert "geometric mean 1.50" in summary


def test_the_rows_are_those_of_a_resnet_and_some_more() -> None:
    assert len({row.name for row in cuda.ROWS}) == len(cuda.ROWS) == 20
    assert any(math.prod(row.shape) * 2 >= cuda.LARGE for row in cuda.ROWS)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--dtype", "int8"], "--dtype must be one of"),
        (["--rows", "7x9"], "is in none of the shapes"),
        (["nonsense"], "BLOCK must be one of"),
        (["network", "--eval"], "network is a step of training"),
        (["--rounds", "0"], "--rounds must be at least 3"),
        (["--compile"], "--compile and --threads are for --device cpu"),
        (["--threads", "2"], "--compile and --threads are for --device cpu"),
    ],
)
def test_bad_options(options: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "--device", "cuda", *options])
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_message_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "--device", "cuda"])
    told = capsys.readouterr().err
    assert stopped.value.code == 2
    assert told.count("\n") == 1
    assert "--device cuda needs a GPU" in told


def test_another_device_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "--device", "tpu"])
    assert stopped.value.code == 2
    assert "--device must be cpu or cuda" in capsys.readouterr().err
