"""Folding batch norm away: the same answers in float64 by a second route, and the reason where it stays."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import random
import warnings
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_linear_bn_eval
from torch.utils import _pytree as pytree

import evenorm
from evenorm.layers import Layer
from evenorm.models import affine, certificate
from evenorm.models import fold as fold_module
from networks_of_people import NETWORKS, shake_, trained

EXACT = 1e-12  # relative, in float64


def folds(folded: evenorm.Folded) -> dict[str, str]:
    return {fold.layer: fold.into for fold in folded.certificate.folds}


def refusals(folded: evenorm.Folded) -> dict[str, str]:
    return {refusal.layer: refusal.reason for refusal in folded.certificate.refusals}


def ready(*layers: nn.Module) -> nn.Sequential:
    """Return a Sequential in evaluation, in float64, whose batch norm has parameters and statistics of its own."""
    model = nn.Sequential(*layers).double().eval()
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            shake_(layer)
    return model


def state(model: nn.Module) -> list[object]:
    return [
        (name, id(module), type(module), module.training, sorted(vars(module)))
        for name, module in model.named_modules()
    ] + [(name, id(tensor), tensor.tolist()) for name, tensor in model.state_dict(keep_vars=True).items()]


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_people_compute_the_same(name):
    model, x = trained(name)
    model, x = model.double(), x.double()
    before = state(model)
    randoms = random.getstate(), torch.get_rng_state().tolist()
    expected = pytree.tree_leaves(model(x))
    folded = evenorm.fold(model, x, tolerance=EXACT)
    assert state(model) == before
    assert randoms == (random.getstate(), torch.get_rng_state().tolist())
    torch.testing.assert_close(pytree.tree_leaves(folded.model(x)), expected, rtol=EXACT, atol=EXACT)
    left = {
        name for name, module in folded.model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
    }
    assert left == set(refusals(folded))
    assert left | set(folds(folded)) == {layer.name for layer in evenorm.conversion(model).layers}


def test_what_stays_in_networks_of_people():
    left = {name: refusals(evenorm.fold(*trained(name))) for name in NETWORKS}
    for name in ("resnet", "mobilenet", "unet", "pointnet", "table_mlp", "functional"):
        assert left[name] == {}
    concatenated = "before it stands cat; behind it stands"
    assert {layer: reason.startswith(concatenated) for layer, reason in left["densenet"].items()} == {
        "layers.0.norm1": True,
        "layers.1.norm1": True,
        "layers.2.norm1": True,
        "transition.0": True,
        "norm5": False,
    }
    assert set(left["recurrent"]) == {"norm_in", "norm"}


def conv(dimensions: int, transposed: bool, **options: object) -> tuple[nn.Module, Tensor]:
    name = f"Conv{'Transpose' if transposed else ''}{dimensions}d"
    return getattr(nn, name)(4, 6, 3, **options), torch.randn(2, 4, *(7, 6, 5)[:dimensions], dtype=torch.float64)


BEFORE = {
    "plain": {},
    "no bias": {"bias": False},
    "stride and padding": {"stride": 2, "padding": 1},
    "dilation": {"dilation": 2, "bias": False},
    "groups": {"groups": 2},
}


@pytest.mark.parametrize("case", BEFORE)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("affine", [True, False])
def test_into_the_convolution_before(case, transposed, dimensions, affine):
    layer, x = conv(dimensions, transposed, **BEFORE[case])
    model = ready(layer, getattr(nn, f"BatchNorm{dimensions}d")(6, eps=1e-2, affine=affine), nn.Tanh())
    folded = evenorm.fold(model, x, tolerance=EXACT)
    assert folds(folded) == {"1": "0"}
    assert [type(module) for module in folded.model] == [type(layer), nn.Identity, nn.Tanh]
    torch.testing.assert_close(folded.model(x), model(x), rtol=EXACT, atol=EXACT)


def test_into_a_depthwise_convolution_and_a_linear_layer():
    images, rows = torch.randn(2, 4, 6, 6).double(), torch.randn(8, 4).double()
    for layer in (nn.Conv2d(4, 4, 3, groups=4), nn.ConvTranspose2d(4, 4, 3, groups=4, output_padding=1, stride=2)):
        assert folds(evenorm.fold(ready(layer, nn.BatchNorm2d(4)), images, tolerance=EXACT)) == {"1": "0"}
    for bias in (True, False):
        model = ready(nn.Linear(4, 5, bias=bias), nn.Dropout(), nn.BatchNorm1d(5, affine=bias))
        assert folds(evenorm.fold(model, rows, tolerance=EXACT)) == {"2": "0"}


BEHIND = {
    "linear": (lambda: (nn.BatchNorm1d(4), nn.Linear(4, 5)), (8, 4), "1"),
    "linear, no bias": (lambda: (nn.BatchNorm1d(4, affine=False), nn.Linear(4, 5, bias=False)), (8, 4), "1"),
    "dropout between": (lambda: (nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 5)), (8, 4), "2"),
    "convolution": (lambda: (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, stride=2)), (2, 4, 7, 7), "1"),
    "groups": (lambda: (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2, bias=False)), (2, 4, 7, 7), "1"),
    "depthwise": (lambda: (nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3, groups=4)), (2, 4, 7, 7), "1"),
    "circular": (
        lambda: (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular")),
        (2, 4, 7, 7),
        "1",
    ),
    "valid": (lambda: (nn.BatchNorm1d(4), nn.Conv1d(4, 6, 3, padding="valid")), (2, 4, 7), "1"),
    "same, of width 1": (lambda: (nn.BatchNorm3d(4), nn.Conv3d(4, 6, 1, padding="same")), (2, 4, 3, 3, 3), "1"),
}


@pytest.mark.parametrize("case", BEHIND)
def test_into_the_layer_behind(case):
    make, shape, into = BEHIND[case]
    model, x = ready(*make()), torch.randn(shape, dtype=torch.float64)
    folded = evenorm.fold(model, x, tolerance=EXACT)
    assert folds(folded) == {"0": into}
    torch.testing.assert_close(folded.model(x), model(x), rtol=EXACT, atol=EXACT)


def test_batch_norm_on_batch_norm_goes_all_the_way():
    x = torch.randn(8, 4).double()
    model = ready(nn.BatchNorm1d(4, affine=False), nn.BatchNorm1d(4), nn.Identity(), nn.BatchNorm1d(4))
    folded = evenorm.fold(model, x, tolerance=EXACT)
    assert folds(folded) == {"1": "0", "3": "0"}
    assert folded.model[0].affine
    model = ready(nn.ReLU(), nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.Linear(4, 3), nn.BatchNorm1d(3))
    assert folds(evenorm.fold(model, x, tolerance=EXACT)) == {"2": "1", "4": "3", "1": "3"}


layers = st.lists(
    st.sampled_from(["conv", "grouped", "transposed", "circular", "norm", "plain norm", "relu", "identity"]),
    min_size=1,
    max_size=6,
)


@settings(max_examples=25, deadline=None)
@given(layers, st.integers(0, 2**32 - 1))
def test_folding_keeps_the_function(kinds, seed):
    make = {
        "conv": lambda: nn.Conv2d(4, 4, 2, dilation=2),
        "grouped": lambda: nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False),
        "transposed": lambda: nn.ConvTranspose2d(4, 4, 2, stride=2, groups=2),
        "circular": lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        "norm": lambda: nn.BatchNorm2d(4),
        "plain norm": lambda: nn.BatchNorm2d(4, affine=False),
        "relu": nn.ReLU,
        "identity": nn.Identity,
    }
    torch.manual_seed(seed)
    model = ready(*(make[kind]() for kind in kinds), nn.BatchNorm2d(4))
    x = torch.randn(2, 4, 16, 16).double()
    folded = evenorm.fold(model, x, tolerance=1e-10)
    torch.testing.assert_close(folded.model(x), model(x), rtol=1e-9, atol=1e-9)


# Ours


def test_our_layers_leave_their_activations():
    model = ready(
        nn.Conv2d(3, 4, 3), evenorm.BatchNorm2d(4, activation="relu"),
        nn.Conv2d(4, 4, 3), evenorm.BatchNorm2d(4, activation=nn.LeakyReLU(0.3)),
        nn.Conv2d(4, 4, 3), evenorm.BatchNorm(4, activation="gelu_tanh"),
    )  # fmt: skip
    x = torch.randn(2, 3, 9, 9).double()
    folded = evenorm.fold(model, x, tolerance=EXACT)
    assert [type(layer) for layer in folded.model[1::2]] == [nn.ReLU, nn.LeakyReLU, nn.GELU]
    torch.testing.assert_close(folded.model(x), model(x), rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("name", ["resnet", "unet", "densenet"])
def test_a_converted_network_folds_like_the_plain_one(name, traced):
    model, x = trained(name)
    model, x = model.double(), x.double()
    if traced:
        model = fx.symbolic_trace(model)
    expected = folds(evenorm.fold(model, x, tolerance=EXACT))
    evenorm.convert(model)
    before = str(evenorm.conversion(model))
    folded = evenorm.fold(model, x, tolerance=EXACT)
    assert folds(folded) == expected
    assert str(evenorm.conversion(model)) == before
    still = {layer.name: layer.fused for layer in evenorm.conversion(folded.model).layers}
    assert still == {layer.name: layer.fused for layer in evenorm.conversion(model).layers if layer.name in still}
    if name == "densenet":
        assert still["transition.0"]
        assert folded.model.get_submodule("transition.0").activation == "relu"


def test_frozen_layers_fold_in_training_mode_too():
    model = evenorm.freeze(ready(nn.Linear(3, 4), nn.BatchNorm1d(4))).train()
    assert folds(evenorm.fold(model, torch.randn(8, 3).double(), tolerance=EXACT)) == {"1": "0"}


# What stays


class Calls(nn.Module):
    def __init__(self, call, **modules: nn.Module) -> None:
        super().__init__()
        self.call = call
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.call(self, x)


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Doubled(nn.BatchNorm1d):
    def forward(self, x):
        return 2 * super().forward(x)


def linear_norm(call, **more: nn.Module) -> nn.Sequential:
    return ready(Calls(call, fc=nn.Linear(4, 4), bn=nn.BatchNorm1d(4), **more))


def _hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda *_: None)
    return module


def _parametrized() -> nn.Module:
    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", nn.Tanh())
    return layer


def _weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(nn.Linear(4, 4))


def _training(model: nn.Sequential) -> nn.Sequential:
    model[1].train()
    return model


def _poisoned(model: nn.Sequential) -> nn.Sequential:
    model[1].running_var[0] = float("nan")
    return model


ROWS, SEQUENCES, IMAGES = (8, 4), (8, 4, 4), (2, 4, 7, 7)
STAYS = {
    "shared layer before": (
        lambda: ready(fc := nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), fc),
        ROWS,
        "of its neighbour 0.0: it is used in several places: 0.0, 0.3",
    ),
    "shared batch norm": (
        lambda: ready(nn.Linear(4, 4), b := nn.BatchNorm1d(4), nn.Linear(4, 4), b),
        ROWS,
        "it is used",
    ),
    "called twice": (
        lambda: linear_norm(lambda m, x: m.bn(m.fc(m.fc(x)))),
        ROWS,
        "of its neighbour 0.0.fc: it is called",
    ),
    "read twice": (
        lambda: linear_norm(lambda m, x: m.bn(y := m.fc(x)) + y),
        ROWS,
        "what it reads, fc, is read in 2",
    ),
    "weight read": (
        lambda: linear_norm(lambda m, x: m.bn(m.fc(x)) @ m.fc.weight),
        ROWS,
        "of its neighbour 0.0.fc: a forw",
    ),
    "norm read": (
        lambda: linear_norm(lambda m, x: m.bn(m.fc(x)) * m.bn.weight),
        ROWS,
        "a forward reads its parameters",
    ),
    "function between": (lambda: linear_norm(lambda m, x: m.bn(m.fc(x) * 2)), ROWS, "before it stands mul"),
    "activation between": (
        lambda: ready(nn.Linear(4, 4), nn.ReLU(), nn.BatchNorm1d(4)),
        ROWS,
        "before it stands 0.1",
    ),
    "its own activation": (
        lambda: ready(evenorm.BatchNorm1d(4, activation="relu"), nn.Linear(4, 4)),
        ROWS,
        "before it",
    ),
    "sequences": (
        lambda: ready(nn.Linear(4, 4), nn.BatchNorm1d(4)),
        SEQUENCES,
        "the channels of 0.0 are not dimension 1",
    ),
    "sequences behind": (
        lambda: ready(nn.BatchNorm1d(4), nn.Linear(4, 4)),
        SEQUENCES,
        "before it stands the input of",
    ),
    "no batch dimension": (
        lambda: ready(nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)),
        (4, 4),
        "the channels of 0.0 are not",
    ),
    "padding": (
        lambda: ready(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)),
        IMAGES,
        "before it stands the input of Sequential.forward; behind it, 0.1 pads with zeros",
    ),
    "padding to the same size": (
        lambda: ready(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding="same")),
        IMAGES,
        "before it stands the input of Sequential.forward; behind it, 0.1 pads with zeros",
    ),
    "transposed behind": (
        lambda: ready(nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 4, 2)),
        IMAGES,
        "before it stands the input of Sequential.forward; behind it is the transposed convolution 0.1",
    ),
    "training": (lambda: _training(ready(nn.Linear(4, 4), nn.BatchNorm1d(4))), ROWS, "it is in training mode"),
    "batch statistics": (
        lambda: ready(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)),
        ROWS,
        "it normalises by the batch's own statistics",
    ),
    "nan": (
        lambda: _poisoned(ready(nn.Linear(4, 4), nn.BatchNorm1d(4))),
        ROWS,
        "its statistics or parameters are not",
    ),
    "subclass before": (
        lambda: ready(Doubling(4, 4), nn.BatchNorm1d(4)),
        ROWS,
        "its neighbour 0.0 (Doubling) overrides",
    ),
    "subclass": (lambda: ready(nn.Linear(4, 4), Doubled(4)), ROWS, "it is a test_fold.Doubled"),
    "parametrized": (
        lambda: ready(_parametrized(), nn.BatchNorm1d(4)),
        ROWS,
        "the weight of its neighbour 0.0 is compu",
    ),
    "weight norm": (
        lambda: ready(_weight_norm(), nn.BatchNorm1d(4)),
        ROWS,
        "the weight of its neighbour 0.0 is computed",
    ),
    "hook before": (
        lambda: ready(_hooked(nn.Linear(4, 4)), nn.BatchNorm1d(4)),
        ROWS,
        "a hook looks at its neighbour 0.0",
    ),
    "hook": (
        lambda: ready(nn.Linear(4, 4), _hooked(nn.BatchNorm1d(4))),
        ROWS,
        "a hook looks at what goes in or out",
    ),
    "branch": (
        lambda: linear_norm(lambda m, x: m.bn(m.fc(x)) if x.sum() < 9e9 else x),
        ROWS,
        "Calls.forward does not call it in every mode",
    ),
    "not reached": (lambda: linear_norm(lambda m, x: m.fc(x)), ROWS, "the example inputs do not reach it"),
}


@pytest.mark.parametrize("case", STAYS)
def test_what_cannot_be_folded_exactly_stays_with_the_reason(case):
    make, shape, reason = STAYS[case]
    torch.manual_seed(0)
    model = nn.Sequential(make()).eval()
    if case == "training":
        model[0][1].train()
    x = torch.randn(shape, dtype=torch.float64)
    folded = evenorm.fold(model, x, tolerance=EXACT)
    assert folds(folded) == {} or case == "shared batch norm"
    found = next(iter(refusals(folded).values()))
    assert found.startswith(reason), found
    reference = copy.deepcopy(model) if case == "training" else model
    torch.testing.assert_close(folded.model(x), reference(x), rtol=EXACT, atol=EXACT, equal_nan=True)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn = nn.Linear(4, 4), evenorm.BatchNorm1d(4, activation="relu")

    def forward(self, x):
        return self.bn(self.fc(x), residual=x)


def test_a_layer_called_with_a_residual_stays():
    folded = evenorm.fold(Residual().eval(), torch.randn(8, 4))
    assert refusals(folded) == {"bn": "it is called with residual"}


def test_layers_that_share_a_weight_are_not_dragged_along():
    model = ready(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4))
    model[3].weight = model[0].weight
    folded = evenorm.fold(model, torch.randn(8, 4).double(), tolerance=EXACT)
    assert folds(folded) == {"1": "0"}
    assert torch.equal(folded.model[3].weight, model[3].weight)


def test_memory_format_and_frozen_weights_are_kept():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)).eval().to(memory_format=torch.channels_last)
    model[0].requires_grad_(False)
    conv = evenorm.fold(model, torch.randn(2, 4, 7, 7)).model[0]
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert not conv.weight.requires_grad
    assert not conv.bias.requires_grad


def test_half_precision_is_cast_once_and_never_overflows():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16)).eval()
    shake_(model[1])
    model.to(torch.bfloat16)
    folded = evenorm.fold(model, torch.randn(8, 16, dtype=torch.bfloat16)).model[0]
    wide = affine.merge_before(copy.deepcopy(model[0]).double(), affine.affine_of(model[1]))
    assert torch.equal(folded.weight, wide.weight.to(torch.bfloat16))
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval().half()
    model[1].running_var.fill_(1e-7)
    model[1].weight.data.fill_(3e4)
    reason = refusals(evenorm.fold(model, torch.zeros(4, 2, dtype=torch.half)))["1"]
    assert reason.startswith("the folded weights do not fit into torch.float16")


# The certificate


class Hiding(nn.Module):
    """Calls its layers by an object that no fold looks into, and so what was folded away once more."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        shake_(self.layers[1])
        self.hidden = SimpleNamespace(layers=list(self.layers))

    def forward(self, x):
        for layer in self.hidden.layers:
            x = layer(x)
        return x


