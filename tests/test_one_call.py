"""An ordinary layer's training step, one call of the CPU engine, does bit for bit what the calls apart do."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

import evenorm
from evenorm import functional
from evenorm.engines import cpu

pytestmark = pytest.mark.skipif(cpu.available() is not None, reason="the C++ engine is not there")

OPTIONS = {
    "plain": {},
    "silu": {"activation": "silu"},
    "propagate": {"on_nonfinite": "propagate"},
    "cumulative": {"momentum": None},
    "debiased": {"average": evenorm.Exponential(0.2, debias=True)},
    "not affine": {"affine": False},
    "no bias": {"bias": False},
    "not tracking": {"track_running_stats": False},
    "population": {"on_single": "population"},
}


def outcome(layer, inputs):
    """The outputs, gradients and buffers of a layer after a step with each input."""
    found = []
    for x, residual, mask in inputs:
        given = [x, *([] if residual is None else [residual]), *layer.parameters()]
        y = layer(x, residual=residual, mask=mask)
        found += [y.detach(), *torch.autograd.grad(y, given, torch.cos(y.detach().nan_to_num()))]
    return found + [buffer.clone() for buffer in layer.buffers()]


def apart(monkeypatch):
    """Let no layer take the one call."""
    monkeypatch.setattr(functional, "train_step", lambda *given: None)


@pytest.mark.parametrize(
    ("with_residual", "masked"),
    [(False, False), (True, False), (False, True)],
    ids=["", "residual", "mask"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_one_call_does_what_the_calls_apart_do(options, dtype, with_residual, masked, monkeypatch):
    inputs = []
    for bad in (False, True, False):
        mask = torch.rand(6, 7) > 0.3 if masked else None
        x = (torch.randn(6, 5, 7) * 3 + 1).to(dtype)
        x[2, 1] = torch.nan if bad else 0.0
        residual = torch.randn(6, 5, 7).to(dtype).requires_grad_() if with_residual else None
        inputs.append((x.requires_grad_(), residual, mask))
    called = []
    ours = functional.train_step
    monkeypatch.setattr(functional, "train_step", lambda *given: called.append(given) or ours(*given))
    found = outcome(evenorm.BatchNorm(5, **options), inputs)
    assert len(called) == (0 if "on_single" in options else 3)
    apart(monkeypatch)
    wanted = outcome(evenorm.BatchNorm(5, **options), inputs)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "options",
    [
        {"renorm": evenorm.Renorm()},
        {"average": evenorm.Window(2)},
        {"on_nonfinite": "raise"},
        {"virtual_batch_size": 2},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_is_not_ordinary_goes_apart(options, monkeypatch):
    monkeypatch.setattr(functional, "train_step", lambda *given: pytest.fail("took the one call"))
    evenorm.BatchNorm(5, **options)(torch.randn(6, 5))
    layer = evenorm.BatchNorm(5)
    with evenorm.one_update(layer):
        layer(torch.randn(6, 5))
    lonely = evenorm.BatchNorm(5, on_single="population")  # a mask may leave a single value
    lonely(torch.randn(6, 5, 3), mask=torch.ones(6, 3, dtype=torch.bool))


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_commits_once(reentrant):
    layer, x = evenorm.BatchNorm(5, activation="relu"), torch.randn(6, 5, requires_grad=True)
    checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
    assert layer.num_batches_tracked == 1


def test_without_a_gradient_the_batch_is_tracked_too():
    layer, x = evenorm.BatchNorm(5, momentum=1.0), torch.randn(6, 5)
    with torch.no_grad():
        y = layer(x)
    assert not y.requires_grad
    torch.testing.assert_close(layer.running_mean, x.mean(0))
    torch.testing.assert_close(y, torch.nn.functional.batch_norm(x, None, None, training=True))


def test_a_gradient_may_be_wanted_by_the_weight_alone():
    layer, x = evenorm.BatchNorm(5), torch.randn(6, 5)
    layer.bias.requires_grad_(False)
    layer(x).pow(3).sum().backward()
    assert layer.weight.grad.count_nonzero() == 5
    assert layer.bias.grad is None


def test_second_derivatives():
    layer, x = evenorm.BatchNorm(5).double(), torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    layer(x)  # the running statistics take no part
    assert torch.autograd.gradgradcheck(layer, (x,))


def test_parameters_that_are_no_parameters():
    """Parametrized and pruned layers keep their weight elsewhere than among the parameters."""
    layer, x = evenorm.BatchNorm(5), torch.randn(6, 5)
    wanted = layer(x) * 2
    parametrize.register_parametrization(layer, "weight", _Twice())
    torch.testing.assert_close(layer(x), wanted)
    pruned = evenorm.BatchNorm(5)
    prune.random_unstructured(pruned, "weight", amount=3)
    assert (pruned(x) == 0).all(0).sum() == 3


class _Twice(nn.Module):
    def forward(self, weight):
        return weight * 2


@pytest.mark.parametrize("given", [(None, None), (torch.float64, torch.float32)], ids=["float32", "mixed"])
def test_the_operator_is_one_that_torch_knows_how_to_trace(given):
    mean_dtype, var_dtype = given
    x, weight = torch.randn(6, 5), torch.randn(5)
    running = (
        torch.zeros(5, dtype=mean_dtype),
        torch.ones(5, dtype=var_dtype),
        torch.tensor(0),
        0.1,
        False,
        1,
        torch.tensor(0),
    )
    arguments = (x, weight, None, None, None, None, 1e-5, 1, 0.0, *running, None)
    torch.library.opcheck(torch.ops.evenorm.step_forward.default, arguments)
