"""Freezing that stays frozen: no train(), copy or pickle undoes it, and nothing else is changed by it."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import evenorm
from book import Situation, answer, situations


def trained(make: Callable[..., nn.Module] = evenorm.BatchNorm1d, **options: Any) -> nn.Sequential:
    """Return a network whose statistics and parameters have left their first values."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Conv1d(3, 4, 1), make(4, **options), nn.Sequential(nn.ReLU(), make(4, **options)))
    for layer in (model[1], model[2][1]):
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    for _ in range(3):
        model(torch.randn(6, 3, 5) * 2 + 1)
    return model


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return list(one) == list(two) and all(torch.equal(one[name], two[name]) for name in one)


X = torch.randn(6, 3, 5, generator=torch.Generator().manual_seed(1))

PASSAGES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "train()": lambda model: model.train(),
    "eval() and train()": lambda model: model.eval().train(),
    "deepcopy": lambda model: copy.deepcopy(model).train(),
    "pickle": lambda model: pickle.loads(pickle.dumps(model)).train(),
    "requires_grad_()": lambda model: model.requires_grad_(True).train(),
    "float()": lambda model: model.double().float().train(),
    "state_dict": lambda model: (model.load_state_dict(model.state_dict()), model.train())[1],
    "frozen twice": lambda model: evenorm.freeze(model).train(),
}


@pytest.mark.parametrize("make", [evenorm.BatchNorm1d, nn.BatchNorm1d], ids=["ours", "torch's"])
@pytest.mark.parametrize("passage", PASSAGES.values(), ids=PASSAGES)
def test_what_is_frozen_stays_frozen(passage: Callable[[nn.Module], nn.Module], make: Any) -> None:
    model = trained(make)
    expected = copy.deepcopy(model).eval()(X)
    before = state(model)
    layers = [model[1], model[2][1]]
    assert evenorm.freeze(model) is model
    assert [model[1], model[2][1]] == layers  # in place, torch's too
    model = passage(model)
    torch.testing.assert_close(model(X), expected)
    assert same(before, state(model))


def test_unfreezing_goes_back_to_training() -> None:
    model, other = trained(), trained()
    assert evenorm.unfreeze(evenorm.freeze(model)) is model
    torch.testing.assert_close(model(X), other(X), rtol=0, atol=0)
    assert same(state(model), state(other))


def test_a_frozen_layer_says_so_and_an_unfrozen_one_does_not() -> None:
    layer = evenorm.BatchNorm1d(3)
    plain = repr(layer)
    assert "frozen=True" in repr(evenorm.freeze(layer))
    assert repr(evenorm.unfreeze(layer)) == plain
    assert "frozen=True" in repr(copy.deepcopy(evenorm.freeze(nn.Sequential(nn.BatchNorm2d(3)))))


@pytest.mark.parametrize("make", [evenorm.BatchNorm1d, nn.BatchNorm1d], ids=["ours", "torch's"])
def test_checkpoints_go_both_ways(make: Any) -> None:
    model = trained(make)
    keys = list(model.state_dict())
    evenorm.freeze(model, affine=True)
    assert list(model.state_dict()) == keys == list(trained(nn.BatchNorm1d).state_dict())
    trained(nn.BatchNorm1d).load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(trained(nn.BatchNorm1d).state_dict(), strict=True)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    assert same(torch.load(file, weights_only=True), state(model))


def test_weight_and_bias_freeze_if_asked() -> None:
    for statistics, affine in ((True, False), (False, True), (True, True)):
        model = evenorm.freeze(trained(nn.BatchNorm1d), statistics=statistics, affine=affine)
        norms = [model[1], model[2][1]]
        assert [layer.weight.requires_grad or layer.bias.requires_grad for layer in norms] == [not affine] * 2
        assert model[0].weight.requires_grad
        assert [getattr(layer, "frozen", False) for layer in norms] == [statistics] * 2
        before = state(model)
        model.train()(X)
        assert same(before, state(model)) == statistics
        evenorm.unfreeze(model, statistics=False)
        assert [layer.weight.requires_grad and layer.bias.requires_grad for layer in norms] == [True] * 2
        assert [getattr(layer, "frozen", False) for layer in norms] == [statistics] * 2


