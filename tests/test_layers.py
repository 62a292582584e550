"""The layers as drop-ins: state, live changes, the tools of torch's ecosystem, and clear errors."""

from __future__ import annotations

import copy
import functools
import math
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.checkpoint import checkpoint

import evenorm
from cases import CASES, Case
from truth import ACTIVATIONS, plain

KEYS = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
PAIRS: list[tuple[type[nn.Module], type[nn.Module], tuple[int, ...]]] = [
    (nn.BatchNorm1d, evenorm.BatchNorm1d, (6, 3)),
    (nn.BatchNorm1d, evenorm.BatchNorm1d, (6, 3, 5)),
    (nn.BatchNorm2d, evenorm.BatchNorm2d, (6, 3, 5, 4)),
    (nn.BatchNorm3d, evenorm.BatchNorm3d, (6, 3, 2, 3, 4)),
]
in_each_pair = pytest.mark.parametrize(
    ("torchs", "ours", "shape"), PAIRS, ids=[f"{ours.__name__}, {len(shape)}-D" for _, ours, shape in PAIRS]
)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def agree(ours: nn.Module, torchs: nn.Module) -> None:
    torch.testing.assert_close(dict(ours.state_dict()), dict(torchs.state_dict()))


def frozen_state(layer: nn.Module) -> list[Tensor]:
    return [tensor.clone() for tensor in [*layer.parameters(), *layer.buffers()]]


def unmoved(layer: nn.Module, before: list[Tensor]) -> bool:
    return all(map(torch.equal, [*layer.parameters(), *layer.buffers()], before))


def network(family: Any, seed: int = 1, **options: Any) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        OrderedDict(
            first=nn.Conv2d(3, 4, 3),
            norm=family.BatchNorm2d(4, **options),
            act=nn.ReLU(),
            flat=nn.Flatten(),
            second=nn.Linear(4 * 9, 5),
            last=family.BatchNorm1d(5, **options),
        )
    )


# One layer, three modes.


@pytest.mark.parametrize("mode", ["train", "eval", "no running statistics"])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize(
    "name", ["2-D", "3-D", "4-D, channels_last", "5-D", "6-D", "4-D, offset 1e4", "2-D, sliced"]
)
def test_a_layer_in_every_mode(name: str, activation: str | None, mode: str) -> None:
    case = CASES[name]
    layer = evenorm.BatchNorm(case.shape[1], activation=activation, track_running_stats="no" not in mode)
    state = case.state()
    with torch.no_grad():
        layer.weight.copy_(state.weight)
        layer.bias.copy_(state.bias)
        if layer.track_running_stats:
            layer.running_mean.copy_(state.running_mean)
            layer.running_var.copy_(state.running_var)
    layer.train(mode == "train")
    fixed = (state.running_mean.double(), state.running_var.double()) if mode == "eval" else None
    x, residual = case.make().requires_grad_(), case.noise(1).requires_grad_()
    leaves = [x, *layer.parameters(), residual]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    y = layer(x, residual=residual)
    true = plain(*wide[:3], fixed=fixed, residual=wide[3], activation=activation)
    torch.testing.assert_close(y, true.float(), rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(y, leaves, case.noise(2))
    expected = torch.autograd.grad(true, wide, case.noise(2).double())
    for ours, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, wanted.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name] + [nn.Softplus(), nn.LeakyReLU(0.2)])
def test_an_activation_is_that_of_the_module_behind(activation: str | nn.Module) -> None:
    x = noise(6, 3, 5)
    behind = activation if isinstance(activation, nn.Module) else ACTIVATIONS[activation]
    for training in (True, False):
        fused = evenorm.BatchNorm1d(3, activation=activation).train(training)
        torch.testing.assert_close(fused(x), behind(nn.BatchNorm1d(3).train(training)(x)))


# What tools look for.


@in_each_pair
def test_layers_are_torchs_to_isinstance(
    torchs: type[nn.Module], ours: type[nn.Module], shape: tuple[int, ...]
) -> None:
    layer = ours(3)
    assert isinstance(layer, torchs)
    assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
    assert isinstance(evenorm.BatchNorm(3), nn.modules.batchnorm._BatchNorm)
    assert not isinstance(layer, nn.SyncBatchNorm)  # which DDP refuses on a CPU
    assert layer._version == torchs(3)._version == 2
    assert list(layer.state_dict()) == KEYS
    assert list(evenorm.BatchNorm(3).state_dict()) == KEYS