def test_a_network_that_answers_otherwise_is_not_returned(monkeypatch):
    with pytest.raises(ValueError, match="answers differ from the original's by") as error:
        evenorm.fold(Hiding().eval(), torch.randn(8, 4))
    assert "layers.1  folded into layers.0" in str(error.value)
    model, x = trained("functional")
    original = affine.merge_before
    monkeypatch.setattr(
        fold_module, "merge_before", lambda *given: original(*given)._replace(bias=original(*given).bias + 1e-2)
    )
    with pytest.raises(ValueError, match="answers differ"):
        evenorm.fold(model, x)


def test_the_probes_catch_what_the_examples_do_not():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    other = copy.deepcopy(model)
    other[0].weight.data[:, 0] += 1
    x = torch.randn(8, 4)
    x[:, 0] = 0
    x[0, 0], x[1, 0] = 1e-9, -1e-9
    wide = certificate.Inputs((torch.cat([x, torch.ones(8, 1)], 1)[:, :4],), {})
    examples, probes = certificate.compare(model, other, wide)
    assert examples.absolute < 1e-6 < 1e-2 < probes.absolute  # the examples show no more than rounding


def test_the_certificate_tells_what_was_done_in_words_and_as_data():
    model, x = trained("densenet")
    found = evenorm.fold(model, x).certificate
    assert "layers.0.norm2  folded into layers.0.conv1" in str(found)
    assert "norm5           left: before it stands transition.3 (AvgPool2d); behind it stands relu" in str(found)
    assert "largest difference on random probes: " in str(found)
    data = json.loads(json.dumps(dataclasses.asdict(found), allow_nan=False))
    assert data["folds"][0] == {"layer": "layers.0.norm2", "into": "layers.0.conv1"}
    assert 0 <= data["examples"]["relative"] < data["tolerance"] < 1e-3