def test_an_optimizer_made_before_keeps_working() -> None:
    model = trained(nn.BatchNorm1d)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    evenorm.freeze(model)
    (model.train()(X) * torch.randn(6, 4, 5)).sum().backward()
    before = state(model)
    optimizer.step()
    moved = [name for name, tensor in state(model).items() if not torch.equal(tensor, before[name])]
    assert moved == [name for name, _ in model.named_parameters()]


@settings(deadline=None, max_examples=40)
@given(situations())
def test_a_frozen_layer_in_training_is_an_unfrozen_one_in_evaluation(situation: Situation) -> None:
    """With every other option: output and all gradients, and no buffer moves."""
    *training, last = situation.batches()
    frozen = situation.layer()
    for x, residual, mask, _ in training:
        frozen(x, residual=residual, mask=mask)
    evaluated = copy.deepcopy(frozen).eval()
    buffers = [buffer.clone() for buffer in evenorm.freeze(frozen).train().buffers()]
    ours, expected = answer(frozen, last), answer(evaluated, last)
    assert all(torch.equal(one, two) for one, two in zip(ours, expected, strict=True))
    with evenorm.one_update(frozen):
        answer(frozen, last)
    assert all(torch.equal(one, two) for one, two in zip(buffers, frozen.buffers(), strict=True))


def test_gradients_and_their_gradients() -> None:
    layer = evenorm.freeze(evenorm.BatchNorm1d(2, 0.1, activation="silu", dtype=torch.float64))
    layer.running_mean.copy_(torch.tensor([1.0, -0.5]))
    shapes, generator = ((4, 2, 3), (2,), (2,), (4, 2, 3)), torch.Generator().manual_seed(2)
    given_ = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]

    def call(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        parameters = {"weight": weight, "bias": bias}
        return torch.func.functional_call(layer, parameters, (x,), {"residual": residual})

    assert gradcheck(call, given_)
    assert gradgradcheck(call, given_)


def test_a_frozen_layer_takes_one_value_and_any_batch() -> None:
    layer = evenorm.freeze(evenorm.BatchNorm1d(3)).train()
    assert layer(torch.randn(1, 3)).shape == (1, 3)
    layer(torch.full((4, 3), torch.nan))
    assert layer.running_mean.isfinite().all()
    assert layer.nonfinite_batches == 0


def test_a_single_layer_and_one_used_twice() -> None:
    layer = nn.BatchNorm1d(4)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    evenorm.freeze(model)
    assert model[0] is model[2] is layer
    assert isinstance(layer, evenorm.BatchNorm1d)
    assert layer.name == "0"
    assert evenorm.freeze(nn.BatchNorm2d(3)).frozen


class Own(nn.BatchNorm1d):
    """A layer of somebody's own, who may have overridden anything."""


ANYTHING = "which may override anything; freeze it by its own means"
BAD: dict[str, tuple[nn.Module, str]] = {
    "no statistics": (
        nn.BatchNorm1d(3, track_running_stats=False),
        "1.0 has no running statistics to freeze; construct it with track_running_stats=True",
    ),
    "ours without statistics": (
        evenorm.BatchNorm1d(3, track_running_stats=False),
        "1.0 has no running statistics to freeze; construct it with track_running_stats=True",
    ),
    "a subclass": (Own(3), f"1.0 is a test_freeze.Own, {ANYTHING}"),
}


@pytest.mark.parametrize(("layer", "text"), BAD.values(), ids=BAD)
def test_what_cannot_be_frozen_is_named_and_nothing_is_frozen(layer: nn.Module, text: str) -> None:
    first = nn.BatchNorm1d(3)
    model = nn.Sequential(first, nn.Sequential(layer))
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        evenorm.freeze(model, affine=True)
    assert type(first) is nn.BatchNorm1d
    assert first.weight.requires_grad


def test_a_network_without_batch_norm_has_nothing_to_freeze() -> None:
    model = nn.Linear(3, 2)
    assert evenorm.unfreeze(evenorm.freeze(model, affine=True)) is model
    assert model.weight.requires_grad
