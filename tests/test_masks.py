"""Masks: the result is that of the valid positions alone, whatever the others hold and however many they are."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional

import evenorm
from book import BAD, RENORMS, Situation, agree, answer, situations

MODES = {"train": True, "eval": False}


@settings(deadline=None, max_examples=80)
@given(situations(with_mask=st.just(True)))
def test_a_masked_layer_is_the_books_on_the_valid_rows(situation: Situation) -> None:
    """Output, all gradients and running statistics, in train and eval, with every other option."""
    agree(situation)


@settings(deadline=None, max_examples=40)
@given(situations(with_mask=st.just(True), virtual_batch_size=st.none()))
def test_a_masked_call_equals_the_same_call_on_the_valid_rows(situation: Situation) -> None:
    masked, alone = situation.layer(), situation.layer()
    for number, (x, residual, mask, dy) in enumerate(situation.batches()):
        masked.train(number < 2)
        alone.train(number < 2)
        ours = answer(masked, (x, residual, mask, dy))
        gathered = [None if tensor is None else tensor.movedim(1, -1)[mask] for tensor in (x, residual, None, dy)]
        rows = answer(alone, tuple(gathered))
        for of_mask, of_rows in zip(ours[:-2], rows[:-2], strict=True):  # y, dx and dresidual
            torch.testing.assert_close(of_mask.movedim(1, -1)[mask], of_rows)
            assert not of_mask.movedim(1, -1)[~mask].any()
        torch.testing.assert_close(ours[-2:], rows[-2:])
        torch.testing.assert_close(
            (masked.running_mean, masked.running_var, masked.num_batches_tracked),
            (alone.running_mean, alone.running_var, alone.num_batches_tracked),
        )


@settings(deadline=None, max_examples=40)
@given(situations(with_mask=st.just(True), virtual_batch_size=st.sampled_from([None, 2])), st.integers(0, 3))
def test_neither_content_nor_amount_of_padding_matters(situation: Situation, more: int) -> None:
    """The content does not change a bit. More padding may change the order of sums, and nothing else."""
    found = []
    for fill, width in [*((fill, 0) for fill in BAD), (math.nan, more)]:
        layer, results = situation.layer(), []
        for number, (x, residual, mask, dy) in enumerate(situation.batches()):
            layer.train(number < 2)
            valid = mask.unsqueeze(1)
            x, residual, dy = (t if t is None else torch.where(valid, t, fill) for t in (x, residual, dy))
            if situation.positions:
                mask = functional.pad(mask, (0, width))
                x, residual, dy = (
                    t if t is None else functional.pad(t, (0, width), value=fill) for t in (x, residual, dy)
                )
            batch = (x, residual, mask, dy)
            answers = answer(layer, batch)
            cut = [t[..., : t.shape[-1] - width] if t.dim() > 2 else t for t in answers]
            results += [*cut, layer.running_mean.clone(), layer.running_var.clone()]
        found.append(results)
    for other in found[1:-1]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))
    torch.testing.assert_close(found[-1], found[0])


def test_an_activation_that_is_not_zero_at_zero_leaves_the_padding_zero() -> None:
    x, mask = torch.randn(4, 3, 5), torch.rand(4, 5) > 0.5
    for activation in ("sigmoid", torch.nn.Softplus()):
        for training in (True, False):
            y = evenorm.BatchNorm1d(3, activation=activation).train(training)(x, mask=mask)
            assert not y.movedim(1, -1)[~mask].any()
            assert y.movedim(1, -1)[mask].all()


def given_doubles() -> list[Tensor]:
    shapes = ((5, 2, 3), (2,), (2,), (5, 2, 3))
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


MASK = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 1], [1, 1, 1], [0, 1, 1]], dtype=torch.bool)


@pytest.mark.parametrize("training", MODES.values(), ids=MODES)
@pytest.mark.parametrize("size", [None, 2])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_gradients_and_their_gradients(activation: str | None, size: int | None, training: bool) -> None:
    layer = evenorm.BatchNorm1d(2, 0.1, activation=activation, virtual_batch_size=size, dtype=torch.float64)
    layer.train(training)

    def call(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        with evenorm.no_update(layer):
            parameters = {"weight": weight, "bias": bias}
            return torch.func.functional_call(layer, parameters, (x,), {"residual": residual, "mask": MASK})

    assert gradcheck(call, given_doubles())
    assert gradgradcheck(call, given_doubles())


def test_a_mask_in_any_layout_is_the_same_mask() -> None:
    x, dy = torch.randn(2, 4, 3, 6)
    lengths = torch.tensor([6, 2, 0, 5])
    mask = evenorm.mask_from_lengths(lengths, 6)
    column = torch.tensor([[True], [False], [True], [True]])
    for plain, other in (
        (mask, mask.t().contiguous().t()),
        (mask, torch.zeros(8, 12, dtype=torch.bool)[::2, ::2].copy_(mask)),
        (column.repeat(1, 6), column.expand(4, 6)),
    ):
        results = []
        for chosen in (plain, other):
            layer = evenorm.BatchNorm1d(3)
            results.append(answer(layer, (x, None, chosen, dy)))
        assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@pytest.mark.parametrize("renorm", [None, evenorm.Renorm(start=0, r_steps=0, d_steps=0)], ids=["plain", "renorm"])
@pytest.mark.parametrize("training", MODES.values(), ids=MODES)
def test_a_mask_that_changes_before_the_backward_is_an_error(training: bool, renorm: Any) -> None:
    """As for every other tensor that a backward still needs: not a wrong gradient."""
    layer = evenorm.BatchNorm1d(3, renorm=renorm).train(training)
    mask = torch.rand(4, 5) > 0.3
    y = layer(torch.randn(4, 3, 5, requires_grad=True), mask=mask)
    mask.fill_(True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(torch.randn(4, 3, 5))


# Masks that leave nothing, or next to nothing.


def snapshot(layer: evenorm.BatchNorm) -> list[Tensor]:
    return [buffer.clone() for buffer in layer.buffers()]


@pytest.mark.parametrize("average", [None, evenorm.Cumulative(), evenorm.Window(2)], ids=str)
def test_an_all_masked_batch_is_refused_and_changes_nothing(average: Any) -> None:
    layer = evenorm.BatchNorm1d(3, average=average)
    before = snapshot(layer)
    text = "mask must leave at least one valid position (True) when training, got mask (4, 5), all False"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}"):
        layer(torch.randn(4, 3, 5), mask=torch.zeros(4, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match=f"^{re.escape(text)}"):
        evenorm.batch_norm(
            torch.randn(4, 3, 5), None, None, training=True, mask=torch.zeros(4, 5, dtype=torch.bool)
        )
    assert all(torch.equal(one, two) for one, two in zip(before, snapshot(layer), strict=True))


def test_an_all_masked_batch_in_eval_mode_is_all_zero() -> None:
    layer = evenorm.BatchNorm1d(3, activation="sigmoid").eval()
    x = torch.full((4, 3, 5), math.nan, requires_grad=True)
    y = layer(x, mask=torch.zeros(4, 5, dtype=torch.bool))
    assert not y.any()
    assert not torch.autograd.grad(y, x, torch.randn_like(y))[0].any()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # torch's own, while it traces
@pytest.mark.parametrize("average", [None, evenorm.Cumulative(), evenorm.Window(2)], ids=str)
def test_an_all_masked_batch_that_nobody_may_look_at_changes_nothing(average: Any) -> None:
    """Compiled, and on an accelerator, the mask's values are not asked for: that would be a host sync."""
    torch._dynamo.reset()
    layer = evenorm.BatchNorm1d(3, average=average)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(torch.randn(4, 3, 5), mask=torch.rand(4, 5) > 0.3)
    before = snapshot(layer)
    x = torch.full((4, 3, 5), math.nan, requires_grad=True)
    y = compiled(x, mask=torch.zeros(4, 5, dtype=torch.bool))
    assert not y.any()
    assert not torch.autograd.grad(y, x, torch.randn_like(y))[0].any()
    assert all(torch.equal(one, two) for one, two in zip(before, snapshot(layer), strict=True))


