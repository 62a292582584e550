"""The layer that the report takes apart: its numbers are the network's, and it is trained once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn", reason="the lab needs the extra evenorm[lab]")

from evenorm.lab import layer_training
from evenorm.lab.layer_page import LayerView
from evenorm.lab.layer_training import stored_layer, take_apart, trained_layer
from evenorm.lab.networks import Sigmoid, perceptron
from evenorm.lab.store import Store
from evenorm.lab.trials import Record, Trial


def network_with_a_past() -> torch.nn.Sequential:
    network = perceptron(1, (4, 5, 7, 2), Sigmoid, normalise=True)
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data.normal_(generator=generator)
    network.train()
    network(torch.randn(1, 4, 50, generator=generator))
    return network


def test_standardising_scaling_and_shifting_give_what_the_network_gives() -> None:
    network, x = network_with_a_past(), torch.randn(1, 4, 30, generator=torch.Generator().manual_seed(1))
    view = LayerView(**take_apart(network, x))
    pre = torch.tensor(view.pre_activations)
    scaled = view.gamma * (pre - view.mean) / view.std + view.beta
    network.eval()
    layers = list(network)[:5]  # linear, batch norm, sigmoid, linear, batch norm
    expected = x
    for layer in layers:
        expected = layer(expected)
    unit = int(view.name.split("unit ")[1].split()[0]) - 1
    torch.testing.assert_close(scaled, expected[0, unit], rtol=1e-5, atol=1e-5)


def test_the_unit_has_the_median_gamma() -> None:
    network = network_with_a_past()
    view = LayerView(**take_apart(network, torch.randn(1, 4, 30)))
    weights = sorted(network[4].layer.weight.tolist())
    assert view.gamma == pytest.approx(weights[3], rel=1e-6)


def test_it_is_trained_once_and_then_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[Trial] = []

    def train(trial: Trial) -> Record:
        trained.append(trial)
        return take_apart(network_with_a_past(), torch.randn(1, 4, 30))

    monkeypatch.setattr(layer_training, "train", train)
    assert stored_layer(Store(tmp_path)) is None
    first = trained_layer(Store(tmp_path))
    assert trained_layer(Store(tmp_path)) == first
    assert stored_layer(Store(tmp_path)) == first
    assert trained == [layer_training.TRIAL]


def test_the_real_one_is_a_layer_that_has_learned() -> None:
    view = LayerView(**layer_training.train(layer_training.TRIAL))
    assert len(view.pre_activations) == 360
    assert view.gamma > 1.1
