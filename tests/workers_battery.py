"""What worker processes run for test_workers: each check compares this worker with one process on all the data.

A check is a function of (rank, world) in `CHECKS`; it asserts. Everything is drawn from fixed seeds, so that every
worker knows the whole batch and its own part of it.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import evenorm
from evenorm import functional, workers
from evenorm.engines import cpu
from evenorm.moments import Moments

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 1e-2, torch.float16: 1e-3}
CHECKS: dict[str, Callable[[int, int], None]] = {}


def check(function: Callable[[int, int], None]) -> Callable[[int, int], None]:
    CHECKS[function.__name__] = function
    return function


def main(rank: int, world: int, folder: str) -> None:
    """Run all checks in one process group; leave their outcomes in a file."""
    torch.set_num_threads(1)
    start(rank, world, folder)
    outcomes = {}
    for name, function in CHECKS.items():
        try:
            function(rank, world)
            outcomes[name] = ""
        except BaseException:
            outcomes[name] = traceback.format_exc()
            break  # the others would wait for this worker in the next collective
    (Path(folder) / f"outcome-{world}-{rank}.json").write_text(json.dumps(outcomes))
    os._exit(0)  # not through gloo's destructors, which wait for workers that failed


def start(rank: int, world: int, folder: str, seconds: float = 60) -> None:
    store = dist.FileStore(f"{folder}/store-{world}", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=seconds))


def layer(dtype: torch.dtype, channels: int = 4, **options: object) -> evenorm.BatchNorm:
    made = evenorm.BatchNorm(channels, dtype=dtype, **options)
    with torch.no_grad():
        made.weight.copy_(torch.tensor([1.0, -0.5, 2.0, 0.0])[:channels])
        made.bias.copy_(torch.tensor([0.5, 0.0, -1.0, 1.0])[:channels])
    return made


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def near(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    if found.numel():
        scale = expected.double().abs().max().clamp(min=1)
        assert (found.double() - expected.double()).abs().max() <= TOLERANCE[dtype] * 4 * scale


def same_everywhere(tensor: Tensor) -> None:
    world = dist.get_world_size()
    copies = [torch.empty_like(tensor) for _ in range(world)]
    dist.all_gather(copies, tensor.contiguous())
    assert all(torch.equal(copy.nan_to_num(7), tensor.nan_to_num(7)) for copy in copies)


def compare(rank: int, parts: list[int], dtype: torch.dtype, masked: bool = False, **options: object) -> None:
    """Train one step on this worker's part, and on the whole in one process; all must agree."""
    samples = sum(parts)
    x, residual, dy = (draw(samples, 4, 3, 3, dtype=dtype, seed=seed) for seed in range(3))
    mask = draw(samples, 3, 3, dtype=torch.float64, seed=3) > 0 if masked else None
    together, alone = layer(torch.float64 if dtype is torch.float64 else torch.float32, **options), None
    alone = layer(
        together.weight.dtype, **{name: value for name, value in options.items() if name != "process_group"}
    )

    def run(module: nn.Module, *given: Tensor | None) -> list[Tensor]:
        x, residual, mask, dy = given
        x, residual = x.clone().requires_grad_(), residual.clone().requires_grad_()
        y = module(x, residual=residual, mask=mask)
        return [y, *torch.autograd.grad(y, [x, residual, module.weight, module.bias], dy)]

    mine = [None if whole is None else whole.split(parts)[rank] for whole in (x, residual, mask, dy)]
    found, expected = run(together, *mine), run(alone, x, residual, mask, dy)
    for index in range(3):
        near(found[index], expected[index].split(parts)[rank], dtype)
    for index in (3, 4):
        dist.all_reduce(found[index])
        near(found[index], expected[index], dtype)
    for name, buffer in together.named_buffers():
        near(buffer, alone.get_buffer(name), torch.float32 if dtype.itemsize < 4 else dtype)
        same_everywhere(buffer)


def uneven(world: int) -> list[int]:
    return [3, 7, 2][:world]


@check
def equal_parts(rank: int, world: int) -> None:
    for dtype in TOLERANCE:
        compare(rank, [4] * world, dtype, process_group="world", activation="silu")


