from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from evenorm.lab.results import Verdict
from evenorm.lab.statistics import (
    Comparison,
    Interval,
    Kind,
    combine,
    equivalence,
    first_crossing,
    holm,
    judge,
    overlapping_splits,
    paired_interval,
    sign_flip,
    superiority,
)

TEN = [0.3, -0.1, 0.8, 0.5, 0.2, 0.9, 0.4, -0.2, 0.6, 0.1]


def comparison(differences: list[float], margin: float = 1.0, **options: object) -> Comparison:
    return Comparison("a", "points", tuple(differences), margin, "more", "less", **options)  # type: ignore[arg-type]


def test_interval_is_the_students_t_interval_of_scipy() -> None:
    interval = paired_interval(TEN)
    expected = stats.ttest_1samp(TEN, 0.0)
    low, high = expected.confidence_interval(0.95)
    np.testing.assert_allclose(
        [interval.mean, interval.low, interval.high, interval.p_value],
        [np.mean(TEN), low, high, expected.pvalue],
        rtol=1e-12,
    )


def test_interval_by_hand() -> None:
    # mean 2, s = 1, n = 3: half-width t_2(0.975)/sqrt(3) = 4.302653/1.732051
    interval = paired_interval([1.0, 2.0, 3.0])
    assert interval.low == pytest.approx(2 - 2.484138, abs=1e-6)
    assert interval.high == pytest.approx(2 + 2.484138, abs=1e-6)


def test_overlapping_splits_widen_the_interval_as_the_papers_say() -> None:
    # 80/20 and 10 seeds: 1.87 times wider
    plain = paired_interval(TEN)
    wide = paired_interval(TEN, overlapping_splits(10, train=80, test=20))
    assert (wide.high - wide.low) / (plain.high - plain.low) == pytest.approx(1.87, abs=0.005)


def test_equal_differences_have_no_width() -> None:
    assert paired_interval([2.0, 2.0]) == Interval(2.0, 2.0, 2.0, 0.0)
    assert paired_interval([0.0, 0.0]).p_value == 1.0


@pytest.mark.parametrize("bad", [[1.0], [], [1.0, math.nan], [1.0, math.inf]])
def test_interval_refuses_what_has_none(bad: list[float]) -> None:
    with pytest.raises(ValueError, match=r"differences|finite"):
        paired_interval(bad)


def test_sign_flip_counts_all_flips() -> None:
    by_hand = [
        abs(sum(s * d for s, d in zip(signs, TEN, strict=True))) for signs in itertools.product((1, -1), repeat=10)
    ]
    share = sum(value >= abs(sum(TEN)) - 1e-9 for value in by_hand) / 2**10
    assert sign_flip(TEN) == share
    assert sign_flip([1.0] * 10) == 2 / 2**10
    assert sign_flip([0.0] * 4) == 1.0


def test_sign_flip_of_many_seeds_draws_flips_and_stays_the_same() -> None:
    many = TEN * 3
    exact = stats.norm.sf(sum(many) / math.sqrt(sum(d * d for d in many))) * 2
    assert sign_flip(many) == sign_flip(many)
    assert sign_flip(many) == pytest.approx(exact, abs=0.002)


