"""Averages: each against its sum of weights, and what may not move them."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import evenorm
from evenorm import Cumulative, Exponential, Window
from evenorm.averages import Average

BATCHES = torch.randn(7, 6, 3, generator=torch.Generator().manual_seed(0)) * 2 + 1
AVERAGES: dict[str, Average] = {
    "Exponential": Exponential(0.3),
    "Exponential, debias": Exponential(0.3, debias=True),
    "Cumulative": Cumulative(),
    "Window 1": Window(1),
    "Window 3": Window(3),
    "Window 9": Window(9),
}


def weights(name: str, batches: int) -> tuple[float, list[float]]:
    """Return what the initial values 0 and 1 still weigh, and what each of the batches weighs, oldest first."""
    if name == "Cumulative":
        return 0.0, [1 / batches] * batches
    if name.startswith("Window"):
        size = min(int(name.split()[1]), batches)
        return 0.0, [0.0] * (batches - size) + [1 / size] * size
    each = [0.3 * 0.7 ** (batches - 1 - batch) for batch in range(batches)]
    if name == "Exponential":
        return 0.7**batches, each
    return 0.0, [weight / sum(each) for weight in each]


@pytest.mark.parametrize("name", AVERAGES)
@pytest.mark.parametrize("batches", range(1, 8))
def test_an_average_is_its_sum_of_weights(name: str, batches: int) -> None:
    layer = evenorm.BatchNorm1d(3, average=AVERAGES[name])
    for batch in BATCHES[:batches]:
        layer(batch)
    rest, each = weights(name, batches)
    seen = list(zip(each, BATCHES.double(), strict=False))
    expected_mean = sum(weight * batch.mean(0) for weight, batch in seen)
    expected_var = rest + sum(weight * batch.var(0) for weight, batch in seen)
    torch.testing.assert_close(layer.running_mean, expected_mean.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.running_var, expected_var.float(), rtol=1e-5, atol=1e-6)
    assert layer.num_batches_tracked == batches


@pytest.mark.parametrize("momentum", [None, 0.0, 0.1, 1.0])
def test_momentum_means_what_it_means_in_torch(momentum: float | None) -> None:
    ours, torchs = evenorm.BatchNorm1d(3, momentum=momentum), nn.BatchNorm1d(3, momentum=momentum)
    for batch in BATCHES:
        ours(batch)
        torchs(batch)
    torch.testing.assert_close(dict(ours.state_dict()), dict(torchs.state_dict()))


@pytest.mark.parametrize("name", AVERAGES)
def test_a_layer_says_its_average(name: str) -> None:
    layer = evenorm.BatchNorm1d(3, average=AVERAGES[name])
    assert layer.average == AVERAGES[name]
    default = evenorm.BatchNorm1d(3)
    default.average = AVERAGES[name]
    assert default.average == AVERAGES[name]
    for batch in BATCHES:
        layer(batch)
        default(batch)
    torch.testing.assert_close(dict(layer.state_dict()), dict(default.state_dict()))


def test_a_window_keeps_its_own_buffers_and_no_other_average_does() -> None:
    plain = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    for name, average in AVERAGES.items():
        layer = evenorm.BatchNorm1d(3, average=average)
        more = ["window_mean", "window_var"] if name.startswith("Window") else []
        assert list(layer.state_dict()) == plain + more
        layer.average = Exponential(0.2)
        assert list(layer.state_dict()) == plain
        assert layer.momentum == 0.2


def test_a_window_goes_on_where_a_checkpoint_stopped() -> None:
    through, first = (evenorm.BatchNorm1d(3, average=Window(3)) for _ in range(2))
    second = evenorm.BatchNorm1d(3, average=Window(3))
    for batch in BATCHES:
        through(batch)
    for batch in BATCHES[:4]:
        first(batch)
    second.load_state_dict(first.state_dict())
    for batch in BATCHES[4:]:
        second(batch)
    torch.testing.assert_close(dict(second.state_dict()), dict(through.state_dict()), rtol=0, atol=0)


def test_a_window_takes_torchs_checkpoint_and_leaves_it_as_it_was() -> None:
    torchs = nn.BatchNorm1d(3)
    for batch in BATCHES:
        torchs(batch)
    checkpoint = torchs.state_dict()
    keys = list(checkpoint)
    layer = evenorm.BatchNorm1d(3, average=Window(4))
    layer.load_state_dict(checkpoint, strict=True)
    assert list(checkpoint) == keys
    torch.testing.assert_close(layer.running_mean, torchs.running_mean)
    assert torch.equal(layer.window_mean, torchs.running_mean.expand(4, -1))
    assert torch.equal(layer.window_var, torchs.running_var.expand(4, -1))
    layer(BATCHES[0])
    torch.testing.assert_close(layer.running_mean, 0.75 * torchs.running_mean + 0.25 * BATCHES[0].mean(0))


def test_a_window_starts_anew_after_a_reset() -> None:
    layer = evenorm.BatchNorm1d(3, average=Window(3))
    for batch in BATCHES:
        layer(batch)
    layer.reset_running_stats()
    layer(BATCHES[0])
    torch.testing.assert_close(layer.running_mean, BATCHES[0].mean(0))


@pytest.mark.parametrize("name", AVERAGES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_batch_leaves_its_channel_alone_and_no_other(name: str, bad: float) -> None:
    layer, clean = (evenorm.BatchNorm1d(3, average=AVERAGES[name]) for _ in range(2))
    for number, batch in enumerate(BATCHES):
        spoiled = batch.clone()
        if number in (2, 5):
            spoiled[4, 1] = bad
        before = layer.running_mean.clone(), layer.running_var.clone()
        layer(spoiled)
        clean(batch)
        if number in (2, 5):
            moved = layer.running_mean != before[0], layer.running_var != before[1]
            assert [column.tolist() for column in moved] == [[True, False, True]] * 2
    others = [0, 2]
    assert torch.equal(layer.running_mean[others], clean.running_mean[others])
    assert torch.equal(layer.running_var[others], clean.running_var[others])
    for name_of, buffer in layer.named_buffers():
        assert buffer.isfinite().all(), name_of
    assert layer.num_batches_tracked == clean.num_batches_tracked == len(BATCHES)


@pytest.mark.parametrize("name", AVERAGES)
def test_an_empty_batch_does_not_count(name: str) -> None:
    layer = evenorm.BatchNorm1d(3, average=AVERAGES[name])
    layer(BATCHES[0])
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    assert layer(torch.zeros(0, 3)).shape == (0, 3)
    with pytest.raises(ValueError, match=r"all False$"):
        layer(BATCHES[0], mask=torch.zeros(6, dtype=torch.bool))
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def raises(text: str, kind: type[Exception] = ValueError) -> Any:
    return pytest.raises(kind, match=f"^{re.escape(text)}$")


@pytest.mark.parametrize("size", [0, -1, 2.0, True])
def test_a_window_holds_something(size: Any) -> None:
    with raises(f"Window needs a size of at least 1 batch, got {size!r}"):
        Window(size)


@pytest.mark.parametrize("momentum", [0.0, -0.1, 1.5])
def test_a_debiased_average_divides_by_something(momentum: float) -> None:
    with raises(f"Exponential(debias=True) needs a momentum above 0, up to 1, got {momentum!r}"):
        Exponential(momentum, debias=True)


def test_momentum_and_average_are_two_names_of_one_thing() -> None:
    with raises("give either momentum or average, got momentum=0.2 and Window(size=2)"):
        evenorm.BatchNorm1d(3, momentum=0.2, average=Window(2))
    with raises("average must be Exponential, Cumulative or Window, got 0.1", TypeError):
        evenorm.BatchNorm1d(3, average=0.1)  # type: ignore[arg-type]
    layer = evenorm.BatchNorm1d(3)
    with raises("average must be Exponential, Cumulative or Window, got 'window'", TypeError):
        layer.average = "window"  # type: ignore[assignment]


def test_an_average_in_half_precision_keeps_wide_statistics() -> None:
    layer = evenorm.BatchNorm1d(3).bfloat16()
    x = (torch.randn(64, 3) + 50).bfloat16()
    for _ in range(200):
        layer(x)
    expected: Tensor = x.float().var(0)
    torch.testing.assert_close(layer.running_var, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("stale", [1e20, 1e14, -1e10, 0.0])
@pytest.mark.parametrize(
    "average",
    [Exponential(1.0), Cumulative(), *(Exponential(m, debias=True) for m in (0.1, 0.03, 0.7, 1.0))],
    ids=repr,
)
def test_a_batch_of_weight_one_replaces_whatever_was_there(average: Average, stale: float) -> None:
    layer = evenorm.BatchNorm1d(2, average=average)
    layer.running_mean.fill_(stale)
    layer.running_var.fill_(abs(stale))
    x = torch.randn(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).float()
    x[:, 0] = 3.0
    layer(x)
    torch.testing.assert_close(layer.running_mean, x.double().mean(0).float(), rtol=2e-7, atol=0)
    torch.testing.assert_close(layer.running_var[1], x[:, 1].double().var().float(), rtol=2e-7, atol=0)
    assert 0 <= layer.running_var[0] < 1e-15 * max(abs(stale), 1)