@check
def uneven_parts_with_every_option(rank: int, world: int) -> None:
    for options in (
        {"activation": "relu"},
        {"average": evenorm.Exponential(0.1, debias=True)},
        {"average": evenorm.Cumulative()},
        {"average": evenorm.Window(2)},
        {"renorm": evenorm.Renorm(start=0, r_steps=0, d_steps=0), "activation": "gelu"},
        {"on_single": "population"},
        {"on_nonfinite": "propagate"},
    ):
        compare(rank, uneven(world), torch.float64, process_group="world", **options)


@check
def a_group_object(rank: int, world: int) -> None:
    compare(rank, uneven(world), torch.float64, process_group=dist.group.WORLD)


@check
def masks_count_exactly(rank: int, world: int) -> None:
    for dtype in (torch.float32, torch.float64):
        compare(rank, uneven(world), dtype, masked=True, process_group="world", activation="relu")


@check
def an_empty_worker(rank: int, world: int) -> None:
    parts = [0] + [5] * (world - 1)
    for dtype in TOLERANCE:
        compare(rank, parts, dtype, process_group="world")


@check
def all_workers_empty(rank: int, world: int) -> None:
    empty = layer(torch.float32, process_group="world")
    before = {name: buffer.clone() for name, buffer in empty.named_buffers()}
    x = torch.empty(0, 4, 3, requires_grad=True)
    empty(x).sum().backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in empty.named_buffers())


@check
def one_value_per_channel_and_worker(rank: int, world: int) -> None:
    x = draw(world, 4, dtype=torch.float64)
    together, alone = layer(torch.float64, process_group="world"), layer(torch.float64)
    near(together(x[rank : rank + 1]), alone(x)[rank : rank + 1], torch.float64)
    near(together.running_var, alone.running_var, torch.float64)


@check
def images_of_different_sizes(rank: int, world: int) -> None:
    sizes = [300, 500, 20][:world]
    images = [draw(1, 3, size, size, dtype=torch.float32, seed=size) for size in sizes]
    together, alone = layer(torch.float32, 3, process_group="world"), layer(torch.float32, 3)
    y = together(images[rank])
    whole = alone(torch.cat([image.flatten(2) for image in images], dim=2))
    near(y.flatten(2), whole.split([size * size for size in sizes], dim=2)[rank], torch.float32)
    near(together.running_var, alone.running_var, torch.float32)


@contextmanager
def a_large_world(large: bool = True) -> Iterator[None]:
    """Reduce in place of gathering, as worlds of many workers do."""
    kept, workers.GATHER_UP_TO = workers.GATHER_UP_TO, 1 if large else workers.GATHER_UP_TO
    try:
        yield
    finally:
        workers.GATHER_UP_TO = kept


@check
def sums_are_reduced_in_a_large_world(rank: int, world: int) -> None:
    with a_large_world():
        for dtype in (torch.float32, torch.float64):
            compare(rank, uneven(world), dtype, process_group="world", activation="silu")
        compare(rank, [0] + [5] * (world - 1), torch.float64, process_group="world")
        compare(rank, uneven(world), torch.float64, process_group="world", track_running_stats=False)


@check
def nothing_of_an_empty_worker_is_added(rank: int, world: int) -> None:
    """However far the others' values are from 0; and a layer without channels has nothing to send but a count."""
    for large in (False, True):
        with a_large_world(large):
            together = layer(torch.float64, process_group="world")
            x = torch.full((4 * rank, 4), 1e200, dtype=torch.float64)
            assert torch.equal(together(x), together.bias.expand_as(x))
            near(together.running_mean / 1e199, torch.ones(4), torch.float64)
            assert evenorm.BatchNorm(0, process_group="world")(torch.empty(4, 0)).shape == (4, 0)


