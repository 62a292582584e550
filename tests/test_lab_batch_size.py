"""The size of the batch: the analysis on made-up trials whose answer is known, and the nets against plain torch."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from evenorm.lab.experiment import Scale
from evenorm.lab.experiments import batch_size
from evenorm.lab.results import Analysis, Verdict
from evenorm.lab.trials import Record, Trial, settings

TEN = Scale(10)


def noise(trial: Trial) -> float:
    """Return the same number in (-1, 1) for the same size and seed."""
    return float(np.random.default_rng([trial.seed, int(trial.arm)]).uniform(-1, 1))


def made_up(gap: float, spread: float = 0.1, repaired: float = 1.0, two: float = 8.0) -> Analysis:
    """Analyse trials with a gap of so many points at size 4 that falls as 1 / size."""

    def record(trial: Trial) -> Record:
        size = int(trial.arm)
        own, loss = 0.95, (0.1 * two if size == 2 else 0.1)
        population = own - (gap * 4 / size + spread * noise(trial)) / 100
        accuracies = {
            "own": own,
            "population": population,
            "frozen": population + repaired / 100 + noise(trial) / 5000,
        }
        rest = {f"{name} loss": 0.1 for name in accuracies} | {
            "train_loss": loss * (1 + 0.01 * noise(trial)),
            "moved": 0.3,
        }
        return {f"{name} accuracy": value for name, value in accuracies.items()} | rest

    return batch_size.analyse({trial: record(trial) for trial in batch_size.plan(TEN)}, TEN)


@pytest.mark.parametrize(
    ("analysis", "expected"),
    [
        (made_up(10.0), Verdict.REPRODUCED),
        (made_up(0.5, 0.03), Verdict.WEAK),  # a gap below its margin
        (made_up(10.0, repaired=0.3), Verdict.WEAK),
        (made_up(10.0, spread=30.0), Verdict.INCONCLUSIVE),
        (made_up(10.0, repaired=0.0), Verdict.INCONCLUSIVE),
        (made_up(-10.0), Verdict.CONTRADICTED),
        (made_up(10.0, two=0.5), Verdict.CONTRADICTED),  # batches of two train better
    ],
)
def test_made_up_trials_get_their_verdict(analysis: Analysis, expected: Verdict) -> None:
    assert analysis.verdict is expected


def test_a_loss_that_is_lost_counts_as_ten() -> None:
    record = {"own accuracy": 0.5, "population accuracy": 0.5, "frozen accuracy": 0.5, "moved": 1.0}
    losses = {"own loss": None, "population loss": 3e9, "frozen loss": None, "train_loss": None}
    analysis = batch_size.analyse({trial: {**record, **losses} for trial in batch_size.plan(TEN)}, TEN)
    assert set(analysis.tables[0].rows[0][5:8]) == {"10.000"}
    assert analysis.verdict is Verdict.INCONCLUSIVE


@pytest.mark.parametrize("size", [2, 4])
def test_parts_of_a_batch_are_normalised_apart(size: int) -> None:
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    cotangent = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))
    y = batch_size.SubBatchNorm(3, 5, size)(x)
    (gradient,) = torch.autograd.grad(y, x, cotangent)
    plain = x.detach().double().requires_grad_()
    parts = [
        nn.functional.batch_norm(part, None, None, training=True)
        for part in plain.transpose(1, 2).reshape(-1, size, 5)
    ]
    expected = torch.stack(parts).view(3, 8, 5).transpose(1, 2)
    (true,) = torch.autograd.grad(expected, plain, cotangent.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient.double(), true, rtol=1e-3, atol=1e-4)


def test_of_two_samples_the_gradient_is_nothing_but_for_eps() -> None:
    x = torch.tensor([[[0.0, 3.0, -2.0, 5.0]]], requires_grad=True)
    layer = batch_size.SubBatchNorm(1, 1, 2)
    (gradient,) = torch.autograd.grad(layer(x)[0, 0, 0] - 3 * layer(x)[0, 0, 3], x)
    assert gradient.abs().max() < 1e-5
    layer.layer.eps = 1.0
    (gradient,) = torch.autograd.grad(layer(x)[0, 0, 0] - 3 * layer(x)[0, 0, 3], x)
    assert gradient.abs().max() > 0.01


def test_frozen_statistics_are_the_training_sets_and_stay() -> None:
    trial = dataclasses.replace(batch_size.plan(Scale(1))[2], settings=settings(steps=10))
    seen: list[nn.Sequential] = []
    freeze = batch_size._frozen

    def spy(network: nn.Sequential, training: batch_size.Samples) -> nn.Sequential:
        frozen = freeze(network, training)
        first = training.x[0].T @ network[0].weight[0].detach().T
        torch.testing.assert_close(frozen[1].layer.running_mean, first.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(frozen[1].layer.running_var, first.var(0, correction=0), rtol=1e-4, atol=1e-5)
        seen.extend([frozen, copy_of(frozen)])
        return frozen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_size, "_frozen", spy)
        batch_size.train([trial])
    trained, before = seen
    assert torch.equal(trained[1].layer.running_mean, before[1].layer.running_mean)
    assert not torch.equal(trained[0].weight, before[0].weight)


def copy_of(network: nn.Sequential) -> nn.Sequential:
    import copy

    return copy.deepcopy(network)


@pytest.mark.parametrize("size", ["2", "32"])
def test_a_stack_equals_its_members_alone(size: str) -> None:
    stack = [
        dataclasses.replace(trial, settings=settings(steps=10))
        for trial in batch_size.plan(Scale(3, quick=True))
        if trial.arm == size
    ]
    assert batch_size.train(stack) == [batch_size.train([trial])[0] for trial in stack]
