"""Calibration: the statistics of all data, by whatever road they come, and nothing else changed."""

from __future__ import annotations

import copy
import json
import math
import random
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

import evenorm

CHANNELS = 4


class ChannelsLast(nn.BatchNorm1d):
    """A make of its own: takes (N, L, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class Activated(nn.BatchNorm2d):
    """A make of its own: calls torch's function itself."""

    def forward(self, x: Tensor) -> Tensor:
        y = functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )
        return y.relu()


class Stubborn(nn.BatchNorm2d):
    """A make of its own: normalises by the batch in evaluation too, and tracks it."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True, 0.1)


class Bare(nn.Module):
    """Uses the layer's buffers and not the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        bn = self.bn
        return torch.batch_norm(
            x, bn.weight, bn.bias, bn.running_mean, bn.running_var, self.training, 0.1, bn.eps, False
        )


MAKES = {
    "torch": nn.BatchNorm2d,
    "sync": nn.SyncBatchNorm,
    "evenorm": evenorm.BatchNorm2d,
    "evenorm for any dimensions": evenorm.BatchNorm,
    "subclass": Activated,
    "subclass that never evaluates": Stubborn,
    "function": lambda channels: Bare(),
}


def network(make=nn.BatchNorm2d, dropout: float = 0.5) -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(
        OrderedDict(
            first=nn.Sequential(nn.Conv2d(2, CHANNELS, 3, padding=1), make(CHANNELS), nn.ReLU()),
            drop=nn.Dropout(dropout),
            second=nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 3, stride=2), make(CHANNELS), nn.ReLU()),
            third=nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), make(CHANNELS)),
        )
    )
    for layer in layers(model):
        nn.init.uniform_(layer.weight, 0.5, 2)
        nn.init.normal_(layer.bias)
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    return model