def test_a_sub_batch_without_a_valid_position_is_zero_and_the_others_do_not_notice() -> None:
    x, mask = torch.randn(4, 3, 5), torch.ones(4, 5, dtype=torch.bool)
    mask[:2] = False
    x[:2] = math.nan
    layer, other = (evenorm.BatchNorm1d(3, virtual_batch_size=2, dtype=torch.float64) for _ in range(2))
    y = layer(x.double(), mask=mask)
    assert not y[:2].any()
    torch.testing.assert_close(y[2:], other(x[2:].double()))
    torch.testing.assert_close(layer.running_var, other.running_var)


def test_a_single_valid_value_is_refused_like_a_single_value() -> None:
    layer, mask = evenorm.BatchNorm1d(3), torch.zeros(4, 5, dtype=torch.bool)
    mask[1, 2] = True
    before = snapshot(layer)
    text = "Expected more than 1 value per channel when training, got input size torch.Size([4, 3, 5]) with 1 valid"
    with pytest.raises(ValueError, match=f"^{re.escape(text)} .*on_single='population'"):
        layer(torch.randn(4, 3, 5), mask=mask)
    assert all(torch.equal(one, two) for one, two in zip(before, snapshot(layer), strict=True))


def test_a_single_valid_value_by_the_population() -> None:
    layer, mask = evenorm.BatchNorm1d(3, on_single="population"), torch.zeros(4, 5, dtype=torch.bool)
    mask[1, 2] = True
    layer(torch.randn(8, 3, 5) * 3 + 1)
    x, before = torch.randn(4, 3, 5, requires_grad=True), snapshot(layer)
    y = layer(x, mask=mask)
    expected = layer.eval()(x.detach()[1, :, 2].unsqueeze(0))[0]
    torch.testing.assert_close(y[1, :, 2], expected)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    torch.testing.assert_close(dx[1, :, 2], (layer.running_var + layer.eps).rsqrt())
    assert all(torch.equal(one, two) for one, two in zip(before, snapshot(layer), strict=True))


