"""Merged statistics: those of a mixture, under the keys of a state_dict."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import evenorm


def network(seed: int, make=nn.BatchNorm1d) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(make(3), nn.Linear(3, 2), make(2))
    for layer in (model[0], model[2]):
        layer.running_mean.normal_(seed, 2)
        layer.running_var.uniform_(0.5, 4)
        layer.num_batches_tracked.fill_(10 * seed)
    return model


def mixture(means: list[Tensor], variances: list[Tensor], weights: list[float]) -> tuple[Tensor, Tensor]:
    """Return a mixture's mean and variance by their raw moments, in float64."""
    share = torch.tensor(weights, dtype=torch.float64).unsqueeze(1) / sum(weights)
    first = (share * torch.stack(means).double()).sum(0)
    second = (share * (torch.stack(variances).double() + torch.stack(means).double() ** 2)).sum(0)
    return first, second - first**2


@given(weights=st.lists(st.floats(0, 1e3), min_size=1, max_size=5).filter(lambda weights: sum(weights) > 1e-3))
@settings(max_examples=30, deadline=None)
def test_means_and_variances_are_those_of_the_mixture(weights):
    models = [network(seed) for seed in range(len(weights))]
    merged = evenorm.merge_statistics(models, weights)
    for index in (0, 2):
        mean, var = mixture(
            [model[index].running_mean for model in models],
            [model[index].running_var for model in models],
            weights,
        )
        torch.testing.assert_close(merged[f"{index}.running_mean"].double(), mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(merged[f"{index}.running_var"].double(), var, rtol=1e-6, atol=1e-6)


def test_federated_workers_get_the_statistics_of_all_their_data():
    parts = torch.randn(90_000, 3).mul(torch.tensor([1.0, 2.0, 3.0])).split([50_000, 30_000, 10_000])
    parts = [part + index for index, part in enumerate(parts)]
    models = [nn.BatchNorm1d(3, momentum=None) for _ in parts]
    for model, part in zip(models, parts, strict=True):
        model(part)
    merged = evenorm.merge_statistics(models, [len(part) for part in parts])
    torch.testing.assert_close(merged["running_mean"], torch.cat(parts).mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merged["running_var"], torch.cat(parts).var(0), rtol=1e-4, atol=0)


def test_one_network_and_equal_networks_merge_to_themselves():
    model = network(3)
    statistics = {key: value for key, value in model.state_dict().items() if "running" in key or "num" in key}
    for models in ([model], [model, copy.deepcopy(model), model.state_dict()]):
        merged = evenorm.merge_statistics(models)
        assert list(merged) == list(statistics)
        assert all(torch.equal(merged[key], statistics[key]) for key in merged)


def test_networks_and_state_dicts_give_the_same_and_are_left_alone():
    models = [network(1), network(2, evenorm.BatchNorm1d)]
    states = [copy.deepcopy(model.state_dict()) for model in models]
    merged = evenorm.merge_statistics(iter([models[0], states[1]]))
    from_states = evenorm.merge_statistics(states)
    assert merged.keys() == from_states.keys()
    assert all(torch.equal(merged[key], from_states[key]) for key in merged)
    for model, state in zip(models, states, strict=True):
        assert all(torch.equal(model.state_dict()[key], state[key]) for key in state)
    merged["0.running_mean"].zero_()
    assert not torch.equal(models[0][0].running_mean, merged["0.running_mean"])


def test_counters_stay_integers():
    merged = evenorm.merge_statistics([network(1), network(2)], [1, 2])
    counter = merged["0.num_batches_tracked"]
    assert counter.dtype == torch.int64
    assert counter.shape == ()
    assert counter == 17  # (10 + 2 * 20) / 3
    without = [{key: value for key, value in network(1).state_dict().items() if "num" not in key}, network(2)]
    assert "0.num_batches_tracked" not in evenorm.merge_statistics(without)


def test_the_result_loads_into_an_averaged_network():
    models = [network(1), network(2)]
    averaged = torch.optim.swa_utils.AveragedModel(models[0])
    averaged.update_parameters(models[0])
    averaged.update_parameters(models[1])
    merged = evenorm.merge_statistics(models)
    report = averaged.module.load_state_dict(merged, strict=False)
    assert report.unexpected_keys == []
    assert {key.rpartition(".")[2] for key in report.missing_keys} == {"weight", "bias"}
    assert torch.equal(averaged.module[2].running_var, merged["2.running_var"])
    wrapped = evenorm.merge_statistics([averaged, averaged])
    assert set(wrapped) == {f"module.{key}" for key in merged}


def test_a_window_starts_again_from_the_merged_statistics():
    models = [nn.Sequential(evenorm.BatchNorm1d(3, average=evenorm.Window(2))) for _ in range(2)]
    for model in models:
        model(torch.randn(8, 3))
    merged = evenorm.merge_statistics(models)
    models[0].load_state_dict(merged, strict=False)
    assert torch.equal(models[0][0].window_var, merged["0.running_var"].expand(2, 3))


def test_a_shared_layer_has_an_entry_under_each_of_its_names():
    layer = nn.BatchNorm1d(3)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    model.load_state_dict(evenorm.merge_statistics([model, model]), strict=False)
    assert {"0.running_mean", "2.running_mean"} <= set(evenorm.merge_statistics([model, model]))


def test_half_precision_is_merged_wide():
    models = [nn.BatchNorm1d(1).half() for _ in range(2)]
    for model, offset in zip(models, (300.0, -300.0), strict=True):  # their squares do not fit into float16
        model.running_mean.fill_(offset)
        model.running_var.fill_(1)
    merged = evenorm.merge_statistics(models, [1, 1e-3])
    assert merged["running_var"].dtype == torch.float16
    models[0].running_mean.fill_(60000)
    models[1].running_mean.fill_(-60000)  # nor does the difference
    assert evenorm.merge_statistics(models, [1, 0])["running_mean"] == 60000
    assert merged["running_var"].item() == pytest.approx(1 + 600**2 * 1e-3 / 1.001**2, rel=1e-3)


def with_value(key: str, value: float) -> dict[str, Tensor]:
    state = network(1).state_dict()
    state[key] = torch.full_like(state[key], value)
    return state


@pytest.mark.parametrize(
    ("models", "weights", "error", "message"),
    [
        ([], None, ValueError, "at least one network"),
        (network(1), None, TypeError, "a list of networks or state_dicts, got one Sequential"),
        (network(1).state_dict(), None, TypeError, "got one OrderedDict"),
        ([network(1), nn.ReLU()], None, ValueError, "^network 1 has no running_mean"),
        ([{"state_dict": network(1).state_dict()}], None, ValueError, "^network 0 has no running_mean"),
        ([network(1), network(1)[:1]], None, ValueError, "networks 0 and 1 differ: one has the layer '2'"),
        ([network(1), nn.ModuleDict({"module": network(1)})], None, ValueError, "prefixes such as 'module.'"),
        ([nn.BatchNorm1d(2), nn.BatchNorm1d(3)], None, ValueError, r"the model has .* shapes: \[\(2,\), \(3,\)\]"),
        ([network(1), with_value("2.running_var", math.nan)], None, ValueError, "2.running_var of network 1 holds"),
        ([network(1)], [1, 2], ValueError, "one entry for each of the 1 networks, got 2"),
        ([network(1)], [-1], ValueError, "0 or more"),
        ([network(1)], [0], ValueError, "not all 0"),
        ([network(1)], [math.nan], ValueError, "0 or more"),
        ([network(1)], [math.inf], ValueError, "finite"),
    ],
)
def test_what_cannot_be_merged_is_refused(models, weights, error, message):
    with pytest.raises(error, match=message):
        evenorm.merge_statistics(models, weights)


def test_statistics_that_overflow_when_merged_are_an_error():
    layers = [nn.BatchNorm1d(2).half() for _ in range(2)]
    layers[0].running_mean.fill_(400)
    layers[1].running_mean.fill_(-400)
    with pytest.raises(ValueError, match=r"running_var reaches 1.6e\+05, which does not fit into torch.float16"):
        evenorm.merge_statistics(layers)
    merged = evenorm.merge_statistics([layer.float() for layer in layers])
    torch.testing.assert_close(merged["running_var"], torch.full((2,), 160_001.0))
