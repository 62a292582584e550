"""The landscape: verdicts of made-up trials, the walk along the gradient, and stacks against separate nets."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from evenorm.lab.experiment import Scale
from evenorm.lab.experiments import landscape
from evenorm.lab.gradients import along_gradient
from evenorm.lab.networks import Linear
from evenorm.lab.results import Analysis, Verdict
from evenorm.lab.training import Samples
from evenorm.lab.trials import Record, Trial, settings

TEN = Scale(10)
MOMENTS = 50


def made_up(width: float, distance: float, smoothness: float, noisy: float = 0.05) -> Analysis:
    """Trials whose measures are so many powers of ten larger without batch norm."""

    def record(trial: Trial) -> Record:
        spread = noisy * float(np.random.default_rng([trial.seed, len(trial.arm)]).uniform(-1, 1))
        more = [0.0] * 3 if trial.arm == "batch norm" else [width, distance, smoothness]
        wide, far, bent = (10 ** (power + spread) for power in more)
        same = {
            "lowest": 0.0,
            "nearest": 0.1,
            "loss": 0.5,
            "cosine": 0.5 + spread,
            "relative": 1.0,
            "invariant": 1.0,
        }
        found = same | {"highest": wide, "farthest": far, "smoothness": bent}
        return {"final": 0.1} | {name: [value] * MOMENTS for name, value in found.items()}

    return landscape.EXPERIMENT.analyse({trial: record(trial) for trial in landscape.plan(TEN)}, TEN)


@pytest.mark.parametrize(
    ("powers", "noisy", "expected"),
    [
        ((1.0, 1.0, 1.0), 0.05, Verdict.REPRODUCED),
        ((1.0, 1.0, 0.15), 0.05, Verdict.WEAK),
        ((1.0, 1.0, 0.0), 0.05, Verdict.INCONCLUSIVE),
        ((1.0, 1.0, -1.0), 0.05, Verdict.CONTRADICTED),
        ((1.0, 1.0, 1.0), 5.0, Verdict.INCONCLUSIVE),
    ],
)
def test_the_verdict_of_made_up_trials(powers: tuple[float, float, float], noisy: float, expected: Verdict) -> None:
    assert made_up(*powers, noisy=noisy).verdict is expected


def test_moments_of_a_lost_net_are_left_out() -> None:
    lost: Record = {"farthest": [None, 100.0, 100.0], "cosine": [None, 0.0, 0.0]}
    kept: Record = {"farthest": [1e9, 10.0, 10.0], "cosine": [1.0, 0.2, 0.3]}
    assert landscape.ratio((lost, kept), landscape.series("farthest")) == pytest.approx(1.0)
    assert landscape.turn((lost, kept)) == pytest.approx(0.25)
    assert landscape.width({"lowest": [1.0, None], "highest": [3.0, None]}) == [2.0, None]
    assert landscape.ratio((lost, kept), landscape.series("farthest"), 0.1) == 0.0  # nothing left


def test_the_early_share_is_the_first_moments() -> None:
    without: Record = {"farthest": [1000.0] + [1.0] * 9}
    with_: Record = {"farthest": [1.0] * 10}
    assert landscape.ratio((without, with_), landscape.series("farthest"), 0.1) == pytest.approx(3.0)
    assert landscape.ratio((without, with_), landscape.series("farthest")) == pytest.approx(0.0)


def test_a_quadratic_is_walked_as_it_can_be_written_down() -> None:
    """Loss ½ h w² of one weight: g = h w, g′ = h (1 − length · h) w, and β = h at every length."""
    curvature, weights = torch.tensor([0.5, 4.0]), torch.tensor([3.0, -2.0])
    network = nn.Sequential(Linear(2, 1, 1, bias=False))
    with torch.no_grad():
        network[0].weight.copy_(weights.view(2, 1, 1))
    samples = Samples(torch.ones(2, 1, 1), torch.zeros(2, 1, dtype=torch.int64))

    def half_square(answers: Tensor, y: Tensor) -> Tensor:
        return 0.5 * curvature[:, None] * answers[:, 0].square()

    lengths = [0.1, 0.5]
    found = along_gradient(network, samples, lengths, half_square)
    moved = (1 - torch.tensor(lengths) * curvature[:, None]) * weights[:, None]
    torch.testing.assert_close(found.loss, 0.5 * curvature * weights**2)
    torch.testing.assert_close(found.losses, 0.5 * curvature[:, None] * moved**2)
    torch.testing.assert_close(found.norm, (curvature * weights).abs())
    torch.testing.assert_close(found.weights, weights**2)
    torch.testing.assert_close(
        found.distances / torch.tensor(lengths) / found.norm[:, None], curvature[:, None].expand(2, 2)
    )
    torch.testing.assert_close(found.cosines, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    torch.testing.assert_close(network[0].weight.detach().flatten(), weights)  # put back


@pytest.mark.parametrize("arm", landscape.ARMS)
def test_a_stack_is_its_members_trained_apart(arm: str) -> None:
    trials = [Trial("landscape", 1, arm, seed, landscape.RATE, settings(steps=20)) for seed in (0, 1)]
    together, (alone,) = landscape.train(trials), landscape.train(trials[1:])
    assert together[1] == alone
    assert together[0] != alone
    assert all(math.isfinite(value) for value in alone["highest"])
