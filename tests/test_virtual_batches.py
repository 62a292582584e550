"""Virtual batches: each run of samples is normalised as if it were alone; the running statistics see the whole."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import evenorm
from book import Situation, agree, situations
from evenorm import formulas
from evenorm.moments import virtual_batches


@settings(deadline=None, max_examples=60)
@given(situations(virtual_batch_size=st.integers(2, 9)))
def test_a_layer_with_virtual_batches_is_the_books_loop(situation: Situation) -> None:
    agree(situation)


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 40), st.integers(2, 12), st.integers(0, 1000))
def test_virtual_batches_equal_a_loop_of_plain_layers(samples: int, size: int, seed: int) -> None:
    """Any N, with remainders; the rule is that no run is smaller than asked for, and they differ by one at most."""
    generator = torch.Generator().manual_seed(seed)
    x, dy = torch.randn(2, samples, 3, 2, generator=generator, dtype=torch.float64)
    layer = evenorm.BatchNorm1d(3, virtual_batch_size=size, dtype=torch.float64)
    x.requires_grad_()
    y = layer(x)
    sizes = virtual_batches(samples, size) or [samples]
    assert sum(sizes) == samples
    assert len(sizes) == max(samples // size, 1)
    assert min(sizes) >= min(size, samples)
    assert max(sizes) - min(sizes) <= 1
    parts = [evenorm.BatchNorm1d(3, dtype=torch.float64)(part) for part in x.split(sizes)]
    torch.testing.assert_close(y, torch.cat(parts))
    ours, loops = (torch.autograd.grad(result, x, dy)[0] for result in (y, torch.cat(parts)))
    torch.testing.assert_close(ours, loops)
    rows = x.detach().movedim(1, -1).flatten(0, 1)
    torch.testing.assert_close(layer.running_mean, 0.1 * rows.mean(0))
    torch.testing.assert_close(layer.running_var, 0.9 + 0.1 * rows.var(0, correction=1))
    assert layer.num_batches_tracked == 1


def test_a_size_that_no_batch_reaches_changes_nothing() -> None:
    x = torch.randn(7, 3)
    assert torch.equal(evenorm.BatchNorm1d(3, virtual_batch_size=7)(x), evenorm.BatchNorm1d(3)(x))
    assert torch.equal(evenorm.BatchNorm1d(3, virtual_batch_size=100)(x), evenorm.BatchNorm1d(3)(x))


def test_eval_knows_no_virtual_batches() -> None:
    x = torch.randn(7, 3)
    layer, plain = evenorm.BatchNorm1d(3, virtual_batch_size=2), evenorm.BatchNorm1d(3)
    layer(x), plain(x)
    torch.testing.assert_close(layer.eval()(x), plain.eval()(x))


class Operations(TorchDispatchMode):
    """Count what torch is asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("plain", [False, True], ids=["engine", "formulas"])
def test_there_is_no_loop_over_sub_batches(plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if plain:
        monkeypatch.setattr("evenorm.engines.choose", lambda x: formulas)
        monkeypatch.setattr("evenorm.engines.cpu.supports", lambda x: False)
    counts = []
    for samples in (8, 64):
        layer, x = evenorm.BatchNorm1d(3, virtual_batch_size=2), torch.randn(samples, 3, 4, requires_grad=True)
        dy = torch.randn(samples, 3, 4)
        with Operations() as operations:
            torch.autograd.grad(layer(x), [x, layer.weight], dy)
        counts.append(operations.count)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("activation", [None, "silu"])
def test_gradients_and_their_gradients(activation: str | None) -> None:
    layer = evenorm.BatchNorm1d(2, 0.1, activation=activation, virtual_batch_size=3, dtype=torch.float64)

    def call(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        with evenorm.no_update(layer):
            return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,), {"residual": residual})

    shapes, generator = ((7, 2, 2), (2,), (2,), (7, 2, 2)), torch.Generator().manual_seed(2)
    given_ = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    assert gradcheck(call, given_)
    assert gradgradcheck(call, given_)


def test_an_empty_batch_is_empty() -> None:
    layer = evenorm.BatchNorm1d(3, virtual_batch_size=2)
    assert layer(torch.randn(0, 3, 4)).shape == (0, 3, 4)
    assert layer.num_batches_tracked == 0
    assert torch.equal(layer.running_var, torch.ones(3))


@pytest.mark.parametrize("size", [0, 1, -4, True, 2.0, "2"], ids=repr)
def test_bad_sizes(size: Any) -> None:
    text = f"virtual_batch_size must be a whole number of at least 2 samples, got {size!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        evenorm.BatchNorm1d(3, virtual_batch_size=size)
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        evenorm.LazyBatchNorm1d(virtual_batch_size=size)
