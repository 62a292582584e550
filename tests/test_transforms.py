"""What torch does to networks: transforms, compilation, export, workers' wrappers, and moves between dtypes."""

from __future__ import annotations

import contextlib
import copy
import io
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call, functionalize, grad, jacrev, jvp, stack_module_state, vmap
from torch.nn.parallel import DistributedDataParallel

import evenorm
from evenorm import Cumulative, Exponential, Renorm, Window

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "activation": {"activation": "silu"},
    "activation, a module": {"activation": nn.Softplus()},
    "debiased": {"average": Exponential(0.3, debias=True)},
    "cumulative": {"average": Cumulative()},
    "momentum=None": {"momentum": None},
    "window": {"average": Window(2)},
    "virtual": {"virtual_batch_size": 3},
    "renorm": {"renorm": Renorm(start=0, r_steps=4, d_steps=2)},
    "raise": {"on_nonfinite": "raise"},
    "propagate": {"on_nonfinite": "propagate"},
    "population": {"on_single": "population"},
    "no affine": {"affine": False},
    "no bias": {"bias": False},
    "no statistics": {"track_running_stats": False},
    "all at once": {
        "activation": "gelu",
        "average": Window(2),
        "virtual_batch_size": 3,
        "renorm": Renorm(start=0, r_steps=4, d_steps=2),
        "on_nonfinite": "raise",
        "on_single": "population",
    },
}
EVERY_OPTION = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
# Torch's own complaints about itself, while it traces.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated"),
]


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def layer_of(options: dict[str, Any], dtype: torch.dtype = torch.float32) -> evenorm.BatchNorm:
    layer = evenorm.BatchNorm(3, dtype=dtype, **options)
    generator = torch.Generator().manual_seed(1)
    for parameter in layer.parameters():
        parameter.data.copy_(torch.randn(3, generator=generator))
    return layer


# torch.func.


@EVERY_OPTION
@pytest.mark.parametrize("mode", ["eval", "frozen", "no_update"])
def test_vmap_is_a_loop(mode: str, options: dict[str, Any]) -> None:
    layer = layer_of(options, torch.float64).train(mode != "eval")
    layer(torch.randn(8, 3, 4).double())
    if mode == "frozen" and layer.running_mean is not None:
        evenorm.freeze(layer)
    elif not layer.track_running_stats:
        mode = "eval"  # nothing to update
    before = buffers(layer)
    stack, residuals = torch.randn(2, 4, 6, 3, 5, dtype=torch.float64)
    held = evenorm.no_update(layer) if mode == "no_update" else contextlib.nullcontext()
    with held:
        found = vmap(lambda x, r: layer(x, residual=r))(stack, residuals)
        loop = torch.stack([layer(x, residual=r) for x, r in zip(stack, residuals, strict=True)])
    torch.testing.assert_close(found, loop)
    torch.testing.assert_close(buffers(layer), before, rtol=0, atol=0)


def test_vmap_over_masks_and_over_networks() -> None:
    masks = torch.rand(4, 6, 5) > 0.3
    layers = [layer_of({}, torch.float64) for _ in range(4)]
    x = torch.randn(6, 3, 5, dtype=torch.float64)
    with evenorm.no_update(layers[0]):
        found = vmap(lambda mask: layers[0](x, mask=mask))(masks)
        torch.testing.assert_close(found, torch.stack([layers[0](x, mask=mask) for mask in masks]))
    for number, layer in enumerate(layers):
        layer.weight.data.mul_(number)
        layer(x * number)
        layer.eval()
    parameters, statistics = torch.func.stack_module_state(layers)
    found = vmap(lambda p, b: functional_call(layers[0], (p, b), (x,)))(parameters, statistics)
    torch.testing.assert_close(found, torch.stack([layer(x) for layer in layers]))


