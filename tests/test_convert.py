"""Converting networks and reverting them: the same answers, the same objects, and reasons where nothing is done."""

from __future__ import annotations

import copy
import pickle
import random

import numpy
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import evenorm
from evenorm.layers import Layer
from evenorm.models import convert as convert_module
from evenorm.models.fuse import APPLIED
from networks_of_people import NETWORKS, shake_, trained


def outputs(model: nn.Module, *inputs: Tensor) -> list[Tensor]:
    return pytree.tree_leaves(model(*inputs))


def fused(model: nn.Module) -> dict[str, tuple[str, ...]]:
    return {layer.name: layer.fused for layer in evenorm.conversion(model).layers if layer.fused}


def reasons(model: nn.Module) -> dict[str, str]:
    return {layer.name: layer.reason for layer in evenorm.conversion(model).layers}


def snapshot(model: nn.Module) -> list[object]:
    """Return all there is to know about the modules of a network: who they are, and what their attributes are."""
    found: list[object] = []
    for name, module in model.named_modules(remove_duplicate=False):
        plain = {key: value for key, value in vars(module).items() if key not in ("_buffers", "_graph")}
        contents = {
            key: {k: id(v) for k, v in value.items()} if isinstance(value, dict) else copy.copy(value)
            for key, value in plain.items()
        }
        buffers = {k: (id(v), None if v is None else v.clone()) for k, v in module._buffers.items()}
        found.append((name, id(module), type(module), list(plain), contents, buffers))
    return found


def same(before: list[object], after: list[object]) -> bool:
    return str(before) == str(after)


