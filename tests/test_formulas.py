"""The operations of an engine, one by one: the plain formulas and the fast engine keep the same contract.

`truth.plain` and autograd say what is right; here the pieces are checked that the layers put together:
statistics given from outside, groups of samples, sums and input gradient apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType

import pytest
import torch
from torch import Tensor

from cases import CASES, Case
from evenorm import engines, formulas
from evenorm.activations import IDENTITY, TABLE
from evenorm.formulas import Setting
from truth import ACTIVATIONS, EPS, plain, rows, statistics

ENGINES = list({engine.__name__: engine for engine in (formulas, engines.choose(torch.zeros(1)))})
ROWS = {name: code for code, name in enumerate(row.name for row in TABLE) if name in ACTIVATIONS}
SOME = [CASES[name] for name in ("2-D", "3-D", "4-D, channels_last", "5-D", "4-D, offset 1e4", "7x7 planes")]
FINITE = [case for case in CASES.values() if case.values not in ("nan", "inf", "-inf")]


def engine_for(name: str, x: Tensor) -> ModuleType:
    return formulas if name == formulas.__name__ else engines.choose(x)


def close(found: Tensor, true: Tensor) -> None:
    """Compare within a few roundings of float32, seen from the largest value."""
    scale = float(true.detach().abs().max()) if true.numel() else 0.0
    torch.testing.assert_close(found.double(), true.detach().double(), rtol=0, atol=1e-6 * scale + 1e-30)


def wide(*tensors: Tensor) -> list[Tensor]:
    return [tensor.double().detach().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "case", [case for case in CASES.values() if case.values not in ("nan", "inf", "-inf")], ids=str
)
def test_moments(case: Case, masked: bool, engine: str) -> None:
    """The mean's error counts in standard deviations, that of m2 as a part of it."""
    x = case.make()
    mask = case.mask() if masked and x.numel() else None
    found = engine_for(engine, x).moments(x, mask)
    values = rows(x, mask).double()
    mean, var = statistics(values)
    assert found.count.tolist() == [len(values)]
    assert found.mean.dtype == found.m2.dtype == torch.float64
    assert ((found.mean[0] - mean).abs() <= 1e-6 * var.sqrt() + 2.0**-52 * mean.abs()).all()
    assert ((found.m2[0] - var * len(values)).abs() <= 1e-6 * var * len(values)).all()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("case", SOME, ids=str)
def test_normalize_and_its_gradients_by_given_statistics(case: Case, name: str, engine: str) -> None:
    x, residual, dy, state = case.make(), case.noise(1), case.noise(2), case.state()
    setting = Setting(case.mask(), None, EPS, ROWS[name], TABLE[ROWS[name]].parameter)
    operations = engine_for(engine, x)
    given = (x, state.running_mean, state.running_var, state.weight, state.bias)
    y = operations.normalize(*given, residual, setting)

    leaves = wide(x, state.weight, state.bias, residual)
    fixed = (state.running_mean.double(), state.running_var.double())
    true = plain(*leaves[:3], fixed=fixed, residual=leaves[3], mask=setting.mask, activation=name)
    close(y, true)
    dx, dweight, dbias, dresidual = torch.autograd.grad(true, leaves, dy.double())

    saved = y if TABLE[setting.activation].sign_suffices else residual
    found = operations.eval_backward(dy, *given, saved, setting, True, True)
    for ours, wanted in zip(found, (dx, dweight, dbias, dresidual), strict=True):
        close(ours, wanted)
    thin = operations.eval_backward(dy, *given, saved, setting, False, False)
    assert thin[1:] == (None, None, None)
    close(thin[0], dx)

    sums = operations.backward_sums(dy, *given, saved, setting)
    close(sums[0][0], dbias)
    close(sums[1][0], dweight)
    alone = operations.input_gradient(dy, *given, saved, setting, None, None, True)
    close(alone[0], dx)
    close(alone[1], dresidual)


def separately(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, splits: Sequence[int], mask: Tensor, name: str
) -> Tensor:
    """Normalise each group of samples by itself."""
    parts = [tensor.split(list(splits)) for tensor in (x, residual, mask)]
    each = zip(*parts, strict=True)
    return torch.cat([plain(x, weight, bias, residual=r, mask=m, activation=name) for x, r, m in each if len(x)])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["identity", "relu", "silu"])
