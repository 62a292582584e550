"""Calls that torch's layers take, or refuse, and that reach ours by an unusual way."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch.func import functional_call, functionalize, grad, stack_module_state, vmap
from torch.fx.proxy import TraceError

import evenorm
from evenorm.engines import cpu

META = {"device": "meta"}


def refused() -> pytest.RaisesExc[Exception]:
    """Expect our error, or torch's own where its operations compute."""
    if cpu.available() is None:
        return pytest.raises(ValueError, match=r"^all tensors must be on x's device, cpu; one is on meta$")
    return pytest.raises(RuntimeError, match="is not on the expected device")


# One operand without memory.


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["weight", "running_var", "residual"])
def test_one_operand_on_meta_is_refused(name: str, training: bool) -> None:
    x, given = torch.randn(4, 3, 5), {"running_mean": torch.zeros(3), "running_var": torch.ones(3)}
    given[name] = torch.ones((4, 3, 5) if name == "residual" else 3, **META)
    with refused():
        evenorm.batch_norm(x, training=training, **given)


def test_a_layer_on_meta_refuses_what_has_memory_and_takes_what_has_none() -> None:
    layer = evenorm.BatchNorm1d(3, **META)
    for training in (True, False):
        with refused():
            layer.train(training)(torch.randn(4, 3))
        assert layer(torch.randn(4, 3, **META)).shape == (4, 3)


# torch.func and compiled autograd.


def test_an_ensemble_trains_on_one_batch_that_it_shares() -> None:
    layers = [evenorm.BatchNorm1d(3) for _ in range(2)]
    for factor, layer in enumerate(layers):
        layer.running_mean.fill_(factor)
    parameters, statistics = stack_module_state(layers)
    x = torch.randn(6, 3)
    found = vmap(lambda p, b, x: functional_call(layers[0], (p, b), (x,)), (0, 0, None))(parameters, statistics, x)
    torch.testing.assert_close(found, torch.stack([layer(x) for layer in layers]))
    torch.testing.assert_close(statistics, stack_module_state(layers)[1])


def test_an_ensemble_of_stacked_state_dicts_trains() -> None:
    layers = [evenorm.BatchNorm1d(3) for _ in range(2)]
    stacked = {key: torch.stack([layer.state_dict()[key] for layer in layers]) for key in layers[0].state_dict()}
    x = torch.randn(2, 6, 3)
    found = vmap(lambda state, x: functional_call(layers[0], state, (x,)))(stacked, x)
    torch.testing.assert_close(found, torch.stack([layer(one) for layer, one in zip(layers, x, strict=True)]))
    for key, value in stacked.items():
        torch.testing.assert_close(value, torch.stack([layer.state_dict()[key] for layer in layers]))


def test_gradients_of_each_sample_in_training_say_what_to_do() -> None:
    layer = evenorm.BatchNorm1d(3)
    with pytest.raises(ValueError, match=r"^vmap cannot update running statistics"):
        vmap(grad(lambda x: layer(x).pow(2).sum()))(torch.randn(4, 6, 3))


def test_functionalized_with_buffers_that_are_given() -> None:
    layer, other, x = evenorm.BatchNorm1d(3), nn.BatchNorm1d(3), torch.randn(6, 3)
    given = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    found = functionalize(lambda buffers, x: functional_call(layer, buffers, (x,)))(given, x)
    torch.testing.assert_close(found, other(x))
    assert layer.num_batches_tracked == 0
    given.pop("nonfinite_batches")
    torch.testing.assert_close(given, dict(other.named_buffers()))


def test_functionalized_with_buffers_that_it_captured_says_what_to_do() -> None:
    layer, x = evenorm.BatchNorm1d(3), torch.randn(6, 3)
    for transformed in (functionalize(layer), functionalize(grad(lambda x: layer(x).sin().sum()))):
        with pytest.raises(ValueError, match=r"^functionalize cannot update running statistics that are not among"):
            transformed(x)
        with evenorm.no_update(layer):
            transformed(x)
    assert layer.num_batches_tracked == 0
    torch.testing.assert_close(functionalize(layer.eval())(x), layer(x))