@in_each_pair
def test_lazy_layers_become_ours(torchs: type[nn.Module], ours: type[nn.Module], shape: tuple[int, ...]) -> None:
    lazy = getattr(evenorm, f"Lazy{ours.__name__}")(activation="relu", average=evenorm.Window(2))
    assert lazy(noise(*shape)).min() == 0
    assert type(lazy) is ours
    assert lazy.num_features == 3
    assert lazy.window_mean.shape == (2, 3)


@pytest.mark.parametrize("missing", [True, False])
def test_checkpoints_of_version_1_have_no_counter(missing: bool) -> None:
    """As torch: a missing counter keeps the one that is there, or starts at 0, if the layer had counted."""
    trained = nn.BatchNorm1d(3)
    trained(noise(6, 3))
    layers = [evenorm.BatchNorm1d(3), nn.BatchNorm1d(3)]
    for layer in layers:
        layer(noise(6, 3, seed=1))
        checkpoint = trained.state_dict()
        if missing:
            del checkpoint["num_batches_tracked"]
            checkpoint._metadata[""]["version"] = 1
        layer.load_state_dict(checkpoint, strict=True)
    agree(*layers)


def test_a_checkpoint_of_version_2_must_be_complete() -> None:
    for layer in (evenorm.BatchNorm1d(3), nn.BatchNorm1d(3)):
        checkpoint = nn.BatchNorm1d(3).state_dict()
        del checkpoint["num_batches_tracked"]
        with pytest.raises(RuntimeError, match="Missing key"):
            layer.load_state_dict(checkpoint)


def test_repr_is_torchs_with_ours_appended() -> None:
    line = "BatchNorm2d(8, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True"
    if "bias=" not in repr(nn.BatchNorm2d(8)):
        line = line.replace(", bias=True", "")
    assert repr(evenorm.BatchNorm2d(8)) == repr(nn.BatchNorm2d(8)) == f"{line})"
    assert repr(evenorm.BatchNorm2d(8, activation="relu")) == f"{line}, activation=relu)"
    window = evenorm.BatchNorm2d(8, activation="silu", average=evenorm.Window(5))
    assert repr(window) == f"{line}, activation=silu, average=Window(size=5))"


def test_initialisation_leaves_torchs_random_numbers_alone() -> None:
    torch.manual_seed(3)
    nn.BatchNorm2d(4)
    expected = torch.rand(2)
    torch.manual_seed(3)
    evenorm.BatchNorm2d(4)(noise(2, 4, 3, 3))
    assert torch.equal(torch.rand(2), expected)


def test_update_bn_works_unchanged() -> None:
    batches = [noise(size, 3, 5, 5, seed=size) for size in (8, 8, 5)]
    networks = [network(evenorm), network(nn)]
    for net in networks:
        net(noise(4, 3, 5, 5))
        update_bn(batches, net)
        assert net.norm.momentum == 0.1
        assert net.norm.num_batches_tracked == 3
    agree(*networks)


def test_averaged_models_work_unchanged() -> None:
    networks = [network(evenorm), network(nn)]
    averaged = [AveragedModel(net, use_buffers=True) for net in networks]
    for step in range(3):
        for net, average in zip(networks, averaged, strict=True):
            net(noise(4, 3, 5, 5, seed=step))
            average.update_parameters(net)
    agree(*averaged)


def test_torchs_own_fusion_takes_our_layers() -> None:
    net = network(evenorm)
    net(noise(8, 3, 5, 5))
    net.eval()
    fused = fuse_conv_bn_eval(net.first, net.norm)
    x = noise(2, 3, 5, 5, seed=9)
    torch.testing.assert_close(fused(x), net.norm(net.first(x)), rtol=1e-4, atol=1e-5)


