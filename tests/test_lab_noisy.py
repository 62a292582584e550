"""Shift put back by noise: verdicts of made-up trials, the noise itself, and stacks against separate nets."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evenorm.lab.experiment import Scale
from evenorm.lab.experiments import noisy
from evenorm.lab.noise import Shaken
from evenorm.lab.results import Analysis, Verdict
from evenorm.lab.trials import Record, Trial, settings

TEN = Scale(10)


def made_up(costs: float, gains: float, jumps: float = 1.0, spread: float = 0.002, last: float = 0.1) -> Analysis:
    """Trials in which the noise costs, and batch norm with noise gains, so much; its jumps are doubled."""
    final = {"none": 0.9 - gains, "batch norm": 0.9 + costs, "noisy batch norm": 0.9, "noisy none": last}

    def record(trial: Trial) -> Record:
        deviation = spread * float(np.random.default_rng([trial.seed, len(trial.arm)]).uniform(-1, 1))
        jump = 2 ** (jumps if trial.arm == "noisy batch norm" else 0.0) * 2 ** (10 * deviation)
        accuracy = final[trial.arm] + deviation
        return {
            "accuracy": [accuracy] * 20,
            "final": accuracy,
            "jump_of_mean": jump,
            "jump_of_variance": jump,
            "loss": 0.1 if accuracy > 0.2 else None,
            "first_loss": 2.3,
            "diverged": float(accuracy < 0.2),
            "steps": 200.0,
        }

    return noisy.EXPERIMENT.analyse({trial: record(trial) for trial in noisy.plan(TEN)}, TEN)


@pytest.mark.parametrize(
    ("costs", "gains", "jumps", "spread", "expected"),
    [
        (0.005, 0.05, 1.0, 0.002, Verdict.REPRODUCED),
        (0.005, 0.008, 1.0, 0.002, Verdict.WEAK),  # better than standard by less than a point
        (0.005, 0.0, 1.0, 0.002, Verdict.INCONCLUSIVE),
        (0.10, 0.05, 1.0, 0.002, Verdict.CONTRADICTED),  # the noise costs too much
        (0.005, 0.05, -1.0, 0.002, Verdict.CONTRADICTED),  # the noisy net is the steadier one
        (0.005, 0.05, 1.0, 0.3, Verdict.INCONCLUSIVE),
    ],
)
def test_the_verdict_of_made_up_trials(
    costs: float, gains: float, jumps: float, spread: float, expected: Verdict
) -> None:
    assert made_up(costs, gains, jumps, spread).verdict is expected


def test_what_the_noise_costs_is_negative() -> None:
    assert made_up(0.005, 0.05, 1.0, 0.0).endpoints[0].estimate == pytest.approx(-0.5)


@pytest.mark.parametrize(("last", "expected"), [(0.1, Verdict.REPRODUCED), (0.6, Verdict.CONTRADICTED)])
def test_whether_noise_stops_the_standard_net_is_judged_beside_the_claim(last: float, expected: Verdict) -> None:
    analysis = made_up(0.005, 0.05, last=last)
    assert analysis.endpoints[4].verdict is expected
    assert analysis.verdict is Verdict.REPRODUCED
    assert analysis.tables[0].rows[3][-2:] == (("0", "10") if last < 0.2 else ("10", "0"))


def test_the_noise_is_that_of_the_paper() -> None:
    """Of x = 0 and x = 1 the outputs are m and s + m: μ in ±0.5, σ in 1 to 1.25, both ±0.1 or 0.1 about them."""
    zero, one = (Shaken([7], "noise", noisy=True)(torch.full((1, 2000, 500), value)) for value in (0.0, 1.0))
    m, s = zero[0], (one - zero)[0]
    mu, sigma = m.mean(1), s.mean(1)
    assert mu.abs().max() < 0.52
    assert mu.std().item() == pytest.approx(1 / 12**0.5, rel=0.05)
    assert (m - mu[:, None]).abs().max() < 0.12
    assert (m - mu[:, None]).std().item() == pytest.approx(0.2 / 12**0.5, rel=0.02)
    assert 0.98 < sigma.min() < 1.02
    assert 1.23 < sigma.max() < 1.27
    assert (s - sigma[:, None]).std().item() == pytest.approx(0.1, rel=0.02)


def test_noise_is_drawn_anew_at_every_call_and_by_each_member_alone() -> None:
    x = torch.zeros(2, 3, 4)
    pair, alone = Shaken([1, 2], "noise", noisy=True), Shaken([2], "noise", noisy=True)
    first, second = pair(x), pair(x)
    assert not torch.equal(first, second)
    assert torch.equal(first[1:], alone(x[1:]))
    assert torch.equal(second[1:], alone(x[1:]))


def test_moments_are_those_of_what_comes_out() -> None:
    for layer in (Shaken([1], "noise", noisy=True), Shaken([1], "noise", noisy=False)):
        y = layer(torch.randn(1, 3, 50, generator=torch.Generator().manual_seed(0)))
        torch.testing.assert_close(layer.mean, y.mean(2))
        torch.testing.assert_close(layer.variance, y.var(2, correction=0))


@pytest.mark.parametrize("arm", noisy.ARMS)
def test_a_stack_is_its_members_trained_apart(arm: str) -> None:
    trials = [Trial("noisy", 1, arm, seed, noisy.RATE, settings(steps=20)) for seed in (0, 1)]
    together, (alone,) = noisy.train(trials), noisy.train(trials[1:])
    assert together[1] == alone
    assert together[0] != alone
    assert len(alone["accuracy"]) == 2
