"""Overfitting: the analysis on made-up trials whose answer is known, and its pieces against plain torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from evenorm.lab.data import digits
from evenorm.lab.experiment import Scale
from evenorm.lab.experiments import overfitting
from evenorm.lab.experiments.overfitting_cells import NOISY_SIZES, NOTHING
from evenorm.lab.networks import initialise_, perceptron
from evenorm.lab.regularisers import Dropout, Lasso, Ridge
from evenorm.lab.results import Analysis, Verdict
from evenorm.lab.training import descend, training_samples
from evenorm.lab.trials import PILOT_SEEDS, Record, Trial, settings, stacks

TEN = Scale(10)


def made_up(loss: Callable[[Trial], float], slope: float = -1.0) -> Analysis:
    def record(trial: Trial) -> Record:
        final = math.exp(loss(trial))
        curve = {"accuracy": [0.9] * 16, "test_loss": [final] * 16, "train_loss": [0.01] * 16}
        noise = [size**slope for size in NOISY_SIZES]
        rest = {"unused_loss": final, "few": 200.0, "of": 1437.0, "test_noise": noise, "training_noise": noise}
        return {**curve, **rest}

    return overfitting.analyse({trial: record(trial) for trial in overfitting.plan(TEN)}, TEN)


def noise(trial: Trial) -> float:
    """Return the same number in (-1, 1) for the same cell and seed."""
    cell = [trial.seed, len(trial.arm), len(trial["regulariser"])]
    return float(np.random.default_rng(cell).uniform(-1, 1))


@pytest.mark.parametrize(
    ("lower", "gain_without", "gain_with", "spread", "expected"),
    [
        (0.3, 0.3, 0.0, 0.02, Verdict.REPRODUCED),
        (0.05, 0.3, 0.0, 0.01, Verdict.WEAK),  # a lower loss, by less than a tenth
        (0.3, 0.04, 0.0, 0.01, Verdict.WEAK),  # less gain, by less than the margin
        (0.3, 0.1, 0.1, 0.05, Verdict.INCONCLUSIVE),  # as much gain as without
        (0.3, 0.3, 0.0, 2.0, Verdict.INCONCLUSIVE),
        (-0.3, 0.3, 0.0, 0.02, Verdict.CONTRADICTED),
        (0.3, 0.0, 0.3, 0.02, Verdict.CONTRADICTED),  # more gain
    ],
)
def test_made_up_trials_get_their_verdict(
    lower: float, gain_without: float, gain_with: float, spread: float, expected: Verdict
) -> None:
    def loss(trial: Trial) -> float:
        with_ = trial.arm == "batch norm"
        gain = 0.0 if trial["regulariser"] == NOTHING else (gain_with if with_ else gain_without)
        return -1.0 - lower * with_ - gain + spread * noise(trial)

    assert made_up(loss).verdict is expected


def test_pilot_seeds_choose_rate_and_strength_on_samples_left_over() -> None:
    def loss(trial: Trial) -> float:
        pilot = trial.seed in PILOT_SEEDS
        chosen = trial.rate == 0.1 and trial["strength"] in (0.0, 0.125, 1e-3)
        return -2.0 if chosen == pilot else -1.0  # what the pilots like is what the others do worst with

    analysis = made_up(loss)
    assert set(map(str, analysis.configuration.values())) == {
        str({"strength": strength, "rate": 0.1}) for strength in (0.0, 0.125, 1e-3)
    }
    assert analysis.endpoints[0].estimate == 0.0
    assert {row[4] for row in analysis.tables[0].rows} == {f"{math.exp(-1):.3f}"}


def test_each_regulariser_has_its_own_gain() -> None:
    gains = {NOTHING: 0.0, "dropout": 0.3, "L1": 0.2, "L2": 0.1}

    def loss(trial: Trial) -> float:
        return -1.0 - gains[trial["regulariser"]] * (trial.arm == "none")

    estimates = [endpoint.estimate for endpoint in made_up(loss).endpoints[1:5]]
    assert estimates == pytest.approx([0.3, 0.3, 0.2, 0.1])  # the best one's, then each one's


def test_intervals_are_widened_by_the_share_of_samples_in_common() -> None:
    first = made_up(lambda trial: -1 + 0.1 * noise(trial)).endpoints[0]
    cells = [
        Trial("", 1, arm, seed, 0.1, settings(regulariser=NOTHING))
        for arm in overfitting.NORMS
        for seed in range(10)
    ]
    values = 0.1 * np.array([noise(cell) for cell in cells])
    half = 2.262157 * (values[:10] - values[10:]).std(ddof=1) * math.sqrt(1 / 10 + 200 / 1237)
    assert first.high - first.estimate == pytest.approx(half, rel=1e-6)


@pytest.mark.parametrize(("slope", "expected"), [(-1.1, Verdict.REPRODUCED), (-2.0, Verdict.CONTRADICTED)])
def test_the_slope_is_judged_around_minus_one(slope: float, expected: Verdict) -> None:
    endpoint = made_up(lambda trial: -1 + 0.01 * noise(trial), slope).endpoints[-1]
    assert endpoint.estimate == pytest.approx(slope + 1)
    assert endpoint.verdict is expected


def test_a_net_that_is_lost_counts_as_a_loss_of_ten() -> None:
    records = {
        trial: {
            "accuracy": [0.1], "test_loss": [None], "train_loss": [None], "unused_loss": None,
            "few": 200.0, "of": 1437.0, "test_noise": [None] * 5, "training_noise": [None] * 5,
        }
        for trial in overfitting.plan(TEN)
    }  # fmt: skip
    analysis = overfitting.analyse(records, TEN)
    assert analysis.verdict is Verdict.INCONCLUSIVE
    assert {row[4] for row in analysis.tables[0].rows} == {"10.000"}


@pytest.mark.parametrize("regulariser", list(overfitting.STRENGTHS))
def test_a_stack_equals_its_members_alone(regulariser: str) -> None:
    short = [
        dataclasses.replace(trial, settings=tuple((k, 25 if k == "steps" else v) for k, v in trial.settings))
        for trial in overfitting.plan(Scale(1, quick=True))
        if trial["regulariser"] == regulariser and trial.arm == "batch norm"
    ]
    (stack,) = stacks(short, 26)
    together = overfitting.train(stack)
    assert together == [overfitting.train([trial])[0] for trial in stack]


def test_the_samples_of_a_seed_are_its_own_and_no_test_image() -> None:
    (first, left), (second, _) = (overfitting.few(digits(), seed) for seed in (0, 1))
    assert (len(first.y_train), len(first.y_test), len(left.y_test)) == (200, 360, 1000)
    assert torch.equal(first.x_test, digits().x_test)
    assert torch.equal(left.x_train, first.x_train)
    assert not torch.equal(first.x_train, second.x_train)
    drawn, unused = ({tuple(row) for row in x.tolist()} for x in (left.x_train, left.x_test))
    assert not drawn & unused
    assert overfitting.few_of(100) == 50


def test_dropout_drops_its_share_from_streams_of_the_members_own() -> None:
    x = torch.ones(3, 50, 400)
    masks = Dropout([5, 6, 5], "a", 0.25)(x)
    assert masks.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (masks == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[0], masks[1])
    assert torch.equal(masks[1:2], Dropout([6], "a", 0.25)(x[:1]))
    assert not torch.equal(masks[1:2], Dropout([6], "b", 0.25)(x[:1]))
    bits = Dropout([0], "a", 0.5)._bytes(torch.Generator().manual_seed(0), 80_000)
    assert torch.bincount(bits.long(), minlength=256).min() > 200  # every byte, the eighth of a word too
    layer = Dropout([5, 6, 5], "a", 0.25)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), x)


@pytest.mark.parametrize(
    ("penalty", "added"),
    [
        (Lasso(0.01), lambda weight: 0.01 * weight.abs().sum()),
        (Ridge(0.01), lambda weight: 0.005 * weight.square().sum()),
    ],
)
def test_a_penalty_is_a_term_of_the_loss(
    penalty: Callable[[torch.Tensor], torch.Tensor], added: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    weight = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(added(weight), weight)
    torch.testing.assert_close(penalty(weight.detach()), gradient)
    trials = [Trial("t", 1, "a", seed, 0.5) for seed in (0, 1)]
    samples = training_samples([digits()] * 2)
    before, after = [], []
    for penalised in (False, True):
        network = perceptron(2, (64, 8, 10), torch.nn.ReLU, normalise=False)
        initialise_(network, [0, 1], lambda inputs: 0.1)
        layer = network[0]
        before.append(layer.weight.detach().clone())
        next(
            descend(
                network,
                samples,
                trials,
                batch=60,
                steps=1,
                penalties={layer.weight: penalty} if penalised else None,
            )
        )
        after.append(layer.weight.detach().clone())
    torch.testing.assert_close(after[0] - after[1], 0.5 * penalty(before[0]), rtol=1e-4, atol=1e-7)
