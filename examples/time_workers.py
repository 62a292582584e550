"""Measure what pooling over workers costs: beside the same layer alone, and beside the bare messages of its bytes.

On CPUs:  torchrun --nproc-per-node 2 examples/time_workers.py
On GPUs the same line; each worker takes the GPU of its local rank.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

import evenorm
from evenorm import workers

SHAPES = ((32, 64), (128, 256), (32, 64, 14, 14), (32, 256, 7, 7), (16, 64, 28, 28))
ROUNDS = 300


def contenders(shape: tuple[int, ...], device: torch.device) -> dict[str, Callable[[], object]]:
    """Return what is compared: forward and backward, alone and pooled, and the two messages by themselves.

    "in place" is the layer alone that sends bare messages where the pooled one sends its own: after the forward and
    after the backward, when the workers have had time to run apart.
    """
    x, dy = (torch.randn(shape, device=device) for _ in range(2))
    x.requires_grad_()
    alone, together = (evenorm.BatchNorm(shape[1], process_group=group).to(device) for group in (None, "world"))
    group, channels = dist.group.WORLD, shape[1]
    forward = [2 * channels + 1] if group is None or workers.few(group) else [channels + 1, 2 * channels]
    sizes = [*forward, 2 * channels]
    messages = [torch.zeros(1, size, dtype=torch.float64, device=device) for size in sizes]

    def step(layer: evenorm.BatchNorm, sent: Sequence[Tensor] = ()) -> None:
        y = layer(x)
        send(sent[:-1])
        torch.autograd.grad(y, (x, layer.weight, layer.bias), dy)
        send(sent[-1:])

    return {
        "alone": lambda: step(alone),
        "pooled": lambda: step(together),
        "bare": lambda: send(messages),
        "in place": lambda: step(alone, messages),
    }


def send(messages: Sequence[Tensor]) -> None:
    """Send messages as the layer does."""
    group = dist.group.WORLD
    assert group is not None
    for message in messages:
        if workers.few(group):
            workers.gather(message, group)
        else:
            dist.all_reduce(message)


def times(runs: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Return the median time of each, in microseconds, all in turn; workers start each together.

    The turns are shuffled, alike on all workers, since each run is slower or faster behind another.
    """
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(ROUNDS):
        for name, run in random.Random(turn).sample([*runs.items()], len(runs)):
            dist.barrier()
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            taken[name].append(time.perf_counter() - start)
    return {name: 1e6 * median(values[ROUNDS // 10 :]) for name, values in taken.items()}


def main() -> None:
    """Print a line a shape."""
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    torch.set_num_threads(1)
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} workers on {dist.get_backend()}; microseconds, medians of {ROUNDS}")
        print("shape on each worker       alone   pooled    added   bare messages   in place")
    for shape in SHAPES:
        found = times(contenders(shape, device), device)
        added, bare, in_place = found["pooled"] - found["alone"], found["bare"], found["in place"] - found["alone"]
        if dist.get_rank() == 0:
            print(
                f"{shape!s:24}{found['alone']:8.0f} {found['pooled']:8.0f} {added:8.0f} "
                f"{bare:8.0f} ({added / bare:4.1f}) {in_place:8.0f} ({added / in_place:4.1f})"
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