def layers(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def images(samples: int = 23, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drift = torch.linspace(0, 3, samples).reshape(-1, 1, 1, 1)  # batches differ
    return torch.randn(samples, 2, 7, 6, generator=generator) * (1 + drift) + drift


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    rows = x.double().transpose(0, 1).flatten(1)
    return rows.mean(1), rows.var(1, correction=1)


def check(layer: nn.Module, x: Tensor, **tolerances: float) -> None:
    mean, var = statistics(x)
    torch.testing.assert_close(layer.running_mean.double(), mean, rtol=1e-5, atol=1e-6, **tolerances)
    torch.testing.assert_close(layer.running_var.double(), var, rtol=1e-5, atol=1e-6, **tolerances)


def by_hand(model: nn.Sequential, batches: list[Tensor]) -> list[Tensor]:
    """Return what the three layers are given in all, each normalising by its batch, in float64 and step by step."""
    model = copy.deepcopy(model).double()
    seen: list[list[Tensor]] = [[], [], []]
    for batch in batches:
        x = batch.double()
        for index, block in enumerate((model.first, model.second, model.third)):
            x = block[0](x)
            seen[index].append(x)
            layer = layers(block)[0]
            mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, correction=0)
            weight, bias = layer.weight.reshape(-1, 1, 1), layer.bias.reshape(-1, 1, 1)
            x = ((x - mean) / (var + layer.eps).sqrt() * weight + bias).relu()
    return [torch.cat(parts).detach() for parts in seen]


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_one_pass_merges_what_layers_get_when_those_below_normalise_by_their_batch(make):
    model, batches = network(make), list(images().split(10))
    calibration = evenorm.calibrate(model, batches)
    for layer, x in zip(layers(model), by_hand(model, batches), strict=True):
        check(layer, x)
        assert layer.num_batches_tracked == 3
    assert [layer.samples for layer in calibration.layers] == [23, 23, 23]
    assert (calibration.batches, calibration.untouched) == (3, {})


@pytest.mark.parametrize("make", [make for make in MAKES.values() if make is not Stubborn])
def test_sequential_gives_each_layer_the_statistics_that_it_has_in_use(make):
    model, batches = network(make), list(images().split(10))
    calibration = evenorm.calibrate(model, batches, sequential=True)
    assert calibration.passes == 3
    model.eval()
    x = images()
    for block in (model.first, model.second, model.third):
        check(layers(block)[0], block[0](x))
        x = block(x)


def test_a_layer_that_never_evaluates_is_left_to_do_so():
    models = [network(Stubborn).double() for _ in range(2)]
    for model, sequential in zip(models, (False, True), strict=True):
        evenorm.calibrate(model, images().double().split(10), sequential=sequential)
    for one, other in zip(*map(layers, models), strict=True):
        torch.testing.assert_close(one.running_var, other.running_var)


def test_a_subclass_is_given_what_it_hands_on():
    layer, x = ChannelsLast(5), torch.randn(12, 5, 5)
    evenorm.calibrate(layer, x.split(5))
    check(layer, x.transpose(1, 2))


@given(cuts=st.lists(st.integers(1, 22), max_size=5), waits=st.sampled_from([1, 2, 32]))
@settings(max_examples=25, deadline=None)
def test_the_statistics_do_not_depend_on_the_cut_into_batches(cuts, waits):
    model, x = evenorm.BatchNorm2d(2), images()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evenorm.models.gather.MERGE_EVERY", waits)
        evenorm.calibrate(model, x.tensor_split(sorted(set(cuts))))
    check(model, x)


def test_digits_survive_an_offset():
    x = torch.randn(64, 3) + 1e4
    layer = nn.BatchNorm1d(3)
    evenorm.calibrate(layer, x.split(10))
    torch.testing.assert_close(layer.running_var.double(), x.double().var(0), rtol=1e-6, atol=0)


def test_nothing_but_batch_norm_is_in_training():
    plain, dropped = network(dropout=0.0), network(dropout=0.9)
    plain.append(nn.InstanceNorm2d(CHANNELS, track_running_stats=True))
    before = copy.deepcopy(plain[-1].state_dict())
    for model in (plain, dropped):
        evenorm.calibrate(model.train(), images().split(10))
    for one, other in zip(layers(plain), layers(dropped), strict=True):
        assert torch.equal(one.running_var, other.running_var)
    assert all(torch.equal(before[key], value) for key, value in plain[-1].state_dict().items())


# ------ nothing else changes, and nothing at all where it fails


def snapshot(model: nn.Module) -> dict[str, object]:
    """Return all that has to be as before, as what can be compared."""
    return {
        "state": {key: value.tolist() for key, value in model.state_dict().items()},
        "buffers": [id(buffer) for buffer in model.buffers()],
        "modes": [module.training for module in model.modules()],
        "hooks": [
            (len(module._forward_pre_hooks), len(module._forward_hooks), len(module._forward_pre_hooks_with_kwargs))
            for module in model.modules()
        ],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "momentum": [(layer.momentum, layer.track_running_stats) for layer in layers(model)],
        "gradients": [None if one.grad is None else one.grad.tolist() for one in model.parameters()],
        "random": (torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())),
        "gradient mode": torch.is_grad_enabled(),
    }


def in_use() -> nn.Sequential:
    """Return a network in the middle of something: mixed modes, gradients, a hook, odd momenta."""
    model = network().train()
    model(images()).square().mean().backward()
    model.second.eval()
    model.first[1].momentum = None
    model.third[1].register_forward_pre_hook(lambda module, inputs: None)
    return model


def shuffled(batches: list[Tensor], failure: BaseException | None = None):
    """Yield batches as a loader does, drawing random numbers of all kinds."""
    for batch in batches:
        torch.rand(3), random.random(), np.random.rand(3)
        yield batch
    if failure is not None:
        raise failure


class Shuffled:
    """A loader that can be read many times, and draws random numbers each time."""

    def __iter__(self):
        return shuffled(BATCHES)


class UnfinishedError(Exception):
    """What somebody else's loader or network raises."""


def fails(model: nn.Module, x: Tensor) -> Tensor:
    if x.shape[0] < 10:
        raise UnfinishedError
    return model(x)


def poisoned() -> Tensor:
    x = images()
    x[15, 1, 3, 3] = math.nan
    return x


