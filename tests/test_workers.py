"""Pooling over real processes on gloo: equal to one process, the same bits everywhere, and no hang."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import evenorm
import workers_battery
from evenorm import workers
from evenorm.activations import resolve
from evenorm.engines import cpu
from evenorm.formulas import Setting

SILU = resolve("silu").code


def run(function: object, world: int, folder: Path) -> list[int | None]:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=function, args=(rank, world, str(folder))) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=240)
        if process.is_alive():
            process.kill()
    return [process.exitcode for process in processes]


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
    assert "verify_workers" in told["bare"]


def test_workers_that_disagree_are_told_so_without_verification(tmp_path: Path) -> None:
    exits = run(workers_battery.disagreeing, 2, tmp_path)
    files = [tmp_path / f"disagreeing-{rank}.json" for rank in range(2)]
    told = [json.loads(path.read_text()) for path in files]
    assert [one["dtype"] for one in told] == ["", ""]  # messages are float64 whatever the batches are
    assert told[1]["calls"] == "", "who does less waits for nobody"
    for how in ("calls", "reduced calls"):
        assert "Timed out" in told[0][how]
        assert "verify_workers" in told[0][how]
    assert "pooling over workers failed in backward" in told[0]["backward"]
    assert "not all of them went backward" in told[0]["backward"]
    # gloo ends the process that is sent more than it expects; the other one gets its error.
    assert [one.get("channels") is None for one in told] == [code != 0 for code in exits]
    survivors = [one["channels"] for one in told if "channels" in one]
    assert survivors
    assert all("verify_workers" in text for text in survivors)


engine_only = pytest.mark.skipif(cpu.available() is not None, reason="the CPU engine is not there")


def draw(samples: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(samples, 37, 5, generator=generator, dtype=torch.float64) + 3).to(dtype)


@engine_only
@pytest.mark.parametrize("options", ["plain", "mask", "residual"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("samples", [(5,), (3, 0, 7), (0, 4), (0, 0), (1,) * 8])
def test_the_engine_steps_over_workers_as_over_the_whole_batch(
    samples: tuple[int, ...], dtype: torch.dtype, options: str
) -> None:
    total = sum(samples)
    x, dy, residual = (draw(total, dtype, seed) for seed in range(3))
    mask = draw(total, torch.float64, 3)[:, 0] > 3 if options == "mask" else None
    setting = Setting(mask, None, 1e-5, SILU, 0.0)
    weight, bias = torch.randn(2, 37, generator=torch.Generator().manual_seed(4)).to(torch.float32)
    residual = residual if options == "residual" else None
    y, *batch = cpu.train_forward(x, weight, bias, residual, setting)
    expected = cpu.train_backward(dy, x, *batch, weight, bias, residual, setting, residual is not None)

    def part(whole: torch.Tensor | None, rank: int) -> torch.Tensor | None:
        return None if whole is None else whole.split(samples)[rank]

    ranks = range(len(samples))
    own = [setting._replace(mask=part(mask, rank)) for rank in ranks]
    sent = torch.cat([cpu.forward_message(part(x, rank), own[rank].mask) for rank in ranks])
    found = []
    for rank in ranks:
        running = torch.zeros(37), torch.ones(37), torch.tensor(0)
        given = part(x, rank), weight, bias, part(residual, rank), own[rank]
        mine, pooled = cpu.step_forward(*given, (*running, 0.5, False, 1, None), sent)
        for without_update, one in zip(cpu.step_forward(*given, messages=sent), (mine, pooled), strict=True):
            assert torch.equal(without_update, one)
        found.append((mine, pooled, running))
    assert all(torch.equal(pooled, found[0][1]) for _, pooled, _ in found)
    running = torch.zeros(37), torch.ones(37), torch.tensor(0)
    cpu.track_(*running, evenorm.Moments(*batch), 0.5)
    count, mean, m2 = workers.split(found[0][1])
    for ours, wanted in zip((count[:, 0], mean, m2, *found[0][2]), (*batch, *running), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=2e-7 if ours.dtype is torch.float32 else 1e-12, atol=1e-12)

    behind = [
        (part(dy, rank), part(x, rank), pooled, weight, bias, part(residual, rank), own[rank])
        for rank, (_, pooled, _) in enumerate(found)
    ]
    sent = torch.cat([cpu.backward_message(*given) for given in behind])
    got = [cpu.step_backward(*given, residual is not None, sent, rank) for rank, given in enumerate(behind)]
    of_parts = [
        torch.cat([mine for mine, *_ in found]),
        torch.cat([dx for dx, *_ in got]),
        torch.stack([dweight.double() for _, dweight, _, _ in got]).sum(0),
        torch.stack([dbias.double() for _, _, dbias, _ in got]).sum(0),
        *([] if residual is None else [torch.cat([dresidual for *_, dresidual in got])]),
    ]
    for ours, wanted in zip(of_parts, (y, *expected[: len(of_parts) - 1]), strict=True):
        limit = workers_battery.TOLERANCE[dtype if ours.dim() > 1 else torch.float32]
        torch.testing.assert_close(ours.double(), wanted.double(), rtol=limit, atol=4 * limit)


@engine_only
def test_the_engine_merges_as_is_defined() -> None:
    parts = [torch.randn(size, 37, dtype=torch.float64) + 1e3 for size in (3, 0, 7)]
    sent = torch.cat([cpu.forward_message(part, None) for part in parts])
    _, packed = cpu.step_forward(parts[0], None, None, None, Setting(), messages=sent)
    count, mean, m2 = workers.split(packed)
    for ours, defined in zip(
        (count[0], mean, m2), vars(workers._merge(*workers.split(sent))).values(), strict=True
    ):
        torch.testing.assert_close(ours, defined, rtol=1e-13, atol=0)


@engine_only
def test_a_constant_stays_one_whoever_is_empty() -> None:
    for constant in draw(40, torch.float64, 0).flatten(1) * 1e6:
        parts = [constant.expand(size, -1) for size in (0, 3, 7)]
        sent = torch.cat([cpu.forward_message(part, None) for part in parts])
        y, packed = cpu.step_forward(parts[1], None, None, None, Setting(), messages=sent)
        assert not y.any()
        for count, mean, m2 in (workers.split(packed), vars(workers._merge(*workers.split(sent))).values()):
            assert count == 10
            assert torch.equal(mean[0], constant)
            assert not m2.any()


@engine_only
def test_the_engine_refuses_messages_that_are_none() -> None:
    x, setting = torch.randn(4, 2), Setting()

    def take(messages: torch.Tensor, setting: Setting = setting) -> None:
        cpu.step_forward(x, None, None, None, setting, messages=messages)

    with pytest.raises(RuntimeError, match="messages must be float64"):
        take(torch.zeros(2, 5))
    for wrong in (torch.zeros(2, 4), torch.zeros(5), torch.zeros(0, 5), torch.zeros(5, 2).t()):
        with pytest.raises(RuntimeError, match="messages must be rows of 5 numbers"):
            take(wrong.double())
    with pytest.raises(RuntimeError, match="batch is one group"):
        take(torch.zeros(2, 5).double(), setting._replace(splits=[2, 2]))
    given = (x, x, cpu.forward_message(x, None), None, None, None, setting, False)
    with pytest.raises(RuntimeError, match="messages must be rows of 4 numbers"):
        cpu.step_backward(*given, torch.zeros(2, 5).double(), 0)
    with pytest.raises(RuntimeError, match="each worker has its own row"):
        cpu.step_backward(*given, torch.zeros(2, 4).double(), 2)


def test_without_torch_distributed() -> None:
    layer = evenorm.BatchNorm1d(3, process_group="world")
    with pytest.raises(ValueError, match=r"process_group needs torch\.distributed to be initialised in training"):
        layer(torch.randn(4, 3))
    layer.eval()
    with evenorm.verify_workers(layer):
        assert layer(torch.randn(4, 3)).shape == (4, 3)


@pytest.mark.parametrize("timeout", [0, -1.0, torch.inf, torch.nan, None, "30", True])
def test_a_timeout_that_is_none(timeout: object) -> None:
    with (
        pytest.raises(ValueError, match="timeout must be a number of seconds, above 0 and finite, got"),
        evenorm.verify_workers(nn.Sequential(), timeout=timeout),
    ):
        pass


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
    with pytest.raises(
        ValueError, match=r"not in the layer's process_group, as torch\.distributed\.new_group told"
    ):
        evenorm.set_process_group(nn.BatchNorm1d(3), dist.GroupMember.NON_GROUP_MEMBER)
    live, told = evenorm.BatchNorm1d(3), "process_group must be None, 'world' or a torch ProcessGroup, got 'wrld'"
    live.process_group = "wrld"
    for use in (
        lambda: live(torch.randn(4, 3)),
        lambda: evenorm.pool_running_statistics_(live, "wrld"),
        lambda: evenorm.calibrate(live, iter([1 / 1]), process_group="wrld"),
    ):
        with pytest.raises(ValueError, match=told):
            use()


def test_torchs_conversion_to_sync_batch_norm_is_loud() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), evenorm.BatchNorm2d(4, activation="relu"))
    with pytest.raises(TypeError, match="set_process_group"):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert list(model.named_children())


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    """A group of this process alone, in a world of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.new_group([0])
    finally:
        dist.destroy_process_group()


