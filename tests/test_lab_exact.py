"""The identities hold for the layer, fail for a layer that is a little wrong, and the verdict says so."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from fractions import Fraction
from functools import cache

import pytest
import torch
from torch import Tensor

from evenorm.lab import identities, symmetries, variance_rounding
from evenorm.lab.experiment import Scale
from evenorm.lab.experiments import exact
from evenorm.lab.identities import LAYER32, LAYER64, PRINTED, Route
from evenorm.lab.identity_table import IDENTITIES
from evenorm.lab.results import Analysis, Verdict
from evenorm.lab.run import train_stack
from evenorm.lab.trials import Record
from evenorm.lab_command import _numbers


@cache
def measured() -> Record:
    _, (record,) = train_stack(0, exact.train, exact.plan(Scale(2)), None)  # on one thread, as the lab does
    return record


def analyse(change: Callable[[Record], object] = lambda record: None) -> Analysis:
    record = copy.deepcopy(measured())
    change(record)
    return exact.analyse(dict.fromkeys(exact.plan(Scale(2)), record), Scale(2))


def test_every_identity_holds() -> None:
    analysis = analyse()
    json.dumps(_numbers(analysis), allow_nan=False)  # --json, though a bound that is held has no p-value
    assert analysis.verdict is Verdict.REPRODUCED
    assert [endpoint.verdict for endpoint in analysis.endpoints[:2]] == [Verdict.REPRODUCED] * 2
    assert f"{len(IDENTITIES)} of {len(IDENTITIES)} identities" in analysis.answer


@pytest.mark.parametrize(
    ("name", "route", "error"),
    [
        ("forward", LAYER64, 1e-13),
        ("forward", LAYER32, 1e-5),
        ("central differences", PRINTED, 1e-5),
        ("constant", LAYER32, math.nan),
        ("own channel", LAYER64, math.inf),
    ],
)
def test_one_error_beyond_its_bound_contradicts_the_claim(name: str, route: Route, error: float) -> None:
    def spoil(record: Record) -> None:
        record["errors"][name][route.name] = exact._finite(error)

    analysis = analyse(spoil)
    assert analysis.verdict is Verdict.CONTRADICTED
    assert IDENTITIES[name].label in analysis.answer
    assert f"{len(IDENTITIES) - 1} of {len(IDENTITIES)} identities" in analysis.answer


def test_a_biased_mean_contradicts_the_claim() -> None:
    def spoil(record: Record) -> None:
        record["means"][3][2] = -4.5

    assert analyse(spoil).verdict is Verdict.CONTRADICTED


def test_theorem_4_1_as_printed_is_judged_beside_the_claim() -> None:
    def rescue(record: Record) -> None:
        record["violated"] = 0.0

    printed = analyse().endpoints[2]
    assert (printed.estimate, printed.verdict) == (100.0, Verdict.CONTRADICTED)
    rescued = analyse(rescue)
    assert rescued.endpoints[2].verdict is Verdict.REPRODUCED
    assert rescued.verdict is Verdict.REPRODUCED


def unbiased(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return (x - x.mean(0)) / torch.sqrt(x.var(0) + eps) * weight + bias


def constant_deviation(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """A backward that forgets that the variance depends on x."""
    return (x - x.mean(0)) / torch.sqrt(x.detach().var(0, correction=0) + eps) * weight + bias


def eps_outside(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return (x - x.mean(0)) / (x.var(0, correction=0).sqrt() + eps) * weight + bias


def mixing(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """A NaN in one channel reaches all."""
    return identities.printed(x, weight, bias, eps) + 0 * x.sum()


WRONG = {
    unbiased: ("backward printed", "backward short", "double backward", "largest", "radial"),
    constant_deviation: ("backward printed", "backward short", "two", "double backward"),
    eps_outside: ("backward printed", "backward short", "double backward", "radial"),
    mixing: ("own channel",),
}
CASES = [(wrong, name) for wrong, names in WRONG.items() for name in names]


@pytest.mark.parametrize(("wrong", "name"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_a_layer_that_is_a_little_wrong_fails(wrong: Callable[..., Tensor], name: str) -> None:
    route = dataclasses.replace(PRINTED, normalise=wrong)
    assert exact._finite(IDENTITIES[name].error(route)) > 10 * IDENTITIES[name].bound(route)


def test_theorem_4_1_needs_its_last_term() -> None:
    found = symmetries.theorem(LAYER64, draws=50)
    torch.testing.assert_close(found.left, found.corrected, rtol=0, atol=1e-12)
    assert (found.left > found.printed + 1e-6).double().mean() > 0.9


def test_an_uncorrected_variance_is_not_the_population_s() -> None:
    route = dataclasses.replace(PRINTED, variance=lambda x: x.var(0, correction=0))
    assert identities.with_replacement(route) == pytest.approx(0.5)  # half of it is missing at m = 2
    assert abs(identities.mean_variance(route, 2)[2]) > 4


def test_the_exact_variance_is_exact() -> None:
    x = torch.tensor([[1.0], [2.0], [4.0]]) + 2.0**20
    assert variance_rounding.exact(x) == [Fraction(7, 3)]
    assert variance_rounding.errors(variance_rounding.textbook, x, variance_rounding.exact(x))[0] > 0.1


def test_rounding_grows_as_predicted() -> None:
    """Slopes of log error on log κ: 2 for the textbook, 1 for Welford, about 0 for the layer."""
    found = variance_rounding.sweep(torch.float32, sizes=(64,))

    def slope(name: str, first: int, last: int) -> float:
        return math.log10(found[name][last] / found[name][first]) / (last - first)

    assert slope("textbook", 1, 3) == pytest.approx(2, abs=0.3)
    assert slope("welford", 2, 5) == pytest.approx(1, abs=0.3)
    assert abs(slope("layer", 0, 5)) < 0.3
