"""Before or after the activation: the verdict of made-up trials, a short real training, and the folds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from evenorm.lab.data import dataset, fold
from evenorm.lab.experiment import Scale
from evenorm.lab.experiments import placement
from evenorm.lab.networks import BatchNorm, Linear, perceptron
from evenorm.lab.results import Analysis, Verdict
from evenorm.lab.trials import Record, Trial, settings
from readers_sentences import untranslated


def analyse(gain: float, *, sigmoid: float | None = None, spread: float = 0.0, loss: float = 0.1) -> Analysis:
    """Analyse trials in which batch norm before the activation gains `gain` in accuracy; its loss is `loss`."""

    def record(trial: Trial) -> Record:
        noise = np.random.default_rng([trial.seed, trial["fold"], len(trial.arm)]).uniform(-1, 1)
        before = trial.arm == "before"
        gained = sigmoid if sigmoid is not None and trial["activation"] == "sigmoid" else gain
        off_best = 0.05 if trial.rate == placement.RATES[1] else 0.0
        return {
            "accuracy": 0.9 + (gained if before else 0.0) + spread * noise - off_best,
            "losses": [loss if before else 0.1] * 10,
            "diverged": 0.0,
            "tested": 360 - (trial["fold"] > 1),
        }

    scale = Scale(10)
    return placement.EXPERIMENT.analyse({trial: record(trial) for trial in placement.plan(scale)}, scale)


@pytest.mark.parametrize(
    ("gain", "sigmoid", "spread", "expected"),
    [
        (0.03, 0.04, 0.01, Verdict.REPRODUCED),
        (0.005, 0.03, 0.001, Verdict.WEAK),
        (0.0, 0.03, 0.01, Verdict.INCONCLUSIVE),
        (0.03, -0.03, 0.01, Verdict.CONTRADICTED),
        (0.01, 0.01, 0.1, Verdict.INCONCLUSIVE),  # too noisy to say
    ],
)
def test_the_verdict_of_made_up_trials(gain: float, sigmoid: float, spread: float, expected: Verdict) -> None:
    assert analyse(gain, sigmoid=sigmoid, spread=spread).verdict is expected


def test_the_numbers_are_exact_where_the_trials_are() -> None:
    analysis = analyse(0.02, loss=0.05)
    assert [endpoint.estimate for endpoint in analysis.endpoints] == pytest.approx([2, 2, 1, 1])
    assert "92.0 % before and 90.0 % after (difference +2.00 points" in analysis.answer
    assert analysis.configuration["best"]["ReLU"] == {"before": 0.3, "after": 0.3}


def test_accuracy_is_over_all_images_not_over_folds() -> None:
    records = [
        {"accuracy": share, "tested": tested, "losses": [1.0], "diverged": 0.0}
        for share, tested in ((1.0, 30), (0.0, 10))
    ]
    assert placement._pooled(records)["accuracy"] == 0.75


def test_every_sentence_has_its_korean() -> None:
    assert not untranslated(analyse(0.02))


@pytest.mark.parametrize("activation", placement.ACTIVATIONS)
@pytest.mark.parametrize("arm", placement.ARMS)
def test_a_stack_equals_separate_trainings(arm: str, activation: str) -> None:
    stack = [
        Trial(placement.NAME, 1, arm, seed, rate, settings(activation=activation, fold=4, steps=25))
        for seed, rate in ((0, 0.3), (1, 0.3), (1, 3.0))
    ]
    assert placement.train(stack) == [placement.train([trial])[0] for trial in stack]


def test_every_sample_is_tested_once_and_seeds_deal_anew() -> None:
    digits = dataset("digits")
    folds = [fold(digits, 3, index) for index in range(5)]
    tested = torch.cat([each.x_test for each in folds]).sum(1).sort().values
    torch.testing.assert_close(tested, torch.cat([digits.x_train, digits.x_test]).sum(1).sort().values)
    assert [len(each.y_train) + len(each.y_test) for each in folds] == [1797] * 5
    other = fold(digits, 4, 0)
    assert len(other.y_test) == len(folds[0].y_test)
    assert not torch.equal(other.x_test, folds[0].x_test)
    assert torch.equal(fold(digits, 3, 0).x_test, folds[0].x_test)


def test_batch_norm_stands_where_it_is_asked_for() -> None:
    def kinds(**options: bool) -> list[str]:
        network = perceptron(1, (4, 3, 2), nn.ReLU, **options)
        return [type(layer).__name__ for layer in network]

    assert kinds(normalise=False) == ["Linear", "ReLU", "Linear"]
    assert kinds(normalise=True) == ["Linear", "BatchNorm", "ReLU", "Linear"]
    assert kinds(normalise=True, after=True) == ["Linear", "ReLU", "BatchNorm", "Linear"]
    for after in (False, True):  # the shift of a batch norm after the activation takes no bias's place
        network = perceptron(1, (4, 3, 2), nn.ReLU, normalise=True, after=after, affine=False)
        (first, _), norms = (
            [layer for layer in network if isinstance(layer, kind)] for kind in (Linear, BatchNorm)
        )
        assert (first.bias is not None) is after
        assert not list(norms[0].parameters())
