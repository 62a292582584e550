"""Sick and healthy networks that the doctor's rules were not made on: drawn at random, on three data sets.

Each case is drawn from a seed: data (wine, breast cancer, digits), perceptron or convolutions, widths, depth,
activation, batch size, optimizer, and how strongly the cause is planted. `python tests/ward.py FIRST LAST` examines
the cases of some seeds and prints what docs/guide/doctor.md shows.
"""

from __future__ import annotations

import random
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from torch import Tensor, nn

import evenorm
from evenorm.doctor.diagnosis import Diagnosis
from evenorm.doctor.findings import Severity

Batches = list[tuple[Tensor, Tensor]]
SOURCES = {"wine": load_wine, "breast cancer": load_breast_cancer, "digits": load_digits}


@dataclass
class Case:
    """A network to be, and the data it is trained on."""

    draw: random.Random
    x: Tensor
    y: Tensor
    data: str
    momentum: float | None = 0.1
    dropout: float = 0.0
    size: int = 64
    masked_length: int = 0

    def __post_init__(self) -> None:
        self.convolves = self.data == "digits" and self.draw.random() < 0.6
        self.size = self.draw.choice((32, 48, 64))
        self.width, self.depth = self.draw.choice((12, 24, 40, 72)), self.draw.choice((1, 2, 3, 4))
        self.activation = self.draw.choice((nn.ReLU, nn.GELU, nn.Tanh, nn.LeakyReLU))
        self.ours = self.draw.random() < 0.3
        self.rate = self.draw.choice((0.003, 0.01))

    def network(self) -> nn.Sequential:
        parts: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8))] if self.convolves else []
        before = 1 if self.convolves else self.x.shape[1]
        kind = (evenorm if self.ours else nn).__dict__["BatchNorm2d" if self.convolves else "BatchNorm1d"]
        for layer in range(self.depth):
            if self.convolves:
                parts.append(nn.Conv2d(before, self.width, 3, padding=1, stride=2 if layer < 2 else 1))
            else:
                parts.append(nn.Linear(before, self.width))
            if self.dropout:
                parts += [self.activation(), nn.Dropout(self.dropout), kind(self.width, momentum=self.momentum)]
            else:
                parts += [kind(self.width, momentum=self.momentum), self.activation()]
            before = self.width
        if self.convolves:
            parts += [nn.AdaptiveAvgPool2d(2), nn.Flatten()]
            before *= 4
        return nn.Sequential(*parts, nn.Linear(before, int(self.y.max()) + 1))

    def epoch(self, size: int | None = None, x: Tensor | None = None, y: Tensor | None = None) -> Batches:
        x, y, size = self.x if x is None else x, self.y if y is None else y, size or self.size
        order = torch.randperm(len(x))
        return [(a, b) for a, b in zip(x[order].split(size), y[order].split(size), strict=True) if len(a) == size]

    def epochs(self, steps: int, **options: object) -> list[Batches]:
        one = len(self.epoch(**options))
        return [self.epoch(**options) for _ in range(max(steps // one, 1))]


def train(case: Case, model: nn.Module, epochs: list[Batches], rate: float | None = None) -> nn.Module:
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(learning, lr=rate or case.rate)
    model.train()
    for epoch in epochs:
        for x, y in epoch:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model


Made = tuple[nn.Module, Batches, set[str]]


def momentum_too_small(case: Case) -> Made:
    case.momentum = case.draw.choice((0.001, 0.002, 0.005))
    return train(case, case.network(), case.epochs(case.draw.choice((60, 150)))), case.epoch(), {"stale-statistics"}


def momentum_zero(case: Case) -> Made:
    case.momentum = 0.0
    return train(case, case.network(), case.epochs(150)), case.epoch(), {"momentum-zero"}


def tiny_batches(case: Case) -> Made:
    size = case.draw.choice((2, 3, 4))
    case.x = case.x + case.draw.choice((2, 4)) * torch.randn(len(case.x), 1)
    model = train(case, case.network(), case.epochs(800, size=size), 0.003)
    return model, case.epoch(size)[:200], {"small-batches", "noisy-statistics"}


class Padded(nn.Module):
    """Convolutions over the features as a sequence, pooled over its length."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for before in [1] + [case.width] * case.draw.choice((1, 2)):
            parts += [nn.Conv1d(before, case.width, 3, padding=1), nn.BatchNorm1d(case.width), nn.ReLU()]
        self.body, self.head = nn.Sequential(*parts), nn.Linear(case.width, int(case.y.max()) + 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).amax(2))


def padding(case: Case) -> Made:
    most = case.draw.choice((4, 8)) * case.x.shape[1]

    def pad(epoch: Batches) -> Batches:
        lengths = [case.draw.randrange(0, most) for _ in epoch]
        return [
            (nn.functional.pad(1 + x.unsqueeze(1), (0, more)), y)
            for more, (x, y) in zip(lengths, epoch, strict=True)
        ]

    model = train(case, Padded(case), [pad(epoch) for epoch in case.epochs(150)])
    return model, pad(case.epoch(min(case.size, 32))), {"padding"}


def streams(case: Case) -> Made:
    kinds = case.draw.choice((2, 3))
    scales = [(1.0, 0.0), (case.draw.choice((0.5, 1.5)), case.draw.choice((2.0, 3.0))), (0.7, -3.0)][:kinds]

    def turn(epoch: Batches) -> Batches:
        order = [number % kinds for number in range(len(epoch))]
        if case.draw.random() < 0.5:
            order.sort()
        return [(scales[kind][0] * x + scales[kind][1], y) for kind, (x, y) in zip(order, epoch, strict=True)]

    model = train(case, case.network(), [turn(epoch) for epoch in case.epochs(200)])
    return model, turn(case.epoch(16)), {"mixed-streams"}


def averaged(case: Case) -> Made:
    model = train(case, case.network(), case.epochs(100))
    average = torch.optim.swa_utils.AveragedModel(model)
    for _ in range(case.draw.choice((3, 6))):
        train(case, model, case.epochs(40), rate=0.05)
        average.update_parameters(model)
    return average, case.epoch(), {"averaged-weights"}


def averaged_by_hand(case: Case) -> Made:
    """Weights averaged into a network that does not say so: known is only that statistics and weights differ."""
    model, data, _ = averaged(case)
    return model.module, data, {"foreign-statistics"}


def momentum_inverted(case: Case) -> Made:
    case.momentum = case.draw.choice((0.9, 0.99))
    return (
        train(case, case.network(), case.epochs(150, size=8)),
        case.epoch(8),
        {"noisy-statistics", "small-batches"},
    )


def cumulative(case: Case) -> Made:
    """All batches weigh the same, those of the first steps' weights too."""
    case.momentum = None
    return (
        train(case, case.network(), case.epochs(case.draw.choice((100, 300)))),
        case.epoch(),
        {"lagging-statistics"},
    )


def not_finite(case: Case) -> Made:
    case.ours = False
    model = train(case, case.network(), case.epochs(150))
    bad = case.epoch()[0][0].clone()
    bad[0] = case.draw.choice((float("nan"), float("inf")))
    with torch.no_grad():
        model(bad)
    return model, case.epoch(), {"not-finite"}


def dropout(case: Case) -> Made:
    case.dropout = case.draw.choice((0.5, 0.7, 0.8))
    case.depth = max(case.depth, 2)
    return train(case, case.network(), case.epochs(200)), case.epoch(), {"dropout-shift"}


class Dropped(nn.Module):
    """Dropout called as a function, which no look at the modules shows."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.body, self.p = case.network(), case.draw.choice((0.5, 0.7))

    def forward(self, x: Tensor) -> Tensor:
        for part in self.body:
            x = nn.functional.dropout(x, self.p, self.training) if isinstance(part, nn.BatchNorm1d) else part(x)
            x = part(x) if isinstance(part, nn.BatchNorm1d) else x
        return x


def dropout_called(case: Case) -> Made:
    case.convolves = case.ours = False
    return train(case, Dropped(case), case.epochs(200)), case.epoch(), {"dropout-shift"}


def healthy_frozen_early(case: Case) -> Made:
    """Statistics frozen after a few steps, and the network trained on with them, as it is then used."""
    model = evenorm.freeze(train(case, case.network(), case.epochs(case.draw.choice((5, 20)))))
    return train(case, model, case.epochs(300), rate=0.01), case.epoch(), set()


def drifted(case: Case) -> Made:
    model = train(case, case.network(), case.epochs(150))
    for layer in list(model)[:-1]:
        layer.requires_grad_(False)
    x = case.draw.choice((2.0, 3.0)) * case.x.flip(1) + 1
    train(case, model, case.epochs(60, x=x), rate=1e-4)
    return model, case.epoch(), {"frozen-drifted"}


def healthy(case: Case) -> Made:
    case.momentum = case.draw.choice((0.1, 0.1, 0.05))
    return train(case, case.network(), case.epochs(case.draw.choice((200, 400)))), case.epoch(), set()


def healthy_frozen(case: Case) -> Made:
    model = train(case, case.network(), case.epochs(250))
    evenorm.freeze(model, affine=True)
    return train(case, model, case.epochs(40), rate=1e-3), case.epoch(), set()


def healthy_calibrated(case: Case) -> Made:
    model = train(case, case.network(), case.epochs(100))
    evenorm.calibrate(model, [x for x, _ in case.epoch()])
    return model, case.epoch(), set()


def healthy_on_test_data(case: Case) -> Made:
    order = torch.randperm(len(case.x))
    kept, test = order[len(order) // 3 :], order[: len(order) // 3]
    x, y = case.x[test], case.y[test]
    case.x, case.y = case.x[kept], case.y[kept]
    return train(case, case.network(), case.epochs(300)), case.epoch(16, x, y), set()


def healthy_in_order(case: Case) -> Made:
    """Data as they lie in the file: wine and breast cancer are sorted by class."""
    model = train(case, case.network(), case.epochs(300))
    data = list(zip(case.x.split(case.size), case.y.split(case.size), strict=True))
    return model, data, set()


def healthy_small_batches(case: Case) -> Made:
    return train(case, case.network(), case.epochs(600, size=8), rate=0.003), case.epoch(8), set()


def healthy_with_noise(case: Case) -> Made:
    """Trained on noisy inputs, examined on clean ones; dropout behind the last batch norm; weight decay."""
    model = case.network()
    model.insert(len(model) - 1, nn.Dropout(0.5))
    noisy = [[(x + 0.2 * torch.randn_like(x), y) for x, y in epoch] for epoch in case.epochs(300)]
    return train(case, model, noisy), case.epoch(), set()


SICK = (
    *(momentum_too_small, momentum_zero, momentum_inverted, tiny_batches, padding, streams, averaged),
    *(averaged_by_hand, not_finite, dropout, cumulative, dropout_called, drifted),
)
HEALTHY = (
    *(healthy, healthy_frozen, healthy_calibrated, healthy_on_test_data, healthy_in_order, healthy_small_batches),
    *(healthy_with_noise, healthy_frozen_early),
)


def admit(make: Callable[[Case], Made], seed: int) -> tuple[Made, str]:
    """Return a patient and the name of its data."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        draw = random.Random(f"{make.__name__} {seed}")
        name = list(SOURCES)[seed % len(SOURCES)]
        table = SOURCES[name]()
        x = torch.tensor(table.data, dtype=torch.float32)
        x = x / 16 if name == "digits" else (x - x.mean(0)) / x.std(0)
        return make(Case(draw, x, torch.tensor(table.target), name)), name


def examine(make: Callable[[Case], Made], seed: int) -> tuple[Diagnosis, set[str], str]:
    (model, data, codes), name = admit(make, seed)
    return evenorm.diagnose(model, data), codes, name


def main(first: int, last: int) -> None:
    rows: dict[str, Counter[str]] = defaultdict(Counter)
    for make in (*SICK, *HEALTHY):
        for seed in range(first, last):
            diagnosis, codes, name = examine(make, seed)
            row, scores = rows[make.__name__], diagnosis.scores
            code = diagnosis.findings[0].code if diagnosis.findings else "nothing"
            grave = bool(diagnosis.findings) and diagnosis.findings[0].severity > Severity.NOTE
            row["all"] += 1
            row["harmed"] += scores is not None and scores.harmful
            if codes:
                row["first"] += code in codes
                row["first, of the harmed"] += code in codes and scores is not None and scores.harmful
                row["anywhere"] += any(one.code in codes for one in diagnosis.findings)
            else:
                row["above a note"] += grave
            if (codes and code not in codes and scores.harmful) or (not codes and grave):
                print(f"    {make.__name__} {seed} ({name}): {code}; {diagnosis.summary}", file=sys.stderr)
        print(make.__name__, dict(rows[make.__name__]), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