BATCHES = list(images().split(10))
FAILURES = {
    "loader": (lambda: shuffled(BATCHES, UnfinishedError()), {}, UnfinishedError, None),
    "interrupt": (lambda: shuffled(BATCHES, KeyboardInterrupt()), {}, KeyboardInterrupt, None),
    "network": (lambda: shuffled(BATCHES), {"forward": fails}, UnfinishedError, None),
    "NaN": (
        lambda: shuffled(list(poisoned().split(10))),
        {},
        ValueError,
        r"^first\.1: its input holds NaN or inf in channel 0 of batch 1, counted from 0; nothing was changed$",
    ),
    "infinity": (
        lambda: shuffled([*BATCHES, images(3) / 0]),
        {"max_batches": 9},
        ValueError,
        r"^first\.1: its input holds NaN or inf in channel 0 of batch 3,",
    ),
    "shape": (
        lambda: shuffled([*BATCHES, torch.ones(5, 3, 7, 6)]),
        {},
        ValueError,
        r"^batch 3, a tensor \(5, 3, 7, 6\), could not be run: first\.0 \(Conv2d\) raised RuntimeError: Given",
    ),
    "channels": (
        lambda: shuffled([torch.ones(5, 3, 2, 2)]),
        {"forward": lambda model, x: model.first[1](x)},
        ValueError,
        r"batch 0, .*: first\.1 \(BatchNorm2d\) raised RuntimeError: running_mean should contain 3 elements not 4",
    ),
    "kind": (lambda: shuffled([*BATCHES, "text"]), {}, ValueError, r"got a str; for others give forward="),
    "empty": (lambda: shuffled([]), {}, ValueError, r"^data gave no batch"),
    "unread again": (
        lambda: Once(BATCHES),
        {"sequential": True},
        ValueError,
        r"^data gave 3 batches first and 0 when read again",
    ),
    "unreached": (
        lambda: shuffled(BATCHES),
        {"forward": lambda model, x: model.first[0](x)},
        ValueError,
        r"^no batch norm layer was reached, of first\.1, second\.1, third\.1",
    ),
}


