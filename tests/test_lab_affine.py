"""Scale and shift: the verdict of made-up trials, and a short real training."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from evenorm.lab.experiment import Scale
from evenorm.lab.experiments import affine
from evenorm.lab.networks import Sigmoid
from evenorm.lab.results import Analysis, Verdict
from evenorm.lab.trials import Record, Trial, settings
from readers_sentences import untranslated


def analyse(left: float, times: float, spread: float = 0.0) -> Analysis:
    """Analyse trials in which a line leaves `left` of the output without γ and β, and `times` as much with them."""

    def record(trial: Trial) -> Record:
        noise = np.random.default_rng([trial.seed, len(trial.arm)]).uniform(-1, 1)
        with_ = trial.arm == "with"
        return {
            "diverged": 0.0,
            "train_loss": (0.02 if with_ else 0.05) * (1 + abs(math.log(trial.rate / 3))),
            "left": left * (times if with_ else 1.0) * 2 ** (spread * noise),
            "straight": 0.4 if with_ else 0.65,
            "density": [1 / 64] * 64,
        }

    scale = Scale(10)
    return affine.EXPERIMENT.analyse({trial: record(trial) for trial in affine.plan(scale)}, scale)


@pytest.mark.parametrize(
    ("left", "times", "spread", "expected"),
    [
        (0.01, 4.0, 0.2, Verdict.REPRODUCED),
        (0.01, 1.5, 0.1, Verdict.WEAK),  # it bends more with γ and β, and not twice as much
        (0.01, 1.0, 0.3, Verdict.INCONCLUSIVE),
        (0.01, 4.0, 3.0, Verdict.INCONCLUSIVE),  # too noisy to say
        (0.01, 0.5, 0.1, Verdict.CONTRADICTED),
        (0.10, 4.0, 0.1, Verdict.CONTRADICTED),  # without γ and β the layer is no line
    ],
)
def test_the_verdict_of_made_up_trials(left: float, times: float, spread: float, expected: Verdict) -> None:
    analysis = analyse(left, times, spread)
    assert analysis.verdict is expected
    assert analysis.configuration["best"]["sigmoid"] == {"without": 3.0, "with": 3.0}


def test_the_numbers_are_exact_where_the_trials_are() -> None:
    analysis = analyse(0.01, 4.0)
    assert [endpoint.estimate for endpoint in analysis.endpoints] == pytest.approx([1, 2, 25, math.log2(2.5)])
    assert "a straight line explained 99.0 % of their output; with them 40 % and 96.0 %" in analysis.answer


def test_every_sentence_has_its_korean() -> None:
    assert not untranslated(analyse(0.01, 4.0))


@pytest.mark.parametrize("activation", affine.ACTIVATIONS)
@pytest.mark.parametrize("arm", affine.ARMS)
def test_a_stack_equals_separate_trainings(arm: str, activation: str) -> None:
    stack = [
        Trial(affine.NAME, 1, arm, seed, rate, settings(activation=activation, steps=20))
        for seed, rate in ((0, 1.0), (1, 1.0), (1, 0.1))
    ]
    assert affine.train(stack) == [affine.train([trial])[0] for trial in stack]


def test_what_a_line_leaves_is_what_least_squares_leave() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 3, 400, generator=generator) * torch.tensor([0.5, 1.0, 4.0])[:, None] + 0.5
    found = affine._bends(nn.Sequential(Sigmoid()), z, Sigmoid)
    for member in range(2):
        left = []
        for unit in z[member].double().numpy():
            output = 1 / (1 + np.exp(-unit))
            _, residual, *_ = np.polyfit(unit, output, 1, full=True)
            left.append(residual[0] / ((output - output.mean()) ** 2).sum())
        assert found["left"][member].item() == pytest.approx(np.mean(left), rel=1e-4)
        assert found["straight"][member].item() == pytest.approx((z[member].abs() <= 1).double().mean().item())
        density = found["density"][member]
        assert density.sum().item() == pytest.approx((z[member].abs() <= 8).double().mean().item())
        assert density[32].item() == pytest.approx(((z[member] >= 0) & (z[member] < 0.25)).double().mean().item())


def test_a_dead_unit_bends_nothing() -> None:
    z = torch.cat([-torch.ones(1, 1, 8), torch.arange(-4.0, 4.0).view(1, 1, 8)], 1)
    left = affine._bends(nn.Sequential(nn.ReLU()), z, nn.ReLU)["left"]
    assert torch.equal(left, affine._bends(nn.Sequential(nn.ReLU()), z[:, 1:], nn.ReLU)["left"])


def test_without_gamma_and_beta_every_units_inputs_are_standardised() -> None:
    trial = Trial(affine.NAME, 1, "without", 0, 1.0, settings(activation="sigmoid", steps=60))
    (record,) = affine.train([trial])
    centres = np.array(affine.EDGES[:-1]) + 1 / 8
    density = np.array(record["density"])
    assert (density * centres).sum() == pytest.approx(0.0, abs=0.1)
    assert (density * centres**2).sum() == pytest.approx(1.0, abs=0.2)