def test_training_a_network_is_torchs_step_for_step() -> None:
    networks = [network(evenorm), network(nn)]
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9) for net in networks]
    labels = torch.arange(8) % 5
    for step in range(5):
        for net, optimizer in zip(networks, optimizers, strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(noise(8, 3, 5, 5, seed=step)), labels).backward()
            optimizer.step()
    agree(*networks)


# Live changes.


def _set(**values: Any) -> Callable[[nn.Module], None]:
    def change(layer: nn.Module) -> None:
        for name, value in values.items():
            setattr(layer, name, copy.deepcopy(value))

    return change


LIVE: dict[str, Callable[[nn.Module], Any]] = {
    "momentum": _set(momentum=0.7),
    "momentum None": _set(momentum=None),
    "eps": _set(eps=0.5),
    "eval": lambda layer: layer.eval(),
    "training": _set(training=False),
    "track_running_stats": _set(track_running_stats=False),
    "track_running_stats in eval": _set(track_running_stats=False, training=False),
    "buffers None": _set(running_mean=None, running_var=None),
    "buffers None in eval": _set(running_mean=None, running_var=None, training=False),
    "no counter": _set(num_batches_tracked=None),
    "no counter, momentum None": _set(num_batches_tracked=None, momentum=None),
    "buffers replaced": _set(running_mean=torch.ones(3), running_var=torch.full((3,), 4.0)),
    "counter replaced": _set(num_batches_tracked=torch.tensor(40), momentum=None),
    "counter in int32": _set(num_batches_tracked=torch.tensor(40, dtype=torch.int32)),
    "counter in uint8, momentum None": _set(num_batches_tracked=torch.tensor(40, dtype=torch.uint8), momentum=None),
    "counter in float32": _set(num_batches_tracked=torch.tensor(40.0)),
    "parameters replaced": _set(weight=nn.Parameter(torch.tensor([1.0, -2.0, 0.0]))),
    "no bias": _set(bias=None),
    "no weight": _set(weight=None),
    "not affine": _set(weight=None, bias=None),
    "reset_running_stats": lambda layer: layer.reset_running_stats(),
    "reset_parameters": lambda layer: layer.reset_parameters(),
    "requires_grad": lambda layer: layer.requires_grad_(False),
    "double": lambda layer: layer.double(),
}


@pytest.mark.parametrize("change", LIVE.values(), ids=LIVE)
@in_each_pair
def test_live_changes_take_effect_as_in_torch(
    torchs: type[nn.Module], ours: type[nn.Module], shape: tuple[int, ...], change: Callable[[nn.Module], Any]
) -> None:
    results = []
    for layer in (ours(3), torchs(3)):
        layer(noise(*shape))
        change(layer)
        dtype = next((t.dtype for t in layer.parameters()), torch.float32)
        x = noise(*shape, seed=1).to(dtype).requires_grad_()
        y = layer(x)
        gradients = torch.autograd.grad(y, x, noise(*shape, seed=2).to(dtype))
        state = dict(layer.state_dict())
        if layer.running_mean is None:
            state.pop("num_batches_tracked")  # torch counts on; ours counts what entered the statistics
        results.append((y, gradients, state))
    torch.testing.assert_close(results[0], results[1])


def test_an_activation_and_an_average_can_be_set_on_a_live_layer() -> None:
    layer, x = evenorm.BatchNorm1d(3), noise(6, 3)
    layer.activation = "relu"
    torch.testing.assert_close(layer(x), nn.BatchNorm1d(3)(x).relu())
    layer.reset_running_stats()
    layer.average = evenorm.Cumulative()
    layer(x)
    torch.testing.assert_close(layer.running_mean, x.mean(0))


# Buffers and modes of autograd.


def test_buffers_are_moved_in_place_and_only_in_training() -> None:
    """Who holds a layer's buffers, as DDP and graph captures do, goes on holding them."""
    layer, x = evenorm.BatchNorm1d(3), noise(6, 3)
    held = dict(layer.named_buffers())
    before = frozen_state(layer)
    layer.eval()
    layer(x)
    with torch.inference_mode():
        layer(x)
    assert unmoved(layer, before)
    layer.train()
    layer(x)
    assert all(buffer is held[name] for name, buffer in layer.named_buffers())
    assert not torch.equal(held["running_mean"], before[2])


