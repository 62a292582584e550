"""Internal covariate shift: verdicts of made-up trials, the measures, and stacks against separate nets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import nn

from evenorm.lab.data import digits
from evenorm.lab.experiment import Scale
from evenorm.lab.experiments import shift
from evenorm.lab.gradients import blocks, parameters_of, shift_of_gradients
from evenorm.lab.networks import initialise_, perceptron
from evenorm.lab.results import Analysis, Verdict
from evenorm.lab.training import batch_order, cross_entropy, descend, training_samples
from evenorm.lab.trials import Record, Trial, settings

TEN = Scale(10)


def noise(trial: Trial) -> float:
    return float(np.random.default_rng([trial.seed, len(trial.arm)]).uniform(-1, 1))


def made_up(drift: float, spread: float, cosine: float = 0.0, noisy: float = 0.1) -> Analysis:
    """Trials whose drift and spread are so many doublings larger without batch norm, and the cosine smaller."""

    def record(trial: Trial) -> Record:
        doublings = noisy * noise(trial) + (0 if trial.arm == "batch norm" else 1)
        more = cosine if trial.arm == "batch norm" else 0.0
        return {
            "drift": [1e-9, 2 ** (drift * doublings), 1e9],
            "spread": [1e-9, 2 ** (spread * doublings), 1e9],
            "typical": [[-1.0, 0.0, 1.0]] * 3,
            "cosine": [0.5 + more + 0.01 * noise(trial)] * 3,
            "distance": [0.1] * 3,
            "loss": 0.1 + 0.01 * noise(trial),
        }

    return shift.EXPERIMENT.analyse({trial: record(trial) for trial in shift.plan(TEN)}, TEN)


@pytest.mark.parametrize(
    ("drift", "spread", "noisy", "expected"),
    [
        (3, 5, 0.1, Verdict.REPRODUCED),
        (3, 0.5, 0.1, Verdict.WEAK),  # the spread changes less, but not by half
        (3, 0, 0.1, Verdict.INCONCLUSIVE),
        (-3, 5, 0.1, Verdict.CONTRADICTED),
        (3, 5, 9.0, Verdict.INCONCLUSIVE),
    ],
)
def test_the_verdict_of_made_up_trials(drift: float, spread: float, noisy: float, expected: Verdict) -> None:
    assert made_up(drift, spread, noisy=noisy).verdict is expected


@pytest.mark.parametrize(
    ("cosine", "expected"),
    [(0.4, Verdict.REPRODUCED), (0.03, Verdict.WEAK), (0.0, Verdict.INCONCLUSIVE), (-0.4, Verdict.CONTRADICTED)],
)
def test_gradients_are_judged_beside_the_claim(cosine: float, expected: Verdict) -> None:
    analysis = made_up(3, 5, cosine)
    assert [endpoint.verdict for endpoint in analysis.endpoints[2:4]] == [expected] * 2
    assert analysis.verdict is Verdict.REPRODUCED


def short(net: str, arm: str, seeds: Sequence[int] = (0, 1)) -> list[Record]:
    trials = [
        Trial("shift", 1, arm, seed, shift.RATES[net], settings(net=net, steps=20 if net == "sigmoid" else 4))
        for seed in seeds
    ]
    return shift.train(trials)


@pytest.mark.parametrize("arm", shift.ARMS)
@pytest.mark.parametrize("net", shift.RATES)
def test_a_stack_is_its_members_trained_apart(net: str, arm: str) -> None:
    together = short(net, arm)
    (alone,) = short(net, arm, (1,))
    assert together[1] == alone


def gradients_after_one_step(rate: float) -> tuple[torch.Tensor, torch.Tensor]:
    trials = [Trial("", 1, "batch norm", seed, rate) for seed in (0, 1)]
    samples = training_samples([digits()] * 2)
    network = perceptron(2, (64, 12, 12, 10), nn.ReLU, normalise=True)
    initialise_(network, [0, 1], lambda inputs: 0.2)
    before = parameters_of(network)
    for _ in descend(network, samples, trials, batch=30, steps=1):
        pass
    order = torch.stack([batch_order(seed, samples.y.shape[1], 30, 1)[0] for seed in (0, 1)])
    after = parameters_of(network)
    cosine, distance = shift_of_gradients(network, before, samples.batch(order), cross_entropy)
    assert all(torch.equal(a, b) for a, b in zip(after, parameters_of(network), strict=True))  # put back
    return cosine, distance


def test_no_step_is_no_shift_and_a_larger_step_a_larger_one() -> None:
    cosine, distance = gradients_after_one_step(0.0)
    torch.testing.assert_close(cosine, torch.ones(2, 2))
    assert not distance.any()
    small, large = (gradients_after_one_step(rate)[1] for rate in (0.01, 0.3))
    assert (small < large).all()


def test_the_shift_of_the_last_layer_written_out() -> None:
    """G′ of the last block: every earlier parameter as after the step, its own as before."""
    trials = [Trial("", 1, "none", 0, 0.3)]
    samples = training_samples([digits()])
    network = perceptron(1, (64, 12, 10), nn.ReLU, normalise=False)
    initialise_(network, [0], lambda inputs: 0.2)
    old = [parameter.detach()[0].clone() for block in blocks(network) for parameter in block]
    before = parameters_of(network)
    for _ in descend(network, samples, trials, batch=30, steps=1):
        pass
    new = [parameter.detach()[0].clone() for block in blocks(network) for parameter in block]
    batch = samples.batch(batch_order(0, samples.y.shape[1], 30, 1))
    cosine, distance = shift_of_gradients(network, before, batch, cross_entropy)

    def gradient(first: Sequence[torch.Tensor]) -> torch.Tensor:
        last = old[2].clone().requires_grad_()
        logits = last @ torch.relu(first[0] @ batch.x[0] + first[1]) + old[3]
        loss = nn.functional.cross_entropy(logits.T, batch.y[0])
        return torch.autograd.grad(loss, last)[0].flatten()

    g, moved = gradient(old), gradient(new)
    torch.testing.assert_close(cosine[0, 0], nn.functional.cosine_similarity(g, moved, dim=0))
    torch.testing.assert_close(distance[0, 0], (g - moved).norm() / g.norm())


def test_percentiles_are_those_of_the_sorted_values() -> None:
    x = torch.randn(2, 3, 500, generator=torch.Generator().manual_seed(0))
    sorted_values = x.sort(2).values
    np.testing.assert_array_equal(shift._percentiles(x), sorted_values[:, :, [75, 250, 425]])


def test_a_lost_net_is_no_agreement() -> None:
    assert shift.average("cosine")({"cosine": [None, 1.0]}) == 0.5