# Lengths.


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=5), st.sampled_from([torch.int64, torch.int32, torch.uint8])
)
def test_lengths_become_a_mask(lengths: list[int], dtype: torch.dtype) -> None:
    mask = evenorm.mask_from_lengths(torch.tensor(lengths, dtype=dtype), 6)
    assert mask.tolist() == [[position < length for position in range(6)] for length in lengths]
    assert mask.dtype == torch.bool


LENGTHS: dict[str, tuple[Any, type[Exception], str]] = {
    "float": (torch.tensor([1.0]), TypeError, "lengths must be integers, got torch.float32"),
    "bool": (torch.tensor([True]), TypeError, "lengths must be integers, got torch.bool"),
    "a list": ([1, 2], TypeError, "lengths must be a tensor of integers, got list"),
    "two dimensions": (torch.ones(2, 1, dtype=torch.int64), ValueError, "lengths must have shape (N,), got (2, 1)"),
    "a number": (torch.tensor(3), ValueError, "lengths must have shape (N,), got ()"),
}


@pytest.mark.parametrize(("lengths", "kind", "text"), LENGTHS.values(), ids=LENGTHS)
def test_bad_lengths(lengths: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=f"^{re.escape(text)}$"):
        evenorm.mask_from_lengths(lengths, 6)


# Bad masks, before any work.

BAD_MASKS: dict[str, tuple[Any, type[Exception], str]] = {
    "x's shape": (
        torch.ones(4, 3, 5).bool(),
        ValueError,
        "mask must have shape (4, 5) for x (4, 3, 5), got (4, 3, 5)",
    ),
    "transposed": (torch.ones(5, 4).bool(), ValueError, "mask must have shape (4, 5) for x (4, 3, 5), got (5, 4)"),
    "samples only": (torch.ones(4).bool(), ValueError, "mask must have shape (4, 5) for x (4, 3, 5), got (4,)"),
    "to broadcast": (
        torch.ones(4, 1).bool(),
        ValueError,
        "mask must have shape (4, 5) for x (4, 3, 5), got (4, 1)",
    ),
    "numbers": (
        torch.ones(4, 5),
        ValueError,
        "mask must be bool, True where a position is valid; got torch.float32; convert it, e.g. mask.bool()",
    ),
    "a list": ([[True] * 5] * 4, TypeError, "mask must be a bool tensor, True where a position is valid; got list"),
    "device": (
        torch.ones(4, 5, dtype=torch.bool, device="meta"),
        ValueError,
        "mask must be on x's device, cpu; it is on meta",
    ),
}


@pytest.mark.parametrize("training", MODES.values(), ids=MODES)
@pytest.mark.parametrize(("mask", "kind", "text"), BAD_MASKS.values(), ids=BAD_MASKS)
def test_bad_masks(mask: Any, kind: type[Exception], text: str, training: bool) -> None:
    layer = evenorm.BatchNorm1d(3, average=evenorm.Window(2)).train(training)
    before = snapshot(layer)
    with pytest.raises(kind, match=f"^{re.escape(text)}$"):
        layer(torch.randn(4, 3, 5), mask=mask)
    assert all(torch.equal(one, two) for one, two in zip(before, snapshot(layer), strict=True))


@settings(deadline=None, max_examples=20)
@given(situations(with_mask=st.just(True), renorm=RENORMS, virtual_batch_size=st.sampled_from([2, 3])))
def test_masks_with_renormalised_sub_batches(situation: Situation) -> None:
    agree(situation)
