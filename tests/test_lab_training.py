from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import evenorm
from evenorm.lab.data import Split, digits, wine
from evenorm.lab.networks import BatchNorm, Linear, Sigmoid, initialise_, perceptron
from evenorm.lab.training import (
    Curves,
    batch_order,
    descend,
    diverged,
    final_loss,
    grade,
    score,
    training_samples,
)
from evenorm.lab.training import test_samples as stack_test_samples
from evenorm.lab.trials import Trial, random_seed

WIDTHS = (64, 100, 100, 10)


def trials(cells: list[tuple[int, float]]) -> list[Trial]:
    return [Trial("speed", 1, "any", seed, rate) for seed, rate in cells]


def train_stacked(
    stack: list[Trial], normalise: bool, steps: int, activation: type[nn.Module] = Sigmoid
) -> tuple[nn.Sequential, Tensor]:
    network = perceptron(len(stack), WIDTHS, activation, normalise=normalise)
    initialise_(network, [trial.seed for trial in stack], lambda inputs: 0.1)
    samples = training_samples([digits()] * len(stack))
    losses = [loss for _, loss in descend(network, samples, stack, batch=60, steps=steps)]
    return network, torch.stack(losses)


def states(network: nn.Module, members: int) -> list[Tensor]:
    values = [*network.parameters(), *(buffer for buffer in network.buffers() if buffer.dim())]
    return [value.detach().reshape(members, -1) for value in values]


CELLS = [(0, 0.3), (1, 0.3), (2, 0.3), (0, 3.0), (1, 0.01)]