class Once:
    """Data that pretend to be there for ever."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.left = iter(batches)

    def __iter__(self):
        yield from self.left


@pytest.mark.parametrize("case", FAILURES.values(), ids=FAILURES)
def test_what_fails_changes_nothing(case):
    data, options, error, message = case
    model = in_use()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        evenorm.calibrate(model, data(), **options)
    assert snapshot(model) == before


@pytest.mark.parametrize("sequential", [False, True])
def test_what_succeeds_changes_statistics_alone(sequential):
    model = in_use()
    before = snapshot(model)
    evenorm.calibrate(model, Shuffled(), sequential=sequential)
    after = snapshot(model)
    changed = {key for key, value in after["state"].items() if value != before["state"][key]}
    assert changed == {
        f"{name}.1.{key}"
        for name in ("first", "second", "third")
        for key in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert {key: after[key] for key in after if key != "state"} == {
        key: before[key] for key in before if key != "state"
    }


def test_random_numbers_of_the_loader_do_not_move_on_and_repeat_themselves_in_each_pass():
    drawn: list[float] = []

    class Augmented:
        def __iter__(self):
            for batch in BATCHES:
                drawn.append(torch.rand(()).item() + random.random())
                yield batch

    torch.manual_seed(5)
    before = snapshot(model := network())
    evenorm.calibrate(model, Augmented(), sequential=True)
    assert drawn[:3] == drawn[3:6] == drawn[6:]
    assert snapshot(model)["random"] == before["random"]


def test_an_interrupted_write_is_taken_back():
    model = network()
    with torch.inference_mode():
        model.third[1].running_var = torch.ones(CHANNELS)  # cannot be written to outside
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="inference tensor"):
        evenorm.calibrate(model, BATCHES)
    assert snapshot(model) == before


def test_statistics_that_do_not_fit_their_dtype_are_not_written():
    model = nn.Sequential(nn.Identity(), nn.BatchNorm1d(3).half())
    x = torch.randn(50, 3).half() * 1000
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"^1: its new running_var is too large for torch.float16"):
        evenorm.calibrate(model, [x])
    assert snapshot(model) == before


# ------ which layers


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used = nn.BatchNorm1d(3)
        self.idle = nn.BatchNorm1d(3)
        self.free = nn.BatchNorm1d(3, track_running_stats=False)
        self.fixed = evenorm.freeze(evenorm.BatchNorm1d(3))
        self.fixed.running_mean.fill_(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.free(self.fixed(self.used(3 * self.used(x))))


def test_layers_reached_twice_never_and_those_that_keep_theirs():
    model, x = Twice(), torch.randn(20, 3) + 1
    calibration = evenorm.calibrate(model, [x])
    check(model.used, torch.cat([x, 3 * (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()]))
    assert model.used.num_batches_tracked == 2
    assert calibration.untouched == {
        "free": "keeps no running statistics",
        "fixed": "frozen",
        "idle": "never reached",
    }
    assert model.idle.running_mean.tolist() == [0, 0, 0]
    assert model.fixed.running_mean.tolist() == [2, 2, 2]
    assert [layer.name for layer in calibration.layers] == ["used"]
    assert calibration.layers[0].samples == 40


def test_a_layer_reached_twice_sees_its_own_estimate_in_its_own_pass():
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.used = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(3 * self.used(self.first(x).square()))

    model, x = Loop(), torch.randn(20, 3)
    evenorm.calibrate(model, x.split(7))
    estimate = copy.deepcopy(model.used).eval()
    evenorm.calibrate(model, x.split(7), sequential=True)
    squares = model.first.eval()(x).square()
    check(model.used, torch.cat([squares, 3 * estimate(squares)]).detach())


def test_masked_positions_do_not_count():
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = evenorm.BatchNorm1d(3)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.bn(x, mask=mask)

    model, x = Masked(), torch.randn(9, 3, 6)
    mask = torch.rand(9, 6) > 0.5
    mask[4] = False
    x = torch.where(mask.unsqueeze(1), x, math.nan)
    calibration = evenorm.calibrate(model, list(zip(x.split(4), mask.split(4), torch.arange(3), strict=True)))
    valid = x.transpose(1, 2)[mask].double()
    torch.testing.assert_close(model.bn.running_var.double(), valid.var(0), rtol=1e-6, atol=0)
    assert calibration.layers[0].samples == 8


def test_a_batch_of_one_value_is_normalised_by_all_so_far():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    x = torch.randn(11, 3)
    evenorm.calibrate(model, x.split(5))
    check(model[0], x)
    parts = [
        (part - base.mean(0)) / (base.var(0, correction=0) + 1e-5).sqrt()
        for part, base in zip(x.split(5), (x[:5], x[5:10], x), strict=True)
    ]
    check(model[1], torch.cat(parts))
    with pytest.raises(ValueError, match=r"^0: the first batch has one value per channel"):
        evenorm.calibrate(model, x.split(1))


def test_a_layer_with_too_few_values_keeps_its_statistics():
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.often, self.empty = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.empty(self.often(x)[:0])

    model = Sometimes()
    assert evenorm.calibrate(model, [torch.randn(5, 3)]).untouched == {"empty": "fewer than two values per channel"}
    assert model.empty.running_var.tolist() == [1, 1, 1]


def test_a_window_is_filled():
    layer = evenorm.BatchNorm1d(3, average=evenorm.Window(3))
    layer.train()(torch.randn(5, 3))
    evenorm.calibrate(layer, torch.randn(40, 3).split(10))
    assert torch.equal(layer.window_var, layer.running_var.expand(3, 3))


def test_compiled_networks_are_run_as_they_are_written():
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    model = network()
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        compiled.eval()(BATCHES[0])
    before = len(compilations)
    calibration = evenorm.calibrate(compiled, BATCHES)
    assert len(compilations) == before > 0
    check(model.first[1], model.first[0](images()))
    assert calibration.layers[0].name == "_orig_mod.first.1"


# ------ what a batch can be


class Inputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(3)

    def forward(self, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
        return self.bn(scale * (left + right))


LEFT, RIGHT, LABELS = torch.randn(12, 3), torch.randn(12, 3), torch.arange(12)


@pytest.mark.parametrize(
    ("data", "forward"),
    [
        ([(LEFT, RIGHT, LABELS)], None),
        ([[LEFT, RIGHT]], None),
        ([{"left": LEFT, "right": RIGHT, "labels": LABELS}], None),
        (((LEFT[rows], RIGHT[rows]) for rows in torch.arange(12).split(5)), None),
        (
            torch.utils.data.DataLoader(torch.utils.data.TensorDataset(LEFT, RIGHT, LABELS), 5, shuffle=True),
            None,
        ),
        ([{"both": torch.stack([LEFT, RIGHT])}], lambda model, batch: model(*batch["both"])),
        ([LEFT + RIGHT], lambda model, batch: model.bn(batch)),
    ],
    ids=["tuple", "list", "dict", "generator", "DataLoader", "forward", "part"],
)
def test_batches_of_all_kinds(data, forward):
    model = Inputs()
    evenorm.calibrate(model, data, forward=forward)
    check(model.bn, LEFT + RIGHT)


def test_labels_are_not_inputs():
    layer = nn.BatchNorm1d(3)
    evenorm.calibrate(layer, [(LEFT, LABELS), {"input": RIGHT, "labels": LABELS}])
    check(layer, torch.cat([LEFT, RIGHT]))


def test_max_batches_reads_no_more():
    def data():
        yield from (LEFT, RIGHT)
        raise AssertionError("one too many")

    layer = nn.BatchNorm1d(3)
    assert evenorm.calibrate(layer, data(), max_batches=2).batches == 2
    check(layer, torch.cat([LEFT, RIGHT]))


# ------ prior, standard error, tolerance


@given(
    first=st.integers(2, 40), second=st.integers(2, 40), make=st.sampled_from([nn.BatchNorm2d, evenorm.BatchNorm2d])
)
@settings(max_examples=20, deadline=None)
def test_old_statistics_weigh_as_if_their_samples_were_there(first, second, make):
    x, layer = images(first + second), make(2)
    evenorm.calibrate(layer, [x[:first]])
    evenorm.calibrate(layer, [x[first:]], prior=first)
    check(layer, x)


def test_a_prior_weighs_in_each_pass():
    model = network()
    old = copy.deepcopy(model.first[1])
    evenorm.calibrate(model, BATCHES, prior=1e9, sequential=True)
    torch.testing.assert_close(model.first[1].running_mean, old.running_mean, rtol=1e-5, atol=1e-6)
    evenorm.calibrate(model, BATCHES, prior=23, sequential=True)
    mean, _ = statistics(model.first[0](images()))
    middle = (mean + old.running_mean.double()) / 2
    torch.testing.assert_close(model.first[1].running_mean.double(), middle, rtol=1e-5, atol=1e-6)


def test_standard_error_is_that_of_a_weighted_mean():
    x, sizes = images(30), [12, 11, 7]
    layer = nn.BatchNorm2d(2)
    found = evenorm.calibrate(layer, x.split(sizes)).layers[0]
    means = torch.stack([part.double().mean((0, 2, 3)) for part in x.split(sizes)])
    share = torch.tensor(sizes).double().unsqueeze(1) / 30
    error = ((share * (means - x.double().mean((0, 2, 3)))).square().sum(0) * 3 / 2).sqrt()
    assert found.standard_error == pytest.approx((error / x.double().std((0, 2, 3))).max().item(), rel=1e-4)
    assert evenorm.calibrate(layer, [x]).layers[0].standard_error is None


def test_standard_error_says_how_far_the_mean_is_off():
    generator = torch.Generator().manual_seed(0)
    off, said = [], []
    for _ in range(200):
        layer = nn.BatchNorm1d(1)
        x = torch.randn(200, 1, generator=generator)
        found = evenorm.calibrate(layer, x.split(10)).layers[0]
        off.append(float(layer.running_mean))
        said.append(found.standard_error)
    assert np.std(off) == pytest.approx(np.mean(said), rel=0.15)
    assert np.mean(said) == pytest.approx(1 / math.sqrt(200), rel=0.1)


def test_tolerance_stops_when_all_means_are_exact_enough():
    generator = torch.Generator().manual_seed(0)
    data = list(torch.randn(5000, 2, generator=generator).split(50))
    layer = nn.BatchNorm1d(2)
    calibration = evenorm.calibrate(layer, data, tolerance=0.05)
    assert calibration.stopped_early
    assert calibration.layers[0].standard_error <= 0.05
    assert 2 <= calibration.batches < 30
    assert not evenorm.calibrate(layer, data[: calibration.batches - 1], tolerance=0.05).stopped_early


# ------ the report


def test_the_report_says_what_changed():
    layer = nn.BatchNorm1d(2, eps=0.0)
    x = torch.tensor([[0.0, 0.0], [4.0, 1.0]])
    layer.running_mean.copy_(torch.tensor([2.0, 3.0]))
    layer.running_var.copy_(torch.tensor([2.0, 1.0]))
    found = evenorm.calibrate(layer, [x, x]).layers[0]  # variances 16/3 and 1/3
    assert found.mean_shift == pytest.approx(2.5 / math.sqrt(1 / 3), rel=1e-5)
    assert found.variance_ratio == pytest.approx((1 / 3, 8 / 3), rel=1e-5)


def test_poisoned_statistics_are_replaced_and_reported():
    layer = nn.BatchNorm1d(2)
    layer.running_mean[0] = layer.running_var[1] = math.nan
    with pytest.raises(ValueError, match="the model: its statistics hold NaN"):
        evenorm.calibrate(layer, [LEFT[:, :2]], prior=3)
    calibration = evenorm.calibrate(layer, [LEFT[:, :2]])
    check(layer, LEFT[:, :2])
    assert calibration.layers[0].mean_shift == math.inf
    assert math.isfinite(calibration.layers[0].variance_ratio[0])
    content = json.loads(json.dumps(calibration.to_dict(), allow_nan=False))
    assert content["layers"][0]["mean_shift"] is None
    assert content["layers"][0]["variance_ratio"][1] is None


def test_the_table_fits_in_80_columns():
    model = nn.Sequential(OrderedDict({"a_long_name_for_a_layer" * 4: nn.BatchNorm1d(3), "b": nn.BatchNorm1d(3)}))
    table = str(evenorm.calibrate(model, LEFT.split(5), sequential=True))
    lines = table.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["layer", "samples", "mean", "shift", "variance", "ratio", "standard", "error"]
    assert lines[2].startswith("..")
    assert lines[3].split()[:2] == ["b", "12"]
    assert lines[-1] == "3 batches in each of 2 passes; shift and error in standard deviations"


# ------ what is refused before any work


@pytest.mark.parametrize(
    ("model", "data", "options", "error", "message"),
    [
        (nn.ReLU(), [], {}, ValueError, "^the network has no batch norm layer to calibrate$"),
        (
            nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)),
            [],
            {},
            ValueError,
            r"no batch norm layer to calibrate \(0: keeps no running statistics\)",
        ),
        (nn.Sequential(nn.LazyBatchNorm1d()), [], {}, ValueError, "^0 is lazy"),
        (nn.BatchNorm1d(3), LEFT, {}, TypeError, r"got a Tensor; for one batch give \[batch\]"),
        (nn.BatchNorm1d(3), 5, {}, TypeError, "an iterable of batches, got a int"),
        (nn.BatchNorm1d(3), iter([LEFT]), {"sequential": True}, ValueError, "a generator can be read once"),
        (nn.BatchNorm1d(3), [LEFT], {"max_batches": 0}, ValueError, "at least 1, got 0"),
        (nn.BatchNorm1d(3), [LEFT], {"max_batches": 1.5}, TypeError, "an integer, got 1.5"),
        (nn.BatchNorm1d(3), [LEFT], {"prior": -1}, ValueError, "prior must be 0 samples or more"),
        (nn.BatchNorm1d(3), [LEFT], {"prior": math.nan}, ValueError, "prior must be 0 samples or more"),
        (nn.BatchNorm1d(3), [LEFT], {"prior": "many"}, TypeError, "prior must be a number"),
        (nn.BatchNorm1d(3), [LEFT], {"tolerance": 0}, ValueError, "tolerance must be above 0"),
        (nn.BatchNorm1d(3), [LEFT], {"process_group": "world"}, ValueError, "torch.distributed"),
    ],
)
def test_what_cannot_work_is_refused(model, data, options, error, message):
    with pytest.raises(error, match=message):
        evenorm.calibrate(model, data, **options)


# ------ workers

WORKER = """
import sys, json
import torch, torch.distributed as dist
import evenorm
from test_calibrate import network, images, layers

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
calls = []
gather = dist.all_gather
dist.all_gather = lambda *args, **options: (calls.append(1), gather(*args, **options))[1]
mine = [list(images().split(10))[:1], list(images().split(10))[1:]][rank]
answer = {}
for sequential in (False, True):
    model = network()
    calibration = evenorm.calibrate(model, mine, process_group="world", sequential=sequential)
    answer[str(sequential)] = {
        "calls": len(calls),
        "batches": calibration.batches,
        "report": calibration.to_dict(),
        "statistics": [[layer.running_mean.tolist(), layer.running_var.tolist()] for layer in layers(model)],
    }
    calls.clear()