def step(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Train one step with random cotangents and return what came out."""
    torch.manual_seed(5)
    found = outputs(model.train(), x)
    optimizer.zero_grad()
    sum((value * torch.randn_like(value)).sum() for value in found).backward()
    optimizer.step()
    return [value.detach() for value in found]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_converted_network_is_the_same_network(name):
    theirs, x = trained(name)
    x = x.double()
    theirs.double()
    ours = copy.deepcopy(theirs)
    optimizers = [torch.optim.SGD(model.parameters(), 0.1, momentum=0.9) for model in (theirs, ours)]
    assert evenorm.convert(ours) is ours
    assert all(layer.converted for layer in evenorm.conversion(ours).layers)
    torch.testing.assert_close(outputs(ours, x), outputs(theirs, x))
    for _ in range(3):
        torch.testing.assert_close(step(ours, x, optimizers[1]), step(theirs, x, optimizers[0]))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    torch.testing.assert_close(outputs(evenorm.revert(ours).eval(), x), outputs(theirs.eval(), x))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("fuse", [True, False])
def test_converting_and_reverting_is_the_identity(name, fuse):
    model, _ = trained(name)
    next(model.modules()).register_forward_hook(lambda *_: None)
    before = snapshot(model)
    assert not same(before, snapshot(evenorm.convert(model, fuse=fuse)))
    assert evenorm.revert(model) is model
    assert same(before, snapshot(model))


def test_what_is_fused_in_networks_of_people():
    found = {name: set(fused(trained(name)[0])) for name in NETWORKS}
    assert found["resnet"] == {"bn1"}  # its blocks share one ReLU module in three places
    assert found["mobilenet"] == {"0.1", "1.block.0.1", "1.block.1.1", "2.block.0.1", "2.block.1.1"}
    layers = {f"layers.{i}.norm{j}" for i in range(3) for j in (1, 2)}
    assert found["densenet"] == {"transition.0", *layers}
    doubles = {f"{part}.{i}" for part in ("down1", "down2", "bottom", "join1", "join2") for i in (1, 4)}
    assert found["unet"] == {"up1.1", *doubles}
    assert found["table_mlp"] == {"2", "5"}
    assert found["recurrent"] == {"norm"}
    assert found["functional"] == found["pointnet"] == set()
    assert "relu stands in the code of Functional.forward" in reasons(trained("functional")[0])["bn"]


def test_what_it_says_after_converting_is_what_it_said_before():
    for name in NETWORKS:
        model, _ = trained(name)
        for network in (model, fx.symbolic_trace(model)):
            before = str(evenorm.conversion(network))
            assert str(evenorm.conversion(evenorm.convert(network))) == before


def test_a_pickled_graph_computes_but_does_not_revert():
    model, x = trained("resnet")
    model = evenorm.convert(fx.symbolic_trace(model))
    twin = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(twin(x), model(x))
    with pytest.raises(ValueError, match="revert, then pickle"):
        evenorm.revert(twin)


@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles_of_a_converted_network_revert(copied):
    model, x = trained("unet")
    expected = outputs(model, x)
    before = [(name, type(module)) for name, module in model.named_modules()]
    twin = copied(evenorm.convert(model))
    torch.testing.assert_close(outputs(twin, x), expected)
    evenorm.revert(twin)
    torch.testing.assert_close(outputs(twin, x), expected)
    assert [(name, type(module)) for name, module in twin.named_modules()] == before


def test_activations_keep_their_parameters():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.LeakyReLU(0.3), nn.BatchNorm1d(3), nn.GELU(approximate="tanh"))
    x = torch.randn(8, 3)
    expected = model(x)
    evenorm.convert(model)
    assert model[0].activation.negative_slope == 0.3
    assert model[2].activation == "gelu_tanh"
    assert [type(model[1]), type(model[3])] == [APPLIED[nn.LeakyReLU], APPLIED[nn.GELU]]
    torch.testing.assert_close(model(x), expected)


class Collecting(nn.Module):
    """Collects what comes out behind each module of a class."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.layers, self.kind = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 3)), kind

    def forward(self, x):
        found = []
        for layer in self.layers:
            x = layer(x)
            if isinstance(layer, self.kind):
                found.append(x)
        return found


@pytest.mark.parametrize("kind", [nn.ReLU, nn.Identity, nn.Module])
def test_an_applied_activation_is_still_one_of_its_class(kind):
    model, x = Collecting(kind), torch.randn(8, 3)
    expected = outputs(model, x)
    assert bool(fused(model)) == (kind is not nn.Module)
    twin = pickle.loads(pickle.dumps(evenorm.convert(model)))
    torch.testing.assert_close(outputs(model, x), expected)
    torch.testing.assert_close(outputs(twin, x), expected)


# Graph modules


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "functional", "pointnet", "unet"])
def test_in_a_graph_module_all_that_follows_is_taken_in(name):
    model, x = trained(name)
    model, x = model.double(), x.double()
    theirs = fx.symbolic_trace(model)
    ours = copy.deepcopy(theirs)
    before, code = snapshot(ours), ours.code
    evenorm.convert(ours)
    torch.testing.assert_close(ours(x), theirs(x))
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in (theirs, ours)]
    torch.testing.assert_close(step(ours, x, optimizers[1]), step(theirs, x, optimizers[0]))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    twin = copy.deepcopy(ours).eval()
    torch.testing.assert_close(twin(x), ours.eval()(x))
    torch.testing.assert_close(evenorm.revert(twin)(x), theirs.eval()(x))
    assert evenorm.revert(ours).code == code
    assert [entry[:3] for entry in snapshot(ours)] == [entry[:3] for entry in before]


def test_additions_and_shared_activations_of_a_traced_resnet_are_taken_in():
    model = evenorm.convert(fx.symbolic_trace(trained("resnet")[0]))
    assert fused(model) == {
        "bn1": ("ReLU",),
        "layer1.0.bn1": ("ReLU",),
        "layer1.0.bn2": ("ReLU",),
        "layer1.0.bn3": ("addition", "ReLU"),
        "layer1.1.bn1": ("ReLU",),
        "layer1.1.bn2": ("ReLU",),
        "layer1.1.downsample.1": ("addition", "ReLU"),
    }
    assert reasons(model)["layer1.1.bn3"] == "the layer behind the addition does it"
    assert "relu" not in model.code
    assert " + " not in model.code


class Adding(nn.Module):
    def __init__(self, add) -> None:
        super().__init__()
        self.bn, self.add = nn.BatchNorm2d(3), add

    def forward(self, x):
        return self.add(self.bn, x)