@check
def what_workers_knew_before_changes_nothing(rank: int, world: int) -> None:
    """Running means that differ, or hold NaN: the output and derivatives of both orders are one process's."""
    parts = uneven(world)
    x, dy, ddx = (draw(sum(parts), 4, 3, dtype=torch.float64, seed=seed) for seed in range(3))

    def run(module: nn.Module, x: Tensor, dy: Tensor, ddx: Tensor) -> list[Tensor]:
        x = x.clone().requires_grad_()
        y = module(x)
        (once,) = torch.autograd.grad(y, x, dy, retain_graph=True)
        (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
        return [y, once, dx, *torch.autograd.grad(dx, x, ddx)]

    expected = run(layer(torch.float64, activation="silu"), x, dy, ddx)
    for large in (False, True):
        for option in ("skip", "raise"):  # one call of the engine, and the general way
            together = layer(torch.float64, activation="silu", process_group="world", on_nonfinite=option)
            together.running_mean[:] = torch.tensor([rank, torch.nan, -torch.inf, 1e8])
            with a_large_world(large):
                found = run(together, *(whole.split(parts)[rank] for whole in (x, dy, ddx)))
            for ours, one in zip(found, expected, strict=True):
                near(ours, one.split(parts)[rank], torch.float64)


@check
def an_offset_costs_a_second_derivative_no_digits(rank: int, world: int) -> None:
    x, dy = draw(8 * world, 4, dtype=torch.float64) + 1e4, draw(8 * world, 4, dtype=torch.float64, seed=1)
    for large in (False, True):
        with a_large_world(large):
            mine, whole = x.chunk(world)[rank].clone().requires_grad_(), x.clone().requires_grad_()
            y, expected = layer(torch.float64, process_group="world")(mine), layer(torch.float64)(whole)
            (found,) = torch.autograd.grad(y, mine, dy.chunk(world)[rank], create_graph=True)
            near(found, torch.autograd.grad(expected, whole, dy)[0].chunk(world)[rank], torch.float64)


@check
def renorm_is_recomputed_with_what_it_was_tied_to(rank: int, world: int) -> None:
    x, dy = (draw(4 * world, 4, dtype=torch.float64, seed=seed).chunk(world)[rank] for seed in range(2))
    for large in (False, True):
        gradients = []
        for checkpointed in (False, True):
            together = layer(torch.float64, process_group="world", renorm=evenorm.Renorm(3.0, 5.0, 0, 0, 0))
            with a_large_world(large):
                together(2 * x + 1)
                mine = x.clone().requires_grad_()
                y = checkpoint(together, mine, use_reentrant=False) if checkpointed else together(mine)
                y.backward(dy)
            gradients.append(mine.grad)
        near(*gradients, torch.float64)


@check
def nonfinite_batches_are_skipped_everywhere(rank: int, world: int) -> None:
    together = layer(torch.float32, process_group="world")
    x = draw(4, 4, 3, dtype=torch.float32)
    if rank == 0:
        x[0, 1, 0] = torch.nan
    together(x)
    assert together.running_var[1] == 1
    assert (together.running_var != 1).sum() == 3
    assert together.nonfinite_batches == 1
    same_everywhere(together.running_mean)


@check
def an_infinite_value_makes_an_infinite_mean_everywhere(rank: int, world: int) -> None:
    x = draw(4 * world, 4, 3, dtype=torch.float64)
    x[0, 1, 0] = x[-1, 2, 0] = torch.inf
    x[0, 3, 0], x[-1, 3, 0] = torch.inf, -torch.inf
    for large in (False, True):
        for renorm in (None, evenorm.Renorm()):  # one call of the engine, and the general way
            together = layer(torch.float64, process_group="world", on_nonfinite="propagate", renorm=renorm)
            with a_large_world(large):
                together(x.chunk(world)[rank])
            torch.testing.assert_close(together.running_mean, 0.1 * x.mean((0, 2)), equal_nan=True)


@check
def sums_and_moments_have_the_same_bits_everywhere(rank: int, world: int) -> None:
    among = dist.group.WORLD
    for seed in range(5):
        own = draw(2, 1, 200, dtype=torch.float64, seed=10 * seed + rank) * 10 ** (3 * rank)
        same_everywhere(workers.total(tuple(own), among))
        pooled = workers.pool(Moments(torch.tensor([3.0 + rank]).double(), *own.abs()), among)
        for part in vars(pooled).values():
            same_everywhere(part)


@check
def one_call_does_what_the_calls_apart_do(rank: int, world: int) -> None:
    """The CPU engine's step over workers, with the update in it and without, and the way of other engines."""
    step, few, outcomes = functional.train_step, functional.few, []
    for functional.train_step, functional.few in (
        (step, few),
        (lambda *given: None, few),
        (lambda *given: None, lambda among: False),
    ):
        together = layer(torch.float64, process_group="world", activation="silu")
        x, residual = (draw(3 + rank, 4, 3, dtype=torch.float64, seed=seed + rank) for seed in (0, 9))
        x, residual = x.requires_grad_(), residual.requires_grad_()
        y = together(x, residual=residual)
        gradients = torch.autograd.grad(y, [x, residual, *together.parameters()], y.detach().cos())
        outcomes.append((y.grad_fn.name(), [y, *gradients, *together.buffers()]))
    functional.train_step, functional.few = step, few
    one = "StepPooledBackward" if cpu.available() is None else "TrainPooledBackward"
    assert [name for name, _ in outcomes] == [one, one, "TrainPooledBackward"]
    for _, others in outcomes[1:]:
        for found, other in zip(outcomes[0][1], others, strict=True):
            near(found, other, torch.float64)


@check
def the_direct_call_of_older_torch(rank: int, world: int) -> None:
    message = draw(1, 5, dtype=torch.float64, seed=rank)
    found = workers.gather(message, dist.group.WORLD)
    kept, workers._DIRECT = workers._DIRECT, "_allgather_base"
    try:
        assert torch.equal(workers.gather(message, dist.group.WORLD), found)
    finally:
        workers._DIRECT = kept
    assert torch.equal(found, torch.cat([draw(1, 5, dtype=torch.float64, seed=seed) for seed in range(world)]))


@check
def single_values_go_by_the_running_statistics_only_together(rank: int, world: int) -> None:
    options = {"on_single": "population", "process_group": "world"}
    compare(rank, [1] + [3] * (world - 1), torch.float64, **options)  # no worker leaves the others waiting
    together, x = layer(torch.float64, **options), draw(1, 4, dtype=torch.float64)
    y = together(x if rank == 0 else x[:0])  # one value on all workers together
    near(y, together.eval()(x)[: len(y)], torch.float64)
    assert together.num_batches_tracked == 0


@check
def micro_batches_count_once(rank: int, world: int) -> None:
    together, alone = (layer(torch.float64, process_group=group) for group in ("world", None))
    x = draw(world, 2, 5, 4, dtype=torch.float64)
    with evenorm.one_update(together):
        for part in range(2):
            together(x[rank, part])
    alone(x.flatten(0, 2))
    near(together.running_mean, alone.running_mean, torch.float64)
    near(together.running_var, alone.running_var, torch.float64)
    assert together.num_batches_tracked == 1


@check
def second_derivatives(rank: int, world: int) -> None:
    parts = uneven(world)
    x, dy, ddx = (draw(sum(parts), 4, 3, dtype=torch.float64, seed=seed) for seed in range(3))

    def twice(module: nn.Module, x: Tensor, dy: Tensor, ddx: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(module(x), x, dy, create_graph=True)
        return torch.autograd.grad(dx, x, ddx)[0]

    mine = [whole.split(parts)[rank] for whole in (x, dy, ddx)]
    found = twice(layer(torch.float64, process_group="world", activation="silu"), *mine)
    near(found, twice(layer(torch.float64, activation="silu"), x, dy, ddx).split(parts)[rank], torch.float64)


@check
def transforms_of_torch_func_are_refused(rank: int, world: int) -> None:
    together, x = layer(torch.float64, process_group="world"), draw(4, 4, dtype=torch.float64)
    for transform in (
        lambda: torch.func.grad(lambda x: together(x).square().sum())(x),
        lambda: torch.func.jvp(together, (x,), (x,)),
        lambda: torch.func.vmap(together)(x.expand(2, 4, 4)),
    ):
        assert "NotImplementedError: pooling over workers (process_group) does not" in _message(transform)


@check
def compiled_in_one_graph(rank: int, world: int) -> None:
    for large in (False, True):
        with a_large_world(large):
            torch.compiler.reset()
            compare_compiled(rank, world)


def compare_compiled(rank: int, world: int) -> None:
    parts = uneven(world)
    x, dy = (draw(sum(parts), 4, 3, dtype=torch.float64, seed=seed) for seed in range(2))
    together, alone = layer(torch.float64, process_group="world"), layer(torch.float64)
    compiled = torch.compile(together, fullgraph=True, backend="aot_eager")
    mine, whole = x.split(parts)[rank].clone().requires_grad_(), x.clone().requires_grad_()
    y = compiled(mine)
    y.backward(dy.split(parts)[rank])
    expected = alone(whole)
    expected.backward(dy)
    near(y, expected.split(parts)[rank], torch.float64)
    near(mine.grad, whole.grad.split(parts)[rank], torch.float64)
    near(together.running_var, alone.running_var, torch.float64)


@check
def checkpointing_pools_again_and_updates_once(rank: int, world: int) -> None:
    for reentrant in (True, False):
        together, alone = layer(torch.float64, process_group="world"), layer(torch.float64)
        x = draw(4 * world, 4, 3, dtype=torch.float64)
        dy = draw(4 * world, 4, 3, dtype=torch.float64, seed=1)
        mine, whole = x.chunk(world)[rank].clone().requires_grad_(), x.clone().requires_grad_()
        checkpoint(together, mine, use_reentrant=reentrant).backward(dy.chunk(world)[rank])
        alone(whole).backward(dy)
        near(mine.grad, whole.grad.chunk(world)[rank], torch.float64)
        near(together.running_var, alone.running_var, torch.float64)
        assert together.num_batches_tracked == 1


@check
def ddp_with_two_forwards_before_a_backward(rank: int, world: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), layer(torch.float32, process_group="world"), nn.Linear(4, 1))
    parallel = DistributedDataParallel(model)
    x = draw(2, 8 * world, 3, dtype=torch.float32)
    (parallel(x[0].chunk(world)[rank]) - parallel(x[1].chunk(world)[rank])).square().mean().backward()
    assert model[0].weight.grad.abs().sum() > 0
    assert model[1].num_batches_tracked == 2
    for parameter in model.parameters():
        same_everywhere(parameter.grad)
    for buffer in model.buffers():
        same_everywhere(buffer)


@check
def fully_sharded(rank: int, world: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), layer(torch.float32, process_group="world"), nn.Linear(4, 1))
    reference = nn.Sequential(nn.Linear(3, 4), layer(torch.float32), nn.Linear(4, 1))
    reference.load_state_dict(model.state_dict())
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    x = draw(8 * world, 3, dtype=torch.float32)
    y = model(x.chunk(world)[rank])
    y.square().mean().backward()
    near(y, reference(x).chunk(world)[rank], torch.float32)
    near(model[1].running_var, reference[1].running_var, torch.float32)


