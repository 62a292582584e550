"""When running statistics may change: no_update, one_update, recomputation, and batches that must not count."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import evenorm
from book import AVERAGES, Situation, answer, situations
from evenorm import formulas

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "debiased": {"average": evenorm.Exponential(0.3, debias=True)},
    "cumulative": {"average": evenorm.Cumulative()},
    "window": {"average": evenorm.Window(2)},
    "window, filling": {"average": evenorm.Window(5)},
    "virtual": {"virtual_batch_size": 2},
    "renorm": {"renorm": evenorm.Renorm(start=0, r_steps=2, d_steps=3)},
    "raise": {"on_nonfinite": "raise"},
    "population": {"on_single": "population"},
}
EVERY_OPTION = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
ENGINES = pytest.mark.parametrize("engine", ["chosen", "formulas"])


@pytest.fixture
def _engine(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the formulas do everything, where the test asks for them."""
    if engine == "formulas":
        monkeypatch.setattr("evenorm.engines.choose", lambda x: formulas)
        monkeypatch.setattr("evenorm.engines.cpu.supports", lambda x: False)


def state(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of all buffers, those that no checkpoint holds too."""
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def same_bits(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# no_update.


@settings(deadline=None, max_examples=40)
@given(situations())
def test_no_update_changes_no_buffer_and_no_output(situation: Situation) -> None:
    layer, other = situation.layer(), situation.layer()
    for batch in situation.batches():
        before = state(layer)
        with evenorm.no_update(layer):
            held = answer(layer, batch)
        assert same_bits(before, state(layer))
        counted = answer(other, batch)
        assert all(torch.equal(one, two) for one, two in zip(held, counted, strict=True))
        layer.load_state_dict(other.state_dict())


@pytest.mark.parametrize(
    "make", [evenorm.BatchNorm1d, nn.BatchNorm1d, nn.SyncBatchNorm], ids=lambda make: make.__module__
)
def test_no_update_takes_batch_norm_of_any_make(make: Callable[[int], nn.Module]) -> None:
    model = nn.Sequential(make(3), nn.Sequential(make(3)), nn.InstanceNorm1d(3, track_running_stats=True))
    model.eval()
    x = torch.randn(6, 3, 4)
    expected, before = model(x), state(model)
    with evenorm.no_update(model):
        assert torch.equal(model(x), expected)
    if make is not nn.SyncBatchNorm:  # which trains on accelerators only
        with evenorm.no_update(model):
            model.train()[:2](x)
    assert same_bits(before, state(model))
    assert all(layer.track_running_stats for layer in (model[0], model[1][0], model[2]))


def test_no_update_ends_where_it_ends() -> None:
    model = nn.Sequential(evenorm.BatchNorm1d(3), evenorm.BatchNorm1d(3, track_running_stats=False))
    x = torch.randn(6, 3)
    with evenorm.no_update(model):
        with evenorm.no_update(model[0]):
            model(x)
        model(x)
    assert model[0].num_batches_tracked == 0
    with pytest.raises(KeyError, match="mine"), evenorm.no_update(model):
        raise KeyError("mine")
    model(x)
    assert model[0].num_batches_tracked == 1
    assert not model[1].track_running_stats


def test_no_update_keeps_the_keys_of_a_checkpoint() -> None:
    layer = evenorm.BatchNorm1d(3, average=evenorm.Window(2))
    keys = list(layer.state_dict())
    with evenorm.no_update(layer):
        assert list(layer.state_dict()) == keys


# one_update.


@settings(deadline=None, max_examples=60)
@given(situations(renorm=st.none(), average=AVERAGES), st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_micro_batches_merge_to_the_whole(situation: Situation, cuts: list[int]) -> None:
    """Any split; the running statistics are those of a step with the whole batch, one momentum step, one count."""
    parts, whole = situation.layer(), situation.layer()
    parts.on_single = "population"
    for x, residual, mask, _ in situation.batches():
        whole(x, residual=residual, mask=mask)
        with evenorm.one_update(parts):
            places = [0, *sorted({min(cut * len(x) // 5, len(x)) for cut in cuts}), len(x)]
            for start, end in pairwise(places):
                here = slice(start, end)
                if mask is None or mask[here].any():
                    parts(
                        x[here],
                        residual=None if residual is None else residual[here],
                        mask=None if mask is None else mask[here],
                    )
            assert parts.num_batches_tracked == whole.num_batches_tracked - 1
    torch.testing.assert_close(state(parts), state(whole), rtol=1e-9, atol=1e-9)


@EVERY_OPTION
def test_one_update_with_every_option(options: dict[str, Any]) -> None:
    parts, whole = (evenorm.BatchNorm1d(3, dtype=torch.float64, **options) for _ in range(2))
    batches = torch.randn(4, 9, 3, 2, dtype=torch.float64)
    for batch in batches:
        whole(batch)
        with evenorm.one_update(parts):
            for part in batch.split([2, 4, 3]):
                parts(part)
    torch.testing.assert_close(state(parts), state(whole))
    assert parts.num_batches_tracked == len(batches)


def test_one_update_does_not_normalise_the_micro_batches_together() -> None:
    """As the documentation says: each is normalised by its own statistics."""
    layer, plain, batch = evenorm.BatchNorm1d(3), evenorm.BatchNorm1d(3), torch.randn(8, 3)
    with evenorm.one_update(layer):
        assert all(torch.equal(layer(part), plain(part)) for part in batch.split(4))


def test_a_block_that_raises_counts_nothing() -> None:
    model = nn.Sequential(evenorm.BatchNorm1d(3), evenorm.BatchNorm1d(3))
    before = state(model)

    def interrupted() -> None:
        with evenorm.one_update(model):
            model(torch.randn(4, 3))
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        interrupted()
    assert same_bits(before, state(model))
    with evenorm.one_update(model):
        model(torch.randn(4, 3))
    assert model[0].num_batches_tracked == 1


def test_a_bad_micro_batch_is_named_before_any_layer_has_counted_anything() -> None:
    model = nn.Sequential(evenorm.BatchNorm1d(3), evenorm.BatchNorm1d(3, on_nonfinite="raise"))
    model[1].name = "body.1"
    before = state(model)
    x = torch.randn(4, 3)
    x[1, 2] = math.inf

    def step() -> None:
        with evenorm.one_update(model):
            model(torch.randn(4, 3))
            model(x)

    with pytest.raises(ValueError, match=r"^body\.1: "):
        step()
    assert same_bits(before, state(model))


def test_blocks_in_blocks_and_without_forwards() -> None:
    model, batch = nn.Sequential(evenorm.BatchNorm1d(3), evenorm.BatchNorm1d(3)), torch.randn(8, 3)
    with evenorm.one_update(model):
        for part in batch.split(4):
            with evenorm.one_update(model[0]):
                model[0](part)
        with evenorm.no_update(model):
            model(batch)
    assert [layer.num_batches_tracked.item() for layer in model] == [1, 0]
    torch.testing.assert_close(model[0].running_mean, 0.1 * batch.mean(0))


def test_a_layer_used_twice_gathers_both() -> None:
    layer, batch = evenorm.BatchNorm1d(3, momentum=1.0), torch.randn(8, 3)
    model = nn.ModuleList([layer, layer])
    with evenorm.one_update(model):
        model[0](batch[:5])
        model[1](batch[5:])
    torch.testing.assert_close(layer.running_var, batch.var(0))


def test_one_update_names_the_layer_that_it_cannot_hold_back() -> None:
    model = nn.Sequential(evenorm.BatchNorm1d(3), nn.Sequential(nn.BatchNorm1d(3)))
    text = "one_update needs evenorm's layers, 1.0 is torch.nn.modules.batchnorm.BatchNorm1d; convert it first"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"), evenorm.one_update(model):
        pytest.fail("the block began")
    assert not model[0].gathers


# Recomputation.


def network(options: dict[str, Any], channels: int = 3) -> nn.Sequential:
    torch.manual_seed(3)
    block = nn.Sequential(nn.Conv1d(channels, 4, 1), evenorm.BatchNorm1d(4, activation="silu", **options))
    return nn.Sequential(
        block, nn.Sequential(nn.Conv1d(4, 4, 1), evenorm.BatchNorm1d(4, **options)), nn.Conv1d(4, 2, 1)
    )


def steps(model: nn.Sequential, run: Callable[..., Tensor], update: Any = None) -> list[Tensor]:
    """Train for three steps; return all gradients."""
    found = []
    for number in range(3):
        x = torch.randn(6, 3, 5, generator=torch.Generator().manual_seed(number)).requires_grad_()
        dy = torch.randn(6, 2, 5, generator=torch.Generator().manual_seed(10 + number))
        run(model, x).backward(dy)
        found += [x.grad, *(parameter.grad.clone() for parameter in model.parameters())]
    return found


@EVERY_OPTION
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_a_checkpointed_network_equals_itself(reentrant: bool, options: dict[str, Any]) -> None:
    """Gradients, statistics and counters to the bit, with no help from the user."""

    def checkpointed(model: nn.Sequential, x: Tensor) -> Tensor:
        for block in model[:-1]:
            x = checkpoint(block, x, use_reentrant=reentrant)
        return model[-1](x)

    plain, recomputed = network(options), network(options)
    one, two = steps(plain, lambda model, x: model(x)), steps(recomputed, checkpointed)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert same_bits(state(plain), state(recomputed))
    assert recomputed[0][1].num_batches_tracked == 3


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # the inner one, in the outer's forward
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpoints_in_checkpoints(reentrant: bool) -> None:
    def nested(model: nn.Sequential, x: Tensor) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            return checkpoint(model[1], checkpoint(model[0], x, use_reentrant=reentrant), use_reentrant=reentrant)

        return model[-1](checkpoint(inner, x, use_reentrant=reentrant))

    plain, recomputed = network({}), network({})
    one, two = steps(plain, lambda model, x: model(x)), steps(recomputed, nested)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert same_bits(state(plain), state(recomputed))


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_a_checkpoint_inside_one_update(reentrant: bool) -> None:
    found = []
    for checkpointed in (False, True):
        model = network({"average": evenorm.Window(2)})
        with evenorm.one_update(model):
            steps(model, lambda m, x, on=checkpointed: checkpoint(m, x, use_reentrant=reentrant) if on else m(x))
        found.append(state(model))
    assert same_bits(*found)
    assert found[0]["0.1.num_batches_tracked"] == 1


def test_the_function_does_not_count_twice_either() -> None:
    mean, var = torch.zeros(3), torch.ones(3)
    x = torch.randn(8, 3, requires_grad=True)
    y = checkpoint(lambda x: evenorm.batch_norm(x, mean, var, training=True), x, use_reentrant=False)
    y.backward(torch.randn(8, 3))
    torch.testing.assert_close(mean, 0.1 * x.detach().mean(0))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # torch's own, while it traces
def test_a_checkpoint_inside_what_is_compiled() -> None:
    torch._dynamo.reset()
    plain, compiled = network({}), network({})
    whole = torch.compile(
        lambda model, x: checkpoint(model, x, use_reentrant=False), backend="aot_eager", fullgraph=True
    )
    one, two = steps(plain, lambda model, x: model(x)), steps(compiled, whole)
    torch.testing.assert_close(one, two)
    torch.testing.assert_close(state(plain), state(compiled))


# Batches that must not count.


@EVERY_OPTION
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0)], ids=str)
def test_an_empty_batch_changes_nothing(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    layer = evenorm.BatchNorm(3, **options)
    layer(torch.randn(8, 3))
    before = state(layer)
    x = torch.zeros(shape, requires_grad=True)
    y = layer(x)
    y.backward(torch.zeros(shape))
    assert y.shape == x.grad.shape == shape
    assert layer.weight.grad is None or not layer.weight.grad.any()
    assert same_bits(before, state(layer))
    with evenorm.one_update(layer):
        layer(x)
    assert same_bits(before, state(layer))


@ENGINES
@pytest.mark.usefixtures("_engine")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("options", [value for name, value in OPTIONS.items() if name != "raise"], ids=str)
def test_skipping_keeps_the_bits_of_the_channel(options: dict[str, Any], bad: float) -> None:
    layer = evenorm.BatchNorm1d(3, **options)
    batches = torch.randn(6, 8, 3, 2)
    for number, batch in enumerate(batches):
        before = state(layer)
        if number in (2, 4):
            batch[3, 1] = bad
            batch[5, 0] = bad
        y = layer(batch)
        if number in (2, 4):
            after = state(layer)
            assert torch.equal(after["running_mean"][:2], before["running_mean"][:2])
            assert torch.equal(after["running_var"][:2], before["running_var"][:2])
            assert after["running_mean"][2] != before["running_mean"][2]
            assert not y[:, :2].isfinite().all(2).all(0).any()  # the output shows it
            assert y[:, 2].isfinite().all()
            assert after["nonfinite_batches"] == before["nonfinite_batches"] + 1
    assert all(buffer.isfinite().all() for buffer in layer.buffers())
    assert layer.nonfinite_batches == 2
    assert layer.num_batches_tracked == 6


def test_a_window_repeats_what_it_knows_in_place_of_a_bad_batch() -> None:
    layer, batches = evenorm.BatchNorm1d(2, average=evenorm.Window(3)), torch.randn(4, 6, 2)
    one, _, two, three = batches[:, :, 1].mean(1)
    batches[1, 3, 1] = math.nan
    for batch, expected in zip(batches, (one, one, (2 * one + two) / 3, (one + two + three) / 3), strict=True):
        layer(batch)
        torch.testing.assert_close(layer.running_mean[1], expected)


@ENGINES
@pytest.mark.usefixtures("_engine")
@pytest.mark.parametrize("name", ["debiased", "cumulative", "window"])
def test_a_batch_that_no_channel_takes_does_not_count(name: str) -> None:
    """Else the next one would share its weight with the initial 0 and 1."""
    layer = evenorm.BatchNorm1d(3, **OPTIONS[name])
    before = state(layer) | {"nonfinite_batches": torch.tensor(1)}
    layer(torch.full((4, 3), math.nan))
    assert same_bits(before, state(layer))
    x = torch.randn(4, 3)
    layer(x)
    torch.testing.assert_close(layer.running_mean, x.mean(0))
    torch.testing.assert_close(layer.running_var, x.var(0))
    assert layer.num_batches_tracked == 1


@ENGINES
@pytest.mark.usefixtures("_engine")
@pytest.mark.parametrize("on_nonfinite", ["skip", "raise"])
def test_a_variance_that_float32_cannot_hold_is_not_taken(on_nonfinite: Any) -> None:
    layer = evenorm.BatchNorm1d(2, on_nonfinite=on_nonfinite)
    layer(torch.stack([torch.randn(8), 1e30 * torch.randn(8)], 1))
    assert layer.running_var.isfinite().all()
    assert layer.running_var[1] == 1
    assert layer.running_mean[1] == 0


@ENGINES
@pytest.mark.usefixtures("_engine")
def test_propagate_takes_it_in_as_torch_does() -> None:
    layer, torchs = evenorm.BatchNorm1d(3, on_nonfinite="propagate"), nn.BatchNorm1d(3)
    x = torch.randn(8, 3)
    x[3, 1] = math.nan
    layer(x), torchs(x)
    torch.testing.assert_close(dict(layer.state_dict()), dict(torchs.state_dict()), equal_nan=True)
    assert layer.nonfinite_batches == 0


@ENGINES
@pytest.mark.usefixtures("_engine")
@pytest.mark.parametrize("options", [{}, {"virtual_batch_size": 2}, {"average": evenorm.Window(1)}], ids=str)
@pytest.mark.parametrize("row", [0, 3])
def test_an_infinite_value_makes_an_infinite_running_mean_as_in_torch(row: int, options: dict[str, Any]) -> None:
    layer, torchs = evenorm.BatchNorm1d(3, on_nonfinite="propagate", **options), nn.BatchNorm1d(3, momentum=0.1)
    torchs.momentum = 1.0 if "average" in options else 0.1
    x = torch.randn(8, 3)
    x[row, 1] = math.inf
    layer(x), torchs(x)
    torch.testing.assert_close(layer.running_mean, torchs.running_mean)
    assert layer.running_var.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("options", [{}, {"average": evenorm.Window(2)}, {"virtual_batch_size": 2}], ids=str)
def test_raise_names_the_layer_and_the_channels(options: dict[str, Any], named: bool) -> None:
    model = nn.Sequential(nn.Sequential(evenorm.BatchNorm1d(12, on_nonfinite="raise", **options)))
    layer = model[0][0]
    if named:
        evenorm.unfreeze(evenorm.freeze(model))
    layer(torch.randn(4, 12))
    x, before = torch.randn(4, 12), state(layer)
    x[1, 2:11] = math.nan
    name = "0.0" if named else "BatchNorm1d(12)"
    channels = "channel 2, 3, 4, 5, 6, 7, 8, 9, ..."
    text = f"{name}: the batch holds NaN or inf in {channels}; its running statistics were left alone"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        model(x)
    assert same_bits(before, state(layer))


def test_a_grad_scaler_skips_the_step_of_a_bad_batch() -> None:
    model = nn.Sequential(nn.Linear(4, 3), evenorm.BatchNorm1d(3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        scaler.scale((model(x) * torch.randn(8, 3)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()

    x = torch.randn(8, 4)
    step(x)
    weights, statistics = [copy.deepcopy(list(model.parameters())), state(model)]
    x[2, 1] = math.inf
    step(x)
    assert all(torch.equal(one, two) for one, two in zip(weights, model.parameters(), strict=True))
    assert same_bits(statistics | {"1.nonfinite_batches": torch.tensor(1)}, state(model))
    assert scaler.get_scale() == 4.0
    step(torch.randn(8, 4))
    assert model[1].num_batches_tracked == 2


def test_the_counter_is_in_no_checkpoint_and_reset_with_the_rest() -> None:
    layer = evenorm.BatchNorm1d(3)
    assert list(layer.state_dict()) == list(nn.BatchNorm1d(3).state_dict())
    layer(torch.full((4, 3), math.nan))
    assert layer.nonfinite_batches == 1
    layer.reset_running_stats()
    assert layer.nonfinite_batches == 0


# One value per channel.


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1), (1, 3, 1, 1)], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"renorm": OPTIONS["renorm"]["renorm"]}, {"average": evenorm.Window(2)}], ids=str
)
def test_a_single_value_by_the_population(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    layer = evenorm.BatchNorm(3, on_single="population", **options)
    layer(torch.randn(8, 3) * 3 + 1)
    x, before = torch.randn(shape), state(layer)
    y = layer(x)
    assert same_bits(before, state(layer))
    assert torch.equal(y, layer.eval()(x))


def test_the_error_for_a_single_value_says_what_to_do_and_where_it_is() -> None:
    x = torch.randn(1, 3)
    text = (
        "Expected more than 1 value per channel when training, got input size torch.Size([1, 3]); "
        "on_single='population' normalises such a batch by the running statistics"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        evenorm.BatchNorm1d(3)(x)
    assert evenorm.BatchNorm1d(3).eval()(x).shape == (1, 3)
    with pytest.raises(ValueError, match="without running statistics") as caught:
        evenorm.BatchNorm1d(3, track_running_stats=False).eval()(x)
    assert "training" not in str(caught.value)


# Options that contradict each other or make no sense.

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "momentum and average": (
        {"momentum": 0.2, "average": evenorm.Cumulative()},
        "give either momentum or average, got momentum=0.2 and Cumulative()",
    ),
    "average, nothing tracked": (
        {"track_running_stats": False, "average": evenorm.Window(3)},
        "average needs running statistics, got track_running_stats=False",
    ),
    "renorm, nothing tracked": (
        {"track_running_stats": False, "renorm": evenorm.Renorm()},
        "renorm needs running statistics, got track_running_stats=False",
    ),
    "population, nothing tracked": (
        {"track_running_stats": False, "on_single": "population"},
        "on_single='population' needs running statistics, got track_running_stats=False",
    ),
    "raise, nothing tracked": (
        {"track_running_stats": False, "on_nonfinite": "raise"},
        "on_nonfinite='raise' needs running statistics, got track_running_stats=False",
    ),
    "on_nonfinite": (
        {"on_nonfinite": "ignore"},
        "on_nonfinite must be one of skip, raise, propagate, got 'ignore'",
    ),
    "on_single": ({"on_single": None}, "on_single must be one of raise, population, got None"),
}


@pytest.mark.parametrize(("options", "text"), BAD.values(), ids=BAD)
@pytest.mark.parametrize(
    "make", [lambda **o: evenorm.BatchNorm1d(3, **o), evenorm.LazyBatchNorm2d], ids=["", "lazy"]
)
def test_bad_options(make: Callable[..., nn.Module], options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        make(**options)


@pytest.mark.parametrize("size", [0, -1, 1.5, None, True], ids=repr)
def test_a_window_of_nothing(size: Any) -> None:
    with pytest.raises(ValueError, match=f"^Window needs a size of at least 1 batch, got {re.escape(repr(size))}$"):
        evenorm.Window(size)