def _in_place(bn, x):
    y = x * 2
    y.add_(bn(x))
    return y * y


def _written_between(bn, x):
    y, r = bn(x), x * 2
    r.mul_(3)
    return y + r


ADDITIONS = {
    "a number": (lambda bn, x: bn(x) + 1.0, "what is added to it is no tensor"),
    "itself": (lambda bn, x: (y := bn(x)) + y, "it is added to itself"),
    "in place": (_in_place, "it is added in place to something that others may read"),
    "later": (_written_between, "what is added to it is computed after it"),
    "read twice": (lambda bn, x: (y := bn(x)) * functional.relu(y), "its output is read in 2 places"),
    "scaled": (lambda bn, x: torch.add(bn(x), x, alpha=2), "what is added to it is no tensor"),
    "parameter of another tensor": (lambda bn, x: functional.elu(bn(x), x.numel()), "what follows it, elu, is no"),
    "smaller": (lambda bn, x: bn(x) + x.mean((2, 3), keepdim=True), ""),
    "first": (lambda bn, x: torch.tanh(x + bn(x)), ""),
    "method": (lambda bn, x: bn(x).add_(x).sigmoid(), ""),
    "leaky": (lambda bn, x: functional.leaky_relu(bn(x), 0.3, inplace=True), ""),
}


@pytest.mark.parametrize("case", ADDITIONS)
def test_an_addition_is_taken_in_where_that_is_the_same(case):
    add, reason = ADDITIONS[case]
    theirs = fx.symbolic_trace(Adding(add))
    shake_(theirs.bn)
    ours = copy.deepcopy(theirs)
    x = torch.randn(4, 3, 5, 5)
    if case in ("smaller",):  # what is added is computed after the layer unless it comes first
        reason = "what is added to it is computed after it"
    assert reasons(ours)["bn"].startswith(reason)
    assert bool(fused(ours)) == (not reason)
    evenorm.convert(ours)
    torch.testing.assert_close(ours(x.clone()), theirs(x.clone()))


def test_what_is_added_may_be_smaller():
    def add(bn, x):
        r = x.mean((2, 3), keepdim=True)
        return bn(x) + r

    theirs = fx.symbolic_trace(Adding(add))
    ours = evenorm.convert(copy.deepcopy(theirs))
    assert fused(ours) == {"bn": ("addition",)}
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    g = torch.randn(4, 3, 5, 5)
    found, expected = ours(x), theirs(x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, x, g), torch.autograd.grad(expected, x, g))


# What is left alone


class Calls(nn.Module):
    """A network of one batch norm, one activation, and a forward given as a function."""

    def __init__(self, call, bn=None, act=None) -> None:
        super().__init__()
        self.bn, self.act, self.call = bn or nn.BatchNorm1d(3), act or nn.ReLU(), call

    def forward(self, x):
        return self.call(self, x)


class Overriding(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x) * 2


class Modes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn, self.act = nn.BatchNorm1d(3), nn.ReLU()

    def forward(self, x):
        return self.act(self.bn(x)) if self.training else self.act(self.bn(x) * 2)


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn, self.act = nn.BatchNorm1d(3), nn.ReLU()

    def forward(self, x, more=None):
        y = self.bn(x)
        if more is not None:
            y = y + more
        return self.act(y)


class Tapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 3))

    def forward(self, x):
        found = []
        for layer in self.layers:
            x = layer(x)
            found.append(x)
        return torch.cat(found, 1)


def _hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda *_: None)
    return module


def _replaced(module: nn.Module) -> nn.Module:
    forward = type(module).forward
    module.forward = lambda x: forward(module, x) + 1
    return module


def _attribute(module: nn.Module) -> nn.Module:
    module.activation = nn.Sigmoid()
    return module


def _parametrized() -> nn.Module:
    bn = nn.BatchNorm1d(3)
    parametrize.register_parametrization(bn, "weight", nn.Softplus())
    return bn


def plain(m, x):
    return m.act(m.bn(x))