def state_of(layer: nn.Module) -> list[object]:
    """Return who a layer is and all its attributes, in their order, tensors by identity."""
    shown = {
        name: {key: id(item) for key, item in value.items()} if isinstance(value, dict) else value
        for name, value in vars(layer).items()
    }
    return [id(layer), type(layer), list(shown.items())]


@pytest.mark.parametrize("kind", ["default", "group", "world"])
def test_torchs_sync_batch_norm_becomes_ours_and_torchs_again(kind: str, group: dist.ProcessGroup) -> None:
    given = {"default": None, "group": group, "world": dist.group.WORLD}[kind]
    torch.manual_seed(0)
    layer = nn.SyncBatchNorm(4, momentum=0.3, process_group=given)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), layer, nn.ReLU())
    layer.register_forward_hook(lambda module, inputs, y: None)
    with torch.no_grad():
        layer.running_var.uniform_(0.5, 2)
    before, state = state_of(layer), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.randn(4, 3, 5, 5)
    expected = model.eval()(x)

    evenorm.convert(model)
    assert model[1] is layer
    assert type(layer) is evenorm.BatchNorm
    assert layer.process_group == "world" if given is None else layer.process_group is given
    assert layer.momentum == 0.3
    torch.testing.assert_close(model(x), expected)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])
    model.train()(x)
    assert layer.num_batches_tracked == 1

    layer.load_state_dict({name[2:]: value for name, value in state.items() if name[0] == "1"})
    evenorm.revert(model.eval())
    for module in (layer, model):
        module.train()
    assert state_of(layer) == before
    assert torch.equal(model.eval()(x), expected)