@pytest.mark.parametrize("options", [{}, {"average": Window(2)}, {"renorm": OPTIONS["renorm"]["renorm"]}], ids=str)
def test_vmap_trains_an_ensemble(options: dict[str, Any]) -> None:
    layers = [layer_of(options) for _ in range(4)]
    parameters, statistics = torch.func.stack_module_state(layers)
    x = torch.randn(2, 4, 6, 3, 5)
    for part in x:
        found = vmap(lambda p, b, x: functional_call(layers[0], (p, b), (x,)))(parameters, statistics, part)
        expected = [layer(one) for layer, one in zip(copy.deepcopy(layers), part, strict=True)]
        if part is x[0]:
            torch.testing.assert_close(found, torch.stack(expected))
    for layer, ones in zip(layers, x.unbind(1), strict=True):
        for one in ones:
            layer(one)
    torch.testing.assert_close(statistics, torch.func.stack_module_state(layers)[1])


def test_vmap_of_a_training_step_says_what_to_do() -> None:
    layer = evenorm.BatchNorm1d(3)
    with pytest.raises(ValueError, match=r"^vmap cannot update running statistics .*evenorm\.no_update\(model\)"):
        vmap(layer)(torch.randn(4, 6, 3))
    assert layer.num_batches_tracked == 0


@EVERY_OPTION
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_functional_gradients_are_autograds(training: bool, options: dict[str, Any]) -> None:
    layer = layer_of(options, torch.float64)
    layer(torch.randn(8, 3, 4).double())
    layer.train(training)
    x, dy, tangent = torch.randn(3, 6, 3, 5, dtype=torch.float64)
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return (functional_call(layer, parameters, (x,)) * dy).sum()

    with evenorm.no_update(layer):
        found = grad(loss, argnums=(0, 1))(parameters, x)
        per_sample = vmap(grad(loss, argnums=1), in_dims=(None, 0))(parameters, torch.stack([x, 2 * x]))
        _, slope = jvp(lambda x: loss(parameters, x), (x,), (tangent,))
        torch.testing.assert_close(jacrev(loss, argnums=1)(parameters, x), found[1])
        wanted = [x.requires_grad_(), *layer.parameters()]
        expected = torch.autograd.grad(layer(x), wanted, dy)
        doubled = torch.autograd.grad(layer(2 * x), x, dy)[0] / 2
    torch.testing.assert_close((found[1], *found[0].values()), expected)
    torch.testing.assert_close(slope, (expected[0] * tangent).sum())
    torch.testing.assert_close(per_sample, torch.stack([expected[0], doubled]))


def test_raise_looks_at_values_where_a_transform_shows_them() -> None:
    layers = [layer_of({"on_nonfinite": "raise"}) for _ in range(2)]
    layer, x = layers[0], torch.randn(6, 3)
    given = dict(layer.named_buffers())  # as arguments, which is what a training step wants where no engine is
    gradient = grad(lambda x, given: functional_call(layer, given, (x,)).sin().sum())
    plain = layer_of({})
    expected = torch.autograd.grad(plain(x.requires_grad_()).sin().sum(), x)[0]
    torch.testing.assert_close(gradient(x.detach(), given), expected)
    torch.testing.assert_close(given, buffers(plain), rtol=0, atol=0)
    x = x.detach()
    with pytest.raises(ValueError, match=r"^BatchNorm\(3\): the batch holds NaN or inf in channel 0, 1, 2;"):
        gradient(x * torch.nan, given)
    state = stack_module_state(layers)
    with pytest.raises(ValueError, match=r"^BatchNorm\(3\): on_nonfinite='raise' looks at values, which vmap and"):
        vmap(lambda p, b: functional_call(layer, (p, b), (x,)))(*state)
    with pytest.raises(ValueError, match=r"^BatchNorm\(3\): on_nonfinite='raise' looks at values, which vmap and"):
        functionalize(lambda b, x: functional_call(layer, b, (x,)))(dict(layer.named_buffers()), x)


def test_a_functional_step_updates_the_buffers_that_it_is_given() -> None:
    layer, other = layer_of({}), layer_of({})
    x = torch.randn(6, 3)
    given = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    functional_call(layer, (dict(layer.named_parameters()), given), (x,))
    other(x)
    assert layer.num_batches_tracked == 0
    torch.testing.assert_close(given, buffers(other), rtol=0, atol=0)


# torch.compile. One graph without a break proves that nothing asks the host: an `.item()` would break it.


def train(call: Callable[..., Tensor], layer: nn.Module, **more: Tensor) -> list[Tensor]:
    found = []
    for number in range(4):
        generator = torch.Generator().manual_seed(number)
        x, dy = torch.randn(2, 7, 3, 5, generator=generator)
        x.requires_grad_()
        y = call(x, **more)
        found += [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], dy)]
    return found


