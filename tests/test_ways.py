"""Forwards that go several ways: what convert and fold do holds in each of them, or is not done."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import evenorm
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
