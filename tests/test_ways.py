"""Forwards that go several ways: what convert and fold do holds in each of them, or is not done."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import evenorm
from evenorm.models import sources
from networks_of_people import shake_


class Block(nn.Module):
    """A convolution, batch norm and an activation, called by a forward that is given."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


class Flag(Block):
    def forward(self, x, preact=False):
        h = self.bn(self.conv(x))
        if preact:
            return h
        return self.act(h)


class Identical(Block):
    def forward(self, x, preact=True):
        h = self.bn(self.conv(x))
        return h if preact is True else self.act(h)


class Raw(Block):
    def forward(self, x, raw=False):
        c = self.conv(x)
        return c if raw else self.act(self.bn(c))


class Pair(Block):
    def forward(self, x):
        skip = None
        if isinstance(x, (tuple, list)):
            x, skip = x
        h = self.bn(self.conv(x))
        return self.act(h) if skip is None else self.act(h) + h * skip


class Required(Block):
    def forward(self, x, skip):
        h = self.bn(self.conv(x))
        return h if skip is None else self.act(h) + skip


class Mode(Block):
    def forward(self, x, mode="post"):
        h = self.bn(self.conv(x))
        return h if mode == "pre" else self.act(h)


class Tensors(Block):
    def forward(self, x):
        h = self.bn(self.conv(x))
        return self.act(h) + h if torch.is_tensor(x) else self.act(h)


class Attribute(Block):
    def forward(self, x):
        h = self.bn(self.conv(x))
        return self.act(h) if hasattr(x, "decomposed") else h


class Keywords(Block):
    def forward(self, x, **options):
        h = self.bn(self.conv(x))
        return h if options.get("pre") is True else self.act(h)


class Large(Block):
    def forward(self, x):
        h = self.bn(self.conv(x))
        return h if x.abs().max() > 100 else self.act(h)


class Passed(nn.Module):
    """Tells its block by an argument of its own what to leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Flag()

    def forward(self, x, preact=False):
        return self.block(x, preact=preact)


class Reaching(nn.Module):
    """Calls its block, and something in it if the input is large; nobody can follow how often."""

    def __init__(self, large: Callable[[nn.Module, Tensor], Tensor], repeats: bool) -> None:
        super().__init__()
        self.block, self.large, self.repeats = Block(), large, repeats

    def forward(self, x):
        for _ in range(x.shape[0] if self.repeats else 1):
            x = x + 0
        if x.abs().max() > 100:
            return self.block.bn(self.block.conv(x))
        return self.block(x)


class Taps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(*Block().children(), *Block().children())

    def forward(self, x):
        for _ in range(len(x)):
            x = x + 0
        found = []
        for layer in self.features:
            x = layer(x)
            found.append(x)
        return torch.cat(found, 1)


class Picked(Taps):
    def forward(self, x):
        for _ in range(len(x)):
            x = x + 0
        return self.features[:2](x) + self.features[:3](x)


class Helped(Taps):
    def forward(self, x):
        for _ in range(len(x)):
            x = x + 0
        return self.by_hand(x)

    def by_hand(self, x):
        return dict(self.named_modules())["features.1"](self.features[0](x))


class Whole(nn.Module):
    """Cannot be followed either, and calls its modules as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.features = nn.Sequential(*Block().children())

    def forward(self, x):
        for _ in range(len(x)):
            x = self.block(x)
        for block in self.blocks:
            x = block(x)
        return self.features(x)


class Refusing(Block):
    """Raises errors for what it does not take."""

    def forward(self, x, skip=None):
        if x.shape[1] != 3:
            raise ValueError("RGB images, please")
        if not x.dim() == 4:  # pytest makes of an assert something else
            raise AssertionError
        return self.act(self.bn(self.conv(x)))


X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))

SEVERAL = {
    "flag": (Flag, lambda m: m(X, preact=True)),
    "flag that is compared": (Identical, lambda m: m(X)),
    "flag, convolution read": (Raw, lambda m: m(X, raw=True)),
    "pair": (Pair, lambda m: m([X, X])),
    "required None": (Required, lambda m: m(X, None)),
    "mode": (Mode, lambda m: m(X, mode="pre")),
    "is_tensor": (Tensors, lambda m: m(X)),
    "hasattr": (Attribute, lambda m: m(X)),
    "keywords": (Keywords, lambda m: m(X, pre=True)),
    "branch": (Large, lambda m: m(X * 1000)),
    "passed on": (Passed, lambda m: m(X, preact=True)),
    "reach, followed": (lambda: Reaching(None, False), lambda m: m(X * 1000)),
    "reach, not followed": (lambda: Reaching(None, True), lambda m: m(X * 1000)),
    "taps": (Taps, lambda m: m(X)),
    "picked": (Picked, lambda m: m(X)),
    "helped": (Helped, lambda m: m(X)),
}


