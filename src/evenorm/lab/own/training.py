"""One network for any table: fully connected, ReLU, and the arms that the six questions compare.

Legend as in `networks`: S members, activations (S, C, N).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor, nn

from evenorm.lab.data import Split
from evenorm.lab.language import Text
from evenorm.lab.networks import BatchNorm, Linear, initialise_
from evenorm.lab.own.preparing import CLASSIFICATION, REGRESSION, OwnData
from evenorm.lab.regularisers import Dropout
from evenorm.lab.training import (
    Criterion,
    Curves,
    cross_entropy,
    descend,
    diverged,
    final_loss,
    test_samples,
    training_samples,
)
from evenorm.lab.trials import Record, Trial

HIDDEN = (64, 64, 64)
BATCH = 64  # or a quarter of the training set, where that is less
EVALUATIONS = 40  # during training
SEEN, SEEN_AT_LAST = 500, 2000  # test rows, during training and after it
DROPPED = 0.3

Grade: TypeAlias = "Callable[[Tensor, Tensor], Tensor]"  # answers (S, outputs, N), y (S, N) -> score (S,)


@dataclass(frozen=True)
class Task:
    """What differs between predicting a class and predicting a number."""

    criterion: Criterion
    grade: Grade  # from 0 to 1
    score: Text  # what the grade is called


def _accuracy(answers: Tensor, y: Tensor) -> Tensor:
    finite = torch.isfinite(answers).all(1)
    return ((answers.argmax(1) == y) & finite).float().mean(1)


def _squared(answers: Tensor, y: Tensor) -> Tensor:
    return (answers[:, 0] - y).square()


def _explained(answers: Tensor, y: Tensor) -> Tensor:
    """Return R², 0 where the mean of the test rows would have been as good or where a member diverged."""
    left = _squared(answers, y).mean(1) / y.var(1, correction=0).clamp_min(1e-12)
    return (1 - left).nan_to_num(0.0, 0.0, 0.0).clamp_min(0.0)


TASKS = {
    CLASSIFICATION: Task(cross_entropy, _accuracy, Text("test accuracy", "테스트 정확도")),
    REGRESSION: Task(_squared, _explained, Text("explained test variance (R²)", "설명된 테스트 분산 (R²)")),
}


@dataclass(frozen=True)
class Arm:
    """A network to compare: where its batch norms stand, and what else it has."""

    words: Text
    norm: str = ""  # "before" or "after" each activation, or "first", on the input alone
    raw: bool = False  # the columns in the file's own units
    scale: float = 1.0  # of the initial weights, in units of He's
    dropout: bool = False


ARMS = {
    "none": Arm(Text("without batch norm", "배치 정규화 없음")),
    "before": Arm(Text("batch norm before the activation", "활성화 앞 배치 정규화"), "before"),
    "after": Arm(Text("batch norm after the activation", "활성화 뒤 배치 정규화"), "after"),
    "raw": Arm(Text("raw columns", "원래 값의 열"), raw=True),
    "raw, first": Arm(Text("raw columns, batch norm first", "원래 값의 열, 입력에 배치 정규화"), "first", raw=True),
    "none, small": Arm(Text("weights × 0.1, without", "가중치 × 0.1, 없음"), scale=0.1),
    "none, large": Arm(Text("weights × 10, without", "가중치 × 10, 없음"), scale=10.0),
    "before, small": Arm(Text("weights × 0.1, with batch norm", "가중치 × 0.1, 배치 정규화"), "before", scale=0.1),
    "before, large": Arm(Text("weights × 10, with batch norm", "가중치 × 10, 배치 정규화"), "before", scale=10.0),
    "none, dropout": Arm(Text("dropout, without batch norm", "드롭아웃, 배치 정규화 없음"), dropout=True),
    "before, dropout": Arm(Text("dropout and batch norm", "드롭아웃과 배치 정규화"), "before", dropout=True),
}


def batch_size(train_rows: int) -> int:
    """Return 64, or a quarter of the training rows where that is less."""
    return min(BATCH, train_rows // 4)


def network_of(arm: Arm, inputs: int, outputs: int, seeds: Sequence[int]) -> nn.Sequential:
    """Return one network a seed, inputs-64-64-64-outputs, initialised by it."""
    members = len(seeds)
    layers: list[nn.Module] = [BatchNorm(members, inputs)] if arm.norm == "first" else []
    for index, (wide, narrow) in enumerate(pairwise((inputs, *HIDDEN))):
        layers.append(Linear(members, wide, narrow, bias=arm.norm != "before"))
        block: list[nn.Module] = [nn.ReLU()]
        if arm.norm in ("before", "after"):
            block.insert(0 if arm.norm == "before" else 1, BatchNorm(members, narrow))
        layers += block
        if arm.dropout:
            layers.append(Dropout(seeds, f"dropout {index}", DROPPED))
    network = nn.Sequential(*layers, Linear(members, HIDDEN[-1], outputs))
    initialise_(network, seeds, lambda width: arm.scale * math.sqrt(2 / width))
    return network


def train(trials: Sequence[Trial], data: OwnData) -> list[Record]:
    """Train one stack: trials that differ in seed and rate alone."""
    arm, task, steps = ARMS[trials[0].arm], TASKS[data.task], int(trials[0]["steps"])
    splits = _splits(trials, data, arm)
    test = test_samples(splits)
    seen = type(test)(test.x[:, :, :SEEN], test.y[:, :SEEN])
    last = type(test)(test.x[:, :, :SEEN_AT_LAST], test.y[:, :SEEN_AT_LAST])
    network = network_of(arm, splits[0].features, data.outputs, [trial.seed for trial in trials])
    curves, losses, every = Curves(len(trials)), [], steps // EVALUATIONS
    for step, loss in descend(
        network,
        training_samples(splits),
        trials,
        batch=batch_size(data.train_rows),
        steps=steps,
        criterion=task.criterion,
    ):
        losses.append(loss)
        if step % every == 0:
            curves.append(score=_graded(network, seen.x, seen.y, task.grade))
    history = torch.stack(losses)
    curves.put(
        diverged=diverged(history),
        first_loss=history[0],
        train_loss=final_loss(history),
        final=_graded(network, last.x, last.y, task.grade),
    )
    return curves.records()


def _splits(trials: Sequence[Trial], data: OwnData, arm: Arm) -> list[Split]:
    """Return each trial's split; where all have the same one, the same object, so that it is not copied."""
    drawn = {trial.seed: data.split(trial.seed) for trial in trials}
    if not arm.raw:
        standardised = {id(split): split.standardised() for split in drawn.values()}
        drawn = {seed: standardised[id(split)] for seed, split in drawn.items()}
    return [drawn[trial.seed] for trial in trials]


@torch.no_grad()
def _graded(network: nn.Module, x: Tensor, y: Tensor, grade: Grade) -> Tensor:
    network.eval()
    return grade(network(x), y)
