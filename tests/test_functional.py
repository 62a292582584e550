"""`batch_norm` and `moments` as functions: every result against the truth, and what autograd builds on them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional

import evenorm
from cases import CASES, Case, State
from truth import ACTIVATIONS, MODES, MODULES, Call, complaints, distance, ours, truth

FUSED: dict[str, tuple[str | None, bool]] = {
    "plain": (None, False),
    "relu": ("relu", False),
    "add": (None, True),
    "add, relu": ("relu", True),
    "silu": ("silu", False),
}


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Fill what torch allocates with NaN, so that an element that nobody writes shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES.values(), ids=str)
def test_every_result_is_at_least_as_exact_as_torchs(case: Case, mode: str) -> None:
    found = {}
    for name, (activation, with_residual) in FUSED.items():
        found[name] = complaints(Call(case, MODES[mode], activation, with_residual))
    assert not any(found.values()), found


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", [case for case in CASES.values() if math.prod(case.shape)], ids=str)
def test_masked_results_are_at_least_as_exact_as_torchs_on_the_valid_rows(case: Case, mode: str) -> None:
    assert complaints(Call(case, MODES[mode], with_mask=True)) == []
    assert complaints(Call(case, MODES[mode], "relu", with_residual=True, with_mask=True)) == []


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("activation", [*ACTIVATIONS, *MODULES])
def test_every_activation_is_at_least_as_exact_as_torchs(activation: str | None, mode: str) -> None:
    chosen = MODULES.get(activation or "", activation)
    for case in (CASES["4-D"], CASES["2-D, offset 1e4"]):
        for residual, mask in ((False, False), (True, False), (True, True)):
            assert complaints(Call(case, MODES[mode], chosen, residual, mask)) == []


WELL_SCALED = ("normal", "offset 50", "offset 1e4", "offset 1e5", "outlier", "scales")
SINGLE = [case for case in CASES.values() if case.dtype == torch.float32 and case.values in WELL_SCALED]


@pytest.mark.parametrize("case", SINGLE, ids=str)
def test_float32_is_within_four_units_in_the_last_place(case: Case) -> None:
    for training in MODES.values():
        call = Call(case, training)
        error, scale = distance(call.answer(ours)["y"], call.answer(truth, widen=True)["y"])
        assert (error <= 4 * 2.0**-23 * scale.max()).all()


def test_float64_with_a_large_offset_loses_only_what_a_rounded_mean_costs() -> None:
    case = Case("", (6, 5, 37), torch.float64, values="offset 1e5")
    error, scale = distance(Call(case).answer(ours)["y"], Call(case).answer(truth)["y"])
    assert (error <= 1e5 * 2.0**-53 * scale).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(37, 5), (5, 5, 33), (3, 5, 9, 11)])
def test_a_constant_channel_gives_exactly_bias(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    case = Case("", shape, dtype, values="constant, any size")
    found, state = Call(case).answer(ours), case.state()
    assert torch.equal(found["y"], state.bias.view(-1, *[1] * (len(shape) - 2)).expand(shape))
    assert torch.equal(found["dweight"], torch.zeros(5, dtype=dtype))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(4, 6, 9, 7), (2, 5, 3, 4, 5)])
def test_output_and_gradient_keep_the_memory_format(shape: tuple[int, ...], layout: str) -> None:
    case = Case("", shape, layout=layout)
    for training in MODES.values():
        found = Call(case, training, "relu", with_residual=True).answer(ours)
        assert found["y"].stride() == found["dx"].stride() == case.make().stride()


@pytest.mark.parametrize("mode", MODES)
def test_expanded_gradients_are_gradients_like_any_other(mode: str) -> None:
    case = CASES["4-D"]
    x, state = case.make().requires_grad_(), case.state()
    y = ours(x, state, MODES[mode], "silu", None, None)
    (from_sum,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    (from_ones,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(from_sum, from_ones)


def test_without_running_statistics_training_is_the_same() -> None:
    case = CASES["4-D"]
    with_them = ours(case.make(), case.state(), True, "relu", None, None)
    state = case.state()
    without = evenorm.batch_norm(case.make(), None, None, state.weight, state.bias, True, activation="relu")
    assert torch.equal(with_them, without)


def test_arguments_are_not_touched() -> None:
    case = CASES["4-D"]
    for training in MODES.values():
        tensors = [case.make(), case.noise(1), *case.state(), case.mask()]
        before = [tensor.clone() for tensor in tensors]
        x, residual, *state, mask = tensors
        ours(x, State(*state), training, "relu", residual, mask)
        moved = [not torch.equal(tensor, old) for tensor, old in zip(tensors, before, strict=True)]
        assert moved == [False, False, False, False, training, training, False]


def test_two_calls_give_the_same_bits() -> None:
    for name in ("4-D", "4-D, channels_last", "2-D, long"):
        call = Call(CASES[name], activation="silu", with_residual=True)
        first, second = call.answer(ours), call.answer(ours)
        assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_padding_has_no_influence(activation: str | None, mode: str) -> None:
    """Neither what stands in the padding nor how much there is of it."""
    results = []
    for padding, fill in ((1, 0.0), (1, math.nan), (1, math.inf), (29, 1e30)):
        generator = torch.Generator().manual_seed(5)
        x, residual, dy = torch.randn(3, 4, 3, 17, generator=generator)
        x, residual, dy = (functional.pad(t, (0, padding), value=fill) for t in (x, residual, dy))
        mask = torch.arange(17 + padding).expand(4, -1) < torch.tensor([[17], [3], [0], [9]])
        for tensor in (x, residual, dy):
            tensor.masked_fill_(~mask.unsqueeze(1), fill)
        mean, var = torch.zeros(3), torch.ones(3)
        weight = torch.tensor([1.5, -1.0, 0.0], requires_grad=True)
        bias = torch.tensor([0.1, 0.2, 0.3], requires_grad=True)
        leaves = (x.requires_grad_(), residual.requires_grad_(), weight, bias)
        more = {"activation": activation, "residual": residual, "mask": mask}
        y = evenorm.batch_norm(x, mean, var, weight, bias, MODES[mode], **more)
        dx, dresidual, dweight, dbias = torch.autograd.grad(y, leaves, dy)
        for tensor in (y, dx, dresidual):
            assert not tensor.masked_select(~mask.unsqueeze(1)).any()
        results.append([*(t[..., :17] for t in (y, dx, dresidual)), dweight, dbias, mean, var])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-6, atol=1e-6)


def test_a_mask_that_leaves_out_all_or_nothing() -> None:
    x, state = CASES["4-D"].make(), CASES["4-D"].state()
    everything = torch.ones(4, 9, 7, dtype=torch.bool)
    assert not ours(x, state, False, None, None, ~everything).any()
    masked = ours(x, CASES["4-D"].state(), True, "relu", None, everything)
    torch.testing.assert_close(masked, ours(x, state, True, "relu", None, None))


def test_a_residual_of_another_dtype_promotes_as_in_torch() -> None:
    x, residual = torch.randn(4, 3, 5).bfloat16(), torch.randn(4, 3, 5, requires_grad=True)
    y = evenorm.batch_norm(x, None, None, training=True, residual=residual, activation="relu")
    expected = (functional.batch_norm(x, None, None, training=True) + residual).relu()
    assert y.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(y, expected, rtol=0, atol=0.05)
    assert torch.autograd.grad(y, residual, torch.ones_like(y))[0].dtype == torch.float32


# `moments`.


@pytest.mark.parametrize("channel_dim", [0, 1, 2, -1, -2])
def test_moments_of_any_channel_dimension(channel_dim: int) -> None:
    x = torch.randn(3, 4, 5)
    found = evenorm.moments(x, channel_dim=channel_dim)
    values = x.double().movedim(channel_dim, -1).flatten(0, -2)
    torch.testing.assert_close(found.mean, values.mean(0))
    torch.testing.assert_close(found.variance(), values.var(0, correction=0))
    assert found.count.shape == ()
    assert found.count == len(values)
    mask = torch.rand(x.movedim(channel_dim, -1).shape[:-1]) > 0.4
    spoiled = x.movedim(channel_dim, -1).clone()
    spoiled[~mask] = math.nan
    masked = evenorm.moments(spoiled.movedim(-1, channel_dim), mask=mask, channel_dim=channel_dim)
    torch.testing.assert_close(masked.mean, values[mask.flatten()].mean(0))
    torch.testing.assert_close(masked.variance(), values[mask.flatten()].var(0, correction=0))


def test_moments_are_differentiable() -> None:
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: evenorm.moments(x).mean, x)
    assert gradcheck(lambda x: evenorm.moments(x).variance(1), x)


# Errors come before any work, and say what is required, what came, and how to fix it.

X = torch.randn(4, 3, 5)
BAD = {
    "1-D": ({"x": torch.randn(3)}, ValueError, "expected 2D or higher input (got 1D input): (N, C, *positions)"),
    "integer": (
        {"x": torch.ones(4, 3, dtype=torch.int64)},
        TypeError,
        "expected a floating-point tensor, got torch.int64; convert it first, e.g. x.float()",
    ),
    "complex": (
        {"x": torch.ones(4, 3, dtype=torch.complex64)},
        TypeError,
        "expected a floating-point tensor, got torch.complex64; convert it first, e.g. x.float()",
    ),
    "not a tensor": (
        {"x": [[1.0, 2.0]]},
        TypeError,
        "expected a floating-point tensor, got list; convert it first, e.g. x.float()",
    ),
    "running_mean": ({"running_mean": torch.zeros(4)}, ValueError, "running_mean should contain 3 elements not 4"),
    "running_var": ({"running_var": torch.ones(2)}, ValueError, "running_var should contain 3 elements not 2"),
    "weight": ({"weight": torch.ones(1)}, ValueError, "weight should contain 3 elements not 1"),
    "bias": ({"bias": torch.ones(0)}, ValueError, "bias should contain 3 elements not 0"),
    "one value": (
        {"x": torch.randn(1, 3)},
        ValueError,
        (
            "Expected more than 1 value per channel when training, got input size torch.Size([1, 3]); "
            "training=False normalises such a batch by the running statistics"
        ),
    ),
    "one value, 1x1": (
        {"x": torch.randn(1, 3, 1, 1)},
        ValueError,
        "Expected more than 1 value per channel when training, got input size torch.Size([1, 3, 1, 1])",
    ),
    "eps 0": ({"eps": 0.0}, ValueError, "batch_norm eps must be positive during training, but got 0.0"),
    "eps below 0": (
        {"eps": -1.0, "training": False},
        ValueError,
        "batch_norm eps must be non-negative, but got -1.0",
    ),
    "no statistics": (
        {"running_mean": None, "running_var": None, "training": False},
        ValueError,
        "Expected running_mean and running_var to be defined when training=False",
    ),
    "one statistic": (
        {"running_mean": None},
        ValueError,
        "running_mean and running_var must either both be None or neither be None",
    ),
    "a statistic that learns": (
        {"running_var": torch.ones(3, requires_grad=True)},
        ValueError,
        "running_mean and running_var are constants, to which no gradient flows, got one that requires grad",
    ),
    "a statistic that learns, eval": (
        {"running_mean": torch.ones(3, requires_grad=True), "training": False},
        ValueError,
        "running_mean and running_var are constants, to which no gradient flows, got one that requires grad",
    ),
    "weight's shape": (
        {"weight": torch.ones(1, 3, 1)},
        ValueError,
        "weight must have shape (3,), got (1, 3, 1); flatten it first",
    ),
    "running_var's shape": (
        {"running_var": torch.ones(3, 1)},
        ValueError,
        "running_var must have shape (3,), got (3, 1); flatten it first",
    ),
    "weight's type": (
        {"weight": 1.0},
        TypeError,
        "weight must be a floating-point tensor of shape (C,) or None, got float",
    ),
    "weight's dtype": (
        {"weight": torch.ones(3, dtype=torch.int64)},
        TypeError,
        "weight must be a floating-point tensor of shape (C,) or None, got torch.int64",
    ),
    "momentum": ({"momentum": None}, TypeError, "momentum must be a number, got None"),
    "layout": (
        {"x": torch.randn(4, 3, 5).to_sparse(), "training": False},
        TypeError,
        "expected a tensor of layout torch.strided, got torch.sparse_coo; convert it, e.g. x.to_dense()",
    ),
    "residual's type": ({"residual": 1.0}, TypeError, "residual must be a tensor of x's shape, got float"),
    "unknown activation": (
        {"activation": "swish"},
        ValueError,
        "activation must be one of relu, leaky_relu, silu, gelu, elu, hardswish, sigmoid, tanh",
    ),
    "activation's type": (
        {"activation": torch.relu},
        TypeError,
        "activation must be a name, an nn.Module or None, got builtin_function_or_method",
    ),
    "residual": (
        {"residual": torch.randn(4, 3, 1)},
        ValueError,
        "residual must have x's shape (4, 3, 5), got (4, 3, 1)",
    ),
    "mask's shape": (
        {"mask": torch.ones(4, 3, 5, dtype=torch.bool)},
        ValueError,
        "mask must have shape (4, 5) for x (4, 3, 5), got (4, 3, 5)",
    ),
    "mask's dtype": (
        {"mask": torch.ones(4, 5)},
        ValueError,
        "mask must be bool, True where a position is valid; got torch.float32; convert it, e.g. mask.bool()",
    ),
}


@pytest.mark.parametrize(("changed", "kind", "text"), BAD.values(), ids=BAD)
def test_bad_arguments(changed: dict[str, Any], kind: type[Exception], text: str) -> None:
    mean, var = torch.zeros(3), torch.ones(3)
    given = {"x": X, "running_mean": mean, "running_var": var, "training": True} | changed
    state = torch.get_rng_state()
    with pytest.raises(kind, match=f"^{re.escape(text)}"):
        evenorm.batch_norm(**given)
    assert torch.equal(mean, torch.zeros(3))
    assert torch.equal(var, torch.ones(3))
    assert torch.equal(torch.get_rng_state(), state)


def test_bad_arguments_of_moments() -> None:
    for x, dim in ((torch.randn(3), 0), (X, 3), (X, -4)):
        text = f"channel_dim must be a dimension of x, 2D or more; got {dim} for {x.dim()}D"
        with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
            evenorm.moments(x, channel_dim=dim)
    with pytest.raises(TypeError, match=r"^expected a floating-point tensor, got list"):
        evenorm.moments([1, 2])
    with pytest.raises(TypeError, match=r"^expected a floating-point tensor, got torch\.int64"):
        evenorm.moments(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"^mask must have shape \(4, 5\) for x \(4, 3, 5\), got \(4,\)$"):
        evenorm.moments(X, mask=torch.ones(4, dtype=torch.bool))
