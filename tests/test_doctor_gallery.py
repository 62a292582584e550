"""The doctor names the planted cause of each sick network first, and finds nothing above a note in healthy ones."""

from __future__ import annotations

import copy
import random

import numpy
import pytest
import torch
from torch import nn

import evenorm
from evenorm.doctor.findings import Severity
from evenorm.doctor.measure import scored
from gallery import HEALTHY, SICK, accuracy, admit


def ids(make) -> str:
    return make.__name__


@pytest.mark.parametrize("make", SICK, ids=ids)
def test_the_planted_cause_is_the_first_finding(make):
    patient = admit(make)
    diagnosis = evenorm.diagnose(patient.model, patient.data)
    assert diagnosis.findings[0].code == patient.code
    assert diagnosis.findings[0].severity == Severity.ERROR
    assert not diagnosis.healthy
    assert diagnosis.scores.harmful
    assert diagnosis.summary.startswith(f"eval() loses {round(100 * diagnosis.scores.lost)} points; ")
    explained = sum(found.harm or 0 for found in diagnosis.findings)
    # What exact statistics do not recover is nobody's where it is a few samples, which depends on the processor.
    left = max(0.0, diagnosis.scores.batch - diagnosis.scores.exact) / diagnosis.scores.lost
    assert explained == pytest.approx(1, abs=1e-6) or (
        explained == pytest.approx(1 - left, abs=1e-6) and left < 0.1
    )


@pytest.mark.parametrize("make", SICK, ids=ids)
def test_the_cure_helps(make):
    patient = admit(make)
    before = accuracy(patient.model, patient.data)
    if patient.cure is None:
        evenorm.calibrate(patient.model, patient.data)
        after = accuracy(patient.model, patient.data)
        assert evenorm.diagnose(patient.model, patient.data).scores.harmful is False
    else:
        torch.manual_seed(0)
        after = accuracy(patient.cure(), patient.data)
    assert after > before + 0.03


@pytest.mark.parametrize("make", HEALTHY, ids=ids)
def test_healthy_networks_have_notes_at_most(make):
    patient = admit(make)
    diagnosis = evenorm.diagnose(patient.model, patient.data)
    assert diagnosis.healthy, str(diagnosis)
    assert diagnosis.summary.startswith("eval() loses nothing: nothing is wrong in")
    assert evenorm.diagnose(patient.model).healthy
    assert evenorm.diagnose(patient.model.state_dict()).healthy


def everything(model: nn.Module) -> list:
    """Return what may not change: tensors by their bits, modes, hooks, attributes, random numbers."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    bits = [(name, tensor.detach().numpy().tobytes(), tensor._version, id(tensor)) for name, tensor in tensors]
    modes = [(name, module.training, type(module), sorted(vars(module))) for name, module in model.named_modules()]
    hooks = [
        {key: dict(value) for key, value in vars(module).items() if key.endswith("_hooks")}
        for module in model.modules()
    ]
    plain = [
        {key: value for key, value in vars(module).items() if isinstance(value, int | float | str | None)}
        for module in model.modules()
    ]
    return [bits, modes, hooks, plain]


class Counting(nn.Module):
    """A network that writes into a buffer whenever it runs."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x):
        self.runs += 1
        return self.inner(x) + torch.rand(1)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [SICK[0], SICK[2], SICK[5], HEALTHY[2]], ids=ids)
def test_nothing_in_the_network_changes(make, training):
    patient = admit(make)
    model = patient.model.train(training)
    model.register_forward_hook(lambda module, args, output: None)
    before, generators = everything(model), (torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1])
    evenorm.diagnose(model, patient.data)
    evenorm.diagnose(model)
    assert everything(model) == before
    after = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1]
    assert torch.equal(after[0], generators[0])
    assert after[1] == generators[1]
    assert (after[2] == generators[2]).all()


def test_a_network_that_writes_and_draws_is_put_back():
    patient = admit(HEALTHY[0])
    model = Counting(patient.model).train()
    state, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    evenorm.diagnose(model, patient.data)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)


def test_the_three_scores_are_those_of_three_ways_to_run():
    """Against a route of its own: eval(), calibrate(), and train() with no_update, on the batches scored."""
    patient = admit(SICK[0])
    data = patient.data
    used = [batch for number, batch in enumerate(data) if scored(number)]
    found = evenorm.diagnose(patient.model, data).scores
    assert found.running == pytest.approx(accuracy(patient.model, used))
    with evenorm.no_update(patient.model), torch.no_grad():
        patient.model.train()
        right = sum(int((patient.model(x).argmax(1) == y).sum()) for x, y in used)
    assert found.batch == pytest.approx(right / found.samples)
    evenorm.calibrate(patient.model, data)
    assert found.exact == pytest.approx(accuracy(patient.model, used))
    assert found.samples == sum(len(y) for _, y in used)