@check
def no_communication_where_nothing_is_pooled(rank: int, world: int) -> None:
    sent, group = [], dist.ProcessGroup
    names = ("all_gather_single", "_allgather_base", "allgather", "allreduce", "broadcast", "send")
    originals = {name: vars(group)[name] for name in names if name in vars(group)}
    for name, original in originals.items():
        setattr(group, name, lambda *given, _call=original.__func__: sent.append(1) or _call(*given))
    try:
        together, x = layer(torch.float32, process_group="world"), draw(4, 4, 3, dtype=torch.float32)
        together(x.requires_grad_()).square().sum().backward()
        assert len(sent) == 2, "one message forward, one backward"
        together.eval()(x).square().sum().backward()
        evenorm.freeze(together).train()(x).square().sum().backward()
        layer(torch.float32, process_group="world", track_running_stats=False).eval()(x)
        one = dist.new_subgroups(group_size=1)[0]
        layer(torch.float32, process_group=one)(x)
        assert len(sent) == 2
    finally:
        for name, original in originals.items():
            setattr(group, name, original)


@check
def many_steps_without_drift(rank: int, world: int) -> None:
    together = layer(torch.float32, process_group="world")
    generator = torch.Generator().manual_seed(rank)
    with torch.no_grad():
        for _ in range(10_000):
            samples = int(torch.randint(0, 4, (), generator=generator))
            together(torch.randn(samples, 4, generator=generator) * 3 + 100)
    same_everywhere(together.running_mean)
    same_everywhere(together.running_var)
    same_everywhere(together.num_batches_tracked)
    assert (together.running_mean - 100).abs().max() < 10


