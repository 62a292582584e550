"""Weight decay: the analysis on made-up trials whose answer is known, and what it measures against plain torch."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from evenorm.lab.data import digits
from evenorm.lab.experiment import Scale
from evenorm.lab.experiments import weight_decay
from evenorm.lab.networks import perceptron
from evenorm.lab.results import Analysis, Verdict
from evenorm.lab.trials import Record, Trial

TEN = Scale(10)


def made_up(ratio: float = 1.0, power: float = 0.5, spread: float = 0.02, difference: float = 1e-14) -> Analysis:
    def record(trial: Trial) -> Record:
        if trial.arm == weight_decay.GROWING:
            return {"difference": difference, "growth": 13.0}
        product = trial["product"]
        noise = float(np.random.default_rng([trial.seed, round(1e6 * product)]).uniform(-1, 1))
        middle = weight_decay.PRODUCTS[1]
        turned = ratio * math.sqrt(2 * middle) * (product / middle) ** power * math.exp(spread * noise)
        unsettled = [9.0] * 60 + [turned] * 40  # what comes before the lengths settle does not count
        return {f"angle {layer}": unsettled for layer in (1, 2, 3)} | {
            f"length {layer}": [2.0] * 100 for layer in (1, 2, 3)
        }

    return weight_decay.analyse({trial: record(trial) for trial in weight_decay.plan(TEN)}, TEN)


@pytest.mark.parametrize(
    ("analysis", "expected"),
    [
        (made_up(), Verdict.REPRODUCED),
        (made_up(ratio=1.2), Verdict.REPRODUCED),
        (made_up(ratio=1.24, spread=0.1), Verdict.INCONCLUSIVE),
        (made_up(ratio=2.0), Verdict.CONTRADICTED),
        (made_up(power=1.0), Verdict.CONTRADICTED),
        (made_up(spread=2.0), Verdict.INCONCLUSIVE),
        (made_up(difference=1e-8), Verdict.WEAK),  # not the same to 9 places
    ],
)
def test_made_up_trials_get_their_verdict(analysis: Analysis, expected: Verdict) -> None:
    assert analysis.verdict is expected


def test_slope_and_ratio_are_what_was_put_in() -> None:
    endpoints = made_up(ratio=1.1, power=0.55, spread=0.0).endpoints
    assert endpoints[0].estimate == pytest.approx(0.05)
    assert endpoints[2].estimate == pytest.approx(math.log(1.1))
    assert endpoints[-1].estimate == pytest.approx(14)


def test_angles_are_exact_however_small() -> None:
    base = torch.tensor([[[3.0, 0.0]], [[0.0, 2.0]]], dtype=torch.float64)
    for true in (1e-6, 1e-3, 1.0, 3.0):
        turn = torch.tensor(
            [[math.cos(true), math.sin(true)], [-math.sin(true), math.cos(true)]], dtype=torch.float64
        )
        turned = 1.7 * base @ turn
        assert weight_decay.angle(base, turned).tolist() == pytest.approx([true, true], rel=1e-6)
    assert weight_decay.angle(base, 0.5 * base).tolist() == [0.0, 0.0]


def test_weights_before_batch_norm_are_free_of_scale_and_no_others() -> None:
    network = perceptron(2, (64, 8, 8, 10), torch.nn.ReLU, normalise=True).double()
    for index, parameter in enumerate(network.parameters()):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(index))
    x = digits().x_train[:30].T.double().expand(2, -1, -1)
    free = weight_decay.scale_free(network)
    assert [weight.shape[1:] for weight in free] == [(8, 64), (8, 8)]
    before = network(x)
    with torch.no_grad():
        for weight in free:
            weight.mul_(7)
    torch.testing.assert_close(network(x), before, rtol=1e-3, atol=1e-3)  # but for ε


def test_a_fifth_of_the_labels_are_drawn_anew() -> None:
    noisy = weight_decay.noisy(digits(), 3)
    changed = (noisy.y_train != digits().y_train).float().mean().item()
    assert changed == pytest.approx(0.2 * 0.9, abs=0.04)
    assert torch.equal(noisy.y_test, digits().y_test)
    assert torch.equal(noisy.y_train, weight_decay.noisy(digits(), 3).y_train)
    assert not torch.equal(noisy.y_train, weight_decay.noisy(digits(), 4).y_train)


def shortened(arm: str, steps: int) -> list[Trial]:
    trials = [trial for trial in weight_decay.plan(Scale(2, quick=True)) if trial.arm == arm]
    product = trials[-1]["product"]
    return [
        dataclasses.replace(trial, settings=tuple((k, steps if k == "steps" else v) for k, v in trial.settings))
        for trial in trials
        if trial["product"] == product
    ]


@pytest.mark.parametrize(("arm", "steps"), [(weight_decay.TURNING, 100), (weight_decay.GROWING, 5)])
def test_a_stack_equals_its_members_alone(arm: str, steps: int) -> None:
    stack = shortened(arm, steps)
    together, alone = weight_decay.train(stack), [weight_decay.train([trial])[0] for trial in stack]
    for one, other in zip(together, alone, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert value == pytest.approx(other[name], rel=1e-5, abs=1e-12)


def test_decay_is_a_growing_rate() -> None:
    records = weight_decay.train(shortened(weight_decay.GROWING, 40))
    assert all(record["difference"] < 1e-10 for record in records)
    assert records[0]["growth"] == pytest.approx((1 - 6.4e-3) ** -79)
    with pytest.MonkeyPatch.context() as patch:  # without the growth the two part
        step = weight_decay._step_
        patch.setattr(weight_decay, "_step_", lambda *given, decay, growth: step(*given, decay=decay, growth=1.0))
        assert weight_decay.train(shortened(weight_decay.GROWING, 40))[0]["difference"] > 1e-4