def shaken(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(1)
    model = make().double().eval()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            shake_(layer)
    return model


@pytest.fixture(autouse=True)
def float64(monkeypatch):
    monkeypatch.setitem(globals(), "X", X.double())


@torch.no_grad()
@pytest.mark.parametrize("case", SEVERAL)
def test_every_way_through_a_forward_answers_as_before(case):
    make, call = SEVERAL[case]
    model = shaken(make)
    before = call(model)
    assert not any(layer.fused for layer in evenorm.conversion(model).layers)
    torch.testing.assert_close(call(evenorm.convert(copy.deepcopy(model))), before)
    example = (X, X) if case == "required None" else X
    if case != "hasattr":
        torch.testing.assert_close(call(evenorm.fold(model, example).model), before)


@pytest.mark.parametrize("case", ["reach, not followed", "taps", "picked", "helped"])
def test_a_forward_that_cannot_be_followed_and_may_take_a_module_apart_is_named(case):
    model = SEVERAL[case][0]()
    why = f"{type(model).__name__}.forward cannot be followed"
    for layer in evenorm.conversion(model).layers:
        assert layer.reason.startswith(why), layer.reason
        assert layer.reason.endswith("and may reach it"), layer.reason


@torch.no_grad()
def test_a_forward_that_calls_its_modules_as_they_are_takes_nothing_away():
    model = shaken(Whole)
    before = model(X)
    assert all(layer.fused for layer in evenorm.conversion(model).layers)
    torch.testing.assert_close(evenorm.convert(copy.deepcopy(model))(X), before)
    assert len(evenorm.fold(model, X).certificate.folds) == 4


@torch.no_grad()
def test_a_way_that_ends_in_an_error_of_the_forward_is_none():
    model = shaken(Refusing)
    before = model(X)
    assert evenorm.conversion(model).layers[0].fused == ("act",)
    torch.testing.assert_close(evenorm.convert(model)(X), before)


def test_ways_without_end_are_given_up():
    class Endless(Block):
        def forward(self, x):
            while x.sum() > 0:
                x = self.act(self.bn(self.conv(x)))
            return x

    assert "ways through it" in evenorm.conversion(Endless()).layers[0].reason


def test_following_leaves_the_functions_of_python_as_they_are():
    import builtins

    before = builtins.isinstance, builtins.hasattr
    evenorm.conversion(Pair())
    evenorm.conversion(Keywords())
    assert (builtins.isinstance, builtins.hasattr) == before


# What a trace does not see


class Listed(Block):
    def forward(self, x):
        if type(x) is list:
            return self.bn(self.conv(x[0]))
        return self.act(self.bn(self.conv(x)))


class Class(Block):
    def forward(self, x):
        h = self.bn(self.conv(x))
        return h if x.__class__ == nn.Parameter else self.act(h)


class Told(Block):
    def forward(self, x, preact):
        h = self.bn(self.conv(x))
        return h if preact is True else self.act(h)


class Worded(Block):
    def forward(self, x, taps=False):
        h = self.bn(self.conv(x))
        return h if taps == "pre" else self.act(h)


class Catching(Block):
    def forward(self, x):
        try:
            len(x)
        except RuntimeError:
            return self.act(self.bn(self.conv(x)))
        return self.bn(self.conv(x))


class Matching(Block):
    def forward(self, x):
        match x:
            case [a, _]:
                return self.bn(self.conv(a))
        return self.act(self.bn(self.conv(x)))


class Default(Block):
    def forward(self, x):
        h = self.bn(self.conv(x))
        return h if getattr(x, "mask", None) is None else self.act(h)


class Direct(Block):
    def forward(self, x):
        return self.act.forward(self.act(self.bn(self.conv(x))) - 1)


class Table(Block):
    def forward(self, x, mode):
        h = self.bn(self.conv(x))
        return {"pre": nn.Identity()}.get(mode, self.act)(h)


class InSet(Block):
    def forward(self, x, mode):
        h = self.bn(self.conv(x))
        return h if mode in {"pre"} else self.act(h)


class Scripted(Block):
    def forward(self, x):
        if torch.jit.isinstance(x, list[Tensor]):
            return self.bn(self.conv(x[0]))
        return self.act(self.bn(self.conv(x)))


def halved(x):
    """Stand for another library's function, which looks at what it is given."""
    if type(x) is not Tensor:
        raise TypeError("no tensor")
    return x / 2


class Helping(Block):
    def forward(self, x, half=False):
        h = self.bn(self.conv(x))
        return halved(h) if half else self.act(h)


class HelpingItself(Block):
    def __init__(self) -> None:
        super().__init__()
        self.helper = halved

    def forward(self, x, half=False):
        h = self.bn(self.conv(x))
        return self.helper(h) if half else self.act(h)


class Several(Block):
    def forward(self, *inputs):
        h = self.bn(self.conv(inputs[0]))
        return h if len(inputs) > 1 else self.act(h)


class Keeping(Block):
    def forward(self, x):
        self.pre = self.bn(self.conv(x))
        return self.act(self.pre)


def kept(model: Keeping, x: Tensor) -> Tensor:
    model(x)
    return model.pre


class Gradient(Block):
    def forward(self, x):
        h = self.bn(self.conv(x))
        with torch.no_grad():
            gate = self.act(h)
        return gate * self.conv(x)


# Forwards that cannot be followed, and call what is inside a block that they hold


class Preactivated(Block):
    def pre(self, x):
        return self.bn(self.conv(x))


class Beside(nn.Module):
    """Goes through blocks as often as there are samples, and then somewhere else by a function that is given."""

    def __init__(self, beside: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.blocks, self.beside = nn.ModuleList(Preactivated() for _ in range(2)), beside


class ByMethod(Beside):
    def forward(self, x):
        for _ in range(len(x)):
            x = x + 0
        for block in self.blocks:
            x = block(x) + block.pre(x)
        return x


class ByName(Beside):
    def forward(self, x):
        for _ in range(len(x)):
            x = x + 0
        for block in self.blocks:
            x = block(x) + getattr(block, "bn")(x)  # noqa: B009  # it is what is tested
        return x


class ByHelper(Beside):
    def forward(self, x):
        for _ in range(len(x)):
            x = x + 0
        for block in self.blocks:
            x = block(x) + self.beside(block, x)
        return x


class ByEntry(Beside):
    def forward(self, x):
        for _ in range(len(x)):
            x = self.blocks[0](x)
        return self.blocks[1](x) + self.blocks[1].pre(x)


class ByList(Beside):
    def __init__(self) -> None:
        super().__init__(None)
        self.parts = [(block.conv, block.bn) for block in self.blocks]

    def forward(self, x):
        for _ in range(len(x)):
            x = x + 0
        for block in self.blocks:
            x = block(x)
        for conv, bn in self.parts:
            x = bn(conv(x))
        return x


class Repeated(Preactivated):
    def forward(self, x):
        for _ in range(len(x)):
            x = self.bn(self.conv(x))
        return x


class Past(nn.Module):
    """Calls what is in its block by a method, which is seen, beside the block's own forward, which is not."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.act = Repeated(), nn.ReLU()

    def forward(self, x):
        return self.act(self.block.pre(self.block(x)))


class Unregistered(Block):
    """Goes through a list that holds its layers as well."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [self.conv, self.bn, self.act]

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Sharing(nn.Module):
    """Holds a block without being its parent."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.conv, self.held = nn.Conv2d(3, 3, 1), {"block": block}

    def forward(self, x):
        return self.held["block"].bn(self.conv(x))


class Siblings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.sharing = Sharing(self.block)

    def forward(self, x):
        return self.block(x) + self.sharing(x)


UNSEEN = {
    "type": (Listed, lambda m: m([X]), "it compares objects by `is`"),
    "class": (Class, lambda m: m(nn.Parameter(X)), "it reads __class__"),
    "required flag": (Told, lambda m: m(X, True), "it compares objects by `is`"),
    "flag that is a word": (Worded, lambda m: m(X, "pre"), "its output leaves Worded.forward"),
    "caught": (Catching, lambda m: m(X), "it catches errors"),
    "match": (Matching, lambda m: m([X, X]), "it matches patterns"),
    "getattr": (Default, lambda m: m(X), "it calls getattr()"),
    "direct": (Direct, lambda m: m(X), "it calls a module's forward by itself"),
    "table": (Table, lambda m: m(X, "pre"), "it looks an unknown value up"),
    "set": (InSet, lambda m: m(X, "pre"), "it looks an unknown value up"),
    "torch.jit": (Scripted, lambda m: m([X]), "it calls torch.jit.isinstance()"),
    "helper": (Helping, lambda m: m(X, True), "it compares objects by `is`"),
    "helper that is held": (HelpingItself, lambda m: m(X, True), "it compares objects by `is`"),
    "any number": (Several, lambda m: m(X, X), "'len' is not supported"),
    "kept": (Keeping, lambda m: kept(m, X), "its output is kept by Keeping.forward"),
    "method of an entry": (lambda: ByMethod(None), lambda m: m(X), "may reach it"),
    "name": (lambda: ByName(None), lambda m: m(X), "may reach it"),
    "helper of an entry": (lambda: ByHelper(Preactivated.pre), lambda m: m(X), "may reach it"),
    "entry": (lambda: ByEntry(None), lambda m: m(X), "may reach it"),
    "list": (ByList, lambda m: m(X), "ByList holds blocks.0.bn in 'parts' and may call it"),
    "past a forward": (Past, lambda m: m(X), "Repeated.forward cannot be followed"),
    "sibling": (Siblings, lambda m: m(X), "Sharing holds block in 'held' and may call it"),
}


@torch.no_grad()
@pytest.mark.parametrize("case", UNSEEN)
def test_what_a_trace_does_not_see_is_left_alone(case):
    make, call, reason = UNSEEN[case]
    model = shaken(make)
    before = call(copy.deepcopy(model))
    first = evenorm.conversion(model).layers[0]
    torch.testing.assert_close(call(evenorm.convert(copy.deepcopy(model))), before)
    assert (first.fused, reason in first.reason) == ((), True), first.reason


@torch.no_grad()
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Past, "Repeated.forward cannot be followed"),
        (Unregistered, "Unregistered holds it in 'layers' as well, where it would stay"),
        (Keeping, ""),
    ],
)
def test_a_layer_is_not_folded_where_something_else_may_call_it(make, reason):
    model = shaken(make)
    before = model(X)
    folded = evenorm.fold(model, X)
    torch.testing.assert_close(folded.model(X), before)
    assert [reason in refusal.reason for refusal in folded.certificate.refusals] == ([True] if reason else [])


@torch.no_grad()
def test_a_list_that_is_followed_takes_nothing_away():
    model = shaken(Unregistered)
    before = model(X)
    assert evenorm.conversion(model).layers[0].fused == ("act",)
    torch.testing.assert_close(evenorm.convert(model)(X), before)


def test_gradients_pass_as_before():
    model = shaken(Gradient)
    twin = evenorm.convert(copy.deepcopy(model))
    for one in (model, twin):
        one(X).sum().backward()
    torch.testing.assert_close(twin.conv.weight.grad, model.conv.weight.grad)
    assert "gradients do not pass" in evenorm.conversion(model).layers[0].reason


class Unpacking(Block):
    def forward(self, x, *more, scale=1.0):
        n, c, height, width = x.shape
        first, second = x.chunk(2, dim=3)
        h = self.bn(self.conv(torch.cat([first, second], 3)))
        found = [h.shape]
        h = self.act(h)
        return h.reshape(n, c, height, width) * scale + found[0][1]


@torch.no_grad()
def test_a_forward_that_unpacks_is_followed():
    model = shaken(Unpacking)
    before = model(X, scale=2.0)
    assert evenorm.conversion(model).layers[0].reason == "its output is read in 2 places in Unpacking.forward"
    torch.testing.assert_close(evenorm.convert(model)(X, scale=2.0), before)


def test_threads_convert_and_compute_side_by_side():
    import builtins

    functions = builtins.isinstance, builtins.hasattr, nn.Module.__call__, nn.Module.__getattr__
    serving, x, errors = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval(), torch.randn(4, 3), []
    expected = serving(x)
    done, network = threading.Event(), nn.ModuleList([Block(), Block()])

    def convert():
        try:
            for _ in range(3):
                assert all(layer.fused for layer in evenorm.conversion(network).layers)
        except Exception as error:
            errors.append(error)

    def serve():
        try:
            while not done.is_set():
                torch.testing.assert_close(serving(x), expected)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=convert) for _ in range(3)]
    server = threading.Thread(target=serve)
    for thread in (server, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    server.join()
    assert errors == []
    assert functions == (builtins.isinstance, builtins.hasattr, nn.Module.__call__, nn.Module.__getattr__)


class Interrupting(Block):
    def forward(self, x):
        self.conv(x)
        raise KeyboardInterrupt


def test_an_interruption_leaves_the_functions_of_python_and_torch_as_they_are():
    import builtins

    functions = builtins.isinstance, builtins.hasattr, nn.Module.__call__, nn.Module.__getattr__
    with pytest.raises(KeyboardInterrupt):
        evenorm.convert(Interrupting())
    assert functions == (builtins.isinstance, builtins.hasattr, nn.Module.__call__, nn.Module.__getattr__)
    assert torch.is_grad_enabled()


class Switching(Block):
    def forward(self, x):
        torch.set_grad_enabled(False)
        return self.act(self.bn(self.conv(x)))


def test_gradients_that_a_forward_switches_off_are_on_again():
    evenorm.convert(Switching())
    assert torch.is_grad_enabled()


def test_a_forward_without_a_source_is_left_and_a_sequential_needs_none(monkeypatch):
    known = {"Block": Block}
    exec("class Typed(Block):\n    def forward(self, x):\n        return self.act(self.bn(self.conv(x)))", known)
    monkeypatch.setattr(sources, "_trees", lambda _: (_ for _ in ()).throw(OSError))
    left, fused = evenorm.conversion(nn.Sequential(known["Typed"](), nn.BatchNorm2d(3), nn.ReLU())).layers
    assert left.reason == "Typed.forward cannot be followed (its source cannot be read)"
    assert fused.fused == ("2",)