@pytest.mark.parametrize("activation", [None, "silu"])
def test_a_backward_that_is_compiled(activation: str | None) -> None:
    torch._dynamo.reset()
    x, residual, dy = torch.randn(3, 6, 3, 5)
    layer, found = evenorm.BatchNorm1d(3, activation=activation), []
    leaves = [x.requires_grad_(), residual.requires_grad_(), *layer.parameters()]
    for compiled in (False, True):
        for leaf in leaves:
            leaf.grad = None
        y = layer(x, residual=residual)
        if compiled:
            with compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
                y.backward(dy)
        else:
            y.backward(dy)
        found.append([leaf.grad.clone() for leaf in leaves])
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("make", [nn.LazyBatchNorm1d, evenorm.LazyBatchNorm1d])
def test_no_update_refuses_a_layer_without_statistics_yet(make: Callable[[], nn.Module]) -> None:
    net: Any = nn.Sequential(nn.LazyLinear(3), make())
    x: Tensor = torch.randn(8, 4)
    with (
        pytest.raises(ValueError, match=r"^no_update: 1 \(LazyBatchNorm1d\) makes .*; run one forward first$"),
        evenorm.no_update(net),
    ):
        net(x)
    net(x)
    with evenorm.no_update(net):
        net(x)
    assert net[1].num_batches_tracked == 1


# Other ways to a layer.


def test_a_layer_is_one_call_in_a_symbolic_trace() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.last = evenorm.BatchNorm1d(3), evenorm.BatchNorm(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.norm(x * 2, residual=x))

    net, x = Residual().eval(), torch.randn(4, 3, 5)
    traced = torch.fx.symbolic_trace(net)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["norm", "last"]
    assert torch.equal(traced(x), net(x))


def test_a_layer_that_is_traced_by_itself_or_scripted_says_what_to_do() -> None:
    layer, x = evenorm.BatchNorm1d(3), torch.randn(4, 3)
    with pytest.raises(TraceError, match=r"^BatchNorm1d is one call in a trace; trace a network that holds it$"):
        torch.fx.symbolic_trace(layer)
    net = nn.Sequential(nn.Linear(3, 3), layer, evenorm.LazyBatchNorm1d()).eval()
    net(x)
    with warnings.catch_warnings():  # of torch's, that scripts and traces are old
        warnings.simplefilter("ignore")
        with pytest.raises(TypeError, match=r"^torch\.jit\.script cannot read evenorm's layers; use "):
            torch.jit.script(net)
        assert net[1] is layer
        torch.testing.assert_close(torch.jit.trace(net, x)(x), net(x))
        torch.testing.assert_close(torch.jit.script(evenorm.revert(copy.deepcopy(net)))(x), net(x))


class Positive(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return value.abs()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_a_parametrized_statistic(name: str, training: bool) -> None:
    x, found = torch.randn(4, 3, 5), []
    for layer in (nn.BatchNorm1d(3), evenorm.BatchNorm1d(3)):
        layer.get_buffer(name).copy_(torch.tensor([-2.0, 1.0, -0.5]))
        nn.utils.parametrize.register_parametrization(layer, name, Positive())
        found.append(layer.train(training)(x))
    torch.testing.assert_close(found[0], found[1])


def test_any_activation_takes_the_place_of_a_module() -> None:
    layer, plain, x = evenorm.BatchNorm1d(3, activation=nn.PReLU()), nn.BatchNorm1d(3), torch.randn(4, 3)
    for activation, after in (
        ("relu", nn.ReLU()),
        (None, nn.Identity()),
        (nn.ELU(2.0), nn.ELU(2.0)),
        ("silu", nn.SiLU()),
    ):
        layer.activation = activation
        torch.testing.assert_close(layer(x), after(plain(x)))
    assert list(layer.state_dict()) == list(plain.state_dict())