@check
def running_statistics_become_one(rank: int, world: int) -> None:
    model = nn.Sequential(evenorm.BatchNorm1d(3, momentum=None), nn.BatchNorm1d(3, momentum=None))
    data = (draw(world, 500, 3, dtype=torch.float32) + 1) * torch.arange(1, world + 1).view(-1, 1, 1)
    model(data[rank])
    found = evenorm.diagnose(model, process_group="world").findings[0]
    assert (found.code, str(found.severity), found.evidence["layers"]) == ("workers-differ", "warning", 2)
    assert found.evidence["workers"] == world
    means, variances = data.double().mean(1), data.double().var(1) + 1e-5
    shift = ((means.max(0).values - means.min(0).values) / variances.max(0).values.sqrt()).max()
    ratio = (variances.max(0).values / variances.min(0).values).max()
    assert abs(found.evidence["means apart by (standard deviations)"] - shift) < 2e-3
    assert abs(found.evidence["largest / smallest variance"] - ratio) < 0.01 * ratio
    assert not any("workers" in one.evidence for one in evenorm.diagnose(model).findings if "differ" in one.code)
    evenorm.pool_running_statistics_(model)
    same_everywhere(model[0].running_var)
    same_everywhere(model[1].running_mean)
    assert "workers-differ" not in {one.code for one in evenorm.diagnose(model, process_group="world").findings}
    if rank == 0:
        model[0].running_mean[1] += 1e-6
    found = [one for one in evenorm.diagnose(model, process_group="world").findings if one.code == "workers-differ"]
    assert [(str(one.severity), one.layer, one.evidence["layers"]) for one in found] == [("note", "0", 1)]
    if rank == 0:
        model[0].running_mean[1] -= 1e-6
    expected = data.double().flatten(0, 1)
    torch.testing.assert_close(model[0].running_mean.double(), expected.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model[0].running_var.double(), expected.var(0), rtol=5e-3, atol=0)