def test_two_forwards_then_one_backward() -> None:
    """Between them the buffers are overwritten, as DDP's broadcast does."""
    layer, x = evenorm.BatchNorm1d(3, activation="silu"), noise(6, 3)
    for training in (True, False):
        layer.train(training)
        expected = torch.autograd.grad((layer(x) * noise(6, 3, seed=1)).sum(), layer.weight)[0]
        reference = layer(x) * noise(6, 3, seed=1)
        for buffer in layer.buffers():
            buffer.copy_(torch.full_like(buffer, 7))
        layer(2 * x)
        torch.testing.assert_close(torch.autograd.grad(reference.sum(), layer.weight)[0], expected)
        layer.reset_running_stats()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("average", [None, evenorm.Cumulative(), evenorm.Window(3)], ids=str)
def test_recomputation_leaves_the_statistics_alone(reentrant: bool, average: Any) -> None:
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), evenorm.BatchNorm1d(4, activation="relu", average=average))
        for step in range(3):
            x = noise(6, 3, seed=step).requires_grad_()
            y = checkpoint(net, x, use_reentrant=reentrant) if recompute else net(x)
            (y * noise(6, 4, seed=9)).sum().backward()
        gradients = [parameter.grad for parameter in net.parameters()]
        results.append([x.grad, *gradients, *net.state_dict().values()])
    assert all(map(torch.equal, *results))


def test_a_forward_inside_a_backward_is_a_recomputation() -> None:
    layer, x, seen = evenorm.BatchNorm1d(3), noise(6, 3).requires_grad_(), []
    x.register_hook(lambda gradient: seen.append(layer(x.detach())))
    layer(x).sum().backward()
    assert len(seen) == layer.num_batches_tracked == 1


def test_nan_leaves_the_other_channels_as_they_were() -> None:
    layer, clean = evenorm.BatchNorm2d(3), evenorm.BatchNorm2d(3)
    x = noise(4, 3, 5, 5)
    for bad in (math.nan, math.inf):
        spoiled = x.clone()
        spoiled[1, 1, 2, 2] = bad
        y, expected = layer(spoiled), clean(x)
        assert y[:, 1].isnan().all()
        assert torch.equal(y[:, [0, 2]], expected[:, [0, 2]])
    assert torch.equal(layer.running_mean[[0, 2]], clean.running_mean[[0, 2]])
    assert (layer.running_mean[1], layer.running_var[1]) == (0, 1)
    assert layer.num_batches_tracked == 2


@in_each_pair
def test_an_empty_batch(torchs: type[nn.Module], ours: type[nn.Module], shape: tuple[int, ...]) -> None:
    for training in (True, False):
        layer = ours(3, activation="relu").train(training)
        before = frozen_state(layer)
        x = torch.zeros(0, *shape[1:], requires_grad=True)
        y = layer(x, mask=torch.zeros(0, *shape[2:], dtype=torch.bool))
        assert y.shape == x.shape
        y.sum().backward()
        assert x.grad is not None
        assert x.grad.shape == x.shape
        assert not layer.weight.grad.any()
        assert not layer.bias.grad.any()
        assert unmoved(layer, before)


# Precision.


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_input_with_float32_parameters(dtype: torch.dtype, training: bool) -> None:
    x = noise(6, 3, 5, 4).to(dtype).requires_grad_()
    results = []
    for layer in (evenorm.BatchNorm2d(3).train(training), nn.BatchNorm2d(3).train(training)):
        y = layer(x)
        gradients = torch.autograd.grad(y, [x, *layer.parameters()], noise(6, 3, 5, 4, seed=1).to(dtype))
        assert [t.dtype for t in (y, *gradients)] == [dtype, dtype, torch.float32, torch.float32]
        results.append([y, *gradients, *layer.state_dict().values()])
    torch.testing.assert_close(results[0], results[1], rtol=0.02, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_torchs_dtypes(dtype: torch.dtype) -> None:
    results = []
    for net in (network(evenorm), network(nn)):
        seen = []
        for module in net:
            module.register_forward_hook(lambda module, given, y, seen=seen: seen.append(y.dtype))
        with torch.autocast("cpu", dtype=dtype):
            y = net(noise(8, 3, 5, 5))
        y.float().square().sum().backward()
        results.append((seen, y, [parameter.grad for parameter in net.parameters()]))
    assert results[0][0] == results[1][0]
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0.05, atol=0.05)
    assert all(gradient.dtype == torch.float32 for gradient in results[0][2])