one_empty = network()
evenorm.calibrate(one_empty, mine * rank, process_group=dist.group.WORLD)
answer["one empty"] = one_empty.first[1].running_var.tolist()
ddp = torch.nn.parallel.DistributedDataParallel(network())
synced = []  # DDP's own broadcast of buffers, which would write to them and wait for as many batches elsewhere
ddp._sync_buffers = lambda: synced.append(1)
ddp_report = evenorm.calibrate(ddp, mine, process_group="world")
answer["synced"] = len(synced)
answer["ddp"] = [layer.name for layer in ddp_report.layers], ddp.module.first[1].running_var.tolist()
try:
    evenorm.calibrate(network(), mine if rank else [torch.full((4, 2, 7, 6), torch.nan)], process_group="world")
except ValueError as error:
    answer["error"] = str(error)
print(json.dumps(answer))
dist.destroy_process_group()
"""


def test_workers_hold_the_statistics_of_all_data(tmp_path):
    path = [str(Path(__file__).parent), str(Path(evenorm.__file__).parents[1])]
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{WORKER}", str(rank), str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    first, second = (json.loads(worker.communicate(timeout=120)[0]) for worker in workers)
    for sequential, passes in (("False", 1), ("True", 3)):
        alone = network()
        whole = evenorm.calibrate(alone, BATCHES, sequential=sequential == "True")
        assert first[sequential] == second[sequential]
        assert first[sequential]["calls"] == passes
        assert first[sequential]["batches"] == whole.batches == 3
        for (mean, var), layer in zip(first[sequential]["statistics"], layers(alone), strict=True):
            torch.testing.assert_close(torch.tensor(mean), layer.running_mean, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(torch.tensor(var), layer.running_var, rtol=1e-6, atol=1e-6)
        for there, here in zip(first[sequential]["report"]["layers"], whole.to_dict()["layers"], strict=True):
            assert there["samples"] == here["samples"]
            assert there["standard_error"] == pytest.approx(here["standard_error"], rel=1e-5)
    assert first["one empty"] == second["one empty"]
    assert first["ddp"] == second["ddp"]
    assert first["synced"] == second["synced"] == 0
    assert first["ddp"][0] == ["module.first.1", "module.second.1", "module.third.1"]
    assert first["ddp"][1] == first["False"]["statistics"][0][1]
    assert first["error"].startswith("first.1: its input holds NaN")
    assert second["error"] == "worker 0 failed, see its own error; nothing was changed on any worker"


class Counting(nn.Module):
    """Counts its calls in two buffers: one that it writes to, one that it replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(4)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        self.replaced = self.replaced + 1
        return self.bn(x)


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_networks_own_buffers_are_left_as_they_were(interrupted):
    def data():
        yield torch.randn(8, 4)
        if interrupted:
            raise KeyboardInterrupt

    network = Counting()
    replaced = network.replaced
    try:
        evenorm.calibrate(network, data())
    except KeyboardInterrupt:
        assert interrupted
    assert network.calls.item() == 0
    assert network.replaced is replaced
    assert network.bn.num_batches_tracked.item() == (0 if interrupted else 1)


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(4)

    def forward(self, x, shift):
        return self.bn(x + shift)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.optim.swa_utils.AveragedModel])
def test_a_wrapped_network_gets_what_the_network_inside_takes(wrap):
    torch.manual_seed(0)
    x, shift, labels = torch.randn(32, 4), torch.randn(32, 4), torch.randint(3, (32,))
    for batch in ({"x": x, "shift": shift, "labels": labels}, (x, shift, labels)):
        network = Named()
        if isinstance(batch, tuple) or wrap is not nn.DataParallel:
            evenorm.diagnose(wrap(network), [batch])
        model = wrap(network)
        evenorm.calibrate(model, [batch])
        torch.testing.assert_close(model.module.bn.running_mean, (x + shift).double().mean(0).float())


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_frozen_script_module_has_no_mode():
    script = torch.jit.freeze(torch.jit.script(nn.Sequential(nn.Linear(4, 4)).eval()))
    model = nn.Sequential(nn.BatchNorm1d(4))
    model.add_module("script", script)
    x = torch.randn(8, 4)
    evenorm.calibrate(model, [x])
    torch.testing.assert_close(model[0].running_mean, x.double().mean(0).float())
    assert model.training