@check
def nan_on_one_worker_is_found(rank: int, world: int) -> None:
    for name in ("running_mean", "running_var"):
        model = nn.Sequential(layer(torch.float32))
        if rank == world - 1:
            model[0].get_buffer(name)[1] = torch.nan
        before = {key: value.clone() for key, value in model.state_dict().items()}
        found = evenorm.diagnose(model, process_group="world").findings
        assert [str(one.severity) for one in found if one.code == "workers-differ"] == ["warning"]
        told = _message(lambda model=model: evenorm.pool_running_statistics_(model))
        assert told.startswith(f"ValueError: 0.{name} of rank {world - 1} holds NaN or inf"), told
        assert all(
            torch.equal(value.nan_to_num(7), before[key].nan_to_num(7)) for key, value in model.state_dict().items()
        )


@check
def variances_of_no_size_hide_no_difference(rank: int, world: int) -> None:
    for others, one in (((1.0, 1.0), (1.0, -1.0)), ((0.0, 1.0), (0.0, 4.0))):
        model = evenorm.BatchNorm(2, eps=0.0)
        model.num_batches_tracked.fill_(100)
        model.running_var.copy_(torch.tensor(one if rank == 1 else others))
        found = evenorm.diagnose(model, process_group="world").findings
        assert [str(found.severity) for found in found if found.code == "workers-differ"] == ["warning"], others


@check
def windows_remember_what_was_pooled(rank: int, world: int) -> None:
    together = layer(torch.float32, average=evenorm.Window(4))
    for seed in range(4):
        together(draw(50, 4, dtype=torch.float32, seed=seed) + 10 * rank)
    evenorm.pool_running_statistics_(together)
    pooled = together.running_mean.clone()
    for value in together.state_dict().values():
        same_everywhere(value)
    x = draw(50, 4, dtype=torch.float32, seed=5)
    together(x)
    near(together.running_mean, 0.75 * pooled + 0.25 * x.mean(0), torch.float32)