@pytest.mark.parametrize("splits", [[4], [1, 3], [2, 1, 1], [1, 1, 1, 1]], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_groups_are_separate_calls(layout: str, splits: list[int], name: str, engine: str) -> None:
    """Forward and backward, for uneven groups, each under its part of the mask."""
    case = Case("", (4, 6, 9, 7), layout=layout)
    x, residual, dy, mask, state = case.make(), case.noise(1), case.noise(2), case.mask(), case.state()
    code = ROWS.get(name, IDENTITY.code)
    setting = Setting(mask, splits, EPS, code, 0.0)
    operations = engine_for(engine, x)
    y, count, mean, m2 = operations.train_forward(x, state.weight, state.bias, residual, setting)
    leaves = wide(x, state.weight, state.bias, residual)
    true = separately(*leaves, splits, mask, None if name == "identity" else name)
    close(y, true)
    assert count.tolist() == [float(part.sum()) for part in mask.split(splits)]
    for at, (part, valid) in enumerate(zip(x.split(splits), mask.split(splits), strict=True)):
        expected_mean, var = statistics(rows(part, valid).double())
        close(mean[at], expected_mean)
        close(m2[at], var * valid.sum())

    wanted = torch.autograd.grad(true, leaves, dy.double())
    saved = y if TABLE[code].sign_suffices else residual
    given = (dy, x, count, mean, m2, state.weight, state.bias, saved, setting)
    for ours, gradient in zip(operations.train_backward(*given, True), wanted, strict=True):
        close(ours, gradient)
    assert operations.train_backward(*given, False)[3] is None


@pytest.mark.parametrize("engine", ENGINES)
def test_the_pieces_make_the_whole(engine: str) -> None:
    """Moments and normalize are train_forward; sums and input gradient are train_backward."""
    case = CASES["3-D"]
    x, dy, state = case.make(), case.noise(2), case.state()
    setting = Setting(None, [2, 1, 3], EPS, ROWS["silu"], 0.0)
    operations = engine_for(engine, x)
    batch = operations.moments(x, None, setting.splits)
    y, count, mean, m2 = operations.train_forward(x, state.weight, state.bias, None, setting)
    close(batch.mean, mean)
    close(batch.m2, m2)
    given = (x, batch.mean, batch.variance(), state.weight, state.bias)
    close(operations.normalize(*given, None, setting), y)
    whole = operations.train_backward(dy, x, count, mean, m2, state.weight, state.bias, None, setting, False)
    sum_g, sum_g_xhat = operations.backward_sums(dy, *given, None, setting)
    offset, slope = sum_g / count.unsqueeze(1), sum_g_xhat / count.unsqueeze(1)
    close(operations.input_gradient(dy, *given, None, setting, offset, slope, False)[0], whole[0])
    close(sum_g_xhat.sum(0), whole[1])
    close(sum_g.sum(0), whole[2])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_value_stays_in_its_group_and_channel(bad: float, engine: str) -> None:
    case = CASES["4-D"]
    x, dy, splits = case.make(), case.noise(2), [1, 2, 1]
    x[0, 2, 0, 0] = bad
    operations = engine_for(engine, x)
    for mask in (None, torch.ones(4, 9, 7, dtype=torch.bool)):
        setting = Setting(mask, splits, EPS, ROWS["relu"], 0.0)
        y, count, mean, m2 = operations.train_forward(x, None, None, None, setting)
        dx, *_ = operations.train_backward(dy, x, count, mean, m2, None, None, None, setting, False)
        for result in (y, dx):
            assert result[0, 2].isnan().all()
            result[0, 2] = 0
            assert result.isfinite().all()


@pytest.mark.parametrize("engine", ENGINES)
def test_groups_without_values_have_moments_of_nothing(engine: str) -> None:
    x = torch.randn(4, 3, 5) + 100
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[1:3] = False
    operations = engine_for(engine, x)
    for found in (
        operations.moments(x, None, [0, 4, 0]),
        operations.moments(x, mask, [1, 2, 1]),
        operations.moments(x[:0], mask[:0], None),
        operations.moments(x[..., :0], None, None),
    ):
        for at in (found.count == 0).nonzero().flatten():
            assert not found.mean[at].any()
            assert not found.m2[at].any()
        assert found.mean.isfinite().all()