LEFT = {
    "layer twice": (lambda: Calls(lambda m, x: m.act(m.bn(x + m.bn(x)))), True, "it is called in several places"),
    "layer in two places": (
        lambda: nn.Sequential(bn := nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 3), bn, nn.ReLU()),
        True,
        "it is used in several places: 0, 3",
    ),
    "activation twice": (
        lambda: nn.Sequential(nn.BatchNorm1d(3), a := nn.SiLU(), nn.Linear(3, 3), a),
        True,
        "of its activation 1: it is used in several places: 1, 3",
    ),
    "activation elsewhere": (
        lambda: Calls(lambda m, x: m.act(m.bn(m.act(x)))),
        True,
        "of its activation act: it is",
    ),
    "read twice": (lambda: Calls(lambda m, x: (y := m.bn(x)) + m.act(y)), True, "its output is read in 2 places"),
    "read twice, in place": (
        lambda: Calls(lambda m, x: (y := m.bn(x)) + m.act(y), act=nn.ReLU(inplace=True)),
        True,
        "its output is read in 2 places",
    ),
    "tapped": (Tapped, True, "its output is read in 2 places in Tapped.forward"),
    "modes": (Modes, True, "what follows it, mul, is no activation"),
    "optional": (Optional, True, "add stands in the code of Optional.forward"),
    "weight read": (
        lambda: Calls(lambda m, x: m.act(m.bn(x)) * m.bn.weight),
        True,
        "a forward reads its parameters",
    ),
    "branch": (
        lambda: Calls(lambda m, x: plain(m, x) if x.sum() > 0 else x),
        True,
        "Calls.forward does not call it in every mode",
    ),
    "other activation": (
        lambda: nn.Sequential(nn.BatchNorm1d(3), nn.PReLU()),
        True,
        "what follows it, 1 (PReLU), is",
    ),
    "nothing": (lambda: nn.Sequential(nn.BatchNorm1d(3)), True, "its output leaves Sequential.forward"),
    "hook on layer": (lambda: Calls(plain, bn=_hooked(nn.BatchNorm1d(3))), True, "a hook looks at its output"),
    "hook on activation": (lambda: Calls(plain, act=_hooked(nn.ReLU())), True, "a hook on its activation act"),
    "forward replaced": (
        lambda: Calls(plain, bn=_replaced(nn.BatchNorm1d(3))),
        False,
        "it had its forward replaced",
    ),
    "forward around it replaced": (
        lambda: _replaced(Calls(lambda m, x: m.act(m.bn(x)))),
        True,
        "Calls.forward cannot be followed (it was replaced on the instance)",
    ),
    "subclass": (lambda: Calls(plain, bn=Overriding(3)), False, "it is a test_convert.Overriding"),
    "parametrized": (lambda: Calls(plain, bn=_parametrized()), False, "it carries parametrizations"),
    "attribute": (
        lambda: Calls(plain, bn=_attribute(nn.BatchNorm1d(3))),
        False,
        "it has an attribute 'activation'",
    ),
    "ours already": (
        lambda: Calls(plain, bn=evenorm.BatchNorm1d(3, activation="elu")),
        True,
        "it has an activation",
    ),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_cannot_be_taken_in_is_left_with_the_reason(case):
    make, converted, reason = LEFT[case]
    torch.manual_seed(0)
    theirs = make()
    torch.manual_seed(0)
    ours = make()
    entry = evenorm.conversion(ours).layers[0]
    assert entry.reason.startswith(reason)
    assert (entry.converted, entry.fused) == (converted, ())
    evenorm.convert(ours)
    x = torch.randn(8, 3)
    for training in (True, False):
        torch.testing.assert_close(ours.train(training)(x.clone()), theirs.train(training)(x.clone()))
    if not any(isinstance(module, Layer) and module.activation for module in ours.modules()):
        evenorm.revert(ours)
    torch.testing.assert_close(ours(x.clone()), theirs(x.clone()))


class Looping(Tapped):
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_an_activation_is_found_where_it_is_called_not_where_it_is_held():
    assert fused(Calls(plain)) == {"bn": ("act",)}
    assert fused(Looping()) == {"layers.1": ("layers.2",)}
    assert fused(nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), nn.ReLU())) == {"0.1": ("1",)}