@check
def calibration_takes_its_prior_from_all_workers(rank: int, world: int) -> None:
    model = nn.Sequential(layer(torch.float64))
    model[0].running_mean.fill_(rank)
    x = draw(20 * world, 4, dtype=torch.float64)
    evenorm.calibrate(model, [x.chunk(world)[rank]], prior=20 * world, process_group="world")
    same_everywhere(model[0].running_mean)
    same_everywhere(model[0].running_var)
    near(model[0].running_mean, (x.mean(0) + (world - 1) / 2) / 2, torch.float64)


@check
def what_is_wrong_on_one_worker_stops_a_calibration_on_all(rank: int, world: int) -> None:
    x = draw(20, 4, dtype=torch.float32)
    for options, data, one in (
        ({}, x, "TypeError: data must be an iterable"),
        ({"prior": -1}, [x], "ValueError: prior must be"),
        ({"prior": 3}, [x], "ValueError: 0: its statistics hold NaN or inf"),
    ):
        model = nn.Sequential(layer(torch.float32))
        if rank == 1:
            model[0].running_mean[0] = torch.nan
        else:
            options, data = {"prior": 3}, [x]
        told = _message(
            lambda model=model, data=data, options=options: evenorm.calibrate(
                model, data, process_group="world", **options
            )
        )
        assert (one if rank == 1 else "ValueError: worker 1 failed, see its own error") in told, told
        assert model[0].num_batches_tracked == 0


@check
def a_group_without_this_worker(rank: int, world: int) -> None:
    others = dist.new_group([0])
    if rank == 0:
        return
    told = _message(lambda: layer(torch.float32, process_group=others)(draw(4, 4, dtype=torch.float32)))
    assert "ValueError" in told
    assert "not in the layer's process_group" in told


@check
def verified_workers_that_agree(rank: int, world: int) -> None:
    together = layer(torch.float32, process_group="world")
    with evenorm.verify_workers(together, timeout=20):
        for _ in range(3):
            together(draw(4, 4, dtype=torch.float32))
    assert together.num_batches_tracked == 3


@check
def blocks_of_a_few_workers_are_no_business_of_others(rank: int, world: int) -> None:
    few = dist.new_group([0, 1])
    model = nn.Sequential(layer(torch.float32, process_group=few if rank < 2 else None))
    with evenorm.verify_workers(model, timeout=5):
        model(draw(4, 4, dtype=torch.float32))
    verified_workers_that_agree(rank, world)


def diverge(rank: int, how: str) -> None:
    """Do on rank 1 something else than on the others, under verification."""
    channels = 3 if rank == 1 and how == "channels" else 4
    first, second = (layer(torch.float32, channels, process_group="world") for _ in range(2))
    model = nn.Sequential(first, second)
    x = draw(4, channels, dtype=torch.float32)
    with evenorm.verify_workers(model, timeout=30):
        if how != "channels":
            model(x)
        if rank == 1 and how == "mode":
            second.eval()
        if rank == 1 and how == "skips":
            return
        if rank == 1 and how == "raises":
            raise KeyError("a fault of its own")
        if rank == 1 and how == "dtype":
            x = x.double()
        model = second if rank == 1 and how == "order" else model
        model(x)


@check
def workers_that_diverge_are_named(rank: int, world: int) -> None:
    for how, words in {
        "mode": ("diverged at pooling number 4", "layer 1", "eval mode"),
        "dtype": ("diverged at pooling number 3", "torch.float64"),
        "order": ("diverged at pooling number 3", "layer 0", "layer 1"),
        "channels": ("diverged at pooling number 1", "3 channels", "4 channels"),
        "skips": ("left the block",),
        "raises": ("stopped with KeyError",),
    }.items():
        told = _message(lambda how=how: diverge(rank, how))
        if rank == 1 and how in ("skips", "raises"):
            assert told == {"skips": "", "raises": "KeyError: 'a fault of its own'"}[how]
        else:
            assert all(word in told for word in words), f"{how}: {told}"
        dist.barrier()