# Transforms, compilation, export.


def test_functional_calls_and_ensembles() -> None:
    layers = [evenorm.BatchNorm1d(3, activation="silu").eval() for _ in range(3)]
    for seed, layer in enumerate(layers):
        layer.running_mean.copy_(noise(3, seed=seed))
        nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(seed))
    parameters, buffers = torch.func.stack_module_state(layers)
    x = noise(6, 3)

    def call(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return functional_call(layers[0], (parameters, buffers), (x,))

    found = torch.func.vmap(call)(parameters, buffers)
    torch.testing.assert_close(found, torch.stack([layer(x) for layer in layers]))


def test_torchs_patch_for_per_sample_gradients_finds_our_layers() -> None:
    net = network(evenorm)
    torch.func.replace_all_batch_norm_modules_(net)
    assert net.norm.running_mean is None
    parameters = {name: parameter.detach() for name, parameter in net.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(net, parameters, (x,)).square().mean()

    x = noise(3, 4, 3, 5, 5)
    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    expected = [torch.func.grad(loss)(parameters, sample) for sample in x]
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, torch.stack([each[name] for each in expected]), rtol=1e-3, atol=1e-5)


COMPILED: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum None": {"momentum": None},
    "relu": {"activation": "relu"},
    "window": {"average": evenorm.Window(2), "activation": "silu"},
    "debias": {"average": evenorm.Exponential(0.2, debias=True)},
    "module": {"activation": nn.Softplus()},
}


def compiled_and_eager(options: dict[str, Any], training: bool, backend: str, more: bool) -> list[list[Tensor]]:
    torch._dynamo.reset()
    results = []
    for compiled in (True, False):
        layer = evenorm.BatchNorm2d(3, **options).train(training)
        call = torch.compile(layer, fullgraph=True, backend=backend) if compiled else layer
        for step in range(3):
            x = noise(4, 3, 5, 5, seed=step).requires_grad_()
            extra: dict[str, Tensor] = {}
            if more:
                extra = {"residual": noise(4, 3, 5, 5, seed=7), "mask": noise(4, 5, 5, seed=8) > 0}
            y = call(x, **extra)
            gradients = torch.autograd.grad(y, [x, *layer.parameters()], noise(4, 3, 5, 5, seed=9))
        results.append([y, *gradients, *layer.state_dict().values()])
    return results


# Torch's compiler imports modules that announce their own deprecation.
compiles = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@compiles
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("options", COMPILED.values(), ids=COMPILED)
def test_compiled_without_a_graph_break(options: dict[str, Any], training: bool) -> None:
    torch.testing.assert_close(*compiled_and_eager(options, training, "aot_eager", more=False))


@compiles
def test_compiled_with_residual_and_mask() -> None:
    torch.testing.assert_close(*compiled_and_eager({"activation": "relu"}, True, "aot_eager", more=True))


@compiles
def test_compiled_by_inductor() -> None:
    torch.testing.assert_close(*compiled_and_eager({"activation": "relu"}, True, "inductor", more=False))


@compiles
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_exported(training: bool) -> None:
    net = network(evenorm, activation="relu").train(training)
    x = noise(4, 3, 5, 5)
    program = torch.export.export(copy.deepcopy(net), (x,)).module()
    for step in range(2):
        torch.testing.assert_close(program(x * (step + 1)), net(x * (step + 1)))
    torch.testing.assert_close(dict(program.named_buffers())["norm.running_mean"], net.norm.running_mean)


# Errors, before any work.

