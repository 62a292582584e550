"""Sick networks, one for each cause, and healthy ones: really trained, on digits, in a second or two each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import evenorm
from evenorm.lab.data import digits

Batches = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Patient:
    """A network, data as it was trained on, and what is wrong with it."""

    model: nn.Module
    data: Batches
    code: str  # of the doctor's first finding; "" for a healthy network
    cure: Callable[[], nn.Module] | None = None  # what else than calibration makes it good


def images() -> tuple[Tensor, Tensor]:
    split = digits()
    return split.x_train, split.y_train


def batches(x: Tensor, y: Tensor, size: int, seed: int = 0) -> Batches:
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    return list(zip(x[order].split(size), y[order].split(size), strict=True))


def perceptron(momentum: float | None = 0.1) -> nn.Sequential:
    def block(inputs: int) -> list[nn.Module]:
        return [nn.Linear(inputs, 32, bias=False), nn.BatchNorm1d(32, momentum=momentum), nn.ReLU()]

    return nn.Sequential(*block(64), *block(32), nn.Linear(32, 10))


def convolutional(channels: int = 8) -> nn.Sequential:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, channels, 3, padding=1, stride=2, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, 2 * channels, 3, padding=1, stride=2, bias=False),
        nn.BatchNorm2d(2 * channels),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * channels, 10),
    )


def train(model: nn.Module, epochs: list[Batches], rate: float = 0.01, parameters: Any = None) -> nn.Module:
    optimizer = torch.optim.Adam(parameters or model.parameters(), lr=rate)
    model.train()
    for epoch in epochs:
        for x, y in epoch:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model


def epochs(number: int, size: int = 64, x: Tensor | None = None, y: Tensor | None = None) -> list[Batches]:
    own = images()
    return [batches(own[0] if x is None else x, own[1] if y is None else y, size, seed) for seed in range(number)]


def accuracy(model: nn.Module, data: Batches) -> float:
    model.eval()
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in data)
    return right / sum(len(y) for _, y in data)


def momentum_too_small() -> Patient:
    return Patient(train(perceptron(momentum=0.001), epochs(4)), epochs(1)[0], "stale-statistics")


def momentum_zero() -> Patient:
    return Patient(train(perceptron(momentum=0.0), epochs(4)), epochs(1)[0], "momentum-zero")


def batches_of_two() -> Patient:
    """Pictures of very different brightness: with two in a batch, each is normalised nearly by itself."""

    def network() -> nn.Sequential:
        first = nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1, stride=2, bias=False)
        return nn.Sequential(*first, nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))

    x, y = images()
    x = x + 4 * torch.randn(len(x), 1, generator=torch.Generator().manual_seed(3))
    pairs = [epoch[:500] for epoch in epochs(2, 2, x, y)]
    model = train(network(), pairs, rate=0.003)
    return Patient(model, pairs[0], "small-batches", lambda: train(network(), epochs(8, 64, x, y)))


class Sequences(nn.Module):
    """Rows of images as sequences of 8 steps, behind which each batch is padded to a length of its own."""

    def __init__(self, masked: bool) -> None:
        super().__init__()
        self.masked = masked
        self.convolutions = nn.ModuleList(
            nn.Conv1d(8 if i == 0 else 32, 32, 3, padding=1, bias=False) for i in (0, 1)
        )
        self.norms = nn.ModuleList(evenorm.BatchNorm1d(32) for _ in (0, 1))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        valid = (torch.arange(x.shape[2]) < 8).expand(len(x), -1) if self.masked else None
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = norm(convolution(x), mask=valid).relu()
        return self.head(x.amax(2))


def padded() -> Patient:
    def pad(data: Batches, seed: int) -> Batches:
        lengths = torch.randint(8, 200, (len(data),), generator=torch.Generator().manual_seed(seed)).tolist()
        return [
            (nn.functional.pad(1 + x.view(-1, 8, 8).transpose(1, 2), (0, length - 8)), y)
            for (x, y), length in zip(data, lengths, strict=True)
        ]

    training = [pad(epoch, seed) for seed, epoch in enumerate(epochs(4))]
    model = train(Sequences(masked=False), training)
    return Patient(model, pad(epochs(1)[0], 99), "padding", lambda: train(Sequences(masked=True), training))


def two_domains() -> Patient:
    """Bright and dark images, each batch of one kind, through the same layers."""

    def both(data: Batches) -> Batches:
        return [(x if number % 2 else 0.7 * x + 2, y) for number, (x, y) in enumerate(data)]

    def mixed() -> nn.Module:
        x, y = images()
        dark = torch.arange(len(x)).unsqueeze(1) % 2 == 0
        return train(perceptron(), epochs(12, 64, torch.where(dark, 0.7 * x + 2, x), y))

    model = train(perceptron(), [both(epoch) for epoch in epochs(6)])
    return Patient(model, both(epochs(1)[0]), "mixed-streams", mixed)


def weights_averaged() -> Patient:
    model = train(perceptron(), epochs(1))
    average = torch.optim.swa_utils.AveragedModel(model)
    for seed in range(4):
        train(model, [batches(*images(), 64, 10 + seed)], rate=0.05)
        average.update_parameters(model)
    return Patient(average, epochs(1)[0], "averaged-weights")


def one_bad_batch() -> Patient:
    epoch = epochs(4)
    model = train(perceptron(), epoch)
    with torch.no_grad():
        model(torch.full((64, 64), torch.nan))
    return Patient(model, epoch[0], "not-finite")


def dropout_before() -> Patient:
    def network(p: float) -> nn.Sequential:
        blocks = [
            part
            for inputs in (64, 48, 48, 48)
            for part in (nn.Linear(inputs, 48), nn.Sigmoid(), nn.Dropout(p), nn.BatchNorm1d(48))
        ]
        return nn.Sequential(*blocks, nn.Linear(48, 10))

    return Patient(
        train(network(0.8), epochs(8)), epochs(1)[0], "dropout-shift", lambda: train(network(0.0), epochs(8))
    )


def frozen_and_drifted() -> Patient:
    """All but the head is frozen with requires_grad=False, and train() goes on moving the statistics."""
    model = train(perceptron(), epochs(4))
    for layer in list(model)[:-1]:
        layer.requires_grad_(False)
    x, y = images()
    train(model, epochs(2, x=2.5 * x.flip(1) + 1, y=y), rate=1e-4, parameters=model[-1].parameters())
    return Patient(model, epochs(1)[0], "frozen-drifted")


def healthy_perceptron() -> Patient:
    return Patient(train(perceptron(), epochs(6)), epochs(1)[0], "")


def healthy_convolutional() -> Patient:
    return Patient(train(convolutional(), epochs(6), rate=0.005), epochs(1)[0], "")


def healthy_frozen() -> Patient:
    model = evenorm.freeze(train(perceptron(), epochs(6)), affine=True)
    return Patient(train(model, epochs(1), rate=1e-3), epochs(1)[0], "")


def healthy_evenorm() -> Patient:
    model = evenorm.convert(train(perceptron(), epochs(4)))
    return Patient(train(model, epochs(2)), epochs(1)[0], "")


SICK = (
    momentum_too_small,
    batches_of_two,
    padded,
    two_domains,
    weights_averaged,
    one_bad_batch,
    dropout_before,
    frozen_and_drifted,
    momentum_zero,
)
HEALTHY = (healthy_perceptron, healthy_convolutional, healthy_frozen, healthy_evenorm)


@cache
def _made(make: Callable[[], Patient]) -> Patient:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def admit(make: Callable[[], Patient]) -> Patient:
    """Return a patient of one's own: trained once for all tests, and copied."""
    return copy.deepcopy(_made(make))