def test_a_handle_still_removes_its_hook_after_an_interruption(monkeypatch):
    model, seen = nn.Sequential(nn.BatchNorm1d(3)), []
    handle = model[0].register_forward_pre_hook(lambda *_: seen.append(1))
    monkeypatch.setattr(convert_module, "adopt_", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        evenorm.convert(model)
    handle.remove()
    model(torch.randn(8, 3))
    assert seen == []


# Looking changes nothing


class Careless(nn.Module):
    """Its forward writes attributes and buffers and draws random numbers."""

    def __init__(self, random_factor) -> None:
        super().__init__()
        self.bn, self.act, self.calls, self.seen = nn.BatchNorm1d(3), nn.ReLU(), 0, []
        self.random_factor = random_factor
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.steps += 1
        self.last = self.act(self.bn(x))
        self.seen.append(self.last)
        return self.last * self.random_factor()


def one() -> float:
    return 1.0


def from_numpy() -> float:
    return float(numpy.random.rand())


def from_torch() -> Tensor:
    return torch.rand(())


@pytest.mark.parametrize("drawn", [one, random.random, from_numpy, from_torch])
def test_looking_at_a_network_leaves_no_trace(drawn):
    model = Careless(drawn)
    before, state = snapshot(model), (random.getstate(), torch.get_rng_state().tolist())
    numbers = numpy.random.get_state()[1].tolist()
    if drawn is one:
        assert fused(model) == {"bn": ("act",)}
    else:
        assert "it draws random numbers" in reasons(model)["bn"]
    assert same(before, snapshot(model))
    assert state == (random.getstate(), torch.get_rng_state().tolist())
    assert numbers == numpy.random.get_state()[1].tolist()
    assert (model.calls, model.seen, model.steps.item()) == (0, [], 0)


class Uncopyable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())
        self.generator = (i for i in range(3))

    def forward(self, x):
        return self.layers(x)


def test_a_network_that_cannot_be_copied_is_fused_in_its_sequentials():
    assert fused(Uncopyable()) == {"layers.0": ("layers.1",)}


@pytest.mark.parametrize("operation", ["adopt_", "take_in_", "release_", "give_back_"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_leaves_the_network_as_it_was(monkeypatch, operation, error):
    model, _ = trained("unet")
    back = operation in ("release_", "give_back_")
    if back:
        evenorm.convert(model)
    before = snapshot(model)
    original, calls = getattr(convert_module, operation), []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise error
        return original(*args)

    monkeypatch.setattr(convert_module, operation, interrupted)
    with pytest.raises(error):
        (evenorm.revert if back else evenorm.convert)(model)
    assert same(before, snapshot(model))


def test_an_interruption_leaves_a_graph_as_it_was(monkeypatch):
    model, x = trained("resnet")
    model = fx.symbolic_trace(model)
    expected, code = model(x), model.code
    original = fx.GraphModule.recompile
    calls = []

    def interrupted(self):
        original(self)
        if self is model:  # and not a copy
            calls.append(self)
            if len(calls) == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(fx.GraphModule, "recompile", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evenorm.convert(model)
    assert len(calls) == 2
    assert model.code == code
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


# What a layer keeps


def test_a_layer_keeps_what_it_has():
    bn = nn.BatchNorm2d(3, eps=1e-3, momentum=None, dtype=torch.float64).eval()
    bn.weight.requires_grad_(False)
    seen = []
    bn.register_forward_pre_hook(lambda module, _: seen.append(type(module)))
    held = [bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.num_batches_tracked]
    evenorm.convert(bn)
    assert all(a is b for a, b in zip(held, [*bn.parameters(), *list(bn.buffers())[:3]], strict=True))
    assert (bn.eps, bn.momentum, bn.training, bn.weight.requires_grad) == (1e-3, None, False, False)
    bn(torch.randn(2, 3, 4, 4, dtype=torch.float64))
    assert seen == [evenorm.BatchNorm2d]


def test_half_precision_comes_back_as_it_was():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).to(torch.bfloat16)
    evenorm.convert(model)
    assert model[1].running_mean.dtype == torch.float32
    evenorm.revert(model)
    assert {value.dtype for value in model.state_dict().values()} == {torch.bfloat16, torch.int64}


def test_lazy_layers_are_converted_and_learn_their_channels():
    model = evenorm.convert(nn.Sequential(nn.LazyBatchNorm1d(), nn.ReLU()))
    assert (model(torch.randn(8, 3)) >= 0).all()
    assert type(model[0]) is evenorm.BatchNorm1d
    evenorm.revert(model)
    assert [type(module) for module in model] == [nn.BatchNorm1d, nn.ReLU]


def test_checkpointing_counts_a_batch_once():
    block = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU())
    model = Calls(lambda m, x: checkpoint(m.bn, x, use_reentrant=False), bn=block)
    theirs, x = copy.deepcopy(block), torch.randn(8, 3)
    assert fused(evenorm.convert(model)) == {"bn.1": ("bn.2",)}
    g = torch.randn(8, 3)
    model(x).backward(g)
    theirs(x).backward(g)
    torch.testing.assert_close(block[0].weight.grad, theirs[0].weight.grad)
    torch.testing.assert_close(block.state_dict(), theirs.state_dict())


def test_tied_weights_stay_tied():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU(), nn.BatchNorm1d(3))
    model[2].weight = model[0].weight
    evenorm.convert(model)
    assert model[2].weight is model[0].weight