def test_holm_by_hand() -> None:
    # sorted .01 .02 .03 .04 times 4 3 2 1: .04, .06, .06 (not below the one before), .06
    np.testing.assert_allclose(holm([0.03, 0.01, 0.04, 0.02]), [0.06, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize(
    ("low", "high", "better", "alike"),
    [
        (1.5, 2.5, Verdict.REPRODUCED, Verdict.CONTRADICTED),
        (0.2, 0.8, Verdict.WEAK, Verdict.REPRODUCED),
        (0.2, 2.5, Verdict.WEAK, Verdict.INCONCLUSIVE),
        (-0.5, 0.5, Verdict.INCONCLUSIVE, Verdict.REPRODUCED),
        (-3.0, 3.0, Verdict.INCONCLUSIVE, Verdict.INCONCLUSIVE),
        (-2.5, -1.5, Verdict.CONTRADICTED, Verdict.CONTRADICTED),
        (1.0, 2.0, Verdict.WEAK, Verdict.INCONCLUSIVE),  # at the margin is not beyond it
        (0.0, 2.0, Verdict.INCONCLUSIVE, Verdict.INCONCLUSIVE),
    ],
)
def test_verdicts_of_an_interval(low: float, high: float, better: Verdict, alike: Verdict) -> None:
    interval = Interval((low + high) / 2, low, high, 0.5)
    assert superiority(interval, 1.0) is better
    assert equivalence(interval, 1.0) is alike


NOISE = list(np.random.default_rng(3).normal(size=10))
NOISE = list((np.array(NOISE) - np.mean(NOISE)) / np.std(NOISE, ddof=1))  # mean 0, deviation 1


@pytest.mark.parametrize(
    ("effect", "noise", "expected"),
    [
        (3.0, 0.5, Verdict.REPRODUCED),
        (0.5, 0.3, Verdict.WEAK),
        (0.0, 0.5, Verdict.INCONCLUSIVE),
        (-3.0, 0.5, Verdict.CONTRADICTED),
        (3.0, 20.0, Verdict.INCONCLUSIVE),
    ],
)
def test_made_up_effects_get_their_verdict(effect: float, noise: float, expected: Verdict) -> None:
    (endpoint,) = judge([comparison([effect + noise * value for value in NOISE])])
    assert endpoint.verdict is expected
    assert endpoint.estimate == pytest.approx(effect)
    assert endpoint.seeds == 10


@pytest.mark.parametrize(
    ("effect", "noise", "expected"),
    [
        (0.0, 0.5, Verdict.REPRODUCED),
        (0.3, 0.3, Verdict.REPRODUCED),
        (0.0, 5.0, Verdict.INCONCLUSIVE),
        (3.0, 0.5, Verdict.CONTRADICTED),
        (-3.0, 0.5, Verdict.CONTRADICTED),
    ],
)
def test_made_up_equivalences_get_their_verdict(effect: float, noise: float, expected: Verdict) -> None:
    differences = [effect + noise * value for value in NOISE]
    (endpoint,) = judge([comparison(differences, kind=Kind.EQUIVALENCE)])
    assert endpoint.verdict is expected


def test_a_borderline_effect_among_many_comparisons_is_inconclusive() -> None:
    borderline = [0.53 + 0.7 * value for value in NOISE]  # t = 2.4
    assert 0.01 < paired_interval(borderline).p_value < 0.05
    (alone,) = judge([comparison(borderline)])
    assert alone.verdict is Verdict.WEAK
    among = judge([comparison(borderline)] * 8)
    assert {endpoint.verdict for endpoint in among} == {Verdict.INCONCLUSIVE}


def test_holm_asks_the_same_of_an_equivalence_alone_as_its_interval() -> None:
    # whatever the noise, one comparison is judged by its interval, so Holm over one must never overrule it
    for noise in np.linspace(0.1, 4.0, 40):
        differences = [0.2 + noise * value for value in NOISE]
        (endpoint,) = judge([comparison(differences, kind=Kind.EQUIVALENCE)])
        assert endpoint.verdict is equivalence(paired_interval(differences), 1.0)


def test_same_arm_on_both_sides_is_rarely_called_different() -> None:
    generator = np.random.default_rng(0)
    verdicts = [judge([comparison(list(generator.normal(size=10)), margin=0.0)])[0].verdict for _ in range(400)]
    share = sum(verdict is not Verdict.INCONCLUSIVE for verdict in verdicts) / 400
    assert 0.02 < share < 0.085  # 5 %, both sides together; three standard errors


def test_combined_verdict_is_the_worst() -> None:
    assert combine([Verdict.REPRODUCED, Verdict.WEAK]) is Verdict.WEAK
    assert combine([Verdict.INCONCLUSIVE, Verdict.WEAK]) is Verdict.INCONCLUSIVE
    assert combine([Verdict.CONTRADICTED, Verdict.INCONCLUSIVE]) is Verdict.CONTRADICTED


@pytest.mark.parametrize(
    ("values", "window", "expected"),
    [
        ([0.1, 0.95, 0.2, 0.9, 0.92], 1, 1),
        ([0.1, 0.95, 0.2, 0.9, 0.92], 2, 4),
        ([0.1, 0.2], 2, None),
        ([None, 1.9, 0.95], 2, 2),  # a gap counts as nothing reached
        ([0.95], 2, None),
        ([], 1, None),
    ],
)
def test_first_crossing(values: list[float | None], window: int, expected: int | None) -> None:
    assert first_crossing(values, 0.9, window) == expected
