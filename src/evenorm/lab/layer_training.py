"""The layer that the report takes apart: one unit of one trained network, stored as any trial is."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from evenorm.lab.data import digits
from evenorm.lab.layer_page import LayerView
from evenorm.lab.networks import BatchNorm, Sigmoid, initialise_, perceptron
from evenorm.lab.store import Store
from evenorm.lab.training import descend, rounded, test_samples, training_samples
from evenorm.lab.trials import Record, Trial, settings
from evenorm.layers import BatchNorm1d

# The network of `speed` at its best rate; 1000 steps bring it to 97 % test accuracy in two seconds.
TRIAL = Trial("layer", 1, "batch norm", seed=0, rate=0.3, settings=settings(steps=1000))


def trained_layer(store: Store) -> LayerView:
    """Return the layer as stored, training and storing it first where it is not.

    Raises:
        OSError: it is not stored, and the store cannot be written.
    """
    stored = stored_layer(store)
    if stored is not None:
        return stored
    record = train(TRIAL)
    store.prepare([TRIAL.experiment])
    store.save(TRIAL, record)
    return LayerView(**record)


def stored_layer(store: Store) -> LayerView | None:
    """Return the layer as stored, None where it is not: for a report that shall not train."""
    record = store.load(TRIAL)
    return None if record is None else LayerView(**record)


def train(trial: Trial) -> Record:
    """Train 64-100-100-100-10 with batch norm and sigmoids, and look at one unit on the test images."""
    split = digits()
    network = perceptron(1, (64, 100, 100, 100, 10), Sigmoid, normalise=True)
    initialise_(network, [trial.seed], lambda inputs: 0.1)
    for _ in descend(network, training_samples([split]), [trial], batch=60, steps=trial["steps"]):
        pass
    return take_apart(network, test_samples([split]).x)


@torch.no_grad()
def take_apart(network: nn.Sequential, x: Tensor) -> Record:
    """Return what the last batch norm of a network of one member does to x (1, C, N), as `LayerView` takes it.

    The unit is the one whose γ is the median of its layer: chosen by rule, not by eye.
    """
    network.eval()
    last = max(place for place, module in enumerate(network) if isinstance(module, BatchNorm))
    layer = network[last].layer
    assert isinstance(layer, BatchNorm1d)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    gamma = layer.weight
    unit = int((gamma == gamma.median()).nonzero()[0])
    hidden = sum(isinstance(module, BatchNorm) for module in network)
    return {
        "name": f"digits, hidden layer {hidden}, unit {unit + 1} of {len(gamma)}: the one with the median γ",
        "pre_activations": rounded(network[:last](x)[0, unit].tolist()),
        "gamma": rounded(gamma[unit].item()),
        "beta": rounded(layer.bias[unit].item()),
        "mean": rounded(layer.running_mean[unit].item()),
        "std": rounded((layer.running_var[unit] + layer.eps).sqrt().item()),
    }
