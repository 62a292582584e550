"""Paired comparisons: intervals, exact tests, and the four verdicts. A leaf: no torch.

A difference is signed so that the claim predicts a positive one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
from scipy import stats

from evenorm.lab.results import Endpoint, Verdict

LEVEL = 0.95
EXACT_SEEDS = 20  # 2^20 sign flips take milliseconds and 8 MB; beyond, flips are drawn
DRAWN_FLIPS = 100_000


class Kind(Enum):
    """What a comparison claims: a difference beyond the margin, or none as large as the margin."""

    SUPERIORITY = "superiority"
    EQUIVALENCE = "equivalence"


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval and two-sided p-value against 0."""

    mean: float
    low: float
    high: float
    p_value: float


@dataclass(frozen=True)
class Comparison:
    """One paired comparison before it is judged: a difference a seed, and what was fixed beforehand."""

    name: str
    unit: str
    differences: tuple[float, ...]
    margin: float
    favours: str
    would_change: str
    kind: Kind = Kind.SUPERIORITY
    spread: float | None = None  # variance of the mean in units of one difference's; None: 1/n


def paired_interval(differences: Sequence[float], spread: float | None = None) -> Interval:
    r"""Return mean ± t_{n-1} · s · sqrt(spread), where spread is 1/n for independent differences.

    Raises:
        ValueError: fewer than two differences, or one that is not finite.
    """
    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"an interval needs at least 2 paired differences, got {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("a difference is not finite: censor trials that diverged before comparing them")
    mean = float(values.mean())
    error = float(values.std(ddof=1)) * math.sqrt(1 / len(values) if spread is None else spread)
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)) * error
    return Interval(mean, mean - half, mean + half, _two_sided(mean, error, len(values)))


def overlapping_splits(seeds: int, train: int, test: int) -> float:
    """Return 1/n + n_test/n_train, the spread where seeds redraw overlapping splits (Nadeau & Bengio 2003)."""
    return 1 / seeds + test / train


def sign_flip(differences: Sequence[float]) -> float:
    """Return the two-sided p-value of the mean under all 2^n flips of signs.

    Above 20 differences, 100 000 drawn flips stand for all of them, always the same ones.
    """
    values = np.asarray(differences, dtype=np.float64)
    observed = abs(values.sum()) * (1 - 1e-12)  # a sum in another order is the same sum
    if len(values) > EXACT_SEEDS:
        signs = np.random.default_rng(0).choice((-1.0, 1.0), size=(DRAWN_FLIPS, len(values)))
        return float((1 + (np.abs(signs @ values) >= observed).sum()) / (1 + DRAWN_FLIPS))
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums + value, sums - value])
    return float((np.abs(sums) >= observed).mean())


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values adjusted for their number by Holm's step-down rule, in the given order."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def superiority(interval: Interval, margin: float) -> Verdict:
    """Judge a claim of a positive difference that is worth having: one beyond the margin."""
    if interval.low > margin:
        return Verdict.REPRODUCED
    if interval.low > 0:
        return Verdict.WEAK
    return Verdict.CONTRADICTED if interval.high < 0 else Verdict.INCONCLUSIVE


def equivalence(interval: Interval, margin: float) -> Verdict:
    """Judge a claim of no difference worth having: the whole interval within ±margin."""
    if -margin < interval.low and interval.high < margin:
        return Verdict.REPRODUCED
    outside = interval.low > margin or interval.high < -margin
    return Verdict.CONTRADICTED if outside else Verdict.INCONCLUSIVE


def judge(comparisons: Sequence[Comparison]) -> tuple[Endpoint, ...]:
    """Judge the comparisons of one experiment together.

    The verdict is the 95 % interval's; where Holm's rule over all of them does not leave the comparison
    significant at 5 %, it is INCONCLUSIVE. The p-value that an endpoint shows is the exact sign-flip test's.
    """
    intervals = [paired_interval(item.differences, item.spread) for item in comparisons]
    adjusted = holm([_claim_p(item, interval) for item, interval in zip(comparisons, intervals, strict=True)])
    rules = {Kind.SUPERIORITY: superiority, Kind.EQUIVALENCE: equivalence}
    endpoints = []
    for item, interval, p_value in zip(comparisons, intervals, adjusted, strict=True):
        verdict = rules[item.kind](interval, item.margin)
        refuted = (
            item.kind is Kind.EQUIVALENCE and verdict is Verdict.CONTRADICTED
        )  # p is the claim's, not its denial's
        if not refuted and p_value > 1 - LEVEL + 1e-12:
            verdict = Verdict.INCONCLUSIVE
        endpoints.append(
            Endpoint(
                name=item.name,
                unit=item.unit,
                estimate=interval.mean,
                low=interval.low,
                high=interval.high,
                p_value=sign_flip(item.differences),
                margin=item.margin,
                verdict=verdict,
                seeds=len(item.differences),
                favours=item.favours,
                would_change=item.would_change,
            )
        )
    return tuple(endpoints)


def combine(verdicts: Iterable[Verdict]) -> Verdict:
    """Return the verdict on a claim that needs all of its parts: the worst one."""
    order = (Verdict.REPRODUCED, Verdict.WEAK, Verdict.INCONCLUSIVE, Verdict.CONTRADICTED)
    return max(verdicts, key=order.index)


def _two_sided(mean: float, error: float, count: int) -> float:
    if error == 0:
        return 1.0 if mean == 0 else 0.0
    return float(2 * stats.t.sf(abs(mean) / error, count - 1))


def _claim_p(item: Comparison, interval: Interval) -> float:
    """Return the p-value that is below 5 % exactly where the 95 % interval supports the comparison's claim."""
    if item.kind is Kind.SUPERIORITY:
        return interval.p_value
    count = len(item.differences)
    quantile = float(stats.t.ppf((1 + LEVEL) / 2, count - 1))
    error = (interval.high - interval.low) / 2 / quantile
    room = item.margin - abs(interval.mean)  # to the nearer margin; two one-sided tests at 2.5 % each
    return _two_sided(room, error, count) if room > 0 else 1.0


def first_crossing(values: Sequence[float | None], threshold: float, window: int) -> int | None:
    """Return the first index at which the mean of the last `window` values reaches the threshold, or None."""
    for index in range(window - 1, len(values)):
        recent = values[index - window + 1 : index + 1]
        numbers = [value for value in recent if value is not None]  # None: not finite, so it reaches nothing
        if len(numbers) == window and sum(numbers) / window >= threshold:
            return index
    return None