# What torch.nn cannot say


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = evenorm.BatchNorm1d(3)

    def forward(self, x, mask=None):
        return self.bn(x, mask=mask)


def _changed() -> nn.Module:
    model = evenorm.convert(nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()))
    model[0].activation = "silu"
    return model


REFUSED = {
    "renorm": (
        lambda: nn.Sequential(evenorm.BatchNorm1d(3, renorm=evenorm.Renorm())),
        "0: torch.nn has no renorm=",
    ),
    "window": (
        lambda: nn.Sequential(evenorm.BatchNorm1d(3, average=evenorm.Window(3))),
        "0: torch.nn has no average=",
    ),
    "frozen": (lambda: evenorm.freeze(nn.Sequential(nn.BatchNorm1d(3))), "unfreeze"),
    "activation": (lambda: evenorm.BatchNorm1d(3, activation="relu"), "its activation has no place of its own"),
    "module": (lambda: evenorm.BatchNorm1d(3, activation=nn.ELU(2.0)), "its activation has no place of its own"),
    "class": (lambda: evenorm.BatchNorm(3), "torch.nn has no class that does what evenorm.layers.BatchNorm does"),
    "mask": (Masked, "bn: Masked.forward calls it with mask"),
    "changed": (_changed, "0: its activation was changed to 'silu'"),
    "left": (lambda: evenorm.convert(nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()))[0], "its activation 1 has left"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_torch_has_no_word_for_is_not_reverted(case):
    make, reason = REFUSED[case]
    model = make()
    before = snapshot(model)
    with pytest.raises(ValueError, match="cannot be reverted") as error:
        evenorm.revert(model)
    assert reason in str(error.value)
    assert same(before, snapshot(model))


class AddsNumber(nn.Module):
    """Adds a number that comes from a shape."""

    def __init__(self, number) -> None:
        super().__init__()
        self.bn, self.number = nn.BatchNorm1d(3), number

    def forward(self, x):
        number = self.number(x)
        return torch.relu(self.bn(x) + number)


@pytest.mark.parametrize(
    "number",
    [lambda x: x.shape[0], lambda x: x.size(1) * 2, lambda x: x.dim(), lambda x: x.numel() // x.shape[-1]],
)
def test_a_number_is_no_addition(number):
    traced = fx.symbolic_trace(AddsNumber(number).eval())
    x = torch.randn(8, 3)
    before = traced(x)
    reason = reasons(traced)["bn"]
    assert reason.endswith("may be a number"), reason
    torch.testing.assert_close(evenorm.convert(traced)(x), before)