def late(rank: int) -> None:
    """Come on rank 1 when the others have given up, though with the same note."""
    together, x = layer(torch.float32, process_group="world"), draw(4, 4, dtype=torch.float32)
    with evenorm.verify_workers(together, timeout=1):
        together(x)
        if rank == 1:
            time.sleep(3)
        together(x)


def refused(rank: int, *given: object, **keywords: object) -> None:
    """Call on rank 1 with arguments that the layer refuses."""
    together, x = layer(torch.float32, process_group="world"), draw(4, 4, dtype=torch.float32)
    with evenorm.verify_workers(together, timeout=30):
        together(*given, **keywords) if rank == 1 else together(x)


def skipped_by_compiled_code(rank: int) -> None:
    """Leave out on rank 1 the forward of a network that was compiled before the block."""
    model = nn.Sequential(nn.Linear(4, 4), layer(torch.float32, process_group="world"))
    compiled, x = torch.compile(model, backend="eager"), draw(4, 4, dtype=torch.float32)
    compiled(x)
    with evenorm.verify_workers(model, timeout=30):
        compiled(x)
        if rank != 1:
            compiled(x)


@check
def nobody_is_left_waiting_under_verification(rank: int, world: int) -> None:
    x, wrong = draw(4, 4, dtype=torch.float32), torch.ones(3, dtype=torch.bool)
    for run, one, others in (
        (lambda: late(rank), "workers stopped at pooling number 2: rank", "did not come to pooling number 2"),
        (lambda: refused(rank, x, mask=wrong), "ValueError: mask must have shape", "stopped with ValueError"),
        (lambda: refused(rank, x[0]), "ValueError: expected 2D or higher", "stopped with ValueError"),
        (lambda: refused(rank, [1]), "TypeError: expected a floating-point tensor", "stopped with TypeError"),
        (lambda: refused(rank), "TypeError: Layer.forward() missing 1", "stopped with TypeError"),
        (lambda: skipped_by_compiled_code(rank), "", "left the block"),
    ):
        start, told = time.monotonic(), _message(run)
        assert (one if rank == 1 else others) in told, told
        assert rank != 1 or one or not told
        assert time.monotonic() - start < 20
        dist.barrier()


def _message(run: Callable[[], object]) -> str:
    try:
        run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def killed(rank: int, world: int, folder: str) -> None:
    """Rank 1 dies in mid-training; rank 0 must be told within the timeout. Not a check: it ends the group."""
    import signal

    torch.set_num_threads(1)
    start(rank, world, folder, seconds=20)
    together = layer(torch.float32, process_group="world")
    together(draw(4, 4, dtype=torch.float32))
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        with evenorm.verify_workers(together, timeout=3):
            together(draw(4, 4, dtype=torch.float32))
        outcome = "went on"
    except RuntimeError as error:
        outcome = str(error)
    try:
        together(draw(4, 4, dtype=torch.float32))
        bare = "went on"
    except RuntimeError as error:
        bare = str(error)
    (Path(folder) / "killed.json").write_text(json.dumps({"verified": outcome, "bare": bare}))
    os._exit(0)


def disagreeing(rank: int, world: int, folder: str) -> None:
    """Rank 1 does something else than rank 0, each time in a group of its own. Not a check: it ends processes."""
    torch.set_num_threads(1)
    start(rank, world, folder)
    told: dict[str, str] = {}
    for how in ("dtype", "calls", "reduced calls", "backward", "channels"):
        dist.barrier()
        group = dist.new_group(list(range(world)), timeout=timedelta(seconds=2))
        with a_large_world("reduced" in how):
            told[how] = _message(lambda how=how, group=group: disagree(how if rank == 1 else "", group))
        (Path(folder) / f"disagreeing-{rank}.json").write_text(json.dumps(told))
    os._exit(0)


def disagree(how: str, group: dist.ProcessGroup) -> None:
    """Take two forwards and a backward; `how` says what to do otherwise."""
    channels = 3 if how == "channels" else 4
    together = layer(torch.float32, channels, process_group=group)
    x = draw(4, channels, dtype=torch.float64 if how == "dtype" else torch.float32)
    y = together(x)
    if "calls" not in how:
        y = together(x)
        if how != "backward":
            y.backward(torch.ones_like(y))
