"""The laws of `Moments`, against exact rational arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import evenorm
from evenorm import Moments, engines, formulas
from evenorm.engines import cpu
from evenorm.moments import virtual_batches

# Every value is a float32, within a range in which no square leaves float64.
numbers = st.floats(-(2.0**40), 2.0**40, width=32).filter(lambda value: value == 0 or abs(value) > 1e-20)
channel = st.lists(numbers, max_size=9)
samples = st.lists(st.tuples(numbers, numbers), max_size=9)
lawful = settings(max_examples=60, deadline=None, derandomize=True)


def tensor(rows: list[tuple[float, float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32).reshape(len(rows), 2)


def of(rows: list[tuple[float, float]]) -> Moments:
    return evenorm.moments(tensor(rows))


def exact(rows: list[tuple[float, float]]) -> list[tuple[Fraction, Fraction]]:
    """Return mean and m2 of each channel, without rounding."""
    found = []
    for values in zip(*rows, strict=True):
        fractions = [Fraction(value) for value in values]
        mean = sum(fractions) / len(fractions)
        found.append((mean, sum((value - mean) ** 2 for value in fractions)))
    return found or [(Fraction(0), Fraction(0))] * 2


def agree(found: Moments, rows: list[tuple[float, float]], digits: float = 1e-6) -> None:
    """Check moments: the mean's error counts in standard deviations, the m2's as a part of it."""
    assert found.count.item() == len(rows)
    for at, (mean, m2) in enumerate(exact(rows)):
        deviation = math.sqrt(m2 / max(len(rows), 1))
        assert abs(found.mean[at].item() - mean) <= digits * deviation + 2.0**-50 * abs(mean)
        rounding = (2.0**-50 * abs(mean)) ** 2 * len(rows)  # of the mean, in float64
        assert abs(found.m2[at].item() - m2) <= digits * m2 + rounding


def same(a: Moments, b: Moments, rows: list[tuple[float, float]]) -> None:
    scale = max((abs(value) for row in rows for value in row), default=0.0)
    assert torch.equal(a.count, b.count)
    torch.testing.assert_close(a.mean, b.mean, rtol=0, atol=1e-12 * scale)
    torch.testing.assert_close(a.m2, b.m2, rtol=1e-12, atol=(1e-12 * scale) ** 2 * len(rows))


@lawful
@given(samples)
def test_moments_are_the_mean_and_the_summed_squared_deviation(rows: list[tuple[float, float]]) -> None:
    agree(of(rows), rows)


@lawful
@given(samples, samples)
def test_merged_moments_are_those_of_all_values(a: list[tuple[float, float]], b: list[tuple[float, float]]) -> None:
    agree(of(a) + of(b), a + b)


@lawful
@given(samples, samples)
def test_merging_commutes(a: list[tuple[float, float]], b: list[tuple[float, float]]) -> None:
    same(of(a) + of(b), of(b) + of(a), a + b)


@lawful
@given(samples, samples, samples)
def test_merging_associates(
    a: list[tuple[float, float]], b: list[tuple[float, float]], c: list[tuple[float, float]]
) -> None:
    same((of(a) + of(b)) + of(c), of(a) + (of(b) + of(c)), a + b + c)


@lawful
@given(samples)
def test_empty_moments_change_no_bit(rows: list[tuple[float, float]]) -> None:
    some, empty = of(rows), of([])
    for merged in (some + empty, empty + some):
        assert torch.equal(merged.count, some.count)
        assert torch.equal(merged.mean, some.mean)
        assert torch.equal(merged.m2, some.m2)


@lawful
@given(st.lists(samples, min_size=1, max_size=5))
def test_pooling_groups_is_merging_them(groups: list[list[tuple[float, float]]]) -> None:
    parts = [of(rows) for rows in groups]
    stacked = Moments(*(torch.stack([getattr(part, name) for part in parts]) for name in ("count", "mean", "m2")))
    everything = [row for rows in groups for row in rows]
    same(stacked.pooled(), sum(parts[1:], parts[0]), everything)
    agree(stacked.pooled(), everything)


@lawful
@given(st.lists(samples, min_size=1, max_size=5))
def test_splits_are_separate_calls(groups: list[list[tuple[float, float]]]) -> None:
    x = torch.cat([tensor(rows) for rows in groups])
    for engine in {formulas, engines.choose(x)}:
        found = engine.moments(x, None, [len(rows) for rows in groups])
        for at, rows in enumerate(groups):
            agree(Moments(found.count[at], found.mean[at], found.m2[at]), rows)


@lawful
@given(samples, st.lists(st.booleans(), min_size=9, max_size=9), st.sampled_from([0.0, math.nan, math.inf, 1e38]))
def test_masked_moments_are_those_of_the_valid_rows(
    rows: list[tuple[float, float]], valid: list[bool], padding: float
) -> None:
    kept = [row for row, keep in zip(rows, valid, strict=False) if keep]
    mask = torch.tensor(valid[: len(rows)], dtype=torch.bool)
    x = torch.where(mask.unsqueeze(1), tensor(rows), padding)
    agree(evenorm.moments(x, mask=mask), kept)


@lawful
@given(st.lists(st.tuples(*[st.floats(width=32, allow_nan=False, allow_infinity=False)] * 2), max_size=9))
def test_variance_is_never_negative(rows: list[tuple[float, float]]) -> None:
    found = of(rows)
    assert (found.m2 >= 0).all()
    assert (found.variance() >= 0).all()
    assert (found.variance(1) >= 0).all()
    assert ((found + found).m2 >= 0).all()


@lawful
@given(
    st.one_of(
        st.tuples(st.floats(width=32, allow_nan=False, allow_infinity=False), st.just(torch.float32)),
        st.tuples(st.floats(allow_nan=False, allow_infinity=False), st.just(torch.float64)),
    ),
    st.integers(1, 300),
)
def test_a_constant_is_its_own_mean_with_no_variance(constant: tuple[float, torch.dtype], count: int) -> None:
    value, dtype = constant
    found = evenorm.moments(torch.full((count, 1), value, dtype=dtype))
    assert found.mean.item() == value
    assert found.m2.item() == 0
    twice = found + found
    assert twice.mean.item() == value
    assert twice.m2.item() == 0


@pytest.mark.parametrize("constant", [1e200, -1.7e308])
def test_an_empty_batch_changes_nothing_however_far_away(constant: float) -> None:
    some, empty = (evenorm.moments(torch.full((size, 2), constant, dtype=torch.float64)) for size in (3, 0))
    groups = Moments(
        *(torch.stack([getattr(part, name) for part in (empty, some)]) for name in ("count", "mean", "m2"))
    )
    for merged in (some + empty, empty + some, groups.pooled()):
        assert (merged.mean == constant).all()
        assert not merged.m2.any()


def test_pooling_a_constant_gives_it_whichever_groups_are_empty() -> None:
    constant = torch.randn(200, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1e6
    parts = [evenorm.moments(constant.expand(size, -1)) for size in (0, 3, 7, 0)]
    groups = Moments(*(torch.stack([getattr(part, name) for part in parts]) for name in ("count", "mean", "m2")))
    pooled = groups.pooled()
    assert torch.equal(pooled.mean, constant)
    assert not pooled.m2.any()
    if cpu.available() is None:  # which pools as it tracks
        mean, var = torch.zeros(200).double(), torch.ones(200).double()
        cpu.track_(mean, var, None, groups, 1.0)
        assert torch.equal(mean, constant)
        assert not var.any()


@pytest.mark.parametrize("correction", [0, 1, 2])
def test_variance_divides_by_the_corrected_count(correction: int) -> None:
    x = torch.randn(8, 3, dtype=torch.float64)
    torch.testing.assert_close(evenorm.moments(x).variance(correction), x.var(0, correction=correction))


def test_variance_of_too_few_values_is_zero() -> None:
    assert evenorm.moments(torch.tensor([[3.0]])).variance(1).item() == 0
    assert evenorm.moments(torch.zeros(0, 1)).variance().item() == 0


def test_moments_are_wide_whatever_the_input() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        found = evenorm.moments(torch.randn(5, 3).to(dtype))
        assert found.count.dtype == found.mean.dtype == found.m2.dtype == torch.float64
        assert (found.count.shape, found.mean.shape, found.m2.shape) == ((), (3,), (3,))


def test_bad_values_stay_in_their_channel() -> None:
    x = torch.randn(6, 4, 5)
    good = evenorm.moments(x)
    for bad in (math.nan, math.inf, -math.inf):
        spoiled = x.clone()
        spoiled[2, 1, 3] = bad
        found = evenorm.moments(spoiled)
        assert found.m2[1].isnan()
        others = [0, 2, 3]
        assert torch.equal(found.mean[others], good.mean[others])
        assert torch.equal(found.m2[others], good.m2[others])


BAD_VALUES = {
    "first": {0: math.inf},
    "last": {5: -math.inf},
    "two": {0: -math.inf, 3: -math.inf},
    "both signs": {1: math.inf, 2: -math.inf},
    "both signs in one part": {4: math.inf, 5: -math.inf},
    "NaN beside": {0: math.nan, 3: math.inf},
}


@pytest.mark.parametrize("bad", BAD_VALUES.values(), ids=BAD_VALUES)
def test_parts_merge_to_the_mean_of_the_whole_where_it_is_not_finite(bad: dict[int, float]) -> None:
    x = torch.randn(6, 2, dtype=torch.float64)
    for row, value in bad.items():
        x[row, 1] = value
    true = x.mean(0)
    parts = [evenorm.moments(part) for part in x.split(2)]
    found = [parts[0] + parts[1] + parts[2], parts[2] + (parts[1] + parts[0])]
    found += [evenorm.moments(x) + evenorm.moments(x[:0]), evenorm.moments(x[:0]) + evenorm.moments(x)]
    mask = torch.ones(6, dtype=torch.bool)
    for engine in {formulas, engines.choose(x)}:
        for asked in ((x,), (x, mask), (x, None, [2, 2, 2]), (x, mask, [1, 3, 2]), (x, None, [0, 4, 2])):
            found.append(engine.moments(*asked).pooled())
    for merged in found:
        torch.testing.assert_close(merged.mean, true, equal_nan=True)
        assert merged.m2.isfinite().tolist() == [True, False]


@lawful
@given(st.integers(0, 200), st.integers(1, 40))
def test_virtual_batches_share_the_samples_out_evenly(count: int, size: int) -> None:
    runs = virtual_batches(count, size) or [count]
    assert sum(runs) == count
    assert max(runs) - min(runs) <= 1
    assert len(runs) == max(count // size, 1)
    assert len(runs) == 1 or min(runs) >= size