@pytest.mark.parametrize("normalise", [False, True])
def test_a_stack_equals_separate_runs(normalise: bool) -> None:
    stack = trials(CELLS)
    together, losses = train_stacked(stack, normalise, steps=100)
    for member, trial in enumerate(stack):
        alone, own = train_stacked([trial], normalise, steps=100)
        torch.testing.assert_close(losses[:, member], own[:, 0], rtol=1e-5, atol=1e-6)
        for stacked, single in zip(states(together, len(stack)), states(alone, 1), strict=True):
            torch.testing.assert_close(stacked[member], single[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normalise", [False, True])
def test_a_stack_equals_ordinary_layers_and_torchs_optimizer(normalise: bool) -> None:
    stack = trials([(5, 0.3), (7, 1.0)])
    _, losses = train_stacked(stack, normalise, steps=60, activation=nn.Sigmoid)
    for member, trial in enumerate(stack):
        layers: list[nn.Module] = []
        for index, (inputs, outputs) in enumerate(pairwise(WIDTHS)):
            linear = nn.Linear(inputs, outputs)
            generator = torch.Generator().manual_seed(random_seed(trial.seed, f"weight {index}"))
            with torch.no_grad():
                linear.weight.normal_(0.0, 0.1, generator=generator)
                linear.bias.zero_()
            layers.append(linear)
            if outputs != 10:
                layers += [evenorm.BatchNorm1d(outputs), nn.Sigmoid()] if normalise else [nn.Sigmoid()]
        network = nn.Sequential(*layers)
        optimizer = torch.optim.SGD(network.parameters(), lr=trial.rate)
        own = []
        for index in batch_order(trial.seed, 1437, 60, 60):
            loss = functional.cross_entropy(network(digits().x_train[index]), digits().y_train[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            own.append(loss.item())
        torch.testing.assert_close(losses[:, member], torch.tensor(own), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("normalise", [False, True])
def test_a_member_that_diverges_disturbs_no_other(normalise: bool) -> None:
    lost = float("inf")
    stack = trials([(0, 0.3), (1, lost), (2, 0.3)])
    _, losses = train_stacked(stack, normalise, steps=30)
    _, calm = train_stacked([stack[0], stack[2]], normalise, steps=30)
    assert not torch.isfinite(losses[-1, 1])
    torch.testing.assert_close(losses[:, [0, 2]], calm, rtol=1e-5, atol=1e-6)
    assert diverged(losses).tolist() == [False, True, False]


def test_arms_of_a_seed_share_weights_and_batches() -> None:
    plain = perceptron(2, WIDTHS, Sigmoid, normalise=False)
    normalised = perceptron(2, WIDTHS, Sigmoid, normalise=True)
    for network in (plain, normalised):
        initialise_(network, [3, 4], lambda inputs: 0.1)
    pairs = zip(
        [layer.weight for layer in plain if isinstance(layer, Linear)],
        [layer.weight for layer in normalised if isinstance(layer, Linear)],
        strict=True,
    )
    for one, other in pairs:
        assert torch.equal(one, other)
        assert not torch.equal(one[0], one[1])
    assert torch.equal(batch_order(3, 1437, 60, 50), batch_order(3, 1437, 60, 100)[:50])
    assert not torch.equal(batch_order(3, 1437, 60, 50), batch_order(4, 1437, 60, 50))


def test_batch_order_shows_each_sample_at_most_once_an_epoch() -> None:
    order = batch_order(0, samples=25, batch=4, steps=13)
    assert order.shape == (13, 4)
    for epoch in (order[:6], order[6:12]):
        assert len(set(epoch.flatten().tolist())) == 24


def test_initial_weights_have_the_deviation_asked_for() -> None:
    network = perceptron(4, (100, 400, 3), Sigmoid, normalise=False)
    initialise_(network, [0, 1, 2, 3], lambda inputs: 1 / math.sqrt(inputs))
    first = network[0]
    assert isinstance(first, Linear)
    assert first.weight.std().item() == pytest.approx(0.1, rel=0.01)
    assert first.bias is not None
    assert not first.bias.any()


def test_stacked_batch_norm_is_a_batch_norm_a_member() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 20, generator=generator) * 3 + 1
    stacked = BatchNorm(3, 5)
    y = stacked(x)
    for member in range(3):
        single = nn.BatchNorm1d(5)
        torch.testing.assert_close(y[member].T, single(x[member].T))
        running = stacked.layer.running_var
        assert running is not None
        torch.testing.assert_close(running.view(3, 5)[member], single.running_var)


def test_sigmoid_is_the_logistic_function_and_its_gradient() -> None:
    x = torch.linspace(-30, 30, 601, requires_grad=True)
    cotangent = torch.randn(601, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(Sigmoid()(x), x, cotangent)
    exact = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(torch.sigmoid(exact), exact, cotangent.double())
    torch.testing.assert_close(Sigmoid()(x).double(), torch.sigmoid(exact), rtol=0, atol=2e-7)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=5e-7)


def test_sigmoid_rounds_alike_wherever_a_value_lies() -> None:
    x = torch.randn(7, 33, 60, generator=torch.Generator().manual_seed(0))
    whole = Sigmoid()(x)
    assert all(torch.equal(whole[member], Sigmoid()(x[member].clone())) for member in range(7))


def test_own_splits_reach_their_own_member() -> None:
    splits = [wine(0), wine(1)]
    samples = training_samples(splits)
    index = torch.tensor([[3, 5], [7, 11]])
    drawn = samples.batch(index)
    for member, split in enumerate(splits):
        assert torch.equal(drawn.x[member].T, split.x_train[index[member]])
        assert torch.equal(drawn.y[member], split.y_train[index[member]])
    shared = training_samples([digits()] * 3)
    assert shared.x.untyped_storage().data_ptr() == digits().x_train.untyped_storage().data_ptr()
    assert torch.equal(shared.batch(torch.tensor([[1], [2], [3]])).x[2, :, 0], digits().x_train[3])


def test_score_uses_running_statistics_and_leaves_them() -> None:
    network = perceptron(2, WIDTHS, Sigmoid, normalise=True)
    initialise_(network, [0, 1], lambda inputs: 0.1)
    before = [buffer.clone() for buffer in network.buffers()]
    accuracy, loss = score(network, stack_test_samples([digits()] * 2))
    assert accuracy.shape == loss.shape == (2,)
    assert all(torch.equal(one, other) for one, other in zip(before, network.buffers(), strict=True))


def test_an_answer_that_is_not_finite_is_not_correct() -> None:
    logits = torch.zeros(1, 3, 4)
    logits[0, 0] = 1.0
    logits[0, :, 2:] = math.nan
    accuracy, _ = grade(logits, torch.zeros(1, 4, dtype=torch.int64))
    assert accuracy.item() == 0.5


def test_diverged_means_not_finite_or_ten_times_the_first_loss() -> None:
    losses = torch.tensor([[1.0, 1.0, 1.0, 2.0], [0.5, 11.0, math.nan, 19.0], [0.4, 1.0, 1.0, 1.0]])
    assert diverged(losses).tolist() == [False, True, True, False]
    assert final_loss(losses[:, :2]).tolist() == pytest.approx([1.9 / 3, 13 / 3])


def test_curves_hold_what_json_has() -> None:
    curves = Curves(2)
    curves.append(loss=torch.tensor([0.123456789, math.nan]))
    curves.append(loss=torch.tensor([1.0, math.inf]))
    curves.put(widths=torch.tensor([[1.0, 2.0], [3.0, 4.0]]), lost=torch.tensor([False, True]))
    assert curves.records() == [
        {"loss": [0.1234568, 1.0], "widths": [1.0, 2.0], "lost": 0.0},
        {"loss": [None, None], "widths": [3.0, 4.0], "lost": 1.0},
    ]


def test_splits_are_stratified_and_standardised_by_the_training_set() -> None:
    assert (len(digits().y_train), len(digits().y_test)) == (1437, 360)
    assert digits().x_train.max() == 1.0
    assert torch.bincount(digits().y_test).min() >= 34
    split = wine(3)
    assert (len(split.y_train), len(split.y_test)) == (142, 36)
    assert not torch.equal(split.x_train, wine(4).x_train)
    assert (split.features, split.classes) == (13, 3)
    flat = split.standardised()
    torch.testing.assert_close(flat.x_train.mean(0), torch.zeros(13), rtol=0, atol=1e-5)
    torch.testing.assert_close(flat.x_train.std(0, correction=0), torch.ones(13))
    constant = Split(torch.ones(4, 1), torch.tensor([0, 1, 0, 1]), torch.ones(2, 1), torch.tensor([0, 1]))
    assert not constant.standardised().x_test.any()


def test_members_that_share_images_keep_labels_of_their_own() -> None:
    split = digits()
    other = Split(split.x_train, split.y_train.flip(0), split.x_test, split.y_test)
    samples = training_samples([split, other])
    assert torch.equal(samples.y[0], split.y_train)
    assert torch.equal(samples.y[1], other.y_train)