@EVERY_OPTION
@pytest.mark.parametrize("with_mask", [False, True], ids=["", "masked"])
def test_compiled_in_one_graph(with_mask: bool, options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    more = {}
    if with_mask:
        more = {"mask": torch.rand(7, 5) > 0.3, "residual": torch.randn(7, 3, 5)}
    eager, layer = layer_of(options), layer_of(options)
    # This backend recomputes in the backward what it can, as the default one does, and generates no code.
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager_decomp_partition")
    torch.testing.assert_close(train(compiled, layer, **more), train(eager, eager, **more))
    torch.testing.assert_close(buffers(layer), buffers(eager))
    layer.eval(), eager.eval()
    torch.testing.assert_close(train(compiled, layer, **more), train(eager, eager, **more))
    torch.testing.assert_close(buffers(layer), buffers(eager))


def test_compiled_states_of_a_layer() -> None:
    """frozen, no_update and one_update are seen by what is compiled."""
    torch._dynamo.reset()
    eager, layer = layer_of({}), layer_of({})
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(8, 3)
    for held in (evenorm.no_update, evenorm.one_update):
        for call, its in ((compiled, layer), (eager, eager)):
            with held(its):
                for part in x.split(4):
                    call(part)
        torch.testing.assert_close(buffers(layer), buffers(eager))
    assert layer.num_batches_tracked == 1
    evenorm.freeze(layer), evenorm.freeze(eager)
    torch.testing.assert_close(compiled(x), eager(x))
    assert layer.num_batches_tracked == 1


def test_compiled_code_skips_and_raises() -> None:
    torch._dynamo.reset()
    for on_nonfinite in ("skip", "raise"):
        layer = layer_of({"on_nonfinite": on_nonfinite})
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        compiled(torch.randn(8, 3))
        before, x = buffers(layer), torch.randn(8, 3)
        x[2, 1] = math.nan
        if on_nonfinite == "raise":
            with pytest.raises(ValueError, match=r"^BatchNorm\(3\): the batch holds NaN or inf in channel 1;"):
                compiled(x)
            assert torch.equal(layer.running_mean, before["running_mean"])
        else:
            assert compiled(x)[:, 1].isnan().all()
            changed = layer.running_mean != before["running_mean"]
            assert changed.tolist() == [True, False, True]
            assert layer.nonfinite_batches == 1


@pytest.mark.filterwarnings("ignore")  # the compiler's toolchain may warn of what it likes
def test_compiled_to_machine_code() -> None:
    torch._dynamo.reset()
    eager, layer = layer_of(OPTIONS["all at once"]), layer_of(OPTIONS["all at once"])
    compiled = torch.compile(layer, fullgraph=True)
    torch.testing.assert_close(train(compiled, layer), train(eager, eager))
    torch.testing.assert_close(buffers(layer), buffers(eager))


def test_compiled_for_any_batch_size() -> None:
    torch._dynamo.reset()
    eager, layer = layer_of({}), layer_of({})
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for samples in (4, 9, 30):
        x = torch.randn(samples, 3, 5)
        torch.testing.assert_close(compiled(x), eager(x))
    torch.testing.assert_close(buffers(layer), buffers(eager))


@EVERY_OPTION
def test_a_training_step_asks_nothing_of_the_values(options: dict[str, Any]) -> None:
    """On tensors without values: whatever would wait for a device would fail here. "raise" is meant to ask."""
    if options.get("on_nonfinite") == "raise":
        pytest.skip('on_nonfinite="raise" asks the host, as documented')
    with FakeTensorMode():
        layer = evenorm.BatchNorm(3, **options)
        x, mask = torch.randn(7, 3, 5, requires_grad=True), torch.ones(7, 5, dtype=torch.bool)
        for more in ({}, {"mask": mask}):
            y = layer(x, **more)
            y.backward(torch.randn(7, 3, 5))
        with evenorm.one_update(layer):
            layer(x)
    assert x.grad.shape == x.shape


# torch.export.


@EVERY_OPTION
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
def test_exported_to_plain_operators(with_residual: bool, options: dict[str, Any]) -> None:
    layer = layer_of(options)
    layer(torch.randn(8, 3, 5))
    layer.eval()
    x, residual = torch.randn(2, 4, 3, 5)
    more = {"residual": residual} if with_residual else {}
    program = torch.export.export(layer, (x,), more)
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert all(name.startswith("aten.") for name in operators), operators
    assert ("aten.batch_norm.default" in operators) == layer.track_running_stats  # what other tools know
    torch.testing.assert_close(program.module()(x, **more), layer(x, **more))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    torch.testing.assert_close(torch.export.load(file).module()(x, **more), layer(x, **more))


def test_exported_with_a_mask() -> None:
    layer, x, mask = layer_of({"activation": "relu"}).eval(), torch.randn(4, 3, 5), torch.rand(4, 5) > 0.4
    program = torch.export.export(layer, (x,), {"mask": mask})
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert all(name.startswith("aten.") for name in operators), operators
    torch.testing.assert_close(program.module()(x, mask=mask), layer(x, mask=mask))


# Workers' wrappers, in a world of one.


@pytest.fixture
def _alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_alone")
@EVERY_OPTION
def test_ddp_with_two_forwards_before_one_backward(options: dict[str, Any]) -> None:
    """The second forward broadcasts the buffers again, in place, which must not spoil the first one's backward."""

    def broadcast(model: nn.Module, _: Any) -> None:  # which a world of one leaves out
        for buffer in model.buffers():
            buffer.copy_(buffer.clone())

    plain = nn.Sequential(nn.Conv1d(3, 3, 1), layer_of(options), nn.Conv1d(3, 2, 1))
    wrapped = DistributedDataParallel(copy.deepcopy(plain))
    wrapped.module.register_forward_pre_hook(broadcast)
    for training in (True, False):
        found = []
        for model in (plain.train(training), wrapped.train(training)):
            model.zero_grad()
            generator = torch.Generator().manual_seed(3)
            one, two, dy = (torch.randn(6, size, 5, generator=generator) for size in (3, 3, 2))
            ((model(one) + model(two)) * dy).sum().backward()
            found.append([parameter.grad for parameter in model.parameters()])
        torch.testing.assert_close(found[0], found[1])
        torch.testing.assert_close(buffers(wrapped.module), buffers(plain))


@pytest.mark.usefixtures("_alone")
@pytest.mark.filterwarnings("ignore")  # FSDP2 on CPU speaks of devices that are not there
@EVERY_OPTION
def test_fully_shard(options: dict[str, Any]) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    plain = nn.Sequential(nn.Conv1d(3, 3, 1), layer_of(options), nn.Conv1d(3, 2, 1))
    sharded = copy.deepcopy(plain)
    mesh = init_device_mesh("cpu", (1,))
    fully_shard(sharded[1], mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    assert list(sharded.state_dict()) == list(plain.state_dict())
    for number in range(2):
        x, dy = torch.randn(6, 3, 5), torch.randn(6, 2, 5)
        for model in (plain, sharded):
            model.train(number == 0).zero_grad()
            (model(x) * dy).sum().backward()
        found = [parameter.grad.full_tensor() for parameter in sharded.parameters()]
        torch.testing.assert_close(found, [parameter.grad for parameter in plain.parameters()])
        torch.testing.assert_close(buffers(sharded), buffers(plain))


# Moves between dtypes.


@EVERY_OPTION
@pytest.mark.parametrize("narrow", [torch.half, torch.bfloat16])
def test_narrow_networks_keep_wide_statistics(narrow: torch.dtype, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    wide = layer_of(options)
    for _ in range(3):
        wide(torch.randn(8, 3, 5) * 300 + 1000)
    layer = copy.deepcopy(wide).to(narrow)
    for name, buffer in layer.named_buffers():
        assert buffer.dtype in (torch.float32, torch.int64), name
        assert torch.equal(buffer, dict(wide.named_buffers())[name]), name
    assert all(parameter.dtype == narrow for parameter in layer.parameters())
    if layer.running_var is not None and "average" in options:
        assert (layer.running_var > 65504 / 2).all()
    x = (torch.randn(8, 3, 5) * 300 + 1000).to(narrow)
    before = buffers(layer)
    y = layer(x)
    assert y.dtype == narrow
    assert y.isfinite().all()
    assert all(buffer.isfinite().all() for buffer in layer.buffers())
    if layer.running_mean is not None:
        assert not torch.equal(layer.running_mean, before["running_mean"])
        assert layer.eval()(x).dtype == narrow


def test_a_variance_above_the_largest_half_stays_finite() -> None:
    layer = evenorm.BatchNorm1d(3, momentum=1.0).half()
    x = (torch.randn(64, 3) * 1000).half()
    layer(x)
    assert (layer.running_var > 65504).all()
    assert layer.half().bfloat16().half().running_var.isfinite().all()
    torch.testing.assert_close(layer.running_var, x.float().var(0))
    assert layer.eval()(x).isfinite().all()


def test_constructed_narrow_loaded_narrow_and_moved_wide() -> None:
    assert evenorm.BatchNorm1d(3, dtype=torch.bfloat16).running_var.dtype == torch.float32
    checkpoint = nn.BatchNorm1d(3).half().state_dict()
    for assign in (False, True):
        layer = evenorm.BatchNorm1d(3)
        layer.load_state_dict(checkpoint, assign=assign)
        assert layer.running_var.dtype == torch.float32
    assert layer.double().running_var.dtype == torch.float64
    assert layer.running_var.dtype == torch.float64
    assert layer.bfloat16().running_var.dtype == torch.float32
    assert layer.float().weight.dtype == torch.float32


@EVERY_OPTION
def test_autocast(options: dict[str, Any]) -> None:
    """Batch norm takes what comes, as torch's does: bfloat16 from a convolution, with float32 parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 3, 1), layer_of(options), nn.Conv1d(3, 2, 1))
    wide = copy.deepcopy(model)
    x = torch.randn(16, 3, 5)
    seen = []
    model[1].register_forward_hook(lambda _, args, y: seen.append((args[0].dtype, y.dtype)))
    for training in (True, False):
        model.train(training), wide.train(training)
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        torch.testing.assert_close(y.float(), wide(x), rtol=0.1, atol=0.2)
        y.float().backward(torch.randn(16, 2, 5))
    assert seen == [(torch.bfloat16, torch.bfloat16)] * 2
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    torch.testing.assert_close(buffers(model), buffers(wide), rtol=0.05, atol=0.02)


@EVERY_OPTION
def test_state_survives_files_and_copies(options: dict[str, Any]) -> None:
    layer = layer_of(options)
    batches = torch.randn(6, 8, 3, 5) + 1
    for batch in batches[:3]:
        layer(batch)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    others = {"copy": copy.deepcopy(layer), "loaded": evenorm.BatchNorm(3, **options)}
    others["loaded"].load_state_dict(torch.load(file, weights_only=True))
    others["assigned"] = evenorm.BatchNorm(3, **options)
    others["assigned"].load_state_dict(copy.deepcopy(layer.state_dict()), assign=True)
    lazy = evenorm.LazyBatchNorm1d(**options)
    lazy.load_state_dict(layer.state_dict())
    others["lazy"] = lazy
    for batch in batches[3:]:
        expected = layer(batch)
        for name, other in others.items():
            assert torch.equal(other(batch), expected), name
    for name, other in others.items():
        torch.testing.assert_close(dict(other.state_dict()), dict(layer.state_dict()), rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("lazy", [False, True])
def test_a_window_takes_torchs_checkpoint(lazy: bool, assign: bool) -> None:
    torchs = nn.BatchNorm1d(3)
    torchs(torch.randn(8, 3) + 4)
    layer = evenorm.LazyBatchNorm1d(average=Window(4)) if lazy else evenorm.BatchNorm1d(3, average=Window(4))
    checkpoint = copy.deepcopy(torchs.state_dict())
    layer.load_state_dict(checkpoint, assign=assign)
    assert list(checkpoint) == list(torchs.state_dict())
    batches = torch.randn(4, 8, 3)
    for batch in batches:
        layer(batch)
    torch.testing.assert_close(layer.running_mean, batches.mean((0, 1)))
    assert list(layer.state_dict()) == [*torchs.state_dict(), "window_mean", "window_var"]