def test_torchs_sync_batch_norm_takes_in_what_follows() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.SyncBatchNorm(4), nn.ReLU())
    evenorm.convert(model)
    assert model[1].activation == "relu"
    assert [type(module) for module in evenorm.revert(model)] == [nn.Conv2d, nn.SyncBatchNorm, nn.ReLU]
    assert model[1].process_group is None


def test_what_of_sync_batch_norm_stays_as_it_is() -> None:
    outside = nn.SyncBatchNorm(3, process_group=dist.GroupMember.NON_GROUP_MEMBER)
    assert "no group that this worker is in" in evenorm.conversion(outside).layers[0].reason
    alone = evenorm.set_process_group(evenorm.convert(nn.SyncBatchNorm(3)), None)
    with pytest.raises(ValueError, match="BatchNorm does with no process_group"):
        evenorm.revert(alone)
    frozen = evenorm.freeze(nn.SyncBatchNorm(3))
    assert (frozen.frozen, frozen.process_group) == (True, "world")
    assert type(evenorm.revert(evenorm.unfreeze(frozen))) is nn.SyncBatchNorm


def test_nccl_and_a_cpu_tensor(group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(dist, "get_backend", lambda group=None: "nccl")
    with pytest.raises(ValueError, match=r"backend is NCCL, which sends CUDA tensors only; x is on cpu"):
        evenorm.BatchNorm1d(3, process_group=group)(torch.randn(4, 3))


def test_copies_share_the_group(group: dist.ProcessGroup) -> None:
    model = nn.Sequential(
        evenorm.BatchNorm1d(3, process_group=group), evenorm.BatchNorm1d(3, process_group="world")
    )
    for copied in (copy.deepcopy(model), nn.Sequential(*map(copy.copy, model))):
        assert copied[0] is not model[0]
        assert copied[0].process_group is group
        assert copied[1].process_group == "world"
        assert list(vars(copied[0])) == list(vars(model[0]))


def test_pickles_know_the_world_and_no_other_group(group: dist.ProcessGroup, tmp_path: Path) -> None:
    for named in ("world", dist.group.WORLD):
        layer = evenorm.BatchNorm1d(3, process_group=named)
        assert pickle.loads(pickle.dumps(layer)).process_group == "world"
    torch.save(layer, tmp_path / "layer.pt")
    assert torch.load(tmp_path / "layer.pt", weights_only=False).process_group == "world"
    for write in (pickle.dumps, lambda module: torch.save(module, tmp_path / "group.pt")):
        with pytest.raises(TypeError, match=r"call evenorm\.set_process_group\(model, None\) first"):
            write(evenorm.BatchNorm1d(3, process_group=group))
