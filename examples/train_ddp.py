"""Train a small network on digits with one batch norm over all workers, and show that it equals one process.

On CPUs:  torchrun --nproc-per-node 2 examples/train_ddp.py
On GPUs the same line; each worker takes the GPU of its local rank.
Needs scikit-learn for the data: pip install "evenorm[lab]"
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import evenorm

STEPS, BATCH = 100, 120


def network() -> nn.Module:
    """Return the network, the same on every worker."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 100), evenorm.BatchNorm1d(100, activation="relu"),
        nn.Linear(100, 100), evenorm.BatchNorm1d(100, activation="relu"),
        nn.Linear(100, 10),
    )  # fmt: skip


def train(model: nn.Module, images: Tensor, labels: Tensor, rank: int = 0, world: int = 1) -> None:
    """Take STEPS steps; each worker takes its share of each batch, which all workers draw alike."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    draws = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        batch = torch.randint(len(images), (BATCH,), generator=draws).chunk(world)[rank].to(images.device)
        loss = cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main() -> None:
    """Train over all workers, then alone, and compare."""
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    digits = load_digits()
    images = torch.tensor(digits.data / 16, dtype=torch.float32, device=device)
    labels = torch.tensor(digits.target, device=device)

    together = evenorm.set_process_group(network().to(device), "world")
    train(DistributedDataParallel(together), images, labels, rank, world)

    alone = network().to(device)
    train(alone, images, labels)
    logits, expected = (model.eval()(images).detach() for model in (together, alone))
    if rank == 0:
        difference = (logits - expected).abs().max() / expected.abs().max()
        accuracy = (logits.argmax(1) == labels).float().mean()
        print(f"{world} workers: accuracy {accuracy:.1%}, largest difference from one process {difference:.1e}")
        assert difference < 1e-3, "the workers should have trained what one process trains"
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