def test_differences_count_nan_and_infinity_only_where_they_differ():
    nan, inf = float("nan"), float("inf")
    same = torch.tensor([1.0, nan, inf, -inf])
    assert certificate.difference(same, same.clone()) == certificate.Difference(0.0, 0.0)
    assert certificate.difference(same, torch.tensor([1.0, 2.0, inf, -inf])).absolute == inf
    assert certificate.difference(torch.tensor([4.0, 0.0]), torch.tensor([4.0, 1.0])) == certificate.Difference(
        1, 0.25
    )
    assert certificate.difference(torch.zeros(2), torch.zeros(3)).relative == inf


class Described(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.bn, self.fc = nn.Embedding(10, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, tokens, weights=None, *, scale):
        x = self.embedding(tokens).mean(1) * scale
        return {"scores": self.fc(self.bn(x if weights is None else x * weights)), "tokens": tokens}


@pytest.mark.parametrize("optional", [True, False])
def test_any_signature_is_taken(optional):
    model = Described().eval()
    examples = {"tokens": torch.randint(0, 10, (8, 5)), "scale": 2.0}
    if optional:
        examples["weights"] = torch.rand(8, 1)
    assert folds(evenorm.fold(model, examples)) == {"bn": "fc"}


def test_bad_input_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    with pytest.raises(ValueError, match="Sequential has no batch norm to fold"):
        evenorm.fold(nn.Sequential(nn.Linear(4, 4)), torch.randn(8, 4))
    with pytest.raises(TypeError, match=r"example_inputs must be a tensor, a tuple .* got str"):
        evenorm.fold(model, "x")
    with pytest.raises(ValueError, match="does not take the example inputs: RuntimeError: mat1 and mat2"):
        evenorm.fold(model, torch.randn(8, 5))
    with pytest.raises(ValueError, match="tolerance is the largest relative difference"):
        evenorm.fold(model, torch.randn(8, 4), tolerance=-1.0)
    with pytest.raises(ValueError, match="without a floating-point tensor"):
        evenorm.fold(Calls(lambda m, x: m.bn(x).argmax(1), bn=nn.BatchNorm1d(4)).eval(), torch.randn(8, 4))
    with pytest.raises(ValueError, match=r"^0, 1 has not seen any input yet"):
        evenorm.fold(nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d()), torch.randn(8, 4))


