"""Batch renormalisation: between plain batch norm and inference, by the paper's formulas and schedule."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import evenorm
from book import RENORMS, Situation, agree, answer, limit, situations
from evenorm import Renorm

OPEN = Renorm(math.inf, math.inf, start=0, r_steps=0, d_steps=0)


def moved(channels: int = 3, **options: Any) -> evenorm.BatchNorm:
    """Return a layer whose running statistics have left 0 and 1, and whose parameters have left 1 and 0."""
    generator = torch.Generator().manual_seed(7)
    layer = evenorm.BatchNorm(channels, dtype=torch.float64, **options)
    state = torch.randn(4, channels, generator=generator, dtype=torch.float64)
    layer.weight.data, layer.bias.data, mean, var = state.unbind()
    layer.running_mean.copy_(mean)
    layer.running_var.copy_(var.square() + 0.1)
    layer.num_batches_tracked.fill_(10)
    return layer


@settings(deadline=None, max_examples=80)
@given(situations(renorm=RENORMS))
def test_a_renormalised_layer_is_the_books(situation: Situation) -> None:
    """Output, all gradients and running statistics, while the limits open, with every other option."""
    agree(situation)


@settings(deadline=None, max_examples=30)
@given(situations(renorm=st.just(OPEN)))
def test_without_limits_training_computes_the_inference_formula(situation: Situation) -> None:
    layer = situation.layer()
    for x, residual, mask, _ in situation.batches():
        expected = copy.deepcopy(layer).eval()(x, residual=residual, mask=mask)
        torch.testing.assert_close(layer.train()(x, residual=residual, mask=mask), expected, rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=30)
@given(situations(renorm=st.just(Renorm(1.0, 0.0, start=0, r_steps=0, d_steps=0))))
def test_with_limits_closed_it_is_plain_batch_norm(situation: Situation) -> None:
    plain = Situation(**(vars(situation) | {"options": situation.options | {"renorm": None}}))
    one, two = situation.layer(), plain.layer()
    for x, residual, mask, dy in situation.batches():
        batch = (x, residual, mask, dy)
        torch.testing.assert_close(answer(one, batch), answer(two, batch), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(dict(one.state_dict()), dict(two.state_dict()))


@pytest.mark.parametrize(
    ("batch", "r_max", "d_max"),
    [
        (1, 1.0, 0.0),
        (5_000, 1.0, 0.0),
        (15_000, 1 + 2 * 10 / 35, 2.5),
        (25_000, 1 + 2 * 20 / 35, 5.0),
        (30_000, 1 + 2 * 25 / 35, 5.0),
        (40_000, 3.0, 5.0),
        (10**9, 3.0, 5.0),
    ],
)
def test_the_schedule_is_the_papers(batch: int, r_max: float, d_max: float) -> None:
    found = Renorm().limits(torch.tensor(batch - 1))
    assert [float(value) for value in found] == pytest.approx([r_max, d_max], rel=1e-12)


@settings(deadline=None, max_examples=100)
@given(RENORMS, st.integers(1, 12))
def test_any_schedule_is_a_straight_line_between_two_levels(renorm: Renorm, batch: int) -> None:
    found = [float(value) for value in renorm.limits(torch.tensor(batch - 1))]
    assert found[0] == pytest.approx(limit(batch, renorm.start, renorm.r_steps, 1.0, renorm.r_max))
    assert found[1] == pytest.approx(limit(batch, renorm.start, renorm.d_steps, 0.0, renorm.d_max))


def test_the_schedule_goes_on_where_a_checkpoint_stopped() -> None:
    renorm = Renorm(2.0, 1.0, start=1, r_steps=6, d_steps=4)
    batches = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(3)) * 3 + 1
    through, first, second = (evenorm.BatchNorm1d(3, renorm=renorm) for _ in range(3))
    expected = [through(batch) for batch in batches]
    found = [first(batch) for batch in batches[:3]]
    second.load_state_dict(first.state_dict())
    found += [second(batch) for batch in batches[3:]]
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))
    assert list(second.state_dict()) == list(torch.nn.BatchNorm1d(3).state_dict())


def test_the_schedule_counts_steps_not_micro_batches() -> None:
    renorm = Renorm(3.0, 5.0, start=1, r_steps=1, d_steps=1)
    layer, plain = (evenorm.BatchNorm1d(3, renorm=option) for option in (renorm, None))
    batches = torch.randn(3, 4, 3)
    with evenorm.one_update(layer):
        for batch in batches:
            torch.testing.assert_close(layer(batch), plain(batch))
    with evenorm.no_update(layer):
        assert not torch.allclose(layer(batches[0]), plain(batches[0]))
        assert layer.num_batches_tracked == 1


def test_the_corrections_take_no_gradient() -> None:
    """In closed form dx = weight * r / sigma_B * (g - <g> - t <g t>) with t the batch standardised."""
    layer = moved(renorm=OPEN)
    x, dy = torch.randn(2, 6, 3, 2, dtype=torch.float64)
    x.requires_grad_()
    sigma = (layer.running_var + layer.eps).sqrt()
    (found,) = torch.autograd.grad(layer(x), x, dy)
    rows, g = (tensor.detach().movedim(1, -1).reshape(-1, 3) for tensor in (x, dy))
    batch_sigma = (rows.var(0, correction=0) + layer.eps).sqrt()
    t = (rows - rows.mean(0)) / batch_sigma
    scale = layer.weight.detach() * (batch_sigma / sigma) / batch_sigma
    expected = scale * (g - g.mean(0) - t * (g * t).mean(0))
    torch.testing.assert_close(found.movedim(1, -1).reshape(-1, 3), expected)
    again = moved(renorm=OPEN)
    with evenorm.no_update(again):
        (twice,) = torch.autograd.grad(again(x), x, dy, create_graph=True)
        functional = torch.func.grad(lambda x: (again(x) * dy).sum())(x.detach())
    torch.testing.assert_close(twice, found)
    torch.testing.assert_close(functional, found)


def clipped(**options: Any) -> evenorm.BatchNorm:
    """Return a layer that would correct more than it may: r and d are constants near x, as its gradient has it."""
    layer = moved(2, renorm=Renorm(1.1, 0.2, start=0, r_steps=0, d_steps=0), eps=0.1, **options)
    layer.running_mean.copy_(torch.tensor([9.0, -8.0]))
    layer.running_var.copy_(torch.tensor([50.0, 0.001]))
    return layer


@pytest.mark.parametrize("options", [{}, {"activation": "silu"}, {"virtual_batch_size": 3}], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_gradients_and_their_gradients(options: dict[str, Any], masked: bool) -> None:
    shapes, generator = ((7, 2, 2), (2,), (2,), (7, 2, 2)), torch.Generator().manual_seed(2)
    given_ = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    mask = torch.rand(7, 2, generator=generator) > 0.2 if masked else None
    layer = clipped(**options)

    def call(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        with evenorm.no_update(layer):
            more = {"residual": residual, "mask": mask}
            return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,), more)

    assert gradcheck(call, given_)
    assert gradgradcheck(call, given_)


def test_gradients_of_a_single_valid_value_by_the_population() -> None:
    mask = torch.tensor([[True, False], [False, False], [True, True], [True, True]])
    layer = moved(2, eps=0.1, virtual_batch_size=2, on_single="population")

    def call(x: Tensor) -> Tensor:
        with evenorm.no_update(layer):
            return layer(x, mask=mask)

    x = torch.randn(4, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    assert gradcheck(call, x)
    assert gradgradcheck(call, x)


def test_running_statistics_move_as_without_it() -> None:
    batches = torch.randn(4, 6, 3) * 3 + 1
    one, two = evenorm.BatchNorm1d(3, renorm=OPEN), evenorm.BatchNorm1d(3)
    for batch in batches:
        one(batch), two(batch)
    torch.testing.assert_close(dict(one.state_dict()), dict(two.state_dict()))


def test_a_change_of_the_running_statistics_does_not_reach_an_earlier_forward() -> None:
    found = []
    for disturb in (False, True):
        layer = moved(renorm=Renorm(1.5, 1.0, start=0, r_steps=0, d_steps=0))
        x, dy = torch.randn(2, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        y = layer(x.requires_grad_())
        if disturb:
            layer.running_mean.add_(3)
            layer.running_var.mul_(5)
            layer.num_batches_tracked.zero_()
        (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
        found.append((dx, *torch.autograd.grad(dx, x, dy)))
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_a_bad_value_shows_and_stays_in_its_channel() -> None:
    layer, x = moved(renorm=OPEN), torch.randn(5, 3, dtype=torch.float64)
    x[2, 1] = math.nan
    before = layer.running_mean.clone()
    y = layer(x)
    assert y[:, 1].isnan().all()
    assert y[:, [0, 2]].isfinite().all()
    assert (layer.running_mean == before).tolist() == [False, True, False]


@pytest.mark.parametrize("options", [{"renorm": OPEN}, {"renorm": Renorm()}, {"on_single": "population"}], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nothing_is_tied_to_running_statistics_that_are_not_finite(bad: float, options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(3)
    x, dy, ddx = torch.randn(3, 6, 3, dtype=torch.float64, generator=generator)
    mask, results = torch.tensor([True, True, False, True, True, False]), []
    for layer in (moved(**options), moved()):
        layer.running_mean[1], layer.running_var[2] = bad, bad
        given = x.clone().requires_grad_()
        y = layer(given, mask=mask)
        once = torch.autograd.grad(y, [given, *layer.parameters()], dy, retain_graph=True)
        (dx,) = torch.autograd.grad(y, given, dy, create_graph=True)
        results.append([y, *once, dx, torch.autograd.grad(dx, given, ddx)[0]])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found[..., 1:], expected[..., 1:])
        assert found.isfinite().all()


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "r_max": ({"r_max": 0.9}, "Renorm needs r_max of at least 1 and d_max of at least 0, got Renorm(r_max=0.9, "),
    "r_max is nan": ({"r_max": math.nan}, "Renorm needs r_max of at least 1 and d_max of at least 0, got Renorm("),
    "d_max": (
        {"d_max": -1},
        "Renorm needs r_max of at least 1 and d_max of at least 0, got Renorm(r_max=3.0, d_max=-1",
    ),
    "start": ({"start": -1}, "Renorm needs 0 <= start <= r_steps and d_steps, got Renorm("),
    "r_steps": ({"r_steps": 4_999}, "Renorm needs 0 <= start <= r_steps and d_steps, got Renorm("),
    "d_steps": ({"d_steps": 4_999}, "Renorm needs 0 <= start <= r_steps and d_steps, got Renorm("),
}


@pytest.mark.parametrize(("options", "text"), BAD.values(), ids=BAD)
def test_bad_limits_and_schedules(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(text)}"):
        Renorm(**options)


def test_what_is_no_renorm_or_has_nothing_to_tie_to() -> None:
    with pytest.raises(TypeError, match=r"^renorm must be a Renorm, got True$"):
        evenorm.BatchNorm1d(3, renorm=True)
    with pytest.raises(ValueError, match=r"^renorm needs running statistics, got track_running_stats=False$"):
        evenorm.BatchNorm1d(3, track_running_stats=False, renorm=OPEN)