BAD: dict[str, tuple[type[nn.Module], tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "1-D to 1d": (evenorm.BatchNorm1d, (noise(3),), {}, ValueError, "expected 2D or 3D input (got 1D input)"),
    "3-D to 2d": (evenorm.BatchNorm2d, (noise(2, 3, 4),), {}, ValueError, "expected 4D input (got 3D input)"),
    "4-D to 3d": (evenorm.BatchNorm3d, (noise(2, 3, 4, 4),), {}, ValueError, "expected 5D input (got 4D input)"),
    "1-D": (
        evenorm.BatchNorm,
        (noise(3),),
        {},
        ValueError,
        "expected 2D or higher input (got 1D input): (N, C, *positions)",
    ),
    "channels": (
        evenorm.BatchNorm2d,
        (noise(2, 4, 3, 3),),
        {},
        ValueError,
        "running_mean should contain 4 elements not 3",
    ),
    "integers": (
        evenorm.BatchNorm1d,
        (torch.ones(4, 3, dtype=torch.int32),),
        {},
        TypeError,
        "expected a floating-point tensor, got torch.int32; convert it first, e.g. x.float()",
    ),
    "one value": (
        evenorm.BatchNorm2d,
        (noise(1, 3, 1, 1),),
        {},
        ValueError,
        "Expected more than 1 value per channel when training, got input size torch.Size([1, 3, 1, 1])",
    ),
    "one value, no statistics": (
        functools.partial(evenorm.BatchNorm1d, track_running_stats=False),
        (noise(1, 3),),
        {},
        ValueError,
        "Expected more than 1 value per channel when training, got input size torch.Size([1, 3]); there are no",
    ),
    "residual": (
        evenorm.BatchNorm1d,
        (noise(4, 3),),
        {"residual": noise(4, 1)},
        ValueError,
        "residual must have x's shape (4, 3), got (4, 1)",
    ),
    "mask's shape": (
        evenorm.BatchNorm1d,
        (noise(4, 3),),
        {"mask": torch.ones(4, 3, dtype=torch.bool)},
        ValueError,
        "mask must have shape (4,) for x (4, 3), got (4, 3)",
    ),
    "mask's dtype": (
        evenorm.BatchNorm1d,
        (noise(4, 3),),
        {"mask": torch.ones(4, dtype=torch.uint8)},
        ValueError,
        "mask must be bool, True where a position is valid; got torch.uint8",
    ),
}


@pytest.mark.parametrize(("kind", "given", "options", "error", "text"), BAD.values(), ids=BAD)
def test_bad_input(
    kind: type[nn.Module], given: tuple[Any, ...], options: dict[str, Any], error: type[Exception], text: str
) -> None:
    layer = kind(3)
    before, state = frozen_state(layer), torch.get_rng_state()
    with pytest.raises(error, match=f"^{re.escape(text)}"):
        layer(*given, **options)
    assert unmoved(layer, before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_a_vector_of_integers(name: str, training: bool) -> None:
    layer = evenorm.BatchNorm1d(3).train(training)
    integers = torch.ones(3, dtype=torch.int32)
    setattr(layer, name, integers if name.startswith("running") else nn.Parameter(integers, requires_grad=False))
    text = rf"^{name} must be a floating-point tensor of shape \(C,\) or None, got torch.int32"
    with pytest.raises(TypeError, match=text):
        layer(noise(4, 3))
    assert layer.num_batches_tracked == 0


def test_bad_options() -> None:
    with pytest.raises(ValueError, match=r"^activation must be one of relu, .* or an nn\.Module, got 'reluu'$"):
        evenorm.BatchNorm1d(3, activation="reluu")
    with pytest.raises(TypeError, match=r"^activation must be a name, an nn\.Module or None, got int$"):
        evenorm.LazyBatchNorm1d(activation=3)
    with pytest.raises(TypeError):
        evenorm.BatchNorm1d(3, 1e-5, 0.1, True, True, None, None, "relu")  # ours are keyword-only


def test_a_layer_with_half_of_its_statistics() -> None:
    layer = evenorm.BatchNorm1d(3).eval()
    layer.running_var = None
    with pytest.raises(ValueError, match=r"^running_mean and running_var must either both be None or neither"):
        layer(noise(4, 3))


def test_one_value_per_channel_is_fine_without_training() -> None:
    case = Case("", (1, 3))
    assert evenorm.BatchNorm1d(3).eval()(case.make()).shape == (1, 3)