class Counting(nn.Module):
    """Remembers what it saw: a forward that leaves something behind."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn, self.calls = nn.Linear(4, 4), nn.BatchNorm1d(4), 0
        self.register_buffer("last", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.last = x.mean()
        return self.bn(self.fc(x)) + torch.rand(())


def test_what_a_forward_leaves_behind_is_in_neither_network():
    model = Counting().eval()
    folded = evenorm.fold(model, torch.randn(8, 4)).model
    assert (model.calls, folded.calls, model.last.item(), folded.last.item()) == (0, 0, 0, 0)
    training = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    folded = evenorm.fold(training, torch.randn(8, 4)).model
    assert training[1].num_batches_tracked == folded[1].num_batches_tracked == 0


# Torch's own tools


def test_torch_rounds_twice_where_ours_rounds_once():
    torch.manual_seed(0)
    linear, norm = nn.Linear(64, 64), nn.BatchNorm1d(64).eval()
    shake_(norm)
    model = nn.Sequential(linear, norm).bfloat16().eval()
    truth = affine.merge_before(copy.deepcopy(linear).double(), affine.affine_of(norm)).weight
    ours = evenorm.fold(model, torch.randn(8, 64).bfloat16()).model[0].weight
    theirs = fuse_linear_bn_eval(linear, norm).weight
    assert (ours - truth).abs().max() < (theirs - truth).abs().max() / 2


def test_torch_answers_otherwise_where_ours_leaves():
    sequences, images = torch.randn(8, 4, 4).double(), torch.randn(2, 4, 7, 7).double()
    model = ready(nn.Linear(4, 4), nn.BatchNorm1d(4))
    assert not torch.allclose(fuse_linear_bn_eval(*model)(sequences), model(sequences))
    torch.testing.assert_close(evenorm.fold(model, sequences).model(sequences), model(sequences))
    model = ready(shared := nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), shared)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing it warns of what it uses itself
        from torch.fx.experimental.optimization import fuse
    assert not torch.allclose(fuse(fx.symbolic_trace(model))(images), model(images))
    torch.testing.assert_close(evenorm.fold(model, images).model(images), model(images))


# Onwards


def plain(model: nn.Module) -> bool:
    return not any(isinstance(module, Layer) for module in model.modules())


@pytest.mark.parametrize("way", ["fold", "revert", "convert"])
@pytest.mark.parametrize("name", ["resnet", "unet", "table_mlp"])
def test_torch_export_answers_the_same(name, way):
    model, x = trained(name)
    expected = model(x)
    exported = torch.export.export(_along(model, x, way), (x,)).module()
    torch.testing.assert_close(exported(x), expected, rtol=1e-4, atol=1e-5)


def _along(model: nn.Module, x: Tensor, way: str) -> nn.Module:
    if way == "fold":
        return evenorm.fold(evenorm.convert(model), x).model
    evenorm.convert(model)
    return evenorm.revert(model) if way == "revert" else model


@pytest.mark.parametrize(("name", "way"), [("unet", "fold"), ("resnet", "revert"), ("mobilenet", "convert")])
@pytest.mark.filterwarnings("ignore")  # of the exporter's own
def test_onnx_answers_the_same(name, way):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed: nothing to export to ONNX with")
    import onnx
    import onnxruntime

    model, x = trained(name)
    expected = model(x)
    file = io.BytesIO()
    torch.onnx.export(_along(model, x, way), (x,), file, dynamo=True, verbose=False)
    assert all(node.op_type != "BatchNormalization" for node in onnx.load_from_string(file.getvalue()).graph.node)
    session = onnxruntime.InferenceSession(file.getvalue())
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-4)


def test_functional_is_still_called_functional():
    """The folded network keeps the user's class and code."""
    model, x = trained("functional")
    folded = evenorm.fold(model, x).model
    assert type(folded) is type(model)
    torch.testing.assert_close(functional.relu(folded.conv(x)), functional.relu(model.bn(model.conv(x))))


class Selecting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hiding = Hiding()

    def forward(self, x):
        return self.hiding(x)[x.sum(1) > 100]


def test_a_comparison_of_nothing_is_no_proof():
    with pytest.raises(ValueError, match="hold no values, so nothing shows"):
        evenorm.fold(Selecting().eval(), torch.randn(8, 4))
    folded = evenorm.fold(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval(), torch.randn(8, 4))
    assert folded.certificate.examples.compared == 24
    assert folded.certificate.probes.compared == 24 * certificate.PROBES


def test_examples_that_another_network_computed_are_examples():
    examples = nn.Linear(4, 4)(torch.randn(8, 4))
    folded = evenorm.fold(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval(), (examples,))
    assert len(folded.certificate.folds) == 1
    assert examples.grad_fn is not None


def test_an_error_of_the_networks_own_says_which():
    class Particular(nn.Sequential):
        def forward(self, x):
            if x.shape[1] != 4:
                raise AssertionError("four columns")
            return super().forward(x)

    model = Particular(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval()
    with pytest.raises(ValueError, match="does not take the example inputs: AssertionError: four columns"):
        evenorm.fold(model, torch.randn(8, 5))
